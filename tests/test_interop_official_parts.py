"""The pieces of interop.official by themselves: calls, collators, schedules, and what they refuse."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from ijepa_fast.interop import official
from ijepa_fast.interop.official.models import ENCODERS

BLOCKS = {
    "input_size": 96,
    "patch_size": 8,
    "enc_mask_scale": (0.85, 1.0),
    "pred_mask_scale": (0.15, 0.2),
    "aspect_ratio": (0.75, 1.5),
    "npred": 3,
    "min_keep": 5,
}
SAMPLES = [(torch.full((3, 4, 4), float(i)), i) for i in range(20)]


def test_apply_masks_and_repeat_interleave_are_what_their_indices_say():
    x = torch.randn(2, 5, 3)
    masks = [torch.tensor([[0, 4], [2, 1]]), torch.tensor([[3, 3], [0, 2]])]
    want = [x[b, mask[b]] for mask in masks for b in range(2)]
    torch.testing.assert_close(official.apply_masks(x, masks), torch.stack(want), rtol=0, atol=0)
    rows = torch.arange(6)
    assert official.repeat_interleave_batch(rows, 3, repeat=2).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    with pytest.raises(ValueError, match="6 rows cannot be cut into blocks of B=4"):
        official.repeat_interleave_batch(rows, 4, repeat=2)


def test_factories_give_the_published_sizes():
    assert official.VIT_EMBED_DIMS == {
        "vit_tiny": 192, "vit_small": 384, "vit_base": 768, "vit_large": 1024, "vit_huge": 1280, "vit_giant": 1408
    }  # fmt: skip
    for name, depth in (("vit_tiny", 12), ("vit_giant", 40)):
        dim = official.VIT_EMBED_DIMS[name]
        with torch.device("meta"):
            encoder = ENCODERS[name](patch_size=16, img_size=[32])
        assert (
            len(encoder.blocks) == depth
            and encoder.num_features == encoder.embed_dim == dim
            and encoder.patch_embed.num_patches == 4
        )
        assert encoder.blocks[0].mlp.fc1.out_features == (6144 if name == "vit_giant" else 4 * dim)


def test_init_model_is_flat_and_the_factory_scales_with_depth():
    encoder, predictor = official.init_model("cpu", patch_size=8, model_name="vit_tiny", crop_size=32, pred_depth=1)
    scaled = official.vit_tiny(patch_size=8, img_size=[32])
    last = [model.blocks[11].mlp.fc2.weight.detach().std() for model in (encoder, scaled)]
    assert float(last[0] / last[1]) == pytest.approx(24**0.5, rel=0.05)
    assert predictor.predictor_pos_embed.shape == (1, 16, 384) and len(predictor.predictor_blocks) == 1
    with pytest.raises(ValueError, match="model_name must be one of vit_tiny, .*got 'vit_micro'"):
        official.init_model("cpu", model_name="vit_micro")


def test_a_single_mask_counts_as_a_list_of_one():
    encoder, predictor = official.init_model("cpu", 8, "vit_tiny", crop_size=32, pred_depth=1)
    x, context, target = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3], [5, 9]]), torch.tensor([[7], [2]])
    z = encoder(x, context)
    torch.testing.assert_close(z, encoder(x, masks=[context]), rtol=0, atol=0)
    torch.testing.assert_close(predictor(z, context, target), predictor(z, [context], [target]), rtol=0, atol=0)


def test_autocast_keeps_fp32_between_blocks():
    encoder, predictor = official.init_model("cpu", 8, "vit_tiny", crop_size=32, pred_depth=1)
    streams = []
    for block in (encoder.blocks[3], predictor.predictor_blocks[0]):
        block.register_forward_hook(lambda module, inputs, output: streams.append((inputs[0].dtype, output.dtype)))
    x, context, target = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3], [5, 9]]), torch.tensor([[7], [2]])
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(x, context)
        predicted = predictor(features, context, target)
    assert streams == [(torch.float32, torch.float32)] * 2
    assert features.dtype == torch.float32 and predicted.dtype == torch.bfloat16
    predicted.float().square().mean().backward()
    assert encoder.blocks[0].attn.qkv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, p: e(torch.zeros(2, 3, 32, 32), []), "masks must be one or more"),
        (lambda e, p: e(torch.zeros(2, 3, 32, 32), [torch.zeros(3, 2).long()]), "masks are for 3 images"),
        (lambda e, p: p(torch.zeros(2, 3, 192), [torch.zeros(2, 2).long()], [torch.zeros(2, 1).long()]), "do not fit"),
        (lambda e, p: p(torch.zeros(2, 2, 192), [torch.zeros(2, 2).long()], [torch.zeros(4, 1).long()]), "do not fit"),
        (lambda e, p: official.vit_predictor(num_patches=15), "15 patches do not form a square grid"),
        (lambda e, p: official.vit_tiny(drop_path_rate=0.1), "drop_path_rate=0.1 is not supported"),
        (lambda e, p: official.MaskCollator(**BLOCKS, context="exact"), "need context batch_min or fixed"),
        (lambda e, p: official.MaskCollator(**BLOCKS, color_jitter=0.1), "have no colours, got color_jitter=0.1"),
        (lambda e, p: official.MaskCollator(**BLOCKS | {"min_keep": 40}), "min_keep=40"),
    ],
)
def test_bad_input_is_refused(call, message):
    encoder, predictor = official.init_model("cpu", 8, "vit_tiny", crop_size=32, pred_depth=1)
    with pytest.raises(ValueError, match=message):
        call(encoder, predictor)


def test_masks_have_the_official_form():
    collator = official.MaskCollator(**BLOCKS, nenc=2)
    batch, contexts, targets = collator(SAMPLES[:4])
    assert batch[0].shape == (4, 3, 4, 4) and batch[1].tolist() == [0, 1, 2, 3]
    assert (len(contexts), len(targets)) == (2, 3)
    for masks in (contexts, targets):
        for mask in masks:
            assert mask.dtype == torch.int64 and mask.shape == masks[0].shape and mask.shape[0] == 4
            assert mask.diff(dim=1).gt(0).all() and 0 <= int(mask.min()) and int(mask.max()) < 144
            assert (mask % 12 < 11).all() and (mask // 12 < 11).all()  # last column and row are never drawn
    for context in contexts:
        for b in range(4):
            assert not set(context[b].tolist()) & {i for target in targets for i in target[b].tolist()}


def epochs(workers: int, done: int = 0, count: int = 2, **settings) -> list[list]:
    """Masks of some epochs of a loop that first skips `done` of them, as a resume does."""
    collator = official.MaskCollator(**BLOCKS, **settings)
    loader = DataLoader(SAMPLES, batch_size=4, collate_fn=collator, num_workers=workers)
    for _ in range(done * len(loader)):
        collator.step()
    return [[(contexts, targets) for _, contexts, targets in loader] for _ in range(done, count)]


def test_masks_do_not_depend_on_workers_or_resumes():
    want = epochs(0)
    torch.testing.assert_close(epochs(2), want, rtol=0, atol=0)
    torch.testing.assert_close(epochs(1, done=1), want[1:], rtol=0, atol=0)
    flat = [tuple(contexts[0].flatten().tolist()) for epoch in want for contexts, _ in epoch]
    assert len(set(flat)) == len(flat) == 10


def test_ranks_and_seeds_draw_different_masks_of_the_same_sizes():
    (first, *_), (second, *_), (other, *_) = (
        epochs(0, count=1, **settings)[0] for settings in ({}, {"rank": 1}, {"seed": 1})
    )
    assert first[1][0].shape == second[1][0].shape  # target sizes are those of the step, on all ranks
    assert not torch.equal(first[1][0], second[1][0])
    assert first[1][0].shape != other[1][0].shape or not torch.equal(first[1][0], other[1][0])


def test_the_collator_of_a_device_draws_the_same_masks():
    images = torch.zeros(4, 3, 96, 96)
    collator = official.DeviceMaskCollator(**BLOCKS)
    for contexts, targets in epochs(0, count=1)[0]:
        same, device_contexts, device_targets = collator(images)
        assert same is images
        torch.testing.assert_close((device_contexts, device_targets), (contexts, targets), rtol=0, atol=0)


def test_fixed_contexts_have_a_constant_size():
    collator = official.MaskCollator(**BLOCKS, context="fixed", mask_ratio=0.75)
    assert {collator(SAMPLES[:n])[1][0].shape for n in (3, 4)} == {(3, 36), (4, 36)}


def test_schedules_end_at_their_final_values_and_stay_there():
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "WD_exclude": True, "weight_decay": 0}], lr=0.1
    )
    schedule = official.WarmupCosineSchedule(optimizer, 4, 0.1, 1.0, T_max=10, final_lr=0.01)
    decay = official.CosineWDSchedule(optimizer, 0.04, 10, final_wd=0.4)
    rates = [schedule.step() for _ in range(13)]
    assert rates[:4] == pytest.approx([0.325, 0.55, 0.775, 1.0]) and rates[9:] == [0.01] * 4
    assert optimizer.param_groups[1]["lr"] == 0.01
    assert [decay.step() for _ in range(13)][9:] == [0.4] * 4
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.4, 0]


def test_gradients_are_unscaled_after_a_scaled_step_and_logged_at_once():
    encoder, predictor = official.init_model("cpu", 8, "vit_tiny", crop_size=32, pred_depth=1)
    optimizer, scaler, *_ = official.init_opt(encoder, predictor, 1, 1e-3, 1e-3, 0, 1, use_bfloat16=True)
    images = torch.randn(2, 3, 32, 32)
    encoder(images).square().mean().backward()
    plain = official.grad_logger(encoder.named_parameters())
    norms = {n: float(p.grad.norm()) for n, p in encoder.named_parameters() if p.grad is not None and p.dim() > 1}
    assert plain.first_layer == pytest.approx(norms["blocks.0.attn.qkv.weight"])
    assert plain.last_layer == pytest.approx(norms["blocks.11.attn.qkv.weight"])
    assert (plain.min, plain.max) == pytest.approx((min(norms.values()), max(norms.values())))
    assert plain.count == len(norms) == 1 + 4 * 12
    before = copy.deepcopy(encoder.state_dict())
    optimizer.zero_grad()
    scaler.scale(encoder(images).square().mean()).backward()
    assert official.grad_logger(encoder.named_parameters()).max == pytest.approx(
        plain.max * scaler.get_scale(), rel=1e-4
    )
    scaler.step(optimizer)
    scaler.update()
    assert official.grad_logger(encoder.named_parameters()).max == pytest.approx(plain.max, rel=1e-4)
    assert not torch.equal(before["norm.weight"], encoder.norm.weight)
    assert torch.equal(before["pos_embed"], encoder.pos_embed)
