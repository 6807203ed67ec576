"""The comparison of whole steps: what it reports, and that it refuses implementations which train something else."""

import json

import pytest
import torch

from benchmarks import implementations, step
from benchmarks.implementations import KINDS, Case, check_agreement, model_config, parse
from benchmarks.results_files import PHASES
from benchmarks.step import main, measure
from ijepa_fast.config import ModelConfig
from ijepa_fast.model.fp8 import Fp8Linear
from ijepa_fast.model.fused_blocks import FusedLayerNorm
from ijepa_fast.step import captured
from ijepa_fast.step.flops import TokenCounts, step_flops
from ijepa_fast.step.options import Suffix
from tests.test_captured import Recorder

MODEL = ModelConfig(56, 4, embed_dim=24, depth=2, num_heads=2, predictor_embed_dim=16, predictor_depth=2)
MODEL_16 = ModelConfig(56, 4, embed_dim=32, depth=2, num_heads=2, predictor_embed_dim=16, predictor_depth=2)
CPU = torch.device("cpu")


@pytest.fixture
def compiling():
    """torch.compile without machine code."""
    compile = torch.compile
    return lambda function, **options: compile(function, **options | {"backend": "eager"})


@pytest.fixture(autouse=True)
def without_compiling(monkeypatch, compiling):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def make_case(masks, steps=4):
    return Case(MODEL, 4, masks, CPU, "fp32", steps=steps)


@pytest.mark.parametrize("masks", ["exact", "batch_min"])
def test_all_implementations_are_compared_and_timed(masks):
    case = make_case(masks)
    report = measure(case, KINDS, rounds=3, warm_up=1)
    expected = {"exact": {"compiled/ours"}, "batch_min": {"ours/eager", "compiled/eager"}}[masks]
    # Official masks are checked too when exact ones are timed: they are what eager can be compared on.
    assert expected | {"ours/eager", "compiled/eager"} == set(report["agreement"])
    assert set(report["implementations"]) == set(KINDS) and not report["failed"]
    assert set(report["ratio"]) == {f"{a}/{b}" for a in KINDS for b in KINDS if a != b}
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


def test_variants_of_ours_are_timed_side_by_side(monkeypatch):
    compiled, recorders = [], []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setattr(captured, "CudaGraphs", lambda device: recorders.append(Recorder()) or recorders[-1])
    names, made = ["ours", "ours+compile", "ours+compile+capture"], []

    def counted(device):
        made.append((recorders[0].eager, recorders[0].captured))
        return 1e9

    monkeypatch.setattr(step, "matmul_rate", counted)
    report = measure(make_case("exact"), names, rounds=2, warm_up=2)
    assert set(report["implementations"]) == set(names) and not report["failed"]
    assert len(compiled) == 2 * 6 and set(report["agreement"]) == {f"{name}/ours" for name in names[1:]}
    assert all(apart.keys() == {"loss", "gradient", "losses"} for apart in report["agreement"].values())
    replayed = report["implementations"]["ours+compile+capture"]
    assert replayed["phases_ms"] is None and "replayed" in replayed["no_phases"]
    (recorder,) = recorders
    # Graphs of all shapes were there before the first step that is timed.
    assert {*made} == {(recorder.eager, recorder.captured)} and recorder.eager == recorder.captured > 0
    assert len(recorder.replayed) == 3 + 2 * 4 + 2 - recorder.eager


def test_names_of_implementations_and_models():
    huge = model_config("vit_h14")
    assert (huge.patch_size, huge.embed_dim, huge.depth, huge.predictor_depth) == (14, 1280, 32, 12)
    assert parse("ours") == ("ours", [])
    assert parse("ours+compile+capture") == ("ours", ["compile", "capture"])
    for name, words in {
        "theirs": "ours, eager, compiled, got 'theirs'",
        "eager+compile": "suffixes are for ours, got 'eager[+]compile'",
        "ours+magic": "compile.*got 'magic'",
        "ours+compile+compile": "at most once",
        "ours+": "got ''",
    }.items():
        with pytest.raises(ValueError, match=words):
            parse(name)


def test_every_variant_trains_what_ours_trains():
    """Those that a CPU can run, in bf16: on a GPU check_agreement says the same of all of them."""
    case = Case(MODEL_16, 4, "exact", CPU, "bf16", steps=1)
    names = ["ours", "ours+fused", "ours+wide", "ours+fp8", "ours+fused+fp8"]
    candidates = [case.make(name) for name in names]
    found, wrong = check_agreement(case, candidates)
    assert not wrong and set(found) == {f"{name}/ours" for name in names[1:]}
    for name, candidate in zip(names, candidates, strict=True):
        assert ("fp8" in name) == candidate.approximate == ("targets" in found.get(f"{name}/ours", {}))
        # And they are what they are called.
        model = candidate.networks
        assert isinstance(model.context_encoder.norm, FusedLayerNorm) == ("fused" in name)
        assert model.context_encoder.wide_residual == (name == "ours+wide")
        assert isinstance(model.target_encoder.blocks[0].attn.qkv, Fp8Linear) == ("fp8" in name)
    assert all(found[f"{name}/ours"]["targets"] > 1e-6 for name in names[3:])


