"""What every format shares: names, shapes, positions and what is said when they do not fit."""

import pytest
import torch
from tiny_jepa import tiny

from ijepa_fast.model.vit import SIZES, VisionTransformer
from ijepa_fast.weights.reading import (
    WeightsError,
    architecture,
    check_fit,
    encoder_in,
    interpolate_positions,
    load_weights,
    plain_names,
)

SIZE = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}


def encoder(img_size=32, seed=0, **changes):
    torch.manual_seed(seed)
    return VisionTransformer(img_size, **SIZE | changes)


def test_prefixes_of_wrappers_do_not_matter():
    state = {f"module._orig_mod.{name}": value for name, value in encoder(seed=1).state_dict().items()}
    model = torch.nn.DataParallel(encoder())
    load_weights(model, state)
    torch.testing.assert_close(model.module.state_dict(), encoder(seed=1).state_dict(), rtol=0, atol=0)


def test_interpolated_weights_give_the_features_that_larger_images_give():
    small, large = encoder(), encoder((48, 64))
    images = torch.randn(2, 3, 48, 64)
    with pytest.raises(WeightsError, match="trained on 16 patches per image and the model is built for 48"):
        load_weights(large, small.state_dict())
    load_weights(large, interpolate_positions(small.state_dict(), large.grid))
    torch.testing.assert_close(large(images), small(images))


def test_other_modules_are_no_encoders():
    wrapped = torch.nn.DataParallel(encoder())
    assert encoder_in(wrapped) is wrapped.module
    with pytest.raises(ValueError, match="got JEPAModel: give its context_encoder or its target_encoder"):
        encoder_in(tiny())
    with pytest.raises(ValueError, match="got Linear$"):
        encoder_in(torch.nn.Linear(2, 2))


def test_positions_of_no_square_grid_are_refused():
    state = encoder((24, 16)).state_dict()
    with pytest.raises(WeightsError, match="6 patches do not form a square grid"):
        interpolate_positions(state, (4, 4))


def test_the_architecture_is_read_off_the_weights():
    seen = architecture(encoder(mlp_ratio=3).state_dict())
    assert (seen.embed_dim, seen.depth, seen.patch_size, seen.in_chans) == (12, 2, 8, 3)
    assert (seen.hidden, seen.num_patches, seen.img_size) == (36, 16, 32)
    with pytest.raises(WeightsError, match="width 12, 2 blocks, MLP width 36, 16 patches of 8 px is none of the known"):
        seen.num_heads  # noqa: B018
    with torch.device("meta"):
        assert architecture(VisionTransformer(**SIZES["small"]).state_dict()).num_heads == 6


def test_another_architecture_is_named_first():
    model, before = encoder(), encoder().state_dict()
    other = encoder(depth=3, embed_dim=24).state_dict()
    with pytest.raises(WeightsError) as refused:
        load_weights(model, other, "file.pth")
    lines = str(refused.value).splitlines()
    assert lines[0] == "file.pth does not fit this VisionTransformer, which is left as it was:"
    assert "it has width 24, 3 blocks, MLP width 96" in lines[1] and "the model has width 12, 2 blocks" in lines[1]
    assert lines[2].startswith("  12 unexpected: blocks.2.norm1.weight (nearest: blocks.") and "and 4 more" in lines[2]
    assert "pos_embed [1, 16, 24] instead of [1, 16, 12]" in lines[3]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_missing_and_unexpected_names_are_listed_with_the_nearest():
    state = encoder().state_dict()
    state["blocks.0.attn.projection.weight"] = state.pop("blocks.0.attn.proj.weight")
    state["optimizer"] = torch.zeros(1)
    with pytest.raises(WeightsError) as refused:
        check_fit(encoder(), state)
    said = str(refused.value)
    assert "1 missing: blocks.0.attn.proj.weight (nearest: blocks.0.attn.projection.weight)" in said
    assert "2 unexpected: blocks.0.attn.projection.weight (nearest: blocks.0.attn.proj.weight), optimizer" in said


def test_what_is_no_tensor_is_named():
    with pytest.raises(WeightsError, match="'epoch' is int"):
        plain_names({"epoch": 3})
