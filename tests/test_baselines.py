"""The baselines of the benchmark train the same model: same loss and gradients as the package, in fp64."""

import pytest
import torch
from dense_jepa import randomize_
from model_cases import assert_equal, assert_same_gradients, byte_images, make_masks

from benchmarks.baselines import Eager, draw_masks, mask_lists
from benchmarks.compiled import Compiled, Packed
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, Masks, MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import IMAGENET_MEAN, IMAGENET_STD
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.step.train_step import TrainStep

MODEL = ModelConfig(24, 4, embed_dim=24, depth=2, num_heads=3, predictor_embed_dim=12, predictor_depth=2)
GRID = (6, 6)
SCHEDULES = Schedules(total_steps=20, warmup_steps=2)
OFFICIAL = {"context": "batch_min", "group_size": 4, "size_per": "step", "draw_last_row_col": False}


@pytest.fixture(autouse=True)
def without_compiling():
    """What a compiler makes of the baseline is not under test, and takes minutes."""
    with torch.compiler.set_stance("force_eager"):  # of functions, too, that were decorated when they were imported
        yield


def make_ours():
    torch.manual_seed(0)
    model = MODEL.build(Objective()).double()
    for seed, network in enumerate((model.context_encoder, model.target_encoder, model.predictor)):
        randomize_(network, seed)
    return model


def normalised(images):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.double() / 255 - mean) / std


def named_gradients(model):
    parts = {"encoder": model.context_encoder, "predictor": model.predictor}
    return {f"{part}.{name}": p.grad for part, module in parts.items() for name, p in module.named_parameters()}


def baseline(kind, ours):
    step = kind(MODEL, SCHEDULES).double()
    step.load_state_dict(ours.state_dict())
    return step


def lists(masks: Masks):
    return mask_lists(masks.context, masks.num_contexts, 36), mask_lists(masks.targets, masks.num_targets, 36)


@pytest.mark.parametrize("contexts", [1, 2])
def test_eager_has_our_loss_and_gradients(contexts):
    ours, images, masks = make_ours(), byte_images(4), make_masks(GRID, 4, num_contexts=contexts, **OFFICIAL)
    step = baseline(Eager, ours)
    loss = step.loss(normalised(images), *lists(masks))
    want = ours(images, masks)[0].total
    loss.backward()
    want.backward()
    assert_equal(loss, want)
    assert_same_gradients(named_gradients(step), named_gradients(ours))


@pytest.mark.parametrize("config", [{}, OFFICIAL], ids=["exact", "batch_min"])
def test_compiled_has_our_loss_and_gradients(config):
    ours, images, masks = make_ours(), byte_images(4), make_masks(GRID, 4, **config)
    step = baseline(Compiled, ours)
    loss = step.loss(normalised(images), Packed.of(masks))
    want = ours(images, masks)[0].total
    loss.backward()
    want.backward()
    # Its loss is fp32, as a user's would be.
    assert_equal(loss.double(), want, rtol=1e-6)
    for name, value in named_gradients(ours).items():
        torch.testing.assert_close(named_gradients(step)[name], value, rtol=1e-5, atol=1e-8, msg=name)


def test_whole_steps_of_all_three_agree():
    """Optimizer, schedules and EMA too: the weights of all networks after three steps."""
    ours = make_ours()
    eager, compiled = baseline(Eager, ours), baseline(Compiled, ours)
    optimizer = FusedAdamW(parameter_groups(ours), weight_decay=0.04)
    sampler = MaskSampler(MaskConfig(min_keep=2, **OFFICIAL), GRID)
    step = TrainStep(ours, optimizer, sampler, SCHEDULES, seed=0)
    for number in range(3):
        images, masks = byte_images(4), sampler.sample(4, seed=0, step=number)
        loss = step(images, number).losses.total
        assert eager(normalised(images), lists(masks), number) == pytest.approx(float(loss), rel=1e-6)
        assert float(compiled(normalised(images), Packed.of(masks), number)) == pytest.approx(float(loss), rel=1e-6)
    for other in (eager, compiled):
        state = other.state_dict()
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_draw_masks_follows_the_published_procedure():
    contexts, targets = draw_masks(16, (14, 14), torch.Generator().manual_seed(0))
    (context,) = contexts
    assert len(targets) == 4 and {mask.shape for mask in targets} == {targets[0].shape}
    size = targets[0].shape[1]
    assert 0.12 * 196 < size < 0.23 * 196
    for image in range(16):
        hidden = set(torch.cat([mask[image] for mask in targets]).tolist())
        assert not hidden & set(context[image].tolist()) and len(context[image]) > 10
        assert max(context[image]) < 13 * 14 and all(patch % 14 < 13 for patch in context[image])
        for mask in targets:
            rows, columns = mask[image] // 14, mask[image] % 14
            assert (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) == size
    again = draw_masks(16, (14, 14), torch.Generator().manual_seed(0))
    assert torch.equal(again[0][0], context)
    with pytest.raises(ValueError, match="different lengths"):
        mask_lists(make_masks(GRID, 4).context, 1, 36)
