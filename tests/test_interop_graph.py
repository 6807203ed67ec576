"""Encoders as graphs of torch.export and ONNX, and the model card: what they compute and what they tell."""

import importlib.util
import json
import re
import sys

import pytest
import torch
import yaml

from ijepa_fast import VisionTransformer
from ijepa_fast.config import from_dict
from ijepa_fast.interop.export import export
from ijepa_fast.interop.graph import SUFFIXES, DenseEncoder, save_graph
from ijepa_fast.weights.runs import load_run, save_run

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))
SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "predictor_embed_dim": 8}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return VisionTransformer(img_size=24, patch_size=4, embed_dim=16, depth=2, num_heads=2).eval()


@pytest.fixture
def run(tmp_path):
    places = {"data": "/home/somebody/secret", "output": "/home/somebody/run"}
    config = from_dict({"model": SIZES, **places, "evaluation": {"labels": "/home/somebody/l.csv"}, "seed": 3})
    path = save_run(tmp_path / "run", config.model.build(config.objective), config, 4, data="folder:1234:abc")
    return path.parent.parent


@pytest.mark.parametrize("sides", [(24, 24), (32, 20)])
def test_the_dense_encoder_is_the_encoder(encoder, sides):
    images = torch.randn(3, 3, *sides)
    dense = DenseEncoder(encoder, encoder.grid_of(*sides))
    torch.testing.assert_close(dense(images), encoder(images), rtol=0, atol=2e-6)


def outputs(path, images):
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    import onnxruntime

    return torch.from_numpy(onnxruntime.InferenceSession(path).run(["features"], {"images": images.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize(
    "to",
    [
        "torch",
        pytest.param("onnx", marks=pytest.mark.skipif(not HAS_ONNX, reason="onnxruntime or onnxscript is missing")),
    ],
)
def test_graphs_compute_the_features_at_the_asked_size(encoder, tmp_path, to, batch):
    out = tmp_path / f"encoder{SUFFIXES[to]}"
    said = save_graph(encoder, to, out, (32, 20), batch, (0, 4095))
    assert f"[{batch or 'B'}, 3, 32, 20], values of 0 to 4095 taken to [0, 1], less mean [0.485" in said
    for count in (1, 2, 5) if batch is None else (batch,):
        images = torch.randn(count, 3, 32, 20)
        with torch.no_grad():
            torch.testing.assert_close(outputs(out, images), encoder(images), rtol=0, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_wishes_that_cannot_be_are_refused(encoder, run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cannot be cut into patches of 4 px"):
        save_graph(encoder, "torch", tmp_path / "a.pt2", (30, 24))
    with pytest.raises(ValueError, match="end in .pt2, got"):
        save_graph(encoder, "torch", tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        export(run, "torch", tmp_path / "a.pt2", batch=0)
    with pytest.raises(ValueError, match="image_size is for the format onnx or torch, not for timm"):
        export(run, "timm", tmp_path / "a", image_size=(24, 24))
    with pytest.raises(ValueError, match="license is for the format huggingface, not for onnx"):
        export(run, "onnx", tmp_path / "a.onnx", license="mit")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="onnxscript"):
        export(run, "onnx", tmp_path / "a.onnx")
    assert not list(tmp_path.glob("a*"))


def test_the_card_tells_recipe_data_figures_and_licence_but_no_places(run, tmp_path):
    summary = {"steps": 4, "before": {"rank": 2.0, "knn": 0.2, "probe": 0.25}, "pixels": {"knn": 0.1, "probe": 0.15}}
    summary["after"] = {"rank": 9.5, "knn": 0.375, "probe": 0.5}
    (run / "summary.json").write_text(json.dumps(summary))
    export(run, "huggingface", tmp_path / "exported", license="cc-by-4.0")
    card = (tmp_path / "exported" / "README.md").read_text()
    head, body = card.split("---\n")[1:]
    assert yaml.safe_load(head)["license"] == "cc-by-4.0" and yaml.safe_load(head)["library_name"] == "transformers"
    assert "| **after training** | 37.5% | 50.0% | 9.5 |" in body and "| raw pixels | 10.0% | 15.0% |  |" in body
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.DOTALL)[1])
    assert settings["model.embed_dim"] == 16 and settings["seed"] == 3
    assert "drawn from 1,234" in body and "somebody" not in card and str(tmp_path) not in card


def test_the_card_of_imported_weights_claims_no_training(run, tmp_path):
    config = load_run(run)[1]
    about = {"kind": "an official checkpoint", "source": "somebody.pth.tar"}
    save_run(tmp_path / "imported", config.model.build(config.objective), config, 7, about=about)
    export(tmp_path / "imported", "huggingface", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "that was imported by" in card and "Elsewhere: these weights" in card
    assert "the licence of where they came from" in card and "steps of" not in card and "somebody" not in card


def test_a_push_needs_an_account_and_uploads_the_folder(run, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    done = []

    class Api:
        def whoami(self):
            if not done:
                raise hub.errors.LocalTokenNotFoundError("no token")

        def create_repo(self, name, **settings):
            done.append((name, settings))
            return f"https://hub/{name}"

        def upload_folder(self, **arguments):
            done.append(arguments)

    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(ValueError, match="--push needs an account: log in"):
        export(run, "huggingface", tmp_path / "exported", push="me/mine")
    assert not (tmp_path / "exported").exists()
    done.append("logged in")
    said = export(run, "huggingface", tmp_path / "exported", push="me/mine")
    assert "uploaded to https://hub/me/mine" in said and 'from_pretrained("me/mine")' in said
    assert done[1] == ("me/mine", {"private": True, "exist_ok": True}) and done[2]["repo_id"] == "me/mine"
    assert 'from_pretrained("me/mine")' in (tmp_path / "exported" / "README.md").read_text()
