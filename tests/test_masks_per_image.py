"""Several masks per image: each as if it were alone, and together one loss and one pass of the target encoder."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dense_jepa import covariance_term, randomize_, variance_term
from model_cases import (
    WIDTH,
    assert_equal,
    assert_equals_oracle,
    assert_same_gradients,
    gradients,
    make_images,
    make_masks,
    make_model,
    patches_per_image,
)
from test_jepa_targets import GRID, KINDS, REGULARISED
from test_jepa_targets import make_model as make_model_of
from tiny_jepa import images as jepa_images
from tiny_jepa import tiny
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import masks_per_image
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, Masks, MaskSampler
from ijepa_fast.masks.sampling import MAX_PER_IMAGE
from ijepa_fast.model.jepa import Objective, mean_pool
from ijepa_fast.model.vit import Projector, cast_weights
from ijepa_fast.optim.groups import parameter_groups
from ijepa_fast.plots import plot_masks
from ijepa_fast.ragged import Ragged
from ijepa_fast.step.captured import CapturedStep
from ijepa_fast.step.flops import TokenCounts, step_flops
from ijepa_fast.step.train_step import TrainStep
from tests.test_captured import Recorder, assert_same_weights, make
from tests.test_fused import fuse
from tests.tiny import MASKS, MODEL, images, tiny_model, tiny_step

GRID_14 = (14, 14)
CONFIGS = {
    "exact": MaskConfig(num_contexts=2),
    "fixed": MaskConfig(context="fixed"),
    "official": MaskConfig.official(4),
    "random": MaskConfig(strategy="random", size_per="image"),
    "rasterized": MaskConfig(strategy="rasterized"),
}


def single(masks, k):
    """Mask k of every image, as masks with one per image."""

    def of_k(ragged, per_mask):
        sequences = ragged.to_lists()
        masks_of_all = [sequences[s : s + per_mask] for s in range(0, len(sequences), per_mask)]
        return Ragged.from_lists(sum(masks_of_all[k :: masks.per_image], []))

    return Masks(of_k(masks.context, masks.num_contexts), of_k(masks.targets, masks.num_targets), masks.num_contexts)


def as_lists(masks):
    return masks.context.to_lists(), masks.targets.to_lists()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_mask_does_not_depend_on_how_many_there_are(config):
    alone, two, five = (
        MaskSampler(replace(config, per_image=count), GRID_14).sample(8, seed=3, step=9, first_image=4)
        for count in (1, 2, 5)
    )
    assert (five.num_images, five.per_image, five.num_targets) == (8, 5, alone.num_targets)
    assert as_lists(single(five, 0)) == as_lists(alone)
    assert as_lists(single(five, 1)) == as_lists(single(two, 1))
    drawn = [as_lists(single(five, k)) for k in range(5)]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
    for sets in (five.context, five.targets):
        assert not sets.uniform or sets.lengths.eq(sets.max_seqlen).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_patches_that_are_read_are_those_of_all_targets_each_once(config):
    sampler = MaskSampler(replace(config, per_image=3), GRID_14)
    exact = sampler.sample(8, seed=3, step=9)
    padded = sampler.sample(8, seed=3, step=9, round_rows=100)
    blocks = exact.targets.to_lists()
    per_image = len(blocks) // 8
    wanted = [sorted(set(sum(blocks[i * per_image : (i + 1) * per_image], []))) for i in range(8)]
    assert exact.read.to_lists() == padded.read.to_lists() == wanted
    assert exact.read.num_rows == sum(map(len, wanted)) == sampler.counts(8, seed=3, step=9)[2]
    assert padded.read.num_rows == -(-exact.read.num_rows // 100) * 100
    moved = exact.to("meta")
    assert moved.read.device.type == "meta" and moved.tokens == exact.tokens
    assert sampler.sample(8, seed=3, step=9, capacity=(8 * 3 * 2 * 196, 8 * 3 * 4 * 196)).read is None


def test_truncation_is_that_of_the_masks_of_one_number():
    config = MaskConfig.official(4, per_image=3)
    exact = MaskSampler(replace(config, context="exact"), GRID_14).sample(8, seed=3, step=9)
    cut = MaskSampler(config, GRID_14).sample(8, seed=3, step=9)
    for k in range(3):
        whole, got = single(exact, k).context.to_lists(), single(cut, k).context.to_lists()
        for first in (0, 4):
            shortest = min(map(len, whole[first : first + 4]))
            assert got[first : first + 4] == [context[:shortest] for context in whole[first : first + 4]]
    assert not cut.context.uniform and cut.targets.uniform


def test_one_size_per_step_is_that_of_all_masks():
    masks = MaskSampler(MaskConfig(size_per="step", per_image=4), GRID_14).sample(6, seed=1, step=2)
    assert masks.targets.uniform and len(set(masks.targets.lengths.tolist())) == 1


def test_bad_numbers_of_masks_are_refused():
    for count in (0, -1, MAX_PER_IMAGE + 1):
        with pytest.raises(ValueError, match=rf"per_image must be in \[1, 16777216\], got {count}"):
            MaskConfig(per_image=count)
    sampler = MaskSampler(MaskConfig(per_image=MAX_PER_IMAGE), GRID_14)
    with pytest.raises(ValueError, match="4 images of 196 patches with 16777216 masks each are too many for 32-bit"):
        sampler.sample(4, seed=0, step=0)


@pytest.mark.parametrize("all_targets", [True, False])
@pytest.mark.parametrize(
    "config",
    [{"per_image": 3}, {"per_image": 2, "num_contexts": 2}, {"per_image": 2, "context": "batch_min", "group_size": 3}],
    ids=str,
)
def test_loss_and_every_gradient(config, all_targets):
    images, masks = make_images(3, GRID), make_masks(GRID, 3, padding=5, **config)
    assert_equals_oracle(make_model(GRID), images, masks, GRID, all_targets=all_targets)


def test_invariance_is_the_distance_between_masks_of_an_image():
    model = make_model(GRID, Objective(prediction_weight=0.5, **REGULARISED, invariance_weight=2.0))
    assert_equals_oracle(model, make_images(3, GRID), make_masks(GRID, 3, padding=5, per_image=3), GRID)


def test_a_projector_stands_between_pooled_contexts_and_the_terms():
    """Each term written out again over contexts that are encoded mask by mask; the prediction knows nothing of it."""
    model = make_model(GRID, Objective(prediction_weight=0.5, **REGULARISED, invariance_weight=2.0))
    images, masks = make_images(4, GRID), make_masks(GRID, 4, padding=5, per_image=2)
    prediction = model(images, masks)[0].prediction
    projector = model.predictor.projector = Projector(WIDTH, 24).double()
    randomize_(projector, seed=9)
    got, _ = model(images, masks)
    contexts = [single(masks, k).context for k in range(2)]
    pooled = torch.cat([mean_pool(model.context_encoder(images, context), context) for context in contexts])
    hidden = F.linear(pooled, projector.fc1.weight, projector.fc1.bias)
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + projector.norm.eps).sqrt()
    hidden = (hidden * projector.norm.weight + projector.norm.bias).relu()
    z = F.linear(hidden, projector.fc2.weight, projector.fc2.bias).chunk(2)
    assert_equal(got.prediction, prediction)
    assert_equal(got.variance, sum(variance_term(part, 1.0, 1e-4) for part in z) / 2)
    assert_equal(got.covariance, sum(map(covariance_term, z)) / 2)
    assert_equal(got.invariance, (z[0] - z[1]).square().mean())
    got.total.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in projector.fc2.parameters())
    assert model.context_encoder.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_a_projector_stays_in_fp32_and_is_trained_and_saved():
    torch.manual_seed(0)
    objective = Objective(variance_weight=1.0, covariance_weight=0.1)
    model = replace(MODEL, projector_dim=24).build(objective)
    torch.manual_seed(0)
    others = MODEL.build(objective).state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())
    cast_weights(model, torch.bfloat16)
    projector = model.predictor.projector
    assert {p.dtype for p in projector.parameters()} == {torch.float32}
    names = {name for name in model.state_dict() if "projector" in name}
    assert names == {f"predictor.projector.{name}" for name in projector.state_dict()} and len(names) == 6
    trained = {id(p) for group in parameter_groups(model) for p in group["params"]}
    assert all(id(p) in trained for p in projector.parameters())


@pytest.mark.parametrize("all_targets", [True, False])
@pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
def test_loss_and_gradients_are_the_mean_over_single_masks(objective, all_targets):
    """In fp64, whatever is predicted and however it is regularised."""
    objective = replace(objective, **REGULARISED)
    model, images = make_model_of(objective), make_images(3, GRID)
    masks = make_masks(GRID, 3, padding=4, per_image=3)
    alone = [model(images, single(masks, k), all_targets=all_targets) for k in range(3)]
    losses, pooled = model(images, masks, all_targets=all_targets)
    for got, *wanted in zip(losses, *(losses for losses, _ in alone), strict=True):
        assert_equal(got, sum(wanted) / 3)
    if objective.targets == "pixels" or (all_targets and not objective.targets.endswith("_alone")):
        torch.testing.assert_close(pooled, sum(features for _, features in alone) / 3)
    assert pooled.shape[0] == 3
    wanted = [gradients(model, losses.total) for losses, _ in alone]
    mean = {name: sum(of_mask[name] for of_mask in wanted) / 3 for name in wanted[0]}
    assert_same_gradients(gradients(model, losses.total), mean)


@pytest.mark.parametrize("objective", [Objective(), Objective(targets="average")])
def test_the_last_target_block_computes_each_patch_once(objective):
    """A patch in several blocks is one row; and where no union is known, every target row is one."""
    model, images = make_model_of(objective), make_images(3, GRID)
    masks = make_masks(GRID, 3, padding=2, per_image=2, num_targets=2)
    counted = []
    model.target_encoder.norm.register_forward_hook(lambda _, inputs, out: counted.append(len(out)))
    want, got, without = (
        model(images, some, all_targets=every)[0]
        for some, every in ((masks, True), (masks, False), (replace(masks, read=None), False))
    )
    assert counted == [3 * 36, masks.read.num_rows, masks.targets.num_rows]
    assert counted[1] < counted[2] < counted[0]
    for name in want._fields:
        assert_equal(getattr(got, name), getattr(want, name))
        assert_equal(getattr(without, name), getattr(want, name))


def test_every_image_goes_through_the_target_encoder_once():
    model, seen = make_model(GRID), []
    model.target_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model(make_images(3, GRID), make_masks(GRID, 3, per_image=4))
    assert seen == [3]


@pytest.mark.parametrize("config", [MASKS, MaskConfig.official(4, min_keep=1)], ids=["exact", "official"])
def test_accumulated_micro_batches_equal_the_large_batch(config):
    config = replace(config, per_image=3)
    whole, parts = tiny_step(masks=config), tiny_step(masks=config, accumulate=2)
    for number in range(2):
        a, b = whole(images(number), number), parts(images(number), number)
        torch.testing.assert_close(a.losses.total, b.losses.total, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
        assert a.tokens == b.tokens and a.pooled.shape == b.pooled.shape == (8, 16)


def test_a_captured_step_equals_the_eager_one():
    graphs, config = Recorder(), replace(MASKS, per_image=2)
    captured, eager = make(CapturedStep, config, round_rows=256, graphs=graphs), make(TrainStep, config, 256)
    for number in range(6):
        got, want = captured(images(number), number), eager(images(number), number)
        assert torch.equal(got.losses.total, want.losses.total) and got.tokens == want.tokens
    assert graphs.replayed
    assert_same_weights(captured, eager)


@pytest.mark.parametrize("all_targets", [True, False])
def test_counted_flops_are_the_closed_form(all_targets):
    masks = MaskSampler(replace(MASKS, per_image=3), (6, 6)).sample(4, seed=0, step=0)
    with FlopCounterMode(display=False) as counter:
        tiny_model()(images(0, 4), masks, all_targets=all_targets)[0].total.backward()
    want = step_flops(MODEL, TokenCounts.of(masks), all_targets=all_targets).total
    pooling = 0 if all_targets else 2 * 4 * masks.read.num_rows * MODEL.embed_dim  # a product of its own
    assert counter.get_total_flops() == pytest.approx(4 * want + pooling, rel=1e-9)


def test_jepa_model_takes_the_number_in_its_masks():
    model = tiny(masks={"per_image": 3})
    masks = model.draw_masks(jepa_images())
    assert masks.per_image == 3
    loss, metrics = model(jepa_images(), masks)
    alone = [model(jepa_images(), single(masks, k))[0] for k in range(3)]
    torch.testing.assert_close(loss, sum(alone) / 3)
    assert int(metrics["tokens"]) == sum(masks.tokens)


def test_patches_stay_on_their_image():
    masks = MaskSampler(MaskConfig(per_image=3, num_contexts=2), (8, 11)).sample(5, seed=0, step=0)
    patches_per_image(masks, (8, 11))


def test_steps_with_several_masks_are_timed_per_mask_and_checked_first(monkeypatch):
    model = ModelConfig(56, 4, embed_dim=24, depth=1, num_heads=2, predictor_embed_dim=16, predictor_depth=1)
    call = (model, 2, MaskConfig(), (1, 3), torch.device("cpu"), "fp32", 2, 1)
    found = masks_per_image.compare(*call)
    assert list(found) == ["1", "3"] and found["1"]["gain"] == found["1"]["cpu_gain"] == 1
    three = found["3"]
    assert three["ms_per_image_and_mask"] == pytest.approx(three["ms"] / 6) and len(three["ms_of_rounds"]) == 2
    assert three["useful_gflops_per_image_and_mask"] < 0.9 * found["1"]["useful_gflops_per_image_and_mask"]
    assert "3 masks per image" in masks_per_image.text(found)
    monkeypatch.setattr(masks_per_image, "alone", lambda masks, k: single(masks, 0))
    with pytest.raises(ValueError, match="the loss with 3 masks per image is .* from the mean over single ones"):
        masks_per_image.compare(*call)


def test_fused_and_compiled_blocks_give_the_same_loss():
    """With a block of each network: tracing takes seconds for every one of them."""
    masks = MaskSampler(replace(MASKS, per_image=2), (6, 6)).sample(8, seed=0, step=0)

    def model():
        torch.manual_seed(0)
        return replace(MODEL, depth=1, predictor_depth=1).build(Objective())

    compiled = torch.compile(model(), backend="eager", fullgraph=True)
    for all_targets, others in ((True, [fuse(model())]), (False, [fuse(model()), compiled])):
        want = model()(images(0), masks, all_targets=all_targets)[0].total.detach()
        for other in others:
            loss = other(images(0), masks, all_targets=all_targets)[0].total.detach()
            torch.testing.assert_close(loss, want)


def test_sheets_have_a_row_for_every_mask():
    masks = MaskSampler(replace(MASKS, per_image=3), (6, 6)).sample(4, seed=0, step=0)
    figure = plot_masks(images(0, 2), masks, (6, 6))
    captions = [text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_text"))]
    lengths = sum(zip(masks.context.lengths.tolist(), *masks.targets.lengths.view(-1, 4).T.tolist(), strict=True), ())
    assert [text for text in captions if "patches" in text] == [f"{count} patches" for count in lengths[: 2 * 3 * 5]]
