"""Weights of encoder and predictor: how many, under which names, with which first values and in which dtype."""

import copy

import pytest
import torch
from dense_jepa import encode
from model_cases import HEADS, byte_images, make_encoder, make_predictor

from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.model.vit import PREDICTOR_DEPTH, SIZES, Predictor, VisionTransformer, cast_weights
from ijepa_fast.ragged import Ragged

PUBLISHED_MILLIONS = {("tiny", 16): 5.52, ("small", 16): 21.67, ("base", 16): 85.80, ("large", 16): 303.30}
"""Of supervised ViTs without their head (Dosovitskiy et al. 2021; Touvron et al. 2021), class token included."""
PUBLISHED_MILLIONS |= {("huge", 14): 630.76, ("giant", 16): 1011.37}
"""Of the released I-JEPA encoders, which have no class token."""


@pytest.mark.parametrize(("size", "patch_size"), PUBLISHED_MILLIONS)
def test_parameter_counts(size, patch_size):
    dim, depth = SIZES[size]["embed_dim"], SIZES[size]["depth"]
    # One block is built; the others have its size.
    encoder = VisionTransformer(patch_size=patch_size, **SIZES[size] | {"depth": 1})
    repeated = (depth - 1) * sum(p.numel() for p in encoder.blocks.parameters())
    hidden = 6144 if size == "giant" else 4 * dim
    attention = (3 * dim * dim + 3 * dim) + (dim * dim + dim)
    mlp = (dim * hidden + hidden) + (hidden * dim + dim)
    embedding = 3 * patch_size**2 * dim + dim
    trained = embedding + depth * (attention + mlp + 4 * dim) + 2 * dim
    assert sum(p.numel() for p in encoder.parameters()) + repeated == trained
    class_token = 0 if size in ("huge", "giant") else 2 * dim
    stored = sum(tensor.numel() for tensor in encoder.state_dict().values()) + repeated
    assert (stored + class_token) / 1e6 == pytest.approx(PUBLISHED_MILLIONS[size, patch_size], abs=0.005)


@pytest.mark.parametrize(
    ("size", "encoder_head", "predictor_head"),
    [("tiny", 64, 128), ("small", 64, 64), ("base", 64, 32), ("large", 64, 24), ("huge", 80, 24), ("giant", 88, 24)],
)
def test_head_dims_and_predictor_depths_of_the_recipes(size, encoder_head, predictor_head):
    assert SIZES[size]["embed_dim"] // SIZES[size]["num_heads"] == encoder_head
    assert 384 // SIZES[size]["num_heads"] == predictor_head
    assert PREDICTOR_DEPTH["base"] == 6 and PREDICTOR_DEPTH["huge"] == 12 and PREDICTOR_DEPTH["giant"] == 16


BLOCK_SHAPES = {
    "norm1.weight": (12,),
    "norm1.bias": (12,),
    "attn.qkv.weight": (36, 12),
    "attn.qkv.bias": (36,),
    "attn.proj.weight": (12, 12),
    "attn.proj.bias": (12,),
    "norm2.weight": (12,),
    "norm2.bias": (12,),
    "mlp.fc1.weight": (48, 12),
    "mlp.fc1.bias": (48,),
    "mlp.fc2.weight": (12, 48),
    "mlp.fc2.bias": (12,),
}


def test_encoder_state_dict_is_that_of_official_checkpoints():
    encoder = VisionTransformer((8, 12), 4, embed_dim=12, depth=2, num_heads=3)
    want = {
        "pos_embed": (1, 6, 12),
        "patch_embed.proj.weight": (12, 3, 4, 4),
        "patch_embed.proj.bias": (12,),
        "norm.weight": (12,),
        "norm.bias": (12,),
    }
    want |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK_SHAPES.items()}
    assert {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()} == want


