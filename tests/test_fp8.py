"""FP8 products in the target encoder: what they compute, where they are used, and what cannot have them."""

import pytest
import torch
from gpu_checks import check_capture_without_host_sync
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

import ijepa_fast.step.flops  # noqa: F401  (registers the formulas of attention)
from ijepa_fast import ops
from ijepa_fast.config import ModelConfig
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.blocks import Linear
from ijepa_fast.model.fp8 import CAPABILITY, Fp8Linear, convert_to_fp8, fp8_linear
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import cast_weights

CPU = torch.device("cpu")
MODEL = ModelConfig(
    img_size=24, patch_size=4, embed_dim=32, depth=3, num_heads=2, predictor_embed_dim=16, predictor_depth=1
)
GRID = (6, 6)


def make_model(objective=None, dtype=torch.bfloat16, **model):
    torch.manual_seed(0)
    built = ModelConfig(**{**vars(MODEL), **model}).build(objective or Objective())
    cast_weights(built, dtype)
    return built


def images(count=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8, generator=generator)


def masks(count=4, **settings):
    return MaskSampler(MaskConfig(min_keep=1), GRID).sample(count, seed=0, step=0, **settings)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(x):
    """x [T, D] as e4m3 numbers times their scales, in fp64; test_kernel_quantize_fp8.py tests that these are right."""
    values, scales = ops.quantize_fp8(x, True)
    return values.double() * scales.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_product_of_rounded_numbers(dtype, with_bias):
    x, weight = 3 * normal(20, 48, dtype=dtype), 0.02 * normal(32, 48, seed=1, dtype=dtype)
    x[::3] *= 10
    bias = normal(32, seed=2, dtype=dtype) if with_bias else None
    wanted = rounded(x) @ rounded(weight).T
    wanted = wanted + bias.double() if with_bias else wanted
    out = fp8_linear(x, weight, bias)
    assert out.dtype == dtype
    tolerance = torch.finfo(dtype).eps / 2 + 1e-6
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=1e-6 * float(wanted.abs().max()))


def test_zero_rows_give_the_bias_alone():
    x, bias = normal(6, 32), normal(16, seed=2)
    x[2:4] = 0
    out = fp8_linear(x, normal(16, 32, seed=1), bias)
    assert torch.equal(out[2:4], bias.expand(2, -1)) and out.isfinite().all()
    assert fp8_linear(x[:0], normal(16, 32, seed=1), bias).shape == (0, 16)


@pytest.mark.parametrize("rows", [130, 128, 1])
def test_what_a_gpu_is_given_has_the_layout_it_wants(rows):
    """torch's own checks of ``_scaled_mm`` for CUDA, on tensors without memory."""
    with FakeTensorMode():
        x, weight, bias = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((rows, 48), (32, 48), (32,))
        )
        out = fp8_linear(x, weight, bias)
    assert (out.shape, out.dtype, out.device.type) == ((rows, 32), torch.bfloat16, "cuda")


def test_a_layer_multiplies_in_fp8_in_training_mode_alone():
    layer, x = nn.Sequential(Linear(32, 16)), normal(5, 32)
    plain, parameters = layer(x), list(layer.parameters())
    convert_to_fp8(layer, CPU)
    assert "Fp8Linear(in_features=32" in str(layer)
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    with torch.no_grad():
        rounded = layer(x)
        assert torch.equal(layer[0](x, slice(4, 9)), rounded[:, 4:9]) and not torch.equal(rounded, plain)
    assert torch.equal(layer.eval()(x), plain)


