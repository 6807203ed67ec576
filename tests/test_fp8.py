"""FP8 products in the target encoder: what they compute, where they are used, and what cannot have them."""

import pytest
import torch
from gpu_checks import check_capture_without_host_sync
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

import ijepa_fast.step.flops  # noqa: F401  (registers the formulas of attention)
from ijepa_fast import ops
from ijepa_fast.config import ModelConfig, TrainConfig
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model import fp8
from ijepa_fast.model.blocks import Linear
from ijepa_fast.model.fp8 import CAPABILITY, active_scaling, fp8_linear, fp8_products
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import cast_weights

SCALINGS = ("tensor", "row")
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


def rounded(x, per_row):
    """x [T, D] as e4m3 numbers times their scales, in fp64; test_kernel_quantize_fp8.py tests that these are right."""
    values, scales = ops.quantize_fp8(x, per_row)
    return values.double() * scales.double()[:, None]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_product_of_rounded_numbers(scaling, dtype, with_bias):
    x, weight = 3 * normal(20, 48, dtype=dtype), 0.02 * normal(32, 48, seed=1, dtype=dtype)
    x[::3] *= 10
    bias = normal(32, seed=2, dtype=dtype) if with_bias else None
    wanted = rounded(x, scaling == "row") @ rounded(weight, scaling == "row").T
    wanted = wanted + bias.double() if with_bias else wanted
    out = fp8_linear(x, weight, bias, scaling)
    assert out.dtype == dtype
    tolerance = torch.finfo(dtype).eps / 2 + 1e-6
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zero_rows_give_the_bias_alone(scaling):
    x, bias = normal(6, 32), normal(16, seed=2)
    x[2:4] = 0
    out = fp8_linear(x, normal(16, 32, seed=1), bias, scaling)
    assert torch.equal(out[2:4], bias.expand(2, -1)) and out.isfinite().all()
    assert fp8_linear(x[:0], normal(16, 32, seed=1), bias, scaling).shape == (0, 16)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rows", [130, 128, 1])
def test_what_a_gpu_is_given_has_the_layout_it_wants(scaling, rows):
    """torch's own checks of ``_scaled_mm`` for CUDA, on tensors without memory."""
    with FakeTensorMode():
        x, weight, bias = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((rows, 48), (32, 48), (32,))
        )
        out = fp8_linear(x, weight, bias, scaling)
    assert (out.shape, out.dtype, out.device.type) == ((rows, 32), torch.bfloat16, "cuda")


def test_scaling_holds_inside_and_ends_with_errors():
    layer, x = Linear(32, 16), normal(5, 32)
    plain = layer(x)
    with torch.no_grad():
        with fp8_products("row"):
            inside = layer(x)
            assert torch.equal(layer.project(x, slice(4, 9)), inside[:, 4:9])
            with fp8_products("tensor"):
                assert active_scaling() == "tensor"
            assert active_scaling() == "row"
        with pytest.raises(RuntimeError, match="inside"), fp8_products("tensor"):
            raise RuntimeError("inside")
    assert active_scaling() == "off" and torch.equal(layer(x), plain) and not torch.equal(inside, plain)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("objective", "all_targets"),
    [
        (Objective(), True),
        (Objective(), False),
        (Objective(targets="average"), False),
        (Objective(target_selection="input"), False),
    ],
)
def test_only_targets_change(scaling, objective, all_targets):
    model, batch, drawn = make_model(objective), images(), masks(capacity=(256, 256))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, alone = model.predict(batch, drawn, all_targets=all_targets), model.target_encoder(batch)
    model.use_fp8_targets(scaling, CPU)
    rounded = model.predict(batch, drawn, all_targets=all_targets)
    assert torch.equal(rounded.values, plain.values) and torch.equal(rounded.context, plain.context)
    assert not torch.equal(rounded.targets, plain.targets)
    read = rounded.rows[rounded.rows >= 0].unique().long()
    likeness = cosine_similarity(rounded.targets[read].double(), plain.targets[read].double())
    assert likeness.min() > 0.99
    padding = plain.targets.eq(0).all(1)
    assert torch.equal(rounded.targets.eq(0).all(1), padding)
    assert torch.equal(model.target_encoder(batch), alone)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.losses(rounded, drawn)[0].total.backward()
    assert all(p.grad.isfinite().all() for p in model.context_encoder.parameters() if p.grad is not None)
    model.use_fp8_targets("off", CPU)
    assert torch.equal(model.predict(batch, drawn, all_targets=all_targets).targets, plain.targets)