@pytest.mark.parametrize("wrong", ["weights", "loss"])
def test_what_trains_something_else_is_not_timed(wrong, monkeypatch):
    case, make = make_case("batch_min"), Case.make

    def spoiled(self, name):
        candidate = make(self, name)
        if name == "compiled" and wrong == "weights":
            with torch.no_grad():
                candidate.networks.context_encoder.norm.weight[0] += 0.1
        elif name == "compiled":
            loss = candidate.networks.loss
            monkeypatch.setattr(candidate.networks, "loss", lambda *inputs: 1.001 * loss(*inputs))
        return candidate

    monkeypatch.setattr(Case, "make", spoiled)
    report = measure(case, KINDS, rounds=1, warm_up=1)
    assert set(report["implementations"]) == {"ours", "eager"}
    assert "does not train what eager trains" in report["failed"]["compiled"] and len(report["failed"]) == 1


def test_a_variant_that_updates_otherwise_is_found(monkeypatch):
    case = make_case("exact")
    ours, other = case.make("ours"), case.make("ours+compile")
    other.holder.schedules = ours.holder.schedules.__class__(total_steps=1000, warmup_steps=10, lr_ends=(4e-4, 1e-6))
    found, wrong = check_agreement(case, [ours, other])
    assert found["ours+compile/ours"]["losses"] > 1e-4 and found["ours+compile/ours"]["gradient"] == 0
    assert "does not train what ours trains: losses" in wrong["ours+compile"]


def test_approximate_targets_are_judged_by_their_direction(monkeypatch):
    monkeypatch.setitem(implementations.SUFFIXES, "rounded", Suffix("blocks", "plain", True, None))
    case = make_case("exact")
    ours, rounded = case.make("ours"), case.make("ours+rounded")
    with torch.no_grad():
        for parameter in rounded.networks.target_encoder.parameters():
            parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    found, wrong = check_agreement(case, [ours, rounded])
    assert not wrong and found["ours+rounded/ours"].keys() == {"loss", "targets", "losses"}
    assert 1e-5 < found["ours+rounded/ours"]["targets"] < 0.02
    with torch.no_grad():
        for parameter in rounded.networks.target_encoder.blocks[0].parameters():
            parameter.normal_()
    found, wrong = check_agreement(case, [ours, rounded])
    assert found["ours+rounded/ours"]["targets"] > 0.02 and "ours+rounded" in wrong


def test_on_a_gpu_each_is_timed_beside_the_first_and_written(monkeypatch):
    """With a case on the CPU that says it is on a GPU."""
    case, names, written, tidied = make_case("exact"), ["ours", "eager", "compiled", "ours+compile"], [], []
    peaks, together = iter((5, 7, 6, 9)), step.measure_together

    def limited(case, names, *rest):
        if "compiled" in names:
            raise torch.OutOfMemoryError("CUDA out of memory")
        monkeypatch.setattr(case, "device", CPU)
        together(case, names, *rest[:2], rest[2] | {"cpu_time_ratio": {}}, rest[3])
        monkeypatch.setattr(case, "device", torch.device("cuda"))

    monkeypatch.setattr(case, "device", torch.device("cuda"))
    monkeypatch.setattr(step, "_tidy", tidied.append)
    monkeypatch.setattr(step, "peak_memory", lambda case, name: next(peaks))
    monkeypatch.setattr(step, "measure_together", limited)
    report = measure(case, names, 2, 1, lambda now: written.append(list(now["implementations"])))
    assert written == [["ours", "eager"], ["ours", "eager"], ["ours", "eager", "ours+compile"]]
    assert report["failed"] == {"compiled": "together with ours: OutOfMemoryError: CUDA out of memory"}
    assert [found["peak_memory_bytes"] for found in report["implementations"].values()] == [5, 7, 9] and tidied
    assert report["ratio"].keys() == {"ours/eager", "eager/ours", "ours/ours+compile", "ours+compile/ours"}


def test_report_file_and_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.step.model_config", lambda name, img_size: MODEL)
    path = tmp_path / "out" / "step.json"
    main(f"--impl ours,eager --device cpu --batch 4 --rounds 2 --warm-up 1 --json {path}".split())
    report = json.loads(path.read_text())
    assert report["kind"] == "step" and report["machine"]["device"] == "cpu" and report["settings"]["batch"] == 4
    assert report["ratio"]["ours/eager"] > 0 and "ours/eager" in capsys.readouterr().out
    for names, words in {
        "ours,theirs": "got 'theirs'",
        "ours,ours+capture": "step.capture needs one GPU",
        "ours+overlap": "step.overlap_target needs a GPU",
        "ours+fp8": "needs train.precision bf16",
    }.items():
        with pytest.raises(SystemExit):
            main(["--impl", names, "--device", "cpu"])
        assert words in capsys.readouterr().err


def test_compiled_variants_pass_every_check(monkeypatch, compiling):
    """Through dynamo, with widths that differ as in real models: training, official masks and evaluation together."""
    monkeypatch.setattr(torch, "compile", compiling)
    torch._dynamo.reset()
    case = Case(MODEL_16, 4, "exact", CPU, "fp32", steps=2)
    names = ["ours", "ours+compile", "ours+compile+fused"]
    report = measure(case, names, rounds=1, warm_up=1)
    assert not report["failed"] and set(report["implementations"]) == set(names)


def test_what_fails_does_not_take_the_others_with_it(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    report = measure(make_case("batch_min"), ["ours", "ours+compile", "eager"], rounds=1, warm_up=1)
    assert set(report["implementations"]) == {"ours", "eager"}
    assert list(report["failed"]) == ["ours+compile"] and "no such kernel" in report["failed"]["ours+compile"]
