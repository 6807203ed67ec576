"""Hugging Face transformers: encoders both ways, folders that open offline, our attention in its models, packed sets.

Weights named as by transformers 4 are checked against a list of its names, whichever version is installed.
"""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel, IJepaConfig, IJepaForImageClassification, IJepaModel, ViTModel

from ijepa_fast import Ragged, VisionTransformer
from ijepa_fast.interop.huggingface import (
    attention_forward,
    from_huggingface,
    save_huggingface,
    to_huggingface,
)
from ijepa_fast.weights.huggingface import from_huggingface_names, style_of, to_huggingface_names
from ijepa_fast.weights.reading import WeightsError

takes_masks = pytest.mark.skipif(transformers.__version__ < "5", reason="IJepaModel of transformers 4 takes no mask")

SHAPES = {
    "square": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "oblong, one channel": {"img_size": (16, 32), "patch_size": 8, "in_chans": 1, "mean": [0.4], "std": [0.2]},
    "no bias, wide MLP": {"img_size": 16, "patch_size": 4, "qkv_bias": False, "mlp_ratio": 48 / 11},
}
SMALL = {"embed_dim": 44, "depth": 1, "num_heads": 4}


def make_encoder(shape: str = "square", std: float = 0.2) -> VisionTransformer:
    torch.manual_seed(0)
    encoder = VisionTransformer(**SMALL | SHAPES[shape]).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=std)
    return encoder


def make_images(encoder: VisionTransformer, count: int = 3) -> torch.Tensor:
    sides = (side * encoder.patch_size for side in encoder.grid)
    return torch.randn(count, encoder.in_chans, *sides, generator=torch.Generator().manual_seed(1))


def features(model: nn.Module, *args, **kwargs) -> torch.Tensor:
    return model(*args, **kwargs).last_hidden_state


class TestConversion:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_features_are_the_same_there_and_back(self, shape):
        encoder = make_encoder(shape)
        images = make_images(encoder)
        model = to_huggingface(encoder)
        assert not model.training and model.config.layer_norm_eps == 1e-6
        torch.testing.assert_close(features(model, images), encoder(images), rtol=0, atol=1e-5)
        again = from_huggingface(model)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), encoder.parameters(), strict=True))
        assert torch.equal(again(images), encoder(images))

    def test_the_eps_matters_for_features_of_small_variance(self):
        encoder = make_encoder(std=1e-3)
        encoder.pos_embed.mul_(1e-3)
        nn.init.ones_(encoder.norm.weight)
        images = make_images(encoder)
        model = to_huggingface(encoder)
        torch.testing.assert_close(features(model, images), encoder(images), rtol=0, atol=1e-5)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-12  # the default of transformers
        assert not torch.allclose(features(model, images), encoder(images), rtol=0, atol=1e-5)

    def test_a_model_with_another_eps_keeps_its_features(self):
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
        config = IJepaConfig(**sizes, image_size=32, patch_size=8, initializer_range=1e-3)
        assert config.layer_norm_eps == 1e-12
        torch.manual_seed(0)
        model = IJepaModel(config).eval()  # its positions are random, not ours
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(from_huggingface(model)(images), features(model, images), rtol=0, atol=1e-5)

    def test_weights_are_copies(self):
        encoder = make_encoder()
        model, before = to_huggingface(encoder), make_encoder()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), before.parameters(), strict=True))
        assert torch.equal(encoder.pos_embed, before.pos_embed)

    def test_of_a_classifier(self):
        encoder = make_encoder()
        config = to_huggingface(encoder).config
        classifier = IJepaForImageClassification(config).eval()
        classifier.ijepa.load_state_dict(to_huggingface(encoder).state_dict())
        images = make_images(encoder)
        assert torch.equal(from_huggingface(classifier)(images), encoder(images))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"hidden_act": "relu"}, "hidden_act='relu'"),
            ({"patch_size": (8, 16)}, r"square patches, but the config has patch_size=[(\[]8, 16"),
        ],
    )
    def test_what_we_do_not_have_is_refused(self, settings, words):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
        model = IJepaModel(IJepaConfig(**sizes | {"image_size": 32, "patch_size": 8} | settings))
        with pytest.raises(ValueError, match=words):
            from_huggingface(model)

    def test_another_model_is_refused(self, tmp_path):
        model = to_huggingface(make_encoder())
        model.config.model_type = "vit"
        with pytest.raises(ValueError, match="config is that of a vit model, not of ijepa"):
            from_huggingface(model)


