"""Fused blocks against plain ones and the dense oracle: losses, every gradient, what is kept, and when they refuse.

On the CPU the definitions of the ops stand for the kernels, so this is about how blocks are cut and put together.
"""

import pytest
import torch
from model_cases import (
    assert_equal,
    assert_equals_oracle,
    assert_same_gradients,
    byte_images,
    gradients,
    make_encoder,
    make_images,
    make_masks,
    make_model,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.fp8 import Fp8Linear
from ijepa_fast.model.fused_blocks import FusedBlock, Unsummed, check_device
from ijepa_fast.model.fused_blocks import fuse as fuse_network
from ijepa_fast.model.vit import cast_weights
from ijepa_fast.ragged import Ragged
from ijepa_fast.step.flops import TokenCounts, step_flops
from tests.tiny import MODEL, images, tiny_model, tiny_step

GRID = (6, 6)


def networks(model):
    return model.context_encoder, model.target_encoder, model.predictor


def fuse(model):
    model.fuse_blocks()
    return model


@pytest.mark.parametrize("all_targets", [True, False])
@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"qkv_bias": False}], ids=["plain", "one block", "no qkv bias"])
def test_losses_and_gradients_are_those_of_the_dense_model(options, all_targets):
    model = fuse(make_model(GRID, **options))
    assert_equals_oracle(model, make_images(3, GRID), make_masks(GRID, 3, padding=4), GRID, all_targets=all_targets)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_and_compiling_change_nothing(checkpointing, compiled):
    model, batch = make_model(GRID, activation_checkpointing=checkpointing), make_images(3, GRID)
    masks = make_masks(GRID, 3, padding=4)
    want = model(batch, masks, all_targets=False)[0].total
    want_gradients = gradients(model, want)
    fuse(model)
    if compiled:
        torch.compiler.reset()
        for network in networks(model):
            network.compile_blocks(backend="aot_eager")
    got = model(batch, masks, all_targets=False)[0].total
    assert_equal(got, want)
    assert_same_gradients(gradients(model, got), want_gradients)


def test_bf16_is_no_further_from_fp64_than_plain_blocks():
    """bf16 matrices beside fp32 norms and biases, as in training: losses, and gradients as relative L2 distances."""
    model, masks = tiny_model(), MaskSampler(MaskConfig(min_keep=1), GRID).sample(8, seed=0, step=0)
    cast_weights(model, torch.bfloat16)
    exact = tiny_model()
    exact.load_state_dict(model.state_dict())
    exact.double()

    def results(network):
        loss = network(images(0), masks)[0].total
        return loss.detach().double(), gradients(network, loss)

    want, want_gradients = results(exact)
    plain, plain_gradients = results(model)
    got, fused_gradients = results(fuse(model))
    eps = torch.finfo(torch.bfloat16).eps
    assert abs(got - want) <= 2 * max(abs(plain - want), eps / 2 * want)

    def distance(found):
        """Over all gradients together: the rounding of one bias of keys, which is noise, decides nothing."""
        return sum((found[name].double() - value).square().sum() for name, value in want_gradients.items()).sqrt()

    assert distance(fused_gradients) <= 1.5 * distance(plain_gradients)
    for name, value in fused_gradients.items():
        assert value.dtype == plain_gradients[name].dtype and value.isfinite().all()


def test_steps_of_training_end_with_the_same_weights():
    plain, other = tiny_step(), tiny_step()
    fuse(other.model)
    for number in range(3):
        torch.testing.assert_close(
            other(images(number), number).losses.total, plain(images(number), number).losses.total, rtol=1e-5, atol=0
        )
    weights = dict(plain.model.named_parameters())
    lr = sum(plain.schedules.lr_at(number) for number in range(3))
    for name, parameter in other.model.named_parameters():
        # Adam moves a weight by the learning rate whatever the gradient, and rounding alone where that is zero.
        difference = (parameter - weights[name]).abs()
        assert difference.mean() <= 1e-3 * lr or name.endswith("qkv.bias"), name


