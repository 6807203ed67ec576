"""The comparison of whole steps: what it reports, and that it refuses implementations which train something else."""

import json

import pytest
import torch

from benchmarks.step import IMPLEMENTATIONS, PHASES, Case, check_agreement, main, measure, model_config
from ijepa_fast.config import ModelConfig
from ijepa_fast.flops import TokenCounts, step_flops

MODEL = ModelConfig(56, 4, embed_dim=24, depth=2, num_heads=2, predictor_embed_dim=16, predictor_depth=2)


@pytest.fixture(autouse=True)
def without_compiling(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def make_case(masks):
    return Case(MODEL, 4, masks, torch.device("cpu"), "fp32", steps=4)


@pytest.mark.parametrize("masks", ["exact", "batch_min"])
def test_all_implementations_are_compared_and_timed(masks):
    case = make_case(masks)
    report = measure(case, IMPLEMENTATIONS, rounds=3, warm_up=1)
    expected = {"exact": {"compiled/ours"}, "batch_min": {"ours/eager", "compiled/eager"}}[masks]
    # Official masks are checked too when exact ones are timed: they are what eager can be compared on.
    assert expected | {"ours/eager", "compiled/eager"} == set(report["agreement"])
    assert set(report["implementations"]) == set(IMPLEMENTATIONS)
    assert set(report["ratio"]) == {f"{a}/{b}" for a in IMPLEMENTATIONS for b in IMPLEMENTATIONS if a != b}
    for name, result in report["implementations"].items():
        assert set(result["phases_ms"]) == set(PHASES) and all(value > 0 for value in result["phases_ms"].values())
        assert len(result["ms_of_rounds"]) == 3
        assert result["images_per_second"] == pytest.approx(4e3 / result["ms"])
        plain = name != "ours"
        tokens = TokenCounts.of(*(case.truncated if name == "eager" else case.drawn))
        flops = step_flops(MODEL, tokens, all_targets=plain, all_predictions=plain).total
        assert result["useful_gflops_per_image"] == pytest.approx(flops / 1e9)
        assert result["share_of_matmul_peak"] == pytest.approx(result["useful_tflops"] / report["matmul_tflops"])
    more = report["implementations"]["ours"]["context_tokens"] / report["implementations"]["eager"]["context_tokens"]
    assert more > 1.2 if masks == "exact" else more == 1


@pytest.mark.parametrize("wrong", ["weights", "loss"])
def test_what_trains_something_else_is_not_timed(wrong, monkeypatch):
    case = make_case("batch_min")
    ours, eager = case.make("ours"), case.make("eager")
    check_agreement(case, [ours, eager])
    if wrong == "weights":
        with torch.no_grad():
            eager.networks.context_encoder.norm.weight[0] += 0.1
    else:
        loss = eager.networks.loss
        monkeypatch.setattr(eager.networks, "loss", lambda *inputs: 1.001 * loss(*inputs))
    with pytest.raises(ValueError, match="ours does not train what eager trains"):
        check_agreement(case, [ours, eager])


def test_report_file_and_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.step.model_config", lambda name, img_size: MODEL)
    path = tmp_path / "out" / "step.json"
    main(f"--impl ours,eager --device cpu --batch 4 --rounds 2 --warm-up 1 --json {path}".split())
    report = json.loads(path.read_text())
    assert report["kind"] == "step" and report["machine"]["device"] == "cpu" and report["settings"]["batch"] == 4
    assert report["ratio"]["ours/eager"] > 0 and "ours/eager" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--impl", "ours,theirs"])
    assert "got 'theirs'" in capsys.readouterr().err


def test_model_names():
    huge = model_config("vit_h14")
    assert (huge.patch_size, huge.embed_dim, huge.depth, huge.predictor_depth) == (14, 1280, 32, 12)
    assert model_config("vit_small").predictor_depth == 6
