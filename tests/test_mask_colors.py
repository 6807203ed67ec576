"""Contexts seen through colours that are drawn for each mask: the draw, the pixels, and everywhere the step goes."""

from dataclasses import replace

import pytest
import torch
from model_cases import make_images, make_masks, make_model
from tiny_jepa import images as jepa_images
from tiny_jepa import tiny

from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.philox import Stream, random_words
from ijepa_fast.step.captured import CapturedStep
from ijepa_fast.step.train_step import TrainStep
from tests.test_captured import Recorder, assert_same_weights, make
from tests.test_fused import fuse
from tests.tiny import MASKS, MODEL, images, tiny_step

GRID = (6, 5)
COLORED = MaskConfig(min_keep=4, per_image=3, color_jitter=0.3)


def drawn(config=COLORED, channels=3, **where):
    return MaskSampler(config, (14, 14), channels=channels).sample(4, **{"seed": 1, "step": 2, **where}).colors


def test_colours_are_what_their_definition_says():
    colors = drawn(channels=5, first_image=8)
    assert colors.shape == (12, 2, 5) and colors.dtype == torch.float32
    for image, k, channel in ((0, 0, 0), (1, 2, 1), (3, 1, 4)):
        words = random_words(1, Stream.MASK_COLOR | k << 8, 2, 8 + image, channel // 2)
        u, v = ((words[2 * (channel % 2) + i] >> 8) / 2**23 - 1 for i in (0, 1))
        gain, shift = colors[image * 3 + k, :, channel].tolist()
        assert gain == pytest.approx(1 + 0.3 * u, rel=1e-6) and shift == pytest.approx(0.3 * v, rel=1e-6, abs=1e-9)


def test_a_colour_belongs_to_seed_step_image_and_mask_alone():
    whole = drawn()
    assert torch.equal(drawn(first_image=2)[:6], whole[6:])
    assert torch.equal(drawn(replace(COLORED, per_image=1)), whole[::3])
    assert torch.equal(drawn(step=torch.tensor(2)), whole) and not torch.equal(drawn(step=3), whole)
    assert len(whole.flatten(1).unique(dim=0)) == 12


def test_colours_are_spread_evenly():
    sampler = MaskSampler(replace(COLORED, color_jitter=1.0), (14, 14))
    values = sampler.sample(2000, seed=0, step=0).colors - torch.tensor([1.0, 0.0])[:, None]
    assert values.abs().max() <= 1 and values.mean((0, 2)).abs().max() < 0.02
    assert (values.std((0, 2)) - 3**-0.5).abs().max() < 0.01


def test_without_jitter_there_are_none():
    assert drawn(MaskConfig()) is None


@pytest.mark.parametrize("jitter", [-0.1, 1.1, float("nan")])
def test_bad_strengths_are_refused(jitter):
    with pytest.raises(ValueError, match=f"color_jitter must be in .* got {jitter}"):
        MaskConfig(color_jitter=jitter)


@pytest.mark.parametrize("num_contexts", [1, 2])
@pytest.mark.parametrize("padding", [0, 7])
def test_a_context_of_changed_colours_is_that_of_a_changed_image(num_contexts, padding):
    """And targets are those of the image as it is."""
    model, pixels = make_model(GRID), make_images(2, GRID)
    masks = make_masks(GRID, 2, padding, per_image=2, num_contexts=num_contexts, color_jitter=0.5)
    got, plain = model.predict(pixels, masks), model.predict(pixels, replace(masks, colors=None))
    assert torch.equal(got.targets, plain.targets)
    mask_of_row = masks.context.sequence_ids() // num_contexts
    for mask in range(4):
        gain, shift = masks.colors[mask].double()[..., None, None]
        want = model.predict(pixels * gain + shift, replace(masks, colors=None)).context
        rows = mask_of_row == mask
        torch.testing.assert_close(got.context[rows], want[rows], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(got.context[rows], plain.context[rows])
    assert not got.context[~masks.context.valid].any()


def test_micro_batches_and_captured_steps_see_the_same_colours():
    config = replace(MASKS, per_image=2, color_jitter=0.3)
    whole, parts = tiny_step(masks=config), tiny_step(masks=config, accumulate=2)
    plain = tiny_step(masks=replace(config, color_jitter=0.0))
    for number in range(2):
        a, b, c = (step(images(number), number) for step in (whole, parts, plain))
        torch.testing.assert_close(a.losses.total, b.losses.total, rtol=1e-5, atol=0)
        assert a.grad_norm != c.grad_norm
    graphs = Recorder()
    captured, eager = make(CapturedStep, config, round_rows=256, graphs=graphs), make(TrainStep, config, 256)
    for number in range(6):
        got, want = captured(images(number), number), eager(images(number), number)
        assert torch.equal(got.losses.total, want.losses.total)
    assert graphs.replayed
    assert_same_weights(captured, eager)


def test_fused_and_compiled_blocks_see_them_too():
    masks = MaskSampler(replace(MASKS, per_image=2, color_jitter=0.3), (6, 6)).sample(8, seed=0, step=0)

    def model():
        torch.manual_seed(0)
        return replace(MODEL, depth=1, predictor_depth=1).build(Objective())

    want = model()(images(0), masks)[0].total.detach()
    for other in (fuse(model()), torch.compile(model(), backend="eager", fullgraph=True)):
        torch.testing.assert_close(other(images(0), masks)[0].total.detach(), want)


def test_jepa_model_takes_them_in_its_masks():
    model = tiny(masks={"color_jitter": 0.5})
    masks = model.draw_masks(jepa_images())
    assert masks.colors.shape == (len(jepa_images()), 2, 3)
    seen, plain = (model.predict(jepa_images(), m).context for m in (masks, replace(masks, colors=None)))
    assert not torch.allclose(seen, plain)


def test_jepa_model_trains_a_projector():
    weights = {"variance_weight": 2.5, "covariance_weight": 0.1, "invariance_weight": 1.25}
    model = tiny(masks={"per_image": 2, "color_jitter": 0.3}, projector_dim=24, **weights)
    optimizer = torch.optim.AdamW(model.parameters())
    before = model.predictor.projector.fc2.weight.detach().clone()
    loss, metrics = model(jepa_images())
    loss.backward()
    optimizer.step()
    assert metrics["invariance_loss"] > 0 and not torch.equal(model.predictor.projector.fc2.weight, before)
    with pytest.raises(ValueError, match="projector_dim must be at least 1, got 0"):
        tiny(projector_dim=0, **weights)


def test_masks_move_with_their_colours():
    assert make_masks(GRID, 2, color_jitter=0.5).to("meta").colors.device.type == "meta"