def test_a_wider_stream_stays_wide_and_is_more_exact():
    """bf16 products between sums in fp32."""
    encoder = make_encoder(depth=6)
    tokens = Ragged.from_lists([[0, 7, 30], [40, 41]])
    x = torch.randn(5, encoder.embed_dim, generator=torch.Generator().manual_seed(0)).bfloat16()

    def run(dtype):
        out = encoder.run_blocks(encoder.blocks, x.to(dtype), tokens, None)
        return out.stream + out.branch + out.bias.to(out.branch.dtype) if isinstance(out, Unsummed) else out

    cast_weights(encoder, torch.bfloat16)
    encoder.double()
    exact = run(torch.float64)
    encoder.float()
    cast_weights(encoder, torch.bfloat16)
    fuse_network(encoder)
    narrow, wide = run(torch.bfloat16), run(torch.float32)
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert (wide - exact).norm() < (narrow - exact).norm() < 0.05 * exact.norm()


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.ijepa_fast.linear_gelu.default:
            self.kept.append(args[3])
        return function(*args, **(kwargs or {}))


def test_only_what_is_trained_keeps_what_is_before_gelu():
    model = fuse(make_model(GRID))
    with Calls() as calls:
        model(make_images(3, GRID), make_masks(GRID, 3))
    assert calls.kept == [False, False, True, True, True, True]  # two blocks each of target, context and predictor


@pytest.mark.parametrize("all_targets", [True, False])
def test_counted_flops_are_the_closed_form(all_targets):
    model, masks = fuse(tiny_model()), MaskSampler(MaskConfig(min_keep=1), GRID).sample(8, seed=0, step=0)
    counts = []
    for network in (tiny_model(), model):
        with FlopCounterMode(display=False) as counter:
            network(images(0), masks, all_targets=all_targets)[0].total.backward()
        counts.append(counter.get_total_flops())
    tokens = TokenCounts.of(masks)
    wanted = step_flops(MODEL, tokens, all_targets=all_targets).total
    assert counts[0] == counts[1]
    assert counts[1] / 8 == pytest.approx(wanted, rel=0.05)  # pooling and EMA weigh more in so small a model


def test_padding_rows_are_zero_and_pass_no_gradient():
    encoder, pictures = make_encoder(), byte_images()
    fuse_network(encoder)
    tokens = Ragged.from_lists([[0, 7, 30], [40, 41]]).padded(9)
    out = encoder(pictures, tokens)
    assert out.shape[0] == 9 and out[5:].eq(0).all() and out[:5].ne(0).any(1).all()
    grad = torch.ones_like(out)
    grad[5:] = float("nan")
    out.backward(grad)
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_layers_for_evaluation_are_those_of_plain_blocks():
    encoder, pictures = make_encoder(), byte_images()
    want = encoder.intermediate_layers(pictures, 2)
    fuse_network(encoder)
    for got, wanted in zip(encoder.intermediate_layers(pictures, 2), want, strict=True):
        assert_equal(got, wanted)
    assert_equal(encoder(pictures), want[-1])


def test_a_network_shows_its_kind_and_is_fused_once():
    model = fuse(fuse(tiny_model()))
    assert str(model).count("2 x FusedBlock") == 3  # context encoder, target encoder, predictor
    assert "BranchLinear" in str(model) and "(norm): FusedLayerNorm" in str(model)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


def test_fp8_products_need_plain_blocks_in_either_order():
    model = tiny_model()
    model.use_fp8_targets(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FP8 products need plain blocks .*: give fuse_blocks\(targets=False\)"):
        model.fuse_blocks()
    assert not any(isinstance(module, FusedBlock) for module in model.modules())
    model.fuse_blocks(targets=False)
    assert isinstance(model.predictor.predictor_blocks[0], FusedBlock)
    assert isinstance(model.target_encoder.blocks[0].attn.qkv, Fp8Linear)
    other = fuse(tiny_model())
    with pytest.raises(ValueError, match="need plain blocks, but the target encoder's are fused"):
        other.use_fp8_targets(torch.device("cpu"))


def test_what_a_gpu_cannot_run_is_refused(monkeypatch):
    gpu = torch.device("cuda")
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=f"need weights in bfloat16 or float16, got {dtype}"):
            check_device(gpu, dtype)
        check_device(torch.device("cpu"), dtype)
    check_device(gpu, torch.bfloat16)
    with pytest.raises(ValueError, match="fused blocks run on cpu and cuda, got meta"):
        check_device(torch.device("meta"), torch.bfloat16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need Triton, which is not installed"):
        check_device(gpu, torch.bfloat16)