LAYER_4 = """attention.attention.query attention.attention.key attention.attention.value attention.output.dense
intermediate.dense output.dense layernorm_before layernorm_after""".split()
"""Modules of a layer as transformers 4.57 names them."""


def names_of_4(depth: int) -> set[str]:
    modules = ["embeddings.patch_embeddings.projection", "layernorm"]
    modules += [f"encoder.layer.{i}.{name}" for i in range(depth) for name in LAYER_4]
    return {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")} | {"embeddings.position_embeddings"}


class TestNames:
    def test_both_styles(self):
        state = make_encoder().state_dict()
        four, five = to_huggingface_names(state, "4"), to_huggingface_names(state, "5")
        assert set(four) == names_of_4(2) and style_of(four) == "4"
        installed = four if transformers.__version__ < "5" else five
        assert set(to_huggingface(make_encoder()).state_dict()) == set(installed) and style_of(five) == "5"
        for renamed in (four, five, {f"ijepa.{name}": value for name, value in four.items()}):
            ours = from_huggingface_names(renamed)
            assert ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)

    def test_pooler_and_classifier_are_left_out(self):
        state = to_huggingface_names(make_encoder().state_dict(), "5")
        more = {"pooler.dense.weight": torch.zeros(1), "embeddings.mask_token": torch.zeros(1)}
        assert from_huggingface_names(state | more).keys() == make_encoder().state_dict().keys()

    def test_what_is_not_understood_keeps_its_name(self):
        state = to_huggingface_names(make_encoder().state_dict(), "5")
        del state["layers.1.attention.k_proj.bias"]
        state["layers.1.extra.weight"] = torch.zeros(1)
        ours = from_huggingface_names(state)
        assert {"layers.1.attention.q_proj.bias", "layers.1.extra.weight"} <= ours.keys()
        assert "blocks.1.attn.qkv.bias" not in ours


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "encoder"
    save_huggingface(make_encoder(), folder)
    return folder