@pytest.mark.parametrize(
    ("objective", "all_targets"),
    [
        (Objective(), True),
        (Objective(), False),
        (Objective(targets="average"), False),
        (Objective(targets="features_alone"), False),
    ],
)
def test_only_targets_change(objective, all_targets):
    model, batch, drawn = make_model(objective), images(), masks(capacity=(256, 256))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, alone = model.predict(batch, drawn, all_targets=all_targets), model.target_encoder(batch)
    model.use_fp8_targets(CPU)
    rounded = model.predict(batch, drawn, all_targets=all_targets)
    assert torch.equal(rounded.values, plain.values) and torch.equal(rounded.context, plain.context)
    assert not torch.equal(rounded.targets, plain.targets)
    read = rounded.rows[rounded.rows >= 0].unique().long()
    likeness = cosine_similarity(rounded.targets[read].double(), plain.targets[read].double())
    assert likeness.min() > 0.99
    padding = plain.targets.eq(0).all(1)
    assert torch.equal(rounded.targets.eq(0).all(1), padding)
    assert torch.equal(model.target_encoder.eval()(batch), alone)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.losses(rounded, drawn)[0].total.backward()
    assert all(p.grad.isfinite().all() for p in model.context_encoder.parameters() if p.grad is not None)
    assert torch.equal(model.predict(batch, drawn, all_targets=all_targets).targets, plain.targets)


def test_a_scale_for_each_row_makes_images_independent():
    model, batch = make_model(), images()
    model.use_fp8_targets(CPU)
    brighter = torch.cat([batch[:2], 255 * (batch[2:] > 127).byte()])
    one, other = (model.predict(b, masks()).targets.view(4, 36, -1)[:2] for b in (batch, brighter))
    assert torch.equal(one, other)


@pytest.mark.slow
def test_compiled_blocks():
    """In evaluation mode the encoder stays plain, although its blocks are compiled."""
    model, batch, drawn = make_model(dtype=torch.float32), images(), masks()
    model.use_fp8_targets(CPU)
    wanted, alone = model.predict(batch, drawn, all_targets=False), model.target_encoder.eval()(batch)
    model.train()
    torch.compiler.reset()
    model.target_encoder.compile_blocks(backend="aot_eager")
    for _ in range(2):
        found = model.predict(batch, drawn, all_targets=False)
        torch.testing.assert_close(found.targets, wanted.targets)
        with torch.no_grad():
            evaluated = model.target_encoder.eval()(batch)
        torch.testing.assert_close(evaluated, alone, rtol=1e-5, atol=1e-5)
        model.train()


def test_flops_are_those_of_the_plain_encoder():
    counted = []
    for fp8 in (False, True):
        model = make_model()
        if fp8:
            model.use_fp8_targets(CPU)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(), masks())
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": 24}, "multiples of 16, but a layer goes from 24 to 72"),
        ({"mlp_ratio": 1.25}, "multiples of 16, but a layer goes from 32 to 40"),
    ],
)
def test_unsuitable_layers_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(**settings).use_fp8_targets(CPU)


def test_pixels_raise():
    with pytest.raises(ValueError, match="objective.targets is pixels"):
        make_model(Objective(targets="pixels")).use_fp8_targets(CPU)


def test_older_gpus_raise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model, gpu = make_model(), torch.device("cuda")
    with pytest.raises(ValueError, match="compute capability 8.9, but NVIDIA A100 has 8.0"):
        model.use_fp8_targets(gpu)
    assert not isinstance(model.target_encoder.blocks[0].mlp.fc1, Fp8Linear)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    model.use_fp8_targets(gpu)
    assert isinstance(model.target_encoder.blocks[0].mlp.fc1, Fp8Linear)


@pytest.mark.gpu
def test_products_on_a_gpu():
    """As on the CPU, but for Hopper's sums, of which about 14 bits are kept, and the rounding of the result."""
    if torch.cuda.get_device_capability() < CAPABILITY:
        with pytest.raises(ValueError, match="compute capability"):
            convert_to_fp8(nn.Sequential(), torch.device("cuda"))
        return
    x, weight, bias = (normal(*s, dtype=torch.bfloat16).cuda() for s in ((1000, 1280), (640, 1280), (640,)))
    wanted = fp8_linear(x.cpu(), weight.cpu(), bias.cpu()).double()
    size = x.cpu().double().abs() @ weight.cpu().double().abs().T
    out = fp8_linear(x, weight, bias)
    assert ((out.cpu().double() - wanted).abs() <= size * 2**-10 + wanted.abs() * 2**-8).all()
    check_capture_without_host_sync(fp8_linear, (x, weight, bias))
