"""The whole objective against the dense, one-image-at-a-time I-JEPA of dense_jepa.py, in fp64.

Legend: B images, N patches, C context and M target blocks per image, D width.
"""

import copy
from dataclasses import replace

import pytest
import torch
from dense_jepa import (
    TARGET_NORM_EPS,
    elementwise_loss,
    encode,
    predict,
)
from model_cases import (
    HEADS,
    WIDTH,
    assert_equal,
    assert_equals_oracle,
    assert_same_gradients,
    gradients,
    make_images,
    make_masks,
    make_model,
    make_oracle,
    oracle_losses,
    patches_per_image,
)

from ijepa_fast.attention.dispatch import BACKENDS, Preference
from ijepa_fast.config import ModelConfig, RunConfig
from ijepa_fast.masks.sampler import Masks
from ijepa_fast.model import vit
from ijepa_fast.model.jepa import IJEPA, Objective, mean_pool, variance_covariance
from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.model.vit import Predictor, VisionTransformer, cast_weights
from ijepa_fast.ragged import Ragged

# Equivalence


MASKS = {
    "exact": {},
    "exact, sizes per step": {"size_per": "step"},
    "fixed": {"context": "fixed", "mask_ratio": 0.75},
    "batch_min": {"context": "batch_min", "group_size": 3},
    "official": {"context": "batch_min", "group_size": 3, "size_per": "step", "draw_last_row_col": False},
    "two contexts": {"num_contexts": 2},
    "two contexts, fixed": {"num_contexts": 2, "context": "fixed", "mask_ratio": 0.75},
    "one target, overlap": {"num_targets": 1, "allow_overlap": True},
}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("config", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("grid", [(6, 6), (4, 9)])
def test_loss_and_every_gradient(grid, config, padding):
    assert_equals_oracle(make_model(grid), make_images(3, grid), make_masks(grid, 3, padding, **config), grid)


OBJECTIVES = {
    "l1": Objective(loss="l1"),
    "l2": Objective(loss="l2"),
    "raw targets": Objective(normalize_targets=False, loss="l2"),
    "variance and covariance": Objective(variance_weight=0.7, covariance_weight=0.3),
    "variance alone": Objective(variance_weight=2.0, prediction_weight=0.0),
    "weighted": Objective(prediction_weight=0.25, covariance_weight=0.1),
}


@pytest.mark.parametrize("all_targets", [True, False])
@pytest.mark.parametrize("num_contexts", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives(objective, num_contexts, all_targets):
    grid = (6, 6)
    masks = make_masks(grid, 3, padding=3, num_contexts=num_contexts)
    assert_equals_oracle(make_model(grid, objective), make_images(3, grid), masks, grid, all_targets=all_targets)


def test_smooth_l1_sees_both_sides_of_its_bend():
    """Or else the tests above would not tell smooth-L1 from L1 or L2."""
    grid = (6, 6)
    model, images, masks = make_model(grid), make_images(3, grid), make_masks(grid, 3)
    contexts, targets = patches_per_image(masks, grid)
    oracle = make_oracle(model)
    predicted = torch.cat([rows for image in oracle.predictions(images, contexts, targets) for rows in image[0]])
    assert 0.1 < (predicted.abs() < 1).double().mean() < 0.9


@pytest.mark.parametrize(
    ("targets", "all_targets", "whole"), [("features", 1, 2), ("features", 0, 1), ("features_alone", 1, 0)]
)
def test_whole_images_can_have_an_attention_of_their_own(monkeypatch, targets, all_targets, whole):
    """``whole``: how many of the target encoder's two blocks compute all rows of all images."""
    grid, objective, uniform = (6, 6), Objective(targets=targets), []
    images, masks = make_images(3, grid), make_masks(grid, 3)
    model = make_model(grid, objective, attention="reference")
    want = model(images, masks, all_targets=bool(all_targets))[0].total
    rows = Preference(("sdpa",), uniform=True), Preference(("reference",))
    monkeypatch.setattr("ijepa_fast.attention.dispatch.PRIORITY", rows)
    for network in (model.context_encoder, model.target_encoder, model.predictor):
        network.use_attention("auto")
    assert BACKENDS["sdpa"].reason() is None
    attend = BACKENDS["sdpa"].attend
    monkeypatch.setattr(BACKENDS["sdpa"], "attend", lambda *a: uniform.append(a[-1]) or attend(*a))
    assert_equal(model(images, masks, all_targets=bool(all_targets))[0].total, want)
    assert uniform == [True] * whole


def test_attention_must_be_a_backend():
    with pytest.raises(ValueError, match="must be one of auto, .*got 'dense'"):
        make_model((6, 6)).context_encoder.use_attention("dense")


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
@pytest.mark.parametrize(
    "images_dtype",
    [
        torch.uint8,
        torch.float64,
    ],
)
@pytest.mark.parametrize("patch_size", [2, 7])
def test_backends_image_types_and_odd_patches(patch_size, images_dtype, backend):
    grid = (5, 6)
    model = make_model(grid, patch_size=patch_size, attention=backend)
    images = make_images(2, grid, patch_size, images_dtype)
    assert_equals_oracle(model, images, make_masks(grid, 2, padding=2), grid)


def uniform_masks(grid, batch, context_length=8, target_length=4, num_targets=3, num_contexts=1):
    """Sets of equal sizes that promise to be so, which dense code may use."""
    num_patches = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)

    def blocks(per_image, length):
        rows = [
            torch.randperm(num_patches, generator=generator)[:length] + b * num_patches
            for b in range(batch)
            for _ in range(per_image)
        ]
        packed = Ragged.full(batch * per_image, length)
        return replace(packed, indices=torch.cat(rows).int())

    return Masks(blocks(num_contexts, context_length), blocks(num_targets, target_length), num_contexts)


@pytest.mark.parametrize("all_targets", [True, False])
@pytest.mark.parametrize("num_contexts", [1, 2])
def test_uniform_sets(num_contexts, all_targets):
    grid = (4, 6)
    masks = uniform_masks(grid, 3, num_contexts=num_contexts)
    assert predictor_layout(masks.context, masks.targets, num_contexts, 3).tokens.uniform
    assert_equals_oracle(make_model(grid), make_images(3, grid), masks, grid, all_targets=all_targets)


@pytest.mark.parametrize("padding", [0, 4])
def test_features_and_predictions(padding):
    grid = (6, 6)
    model, images, masks = make_model(grid), make_images(3, grid), make_masks(grid, 3, padding, num_contexts=2)
    contexts, targets = patches_per_image(masks, grid)
    oracle = make_oracle(model)

    context = model.context_encoder(images, masks.context)
    want = torch.cat([rows for image in oracle.context_features(images, contexts) for rows in image])
    assert_equal(context[: len(want)], want)
    assert context[len(want) :].eq(0).all() and len(context) == len(want) + padding

    assert_equal(model.target_encoder(images), oracle.target_features(images))

    layout = predictor_layout(masks.context, masks.targets, 2, 4)
    prediction = model.predictor(context, layout)
    blocks = [
        rows for image in oracle.predictions(images, contexts, targets) for of_context in image for rows in of_context
    ]
    want = torch.cat(blocks)
    assert_equal(prediction[: len(want)], want)
    # Each context of an image predicts every target row, also the padding.
    assert prediction[len(want) :].eq(0).all() and len(prediction) == len(want) + 2 * 2 * padding
    assert layout.predicted.lengths.tolist() == [len(rows) for rows in blocks]


@pytest.mark.parametrize("padding", [0, 4])
def test_all_targets_false_gives_the_same_loss_and_gradients(padding):
    grid = (6, 6)
    model, images, masks = make_model(grid), make_images(3, grid), make_masks(grid, 3, padding)
    every, pooled_every = model(images, masks)
    read, pooled_read = model(images, masks, all_targets=False)
    assert_equal(read.total, every.total)
    assert_same_gradients(gradients(model, read.total), gradients(model, every.total))

    features = make_oracle(model).target_features(images)
    assert_equal(pooled_every, features.mean(1).to(pooled_every.dtype), rtol=1e-6)
    _, targets = patches_per_image(masks, grid)
    read_rows = [features[b, sum(blocks, [])].mean(0) for b, blocks in enumerate(targets)]
    assert_equal(pooled_read, torch.stack(read_rows).to(pooled_read.dtype), rtol=1e-6)
    assert not pooled_every.requires_grad and not pooled_read.requires_grad


def test_images_of_another_size_than_in_training():
    """Positions come from interpolated tables; the rest is the same."""
    model, grid = make_model((6, 6)), (4, 8)
    images, masks = make_images(2, grid), make_masks(grid, 2)
    got, _ = model(images, masks)
    at_size = make_model(grid)
    for network, other, table in (
        (model.context_encoder, at_size.context_encoder, "pos_embed"),
        (model.target_encoder, at_size.target_encoder, "pos_embed"),
        (model.predictor, at_size.predictor, "predictor_pos_embed"),
    ):
        resized = vit.resize_positions(getattr(network, table)[0], (6, 6), grid)[None]
        other.load_state_dict(network.state_dict() | {table: resized})
    want = oracle_losses(make_oracle(at_size), model.objective, images, *patches_per_image(masks, grid))
    assert_equal(got.total, want.total)


def test_total_alone_carries_the_graph():
    grid = (6, 6)
    model = make_model(grid, Objective(variance_weight=1.0, covariance_weight=1.0))
    losses, _ = model(make_images(2, grid), make_masks(grid, 2))
    assert [value.requires_grad for value in losses] == [True, False, False, False, False]
    losses.total.backward()
    assert all(p.grad is not None for p in [*model.context_encoder.parameters(), *model.predictor.parameters()])
    assert all(p.grad is None and not p.requires_grad for p in model.target_encoder.parameters())


def test_mean_over_blocks_is_exact_over_parts_of_a_batch():
    grid = (6, 6)
    model, images, masks = make_model(grid), make_images(4, grid), make_masks(grid, 4)
    contexts, targets = masks.context.to_lists(), masks.targets.to_lists()
    parts = []
    for first in (0, 2):

        def part(sequences, per_image, first=first):
            own = sequences[first * per_image : (first + 2) * per_image]
            return Ragged.from_lists([[token - first * 36 for token in tokens] for tokens in own])

        losses, _ = model(images[first : first + 2], Masks(part(contexts, 1), part(targets, 4)))
        parts.append(losses.total)
    whole, _ = model(images, masks)
    assert_equal(torch.stack(parts).mean(), whole.total)


def test_empty_blocks():
    """A context or target without patches: nothing is NaN, and an empty target block counts in the mean."""
    grid = (4, 4)
    model, images = make_model(grid), make_images(2, grid)
    contexts, targets = [[0, 5], []], [[1, 2, 3], [], [16 + 4], [16 + 9, 16 + 2]]
    losses, _ = model(images, Masks(Ragged.from_lists(contexts), Ragged.from_lists(targets)))
    oracle = make_oracle(model)
    context = oracle.context_features(images, [[[0, 5]], [[]]])
    wanted = oracle.target_features(images)
    blocks = []
    for image, block in ((0, [1, 2, 3]), (1, [4]), (1, [9, 2])):
        predicted = predict(oracle.predictor, context[image][0], [[0, 5], []][image], block, HEADS)
        normalised = torch.nn.functional.layer_norm(wanted[image, block], (WIDTH,), eps=TARGET_NORM_EPS)
        blocks.append(elementwise_loss(predicted - normalised, "smooth_l1").mean())
    want = torch.stack(blocks).sum() / 4
    assert_equal(losses.total, want)
    assert_same_gradients(gradients(model, losses.total), oracle.gradients(want))


# Parts


@pytest.mark.parametrize("padding", [0, 3])
def test_mean_pool(padding):
    sequences = Ragged.from_lists([[0, 1, 2], [], [3]])
    x = torch.randn(4 + padding, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled = mean_pool(x, sequences.padded(4 + padding))
    assert_equal(pooled, torch.stack([x[:3].mean(0), torch.zeros(5, dtype=torch.float64), x[3]]))
    assert mean_pool(x.bfloat16(), sequences.padded(4 + padding)).dtype == torch.float32


def test_variance_covariance_by_hand():
    """Two dimensions: z = (+-1, +-2), so variances 2 and 8 and covariance 4."""
    z = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    variance, covariance = variance_covariance(z, target_std=3.0, eps=0.25)
    assert float(variance) == pytest.approx(((3 - 2.25**0.5) + (3 - 8.25**0.5)) / 2)
    assert float(covariance) == pytest.approx((4**2 + 4**2) / 2)
    assert float(variance_covariance(z, target_std=1.0, eps=0.25)[0]) == 0
    with pytest.raises(ValueError, match="at least 2 images .* got 1"):
        variance_covariance(z[:1])


def test_target_encoder_starts_as_a_frozen_copy():
    encoder = VisionTransformer(16, 4, embed_dim=12, depth=1, num_heads=3)
    model = IJEPA(encoder, Predictor((4, 4), 12, 12, depth=1, num_heads=3))
    for mine, copied in zip(model.context_encoder.parameters(), model.target_encoder.parameters(), strict=True):
        assert torch.equal(mine, copied) and mine is not copied
        assert mine.requires_grad and not copied.requires_grad


# Precision


def test_bf16_loss_is_within_the_error_of_plain_torch_in_bf16():
    """Smooth-L1 has slope 1 at most, so the loss moves no further than predictions and normalised targets do. Twice
    what they move in the dense model with everything in bf16 is allowed."""
    grid = (6, 6)
    exact, images, masks = make_model(grid), make_images(3, grid), make_masks(grid, 3)
    contexts, targets = patches_per_image(masks, grid)

    def outputs(oracle):
        everything = [range(36)] * 3
        wanted = torch.stack(encode(oracle.target_encoder, images, everything, HEADS)).double()
        wanted = torch.nn.functional.layer_norm(wanted, (WIDTH,), eps=TARGET_NORM_EPS)
        predicted = oracle.predictions(images, contexts, targets)
        return torch.cat([rows for image in predicted for rows in image[0]]).double(), wanted

    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    errors = [
        (plain - want).detach().abs().mean()
        for plain, want in zip(outputs(make_oracle(rounded)), outputs(make_oracle(exact)), strict=True)
    ]
    cast = copy.deepcopy(exact).float()
    cast_weights(cast, torch.bfloat16)
    losses, pooled = cast(images, masks)
    assert losses.total.dtype == losses.prediction.dtype == pooled.dtype == torch.float32
    assert (losses.total - exact(images, masks)[0].total).abs() <= 2 * sum(errors)
    losses.total.backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in cast.predictor.parameters())


def test_fp32_agrees_with_fp64():
    grid = (6, 6)
    exact, images, masks = make_model(grid), make_images(3, grid), make_masks(grid, 3)
    single = copy.deepcopy(exact).float()
    assert_equal(single(images, masks)[0].total.double(), exact(images, masks)[0].total, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    ["sdpa", "auto"],
)
def test_compiles_into_one_graph(backend):
    grid = (6, 6)
    model, images = make_model(grid, attention=backend), make_images(3, grid)
    masks = make_masks(grid, 3, padding=4)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = compiled(images, masks)[0].total, model(images, masks)[0].total
    assert_equal(got, want)
    assert_same_gradients(gradients(model, got), gradients(model, want))


# Errors


def small_model(**options):
    encoder = VisionTransformer(16, 4, embed_dim=12, depth=1, num_heads=3)
    return IJEPA(encoder, Predictor((4, 4), 12, 12, depth=1, num_heads=3), **options)


def masks_of(images, contexts=1, targets=2):
    return Masks(Ragged.full(images * contexts, 3), Ragged.full(images * targets, 2), contexts)


ERRORS = {
    "grids": (
        lambda: IJEPA(VisionTransformer(16, 4, embed_dim=12, depth=1, num_heads=3), Predictor((4, 5), 12, 12, 1, 3)),
        r"\(4, 5\) .* \(4, 4\)",
    ),
    "widths": (
        lambda: IJEPA(VisionTransformer(16, 4, embed_dim=12, depth=1, num_heads=3), Predictor((4, 4), 24, 12, 1, 3)),
        "24.*12",
    ),
    "loss": (lambda: Objective(loss="huber"), "'huber'"),
    "weight": (lambda: Objective(variance_weight=-1.0), "variance_weight .* -1.0"),
    "nan weight": (lambda: Objective(prediction_weight=float("nan")), "prediction_weight .* nan"),
    "one image for a variance": (
        lambda: small_model(objective=Objective(variance_weight=1.0))(torch.zeros(1, 3, 16, 16), masks_of(1)),
        "at least 2 images",
    ),
    "one mask for an invariance": (
        lambda: small_model(objective=Objective(invariance_weight=1.0))(torch.zeros(2, 3, 16, 16), masks_of(2)),
        "invariance_weight 1.0 .*per_image is 1",
    ),
    "a projector without terms": (
        lambda: ModelConfig(img_size=16, patch_size=4, embed_dim=12, num_heads=3, projector_dim=8).build(Objective()),
        "projector of projector_dim .* has nothing to learn from",
    ),
    "one mask in the settings": (lambda: RunConfig(objective=Objective(invariance_weight=0.5)), "per_image is 1"),
}
MASKS_OF_OTHER_IMAGES = {
    "fewer": lambda: small_model()(torch.zeros(4, 3, 16, 16), masks_of(2)),
    "more": lambda: small_model()(torch.zeros(2, 3, 16, 16), masks_of(4)),
    "half, with two contexts": lambda: small_model()(torch.zeros(4, 3, 16, 16), masks_of(2, contexts=2, targets=4)),
}


@pytest.mark.parametrize(("make", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", MASKS_OF_OTHER_IMAGES.values(), ids=MASKS_OF_OTHER_IMAGES)
def test_masks_of_another_number_of_images_are_rejected(make):
    with pytest.raises(ValueError, match="2.*4|4.*2"):
        make()