def test_predictor_state_dict_is_that_of_official_checkpoints():
    predictor = Predictor((2, 3), 20, predictor_embed_dim=12, depth=2, num_heads=3)
    want = {
        "mask_token": (1, 1, 12),
        "predictor_pos_embed": (1, 6, 12),
        "predictor_embed.weight": (12, 20),
        "predictor_embed.bias": (12,),
        "predictor_norm.weight": (12,),
        "predictor_norm.bias": (12,),
        "predictor_proj.weight": (20, 12),
        "predictor_proj.bias": (20,),
    }
    want |= {f"predictor_blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK_SHAPES.items()}
    assert {name: tuple(tensor.shape) for name, tensor in predictor.state_dict().items()} == want


@pytest.mark.parametrize("init", ["flat", "depth_scaled"])
def test_initial_weights(init):
    encoder = VisionTransformer(16, 8, embed_dim=128, depth=3, num_heads=2, init=init)
    predictor = Predictor((2, 2), 128, predictor_embed_dim=128, depth=3, num_heads=2, init=init)
    blocks = {"blocks": encoder.blocks, "predictor_blocks": predictor.predictor_blocks}
    for stack in blocks.values():
        for layer, block in enumerate(stack, start=1):
            last = 0.02 / (2 * layer) ** 0.5 if init == "depth_scaled" else 0.02
            for weight, std in ((block.attn.qkv, 0.02), (block.attn.proj, last), (block.mlp.fc2, last)):
                # 5 standard errors of a standard deviation estimated from 16,384 values or more
                assert float(weight.weight.detach().std()) == pytest.approx(std, rel=5 / (2 * 16384) ** 0.5)
    for name, parameter in [*encoder.named_parameters(), *predictor.named_parameters()]:
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif "norm" in name:
            assert parameter.eq(1).all(), name
    assert 0.01 < float(predictor.mask_token.detach().std()) < 0.03


def test_cast_weights_keeps_small_parameters_in_fp32():
    encoder, predictor = make_encoder().float(), make_predictor().float()
    for module in (encoder, predictor):
        cast_weights(module, torch.bfloat16)
        for name, tensor in module.state_dict().items():
            small = name.endswith("bias") or "norm" in name or "pos_embed" in name or name == "mask_token"
            assert tensor.dtype == (torch.float32 if small else torch.bfloat16), name


def test_bf16_features_are_as_good_as_plain_torch_in_bf16():
    exact, images = make_encoder(), byte_images(2)
    cast = copy.deepcopy(exact).float()
    cast_weights(cast, torch.bfloat16)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in exact.state_dict().items()}
    everything = [range(36)] * 2
    want = torch.stack(encode(exact.state_dict(), images, everything, HEADS))
    plain = torch.stack(encode(rounded, images, everything, HEADS))
    got = cast(images)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() <= 2 * (plain - want).norm()


def test_gradients_arrive_in_the_dtype_of_their_parameter():
    encoder, predictor = make_encoder().float(), make_predictor().float()
    cast_weights(encoder, torch.bfloat16)
    cast_weights(predictor, torch.bfloat16)
    context, targets = Ragged.from_lists([[0, 1, 2], [40, 41]]), Ragged.from_lists([[5], [50, 51]])
    out = predictor(encoder(byte_images(2), context), predictor_layout(context, targets, 1, 1))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for parameter in [*encoder.parameters(), *predictor.parameters()]:
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all()


@pytest.mark.parametrize(("patch_size", "channels"), [(4, 3), (8, 1), (8, 4)])
def test_whitened_patches(patch_size, channels):
    """Of images whose pixels are correlated as assumed, outputs have the stated spread and many directions."""
    torch.manual_seed(0)
    mean_std = {"mean": [0.0] * channels, "std": [1.0] * channels}
    shape = {"img_size": patch_size, "patch_size": patch_size, "in_chans": channels, "embed_dim": 32, "depth": 1}
    whitened, flat = (VisionTransformer(**shape, **mean_std, num_heads=2, init=init) for init in ("whitened", "flat"))
    at = torch.arange(patch_size).double()
    side = 0.95 ** (at[:, None] - at).abs()
    covariance = torch.kron(side[:channels, :channels].contiguous(), torch.kron(side, side))
    images = torch.randn(2000, len(covariance)).double() @ torch.linalg.cholesky(covariance).T
    images = images.view(-1, channels, patch_size, patch_size).float()
    rank = {}
    for name, encoder in (("whitened", whitened), ("flat", flat)):
        values = torch.linalg.eigvalsh(torch.cov(encoder.patch_embed.proj(images).flatten(1).T)).clamp(min=0)
        rank[name] = float(values.sum() ** 2 / values.square().sum())
    assert values.shape == (32,) and float(whitened.patch_embed.proj(images).std()) == pytest.approx(0.6, rel=0.1)
    assert rank["whitened"] > 3 * rank["flat"]
    assert torch.equal(whitened.patch_embed.proj.bias, torch.zeros(32))