def test_a_scale_for_each_row_makes_images_independent():
    model, batch = make_model(), images()
    features = {}
    for scaling in SCALINGS:
        model.use_fp8_targets(scaling, CPU)
        brighter = torch.cat([batch[:2], 255 * (batch[2:] > 127).byte()])
        features[scaling] = [model.predict(b, masks()).targets.view(4, 36, -1)[:2] for b in (batch, brighter)]
    assert torch.equal(*features["row"]) and not torch.equal(*features["tensor"])


@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled_blocks(scaling):
    """The encoder on its own stays plain, although it is the same compiled function."""
    model, batch, drawn = make_model(dtype=torch.float32), images(), masks()
    model.use_fp8_targets(scaling, CPU)
    wanted, alone = model.predict(batch, drawn, all_targets=False), model.target_encoder(batch)
    torch.compiler.reset()
    model.target_encoder.compile_blocks(backend="aot_eager")
    for _ in range(2):
        found = model.predict(batch, drawn, all_targets=False)
        torch.testing.assert_close(found.targets, wanted.targets)
        with torch.no_grad():
            torch.testing.assert_close(model.target_encoder(batch), alone, rtol=1e-5, atol=1e-5)


def test_flops_are_those_of_the_plain_encoder():
    counted = []
    for scaling in ("off", *SCALINGS):
        model = make_model()
        model.use_fp8_targets(scaling, CPU)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(), masks())
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == counted[2] > 0


@pytest.mark.parametrize(
    ("scaling", "settings", "message"),
    [
        ("rows", {}, "must be one of off, tensor, row, got 'rows'"),
        ("row", {"embed_dim": 24}, "multiples of 16, but a layer goes from 24 to 72"),
        ("row", {"mlp_ratio": 1.25}, "multiples of 16, but a layer goes from 32 to 40"),
    ],
)
def test_unsuitable_layers_raise(scaling, settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(**settings).use_fp8_targets(scaling, CPU)


def test_pixels_raise():
    with pytest.raises(ValueError, match="objective.targets is pixels"):
        make_model(Objective(targets="pixels")).use_fp8_targets("row", CPU)


def test_older_gpus_raise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model, gpu = make_model(), torch.device("cuda")
    with pytest.raises(ValueError, match="compute capability 8.9, but NVIDIA A100 has 8.0"):
        model.use_fp8_targets("row", gpu)
    assert model.fp8_targets == "off"
    model.use_fp8_targets("off", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    model.use_fp8_targets("row", gpu)
    assert model.fp8_targets == "row"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8_targets": "rows"}, "fp8_targets must be one of off, tensor, row, got 'rows'"),
        ({"fp8_targets": "row", "precision": "fp32"}, "fp8_targets row needs precision bf16, got fp32"),
    ],
)
def test_unsuitable_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_on_a_gpu(scaling):
    """As on the CPU, but for Hopper's sums, of which about 14 bits are kept, and the rounding of the result."""
    if torch.cuda.get_device_capability() < CAPABILITY:
        with pytest.raises(ValueError, match="compute capability"):
            fp8.check_fp8(scaling, [], torch.device("cuda"))
        return
    x, weight, bias = (normal(*s, dtype=torch.bfloat16).cuda() for s in ((1000, 1280), (640, 1280), (640,)))
    out = fp8_linear(x, weight, bias, scaling)
    wanted = fp8_linear(x.cpu(), weight.cpu(), bias.cpu(), scaling).double()
    size = x.cpu().double().abs() @ weight.cpu().double().abs().T
    assert ((out.cpu().double() - wanted).abs() <= size * 2**-10 + wanted.abs() * 2**-8).all()
    check_capture_without_host_sync(lambda *arguments: fp8_linear(*arguments, scaling), (x, weight, bias))
