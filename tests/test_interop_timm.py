"""Weights to and from timm, against names and features that timm gave (tests/golden/timm.json)."""

import functools
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ijepa_fast.interop import official
from ijepa_fast.model.vit import SIZES, VisionTransformer
from ijepa_fast.weights.encoder_file import save_encoder
from ijepa_fast.weights.reading import WeightsError, load_weights, set_layer_norm_eps
from ijepa_fast.weights.timm import from_timm, timm_arguments, timm_call, to_timm
from tests import official_case as case

GOLDEN = Path(__file__).parent / "golden" / "timm.json"
SIZE = {"embed_dim": case.WIDTH, "depth": case.DEPTH, "num_heads": case.HEADS}


def encoder_of_the_case() -> VisionTransformer:
    encoder = official.VisionTransformer([case.SIDE], case.PATCH, **SIZE)
    case.fill(encoder, 0.0)
    return encoder


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def test_names_and_arguments_are_those_of_timm(golden):
    encoder = encoder_of_the_case()
    assert [[name, list(value.shape)] for name, value in to_timm(encoder).items()] == golden["names"]
    assert timm_arguments(encoder) == golden["arguments"]


def test_features_of_weights_from_timm_are_those_of_timm(golden):
    # timm's state dict with these weights: the names it has, the values of the formula.
    theirs = dict(zip([name for name, _ in golden["names"]], to_timm(encoder_of_the_case()).values(), strict=True))
    encoder = VisionTransformer(case.SIDE, case.PATCH, **SIZE)
    load_weights(encoder, from_timm(theirs | {"head.weight": torch.zeros(3, case.WIDTH)}))
    features = encoder(case.images(0).float()).detach()
    # timm computed in fp64; ours in fp32 are to agree to 1e-5 of the size of the features.
    assert case.digest(features) == pytest.approx(golden["features"], abs=1e-5 * golden["features"][0])
    assert case.digest(features.mean(1)) == pytest.approx(golden["pooled"], abs=1e-5 * golden["pooled"][0])


def test_there_and_back_changes_nothing():
    encoder = VisionTransformer((48, 32), 8, **SIZE, qkv_bias=False).to(torch.bfloat16)
    state = to_timm(encoder)
    assert all(value.dtype == torch.float32 for value in state.values())
    assert (timm_arguments(encoder)["img_size"], timm_arguments(encoder)["qkv_bias"]) == ((48, 32), False)
    again = VisionTransformer((48, 32), 8, **SIZE, qkv_bias=False).to(torch.bfloat16)
    load_weights(again, from_timm(state))
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_number_of_heads_is_always_told():
    with torch.device("meta"):
        arguments = timm_arguments(VisionTransformer(patch_size=16, **SIZES["base"]))
    assert arguments["model_name"] == "vit_base_patch16_gap_224" and arguments["num_heads"] == 12


def test_an_eps_that_is_not_that_of_timm_is_told():
    encoder = encoder_of_the_case()
    assert "norm_layer" not in timm_arguments(encoder)
    set_layer_norm_eps(encoder, 1e-12)
    assert timm_arguments(encoder)["norm_layer"](7).eps == 1e-12
    known = {"timm": SimpleNamespace(create_model=dict), "functools": functools, "torch": torch}
    assert eval(timm_call(encoder, "x.safetensors"), known)["norm_layer"](7).eps == 1e-12
    encoder.norm.eps = 1e-5
    with pytest.raises(ValueError, match=r"must have one eps, got \[1e-12, 1e-05\]"):
        timm_arguments(encoder)


@pytest.mark.parametrize(
    ("name", "what"), [("cls_token", "a class token"), ("fc_norm.weight", "a norm after the pooling")]
)
def test_other_models_of_timm_are_refused(name, what):
    state = to_timm(encoder_of_the_case()) | {name: torch.zeros(1)}
    with pytest.raises(WeightsError, match=f"have {what}"):
        from_timm(state)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed; its numbers are golden")
def test_timm_itself_loads_them_and_gives_the_same_features(tmp_path):
    import timm

    encoder = encoder_of_the_case()
    model = timm.create_model(**timm_arguments(encoder)).eval()
    model.load_state_dict(to_timm(encoder), strict=True)
    images = case.images(0).float()
    torch.testing.assert_close(model.forward_features(images), encoder(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(from_timm(model), to_timm(encoder), rtol=0, atol=0)
    save_encoder(tmp_path / "e.safetensors", encoder)
    arguments = timm_arguments(encoder, tmp_path / "e.safetensors")
    for changes in ({}, {"num_classes": 5}, {"img_size": 2 * arguments["img_size"]}):
        model = timm.create_model(**arguments | changes).eval()
        torch.testing.assert_close(model.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)
