"""What is predicted: every kind of target against the dense model of dense_jepa.py, in fp64.

Legend: B images, N patches, C context and M target blocks per image, D width, p patch size.
"""

from dataclasses import replace

import pytest
import torch
from dense_jepa import TARGET_NORM_EPS, DenseJEPA, _layer_norm, elementwise_loss, encode, normalized, randomize_
from model_cases import (
    HEADS,
    PREDICTOR_WIDTH,
    WIDTH,
    assert_equal,
    assert_same_gradients,
    gradients,
    make_encoder,
    make_images,
    make_masks,
    oracle_losses,
    patches_per_image,
)
from test_jepa_padding import poison_ops
from tiny import MODEL, tiny_step

from ijepa_fast.masks.sampler import Masks
from ijepa_fast.model.jepa import IJEPA, Objective
from ijepa_fast.model.vit import Predictor, VisionTransformer
from ijepa_fast.ragged import Ragged

GRID, PATCH = (6, 6), 4

KINDS = {
    "average": Objective(targets="average"),
    "average, raw": Objective(targets="average", normalize_targets=False),
    "pixels, normalised": Objective(targets="pixels"),
    "pixels": Objective(targets="pixels", normalize_targets=False, loss="l2"),
    "features of the block alone": Objective(targets="features_alone"),
    "features of the block alone, raw": Objective(targets="features_alone", normalize_targets=False),
    "average of the block alone": Objective(targets="average_alone"),
}
REGULARISED = {"variance_weight": 0.7, "covariance_weight": 0.3}


