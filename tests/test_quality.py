"""benchmarks/quality.py: equal budgets, the frozen teacher, what is not run twice, and the table."""

import json
import sys

import yaml

from benchmarks import quality

GROUP = {
    "base": "demo",
    "seconds": 0.2,
    "curve": [0.5],
    "settings": {
        "model.embed_dim": 16,
        "model.depth": 1,
        "train.batch_size": 8,
        "evaluation.images": [64, 64],
    },
    "variants": {
        "ours": {},
        "no_prediction": {"objective.prediction_weight": 0.0},
        "mae": {"objective.targets": "pixels"},
        "teacher": {"teacher": "mae"},
        "untrained": {"untrained": True},
    },
}


def test_variants_are_trained_for_a_budget_once_and_shown(tmp_path, monkeypatch, capsys):
    variants, results, page = tmp_path / "q.yaml", tmp_path / "q.json", tmp_path / "q.md"
    variants.write_text(yaml.safe_dump({"tiny": GROUP}, sort_keys=False))
    page.write_text("before\n<!-- table of q.json -->\n<!-- end of table -->\nafter\n")
    files = ["--variants", str(variants), "--json", str(results), "--group", "tiny"]
    monkeypatch.setattr(sys, "argv", ["quality", "rendered", *files])
    assert quality.main() == 0
    runs = json.loads(results.read_text())["runs"]
    assert [run["variant"] for run in runs] == list(GROUP["variants"])
    for run in runs[:4]:
        assert run["images"] == 8 * run["steps"] > 0
        assert run["processor_seconds"] > 0 and 0 < run["figures"]["probe"] < 1
    assert set(runs[-1]["figures"]) == {"knn", "probe", "rank", "pixels", "colours"}

    monkeypatch.setattr(quality, "run", None)  # nothing is trained again
    monkeypatch.setattr(
        sys, "argv", ["quality", "rendered", *files, "--doc", str(page), "--png", str(tmp_path / "q.png")]
    )
    assert quality.main() == 0
    text = page.read_text()
    assert "| raw pixels |" in text and "| ours |" in text and text.startswith("before\n") and text.endswith("after\n")
    assert (tmp_path / "q.png").exists()