class TestFolders:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch):
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    @pytest.mark.parametrize("attention", ["sdpa", "eager", "ijepa_fast"])
    def test_auto_model_opens_it(self, folder, attention):
        encoder = make_encoder()
        model = AutoModel.from_pretrained(folder, attn_implementation=attention)
        assert type(model) is IJepaModel and model.config._attn_implementation == attention
        images = make_images(encoder)
        torch.testing.assert_close(features(model, images), encoder(images), rtol=0, atol=1e-5)

    def test_it_has_the_names_that_both_versions_read(self, folder):
        assert set(load_file(folder / "model.safetensors")) == names_of_4(2)

    def test_the_image_processor_makes_what_the_encoder_expects(self, folder):
        processor = AutoImageProcessor.from_pretrained(folder)
        encoder = make_encoder()
        raw = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        pixels = processor(raw.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(encoder(pixels), encoder(raw[None]), rtol=0, atol=1e-5)
        small = processor(torch.zeros(20, 50, 3, dtype=torch.uint8).numpy(), return_tensors="pt")["pixel_values"]
        assert small.shape == (1, 3, 32, 32)

    def test_back_from_a_folder_with_its_mean_and_std(self, tmp_path):
        encoder = make_encoder("oblong, one channel")
        save_huggingface(encoder, tmp_path)
        again = from_huggingface(tmp_path)
        raw = torch.randint(0, 256, (2, 1, 16, 32), dtype=torch.uint8)
        assert torch.equal(again(raw), encoder(raw))

    @pytest.mark.parametrize("style", ["4", "5"])
    @pytest.mark.parametrize("form", ["one file", "shards", "pickle"])
    def test_folders_of_every_kind(self, folder, tmp_path, style, form):
        encoder = make_encoder()
        state = to_huggingface_names(encoder.state_dict(), style)
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        if form == "one file":
            save_file(state, tmp_path / "model.safetensors")
        elif form == "pickle":
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:
            where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
            for file in set(where.values()):
                save_file({name: state[name] for name in state if where[name] == file}, tmp_path / file)
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        images = make_images(encoder)
        assert torch.equal(from_huggingface(tmp_path)(images), encoder(images))

    def test_what_does_not_fit_is_listed(self, folder, tmp_path):
        state = load_file(folder / "model.safetensors")
        del state["encoder.layer.0.output.dense.weight"]
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(WeightsError, match=r"1 missing: blocks\.0\.mlp\.fc2\.weight"):
            from_huggingface(tmp_path)

    def test_a_pickle_of_something_else(self, folder, tmp_path):
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        torch.save([1], tmp_path / "pytorch_model.bin")
        with pytest.raises(WeightsError, match="pytorch_model.bin holds list, no weights"):
            from_huggingface(tmp_path)

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(WeightsError, match=re.escape(f"{tmp_path} is a folder without config.json")):
            from_huggingface(tmp_path)


def with_attention(model: nn.Module, name: str) -> nn.Module:
    model.set_attn_implementation(name)
    return model


class TestAttention:
    def test_gradients_are_those_of_eager_attention(self):
        encoder = make_encoder()
        images = make_images(encoder)
        gradients = []
        for name in ("ijepa_fast", "eager"):
            model = with_attention(to_huggingface(encoder), name)
            features(model, images).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        largest = max(float(gradient.abs().max()) for gradient in gradients[1])
        for ours, theirs in zip(*gradients, strict=True):  # that of a bias of keys is zero but for rounding
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * largest)

    @takes_masks
    def test_a_padding_mask(self):
        encoder = make_encoder()
        images = make_images(encoder)
        there = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.5
        ours = features(with_attention(to_huggingface(encoder), "ijepa_fast"), images, attention_mask=there)
        theirs = features(with_attention(to_huggingface(encoder), "eager"), images, attention_mask=there)
        torch.testing.assert_close(ours[there], theirs[there], rtol=0, atol=1e-5)
        assert not torch.allclose(ours[there], encoder(images)[there], rtol=0, atol=1e-2)

    def test_another_vision_transformer(self):
        from transformers import ViTConfig

        config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
        model = ViTModel(config, add_pooling_layer=False).eval()
        images = torch.randn(2, 3, 32, 32)
        expected = features(with_attention(model, "eager"), images)
        torch.testing.assert_close(features(with_attention(model, "ijepa_fast"), images), expected, rtol=0, atol=1e-5)

    def test_another_scale(self):
        q, k, v = torch.randn(3, 2, 2, 5, 8).unbind(0)
        ours, weights = attention_forward(nn.Identity(), q, k, v, None, scaling=0.2)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2)
        torch.testing.assert_close(ours, expected.transpose(1, 2))
        assert weights is None

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"dropout": 0.1}, "no dropout, got dropout=0.1"),
            ({"is_causal": True}, "not for causal attention"),
            ({"output_attentions": True}, "has no attention weights to give"),
            ({"attention_mask": torch.zeros(2, 1, 5, 5)}, r"takes masks \[2, 5\] of tokens, got \[2, 1, 5, 5\]"),
            ({"key": torch.zeros(2, 1, 5, 8)}, r"queries \[2, 2, 5, 8\] and keys \[2, 1, 5, 8\]"),
        ],
    )
    def test_what_it_cannot_do_is_refused(self, arguments, words):
        q = torch.zeros(2, 2, 5, 8)
        with pytest.raises(ValueError, match=words):
            attention_forward(nn.Identity(), **{"query": q, "key": q, "value": q, "attention_mask": None} | arguments)


class TestPacked:
    @takes_masks
    def test_the_visible_tokens_of_a_masked_model(self):
        encoder = make_encoder()
        model, images = with_attention(to_huggingface(encoder), "eager"), make_images(encoder)
        there = torch.rand(3, 16, generator=torch.Generator().manual_seed(3)) < 0.5
        tokens = Ragged.from_lists([(b * 16 + row.nonzero().flatten()).tolist() for b, row in enumerate(there)])
        expected = features(model, images, attention_mask=there)[there]
        torch.testing.assert_close(from_huggingface(model)(images, tokens), expected, rtol=0, atol=1e-5)

    def test_images_of_another_size(self):
        model = to_huggingface(make_encoder())
        images = torch.randn(2, 3, 48, 48)
        expected = features(model, images, interpolate_pos_encoding=True)
        packed = from_huggingface(model)(images, Ragged.full(2, 36))
        torch.testing.assert_close(packed.unflatten(0, (2, 36)), expected, rtol=0, atol=1e-5)