class DenseTargets(DenseJEPA):
    """The dense model with the target of one block at a time."""

    objective: Objective

    def wanted(self, image, block):
        """[len(block), K]: what is predicted for a block of image [3, h, w]."""
        if self.objective.targets == "pixels":
            pixels = normalized(image[None], torch.float64)[0]
            corners = [(PATCH * (patch // GRID[1]), PATCH * (patch % GRID[1])) for patch in block]
            rows = [pixels[:, top : top + PATCH, left : left + PATCH].flatten() for top, left in corners]
        elif self.objective.targets.endswith("_alone"):
            rows = list(encode(self.target_encoder, image[None], [block], HEADS)[0])
        else:
            rows = list(self.target_features(image[None])[0, block])
        if self.objective.normalize_targets:
            rows = [_layer_norm(row, TARGET_NORM_EPS) for row in rows]
        if self.objective.averaged:
            rows = [sum(rows) / len(rows)] * len(rows)
        return torch.stack(rows)

    def prediction_loss(self, images, contexts, targets):
        losses = []
        for image, of_image, blocks in zip(images, self.predictions(images, contexts, targets), targets, strict=True):
            for of_context in of_image:
                for block, predicted in zip(blocks, of_context, strict=True):
                    losses.append(elementwise_loss(predicted - self.wanted(image, block), self.kind).mean())
        return torch.stack(losses).mean()


def make_model(objective, **options):
    target_dim = 3 * PATCH**2 if objective.targets == "pixels" else None
    predictor = Predictor(GRID, WIDTH, PREDICTOR_WIDTH, depth=2, num_heads=HEADS, target_dim=target_dim, **options)
    model = IJEPA(make_encoder(PATCH * GRID[0], PATCH, **options), predictor.double(), objective)
    for seed, network in enumerate((model.context_encoder, model.target_encoder, model.predictor)):
        randomize_(network, seed)
    return model


def make_oracle(model):
    networks = (model.context_encoder, model.target_encoder, model.predictor)
    oracle = DenseTargets(*(network.state_dict() for network in networks), HEADS, model.objective.loss)
    oracle.objective = model.objective
    return oracle


def assert_equals_oracle(model, images, masks, **options):
    oracle = make_oracle(model)
    want = oracle_losses(oracle, model.objective, images, *patches_per_image(masks, GRID))
    got, _ = model(images, masks, **options)
    for name, value in zip(got._fields, got, strict=True):
        assert_equal(value, getattr(want, name))
    assert_same_gradients(gradients(model, got.total), oracle.gradients(want.total))


@pytest.mark.parametrize("all_targets", [True, False])
@pytest.mark.parametrize("masks", [{}, {"num_contexts": 2}, {"strategy": "rasterized"}], ids=str)
@pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
def test_loss_and_every_gradient(objective, masks, all_targets):
    objective = replace(objective, **REGULARISED)
    images = make_images(2, GRID)
    assert_equals_oracle(
        make_model(objective), images, make_masks(GRID, 2, padding=3, **masks), all_targets=all_targets
    )


@pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
def test_byte_images(objective):
    assert_equals_oracle(make_model(objective), make_images(2, GRID, dtype=torch.uint8), make_masks(GRID, 2))


@pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
def test_nan_in_padding_rows_reaches_no_gradient(monkeypatch, objective):
    model, images = make_model(replace(objective, **REGULARISED)), make_images(2, GRID)
    exact, padded = make_masks(GRID, 2, num_contexts=2), make_masks(GRID, 2, padding=7, num_contexts=2)
    want, want_pooled = model(images, exact)
    want_gradients = gradients(model, want.total)
    poison_ops(monkeypatch)
    got, pooled = model(images, padded)
    assert_equal(got.total, want.total)
    assert_equal(pooled, want_pooled)
    assert_same_gradients(gradients(model, got.total), want_gradients)


@pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
def test_an_empty_block_adds_nothing(objective):
    model, images = make_model(objective), make_images(2, GRID)
    masks = Masks(Ragged.from_lists([[0, 5], [36, 40]]), Ragged.from_lists([[1, 2, 3], [], [], [36 + 9, 36 + 2]]))
    oracle = make_oracle(model)
    losses = []
    for image, context, block in ((0, [0, 5], [1, 2, 3]), (1, [0, 4], [9, 2])):
        (((predicted,),),) = oracle.predictions(images[image : image + 1], [[context]], [[block]])
        losses.append(elementwise_loss(predicted - oracle.wanted(images[image], block), model.objective.loss).mean())
    assert_equal(model(images, masks)[0].total, sum(losses) / 4)


def test_every_patch_of_a_block_has_one_average():
    """A predictor that gave the average for every patch would be right: the loss of average targets is then 0."""
    objective = Objective(targets="average")
    model, images, masks = make_model(objective), make_images(1, GRID), make_masks(GRID, 1, num_targets=1)
    (block,) = patches_per_image(masks, GRID)[1][0]
    average = make_oracle(model).wanted(images[0], block)[0]
    with torch.no_grad():
        model.predictor.predictor_proj.weight.zero_()
        model.predictor.predictor_proj.bias.copy_(average)
    assert float(model(images, masks)[0].prediction) < 1e-20
    assert float(make_model(Objective())(images, masks)[0].prediction) > 1e-3


@pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
def test_pooled_features_for_monitoring(objective):
    """Those of the target encoder, or of the context encoder where there is none in the objective."""
    model, images, masks = make_model(objective), make_images(2, GRID), make_masks(GRID, 2)
    contexts, targets = patches_per_image(masks, GRID)
    oracle = make_oracle(model)
    if objective.targets == "pixels":
        want = oracle.pooled_context(images, contexts)
    elif objective.targets in ("features", "average"):
        want = oracle.target_features(images).mean(1)
    else:
        blocks = [
            torch.cat([encode(oracle.target_encoder, image[None], [block], HEADS)[0] for block in of_image])
            for image, of_image in zip(images, targets, strict=True)
        ]
        want = torch.stack([features.mean(0) for features in blocks])
    pooled = model(images, masks)[1]
    assert not pooled.requires_grad
    assert_equal(pooled, want.to(pooled.dtype), rtol=1e-6)


def test_pixels_need_no_target_encoder(monkeypatch):
    model = make_model(KINDS["pixels"])
    monkeypatch.setattr(model.target_encoder, "forward", None)
    model(make_images(2, GRID), make_masks(GRID, 2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
def test_training_steps_lower_the_loss(objective, precision):
    """Towards fixed targets, of images with something to predict: a ramp of its own slope in each."""
    step = tiny_step(precision, objective=objective, lr=3e-3)
    step.schedules = replace(step.schedules, lr=3e-3, lr_ends=(3e-3, 1e-6), momentum=(1.0, 1.0))
    ramps = torch.arange(24) * torch.arange(1, 5)[:, None]
    images = ramps[:, None, None].expand(4, 3, 24, 24).to(torch.uint8)
    losses = [float(step(images, number).losses.prediction) for number in range(12)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.slow
@pytest.mark.parametrize("objective", [KINDS["average"], KINDS["pixels"], KINDS["features of the block alone"]])
def test_compiles_into_one_graph(objective):
    model, images, masks = make_model(objective), make_images(2, GRID), make_masks(GRID, 2, padding=4)
    torch.compiler.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(images, masks)[0].total
    assert_equal(got, model(images, masks)[0].total)


def small_parts(target_dim=None):
    encoder = VisionTransformer(16, 4, embed_dim=12, depth=1, num_heads=3)
    return encoder, Predictor((4, 4), 12, 12, depth=1, num_heads=3, target_dim=target_dim)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(targets="tokens"), "targets must be one of features, average, .*pixels, got 'tokens'"),
        (lambda: IJEPA(*small_parts(), Objective(targets="pixels")), "gives width 12, but .* pixels have 48"),
        (lambda: IJEPA(*small_parts(48)), "gives width 48, but .* features have 12"),
    ],
)
def test_errors_name_the_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_configuration_builds_a_predictor_of_the_right_width():
    assert MODEL.build(Objective(targets="pixels")).predictor.predictor_proj.out_features == 48
    assert MODEL.build(Objective(targets="average")).predictor.predictor_proj.out_features == MODEL.embed_dim
