"""benchmarks/precision_curves.py and the page that shows its results."""

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import ablations, precision_curves
from benchmarks.report.sections import precision
from ijepa_fast.model.vit import VisionTransformer, cast_weights

VARIANTS = ablations.variants("precision")


def test_products_in_fp32_are_the_bf16_products_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator).bfloat16() for s in ((40, 64), (24, 64), (24,)))
    x.requires_grad_()
    with ablations.ProductsInFp32():
        out = F.linear(x, weight, bias)
    exact = x.detach().double() @ weight.double().T + bias.double()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.detach().double(), exact, rtol=2**-8, atol=1e-5)
    out.sum().backward()
    torch.testing.assert_close(x.grad.double(), weight.double().sum(0).expand(40, -1), rtol=2**-8, atol=1e-5)


def test_variants_differ_in_their_precision_alone(tmp_path):
    configs = {name: ablations.run_config(name, config, 0, tmp_path) for name, config in VARIANTS.items()}
    changed = [set(ablations.changes(configs["fp32"], config)) for config in configs.values()]
    assert set().union(*changed) == {"train.precision", "step.wide_residual", "step.fp8_targets"}
    assert len({config.output for config in configs.values()}) == len(configs) == 4


def test_likeness_is_by_block_and_leaves_the_precision_of_the_caller():
    torch.manual_seed(0)
    encoder = VisionTransformer(32, 4, embed_dim=64, depth=3, num_heads=2)
    images = precision_curves.rendered_images(6, 32)
    pairs = precision_curves.likeness(encoder, images)
    assert [(pair["a"], pair["b"]) for pair in pairs] == [("bf16", "fp32"), ("row", "bf16")]
    for pair in pairs:
        assert len(pair["blocks"]) == 3
        for block in pair["blocks"]:
            assert 0.9 < block["min"] <= block["mean"] < 1 and 0.9 < block["centred_mean"] < 1
    rounded = [pair["blocks"][-1]["mean"] for pair in pairs]
    assert rounded[0] > rounded[1]

    cast_weights(encoder, torch.bfloat16)
    same = precision_curves.likeness(encoder, images)
    assert same[0]["blocks"][-1] == {"mean": 1.0, "min": 1.0, "centred_mean": 1.0}


def made_up(seeds=(0, 1)):
    def run(seed, loss):
        curve = [{"step": step, "loss": loss + 1 / step, "rank": 3.0, "knn": 0.3} for step in range(10, 80, 10)]
        return {"seed": seed, "probe": 0.5 + loss, "knn": 0.4, "rank": 9.0, "curve": curve}

    variants = [
        {"recipe": name, "changes": {}, "runs": [run(seed, 0.01 * i + 0.001 * seed) for seed in seeds]}
        for i, name in enumerate(VARIANTS)
    ]
    block = {"mean": 0.99912, "min": 0.99834, "centred_mean": 0.98765}
    compared = [{"a": "row", "b": "bf16", "blocks": [block, block]}]
    return {
        "kind": "precision", "file": "precision.json", "recipes": variants,
        "machine": {"cpu": "CPU", "threads": 1, "cores": 2, "torch": "2.11.0", "python": "3.12.3", "commit": None},
        "settings": {"model.depth": 3, "model.embed_dim": 64, "train.steps": 70, "train.batch_size": 32},
        "likeness": [{"encoder": "ViT-S/16, untrained", "compared": compared}],
    }  # fmt: skip


def test_the_page_says_what_the_results_say(tmp_path):
    text = precision({"precision": [made_up()]})
    end = sum(1 / step for step in range(30, 80, 10)) / 5
    difference, points = "0.0100 ± 0.0000 (2 of 2 above)", "1.0 ± 0.0 (2 of 2 above)"
    assert f"| bf16, fp32 residual | {end + 0.0205:.4f} ± 0.0007 | {difference} | 52.0 ± 0.1 | {points} |" in text
    row = "| ViT-S/16, untrained | 2 | FP8, row and bf16 | 0.99912 (0.99834) | 0.99912 (0.99834) | 0.98765 |"
    assert row in text and "70 steps of 32 images" in text
    single = precision({"precision": [made_up(seeds=(0,))]})
    assert f"| bf16 | {end + 0.01:.4f} |  | 51.0 |  |" in single


@pytest.mark.slow
def test_command(tmp_path):
    file = tmp_path / "results" / "precision.json"
    arguments = ["--seeds", "3", "--steps", "20", "--jobs", "1", "--sizes", "--out", str(tmp_path / "runs")]
    assert precision_curves.main([*arguments, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [entry["recipe"] for entry in found["recipes"]] == list(VARIANTS)
    for entry in found["recipes"]:
        (run,) = entry["runs"]
        assert run["seed"] == 3 and [row["step"] for row in run["curve"]] == [10, 20]
        assert all(0 <= run[name] <= 1 for name in ("probe", "knn"))
    ends = [entry["runs"][0]["curve"][-1]["loss"] for entry in found["recipes"]]
    assert len(set(ends)) == 4 and max(ends) - min(ends) < 0.02
    assert found["likeness"][0]["encoder"] == "trained in bf16, seed 3"
    text = precision({"precision": [found | {"file": "precision.json"}]})
    assert "| bf16, FP8 targets, row |" in text
