"""``ijepa-fast bench`` as it is typed."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from ijepa_fast import cli
from ijepa_fast.bench.command import RECIPES
from ijepa_fast.bench.steps import step_rate
from ijepa_fast.config import TrainConfig, find_recipe
from tests.tiny import tiny_run

CPU = torch.device("cpu")
TINY = {
    "model": {
        "img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2,
        "predictor_embed_dim": 8, "predictor_depth": 1,
    },
    "masks": {"min_keep": 1},
    "train": {"device": "cpu"},
}  # fmt: skip


def test_a_recipe_is_measured(tmp_path, capsys):
    config, path = tmp_path / "small.yaml", tmp_path / "report.json"
    config.write_text(yaml.safe_dump(TINY))
    arguments = ["--config", str(config), "--images", "2", "--seconds", "4", "--json", str(path)]
    assert cli.main(["bench", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "small: " in printed and "images/s in steps of 2 (fp32, " in printed and "gather_patches" in printed
    report = json.loads(path.read_text())
    step = report["step"]
    assert step["images_per_second"] == pytest.approx(2e6 / step["times"]["p50"], rel=1e-3)
    assert 1 < step["context_tokens"] <= 36 and step["images"] == 2
    assert {row["model"] for row in report["rows"]} == {"small"}
    assert {"ours", "eager"} <= {row["provider"] for row in report["rows"]} and "compile" not in printed
    assert cli.main(["bench", "--config", str(config), "--images", "0"]) != 0
    assert "images must be positive, got 0" in capsys.readouterr().err
    assert all(find_recipe(name).exists() for name in RECIPES.values())


def test_a_loss_that_is_not_finite_is_no_rate(monkeypatch):
    config = tiny_run("none", "none")
    broken = replace(config, train=TrainConfig(precision="fp32"), objective=replace(config.objective))
    build = type(config.model).build

    def spoiled(self, objective):
        model = build(self, objective)
        model.predictor.mask_token.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(type(config.model), "build", spoiled)
    with pytest.raises(RuntimeError, match="the loss of step 0 was not finite"):
        step_rate(broken, CPU, 2, seconds=0)
