"""Pages say what the results files say, and nothing where there is none or where tests failed."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest

from benchmarks import charts, report
from benchmarks.targets import op_targets, step_targets

ROOT = Path(__file__).resolve().parents[1]
KERNELS = (ROOT / "docs" / "kernels.md").read_text()
MACHINE = {
    "device": "cuda", "gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0",
    "cpu": "CPU", "threads": 1, "cores": 16, "python": "3.12.3", "commit": "0123456789abcdef", "dirty": False,
}  # fmt: skip


def op_row(op, case, mode="forward", provider="ours", model="ViT-H/14", p50=100.0, share=0.9, **more):
    times = {"graph": {"p20": p50 - 1, "p50": p50, "p80": p50 + 1, "runs": 30, "method": "graph"}}
    row = {"model": model, "op": op, "case": case, "mode": mode, "provider": provider, "times": times}
    row |= {"gb_per_s": 3870.0, "floor_us": share * p50, "floor": "copy", "of_floor": share, "faster_than": {}}
    return row | more


def step_report(model="vit_h14", masks="exact", rates=(700.0, 200.0, 600.0), memory=(80, 200, 100)):
    names = ("ours", "eager", "compiled")
    results = {
        name: {"images_per_second": rate, "ms": 128e3 / rate, "context_tokens": 50.0 if name == "eager" else 100.0,
               "useful_tflops": 500.0, "share_of_matmul_peak": 0.63, "peak_memory_bytes": size << 30}
        for name, rate, size in zip(names, rates, memory, strict=True)
    }  # fmt: skip
    ratio = {f"ours/{name}": rate / rates[0] for name, rate in zip(names[1:], rates[1:], strict=True)}
    settings = {"model": model, "batch": 128, "masks": masks}
    return {"kind": "step", "machine": MACHINE, "settings": settings, "implementations": results, "ratio": ratio}


@pytest.fixture
def check():
    """A GPU run in which everything went well."""
    rows = [
        op_row("gather_patches", "context", p50=9.25, share=0.91),
        op_row("ema_", "all parameters", p50=1800.0, share=0.5, faster_than={"foreach": 1.25, "loop": 1.4}),
        op_row("varlen_attention", "context", "both", p50=150.0, faster_than={"torch_varlen": 1.5}),
        op_row("varlen_attention", "context", "both", "torch_varlen", p50=225.0),
    ]
    device_times = [{"images": 2048, "recipe": "official", "grid": "16x16", "times": {"p50": 41.5}}]
    sanitizer = {"compute-sanitizer memcheck": {"exit_status": 0, "seconds": 20.0}}
    parts = {
        "tests": {"passed": 120, "failed": []},
        "masks": {"commands": sanitizer, "report": {"device_times": device_times}},
        "ops": {"rows": rows},
        "step": {"reports": [step_report()]},
    }
    entries = {name: {"machine": MACHINE, "commands": {}, **part} for name, part in parts.items()}
    return {"kind": "gpu_check", "file": "gpu-nvidia-h200.json", "parts": entries}


def pages_of(*checks):
    return report.results_page({"gpu_check": list(checks)})


def test_committed_pages_are_those_of_the_committed_results():
    reports = report.load(ROOT / "benchmarks" / "results")
    assert reports["masks"]
    for path, text in report.pages(ROOT, reports).items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run python -m benchmarks.report"


def test_no_results_are_no_figures():
    page = report.results_page({})
    assert page.count("not measured yet") == 3 and "not run yet" in page
    assert not re.search(r"\d", page.replace("L2", ""))
    assert "have not been timed on a GPU yet" in report.readme_table({})
    assert report.kernels_page(KERNELS, {}).count("not measured yet") == sum(1 for _ in kernel_lines(KERNELS))


def kernel_lines(text):
    table = text[text.index("| kernel |") :].split("\n\n")[0].split("\n")
    return (line for line in table[2:])


def test_a_gpu_run_is_shown(check):
    page = pages_of(check)
    for words in (
        "NVIDIA H200; torch 2.11.0, Triton 3.6.0, CUDA 13.0, driver 580.1, Python 3.12.3; commit 0123456789ab",
        "| gather_patches | context | forward | 9.2 (8.2 to 10.2) | 3,870 GB/s | 91% |  |",
        "| varlen_attention | context | both | 150.0 (149.0 to 151.0) | 3,870 GB/s | 90% | torch_varlen 1.50 |",
        "| 2048 | official | 16x16 | 41.5 |",
        "compute-sanitizer memcheck: clean.",
        "120 tests passed.",
        "| vit_h14 | 128 | exact | ours | 700.0 | 182.9 | 100.0 | 500.0 (63%) | 80.0 |  |",
        "| vit_h14 | 128 | batch_min | eager | 200.0 |",
    ):
        assert words in page
    assert "700.0" in report.readme_table({"gpu_check": [check]})


def test_the_column_of_the_kernels_page(check):
    page = report.kernels_page(KERNELS, {"gpu_check": [check]})
    assert "| 6.2 | 9.2 µs, 91% |" in page and "1,800.0 µs, 50% |" in page
    assert page.count("not measured yet") == KERNELS.count("not measured yet") - 2
    assert report.kernels_page(page, {}) == KERNELS  # and back


@pytest.mark.parametrize("tests", [{"passed": 119, "failed": ["test_x.py: test_y"]}, {"passed": 0, "failed": []}, None])
def test_nothing_is_shown_of_a_run_whose_tests_failed(check, tests):
    if tests is None:
        del check["parts"]["tests"]
    else:
        check["parts"]["tests"] |= tests
    page = pages_of(check)
    assert "Times of this run are not shown." in page
    assert "9.2" not in page and "700.0" not in page and "41.5" not in page
    assert report.kernels_page(KERNELS, {"gpu_check": [check]}) == report.kernels_page(KERNELS, {})


def test_a_dry_run_is_no_gpu_run(check):
    for entry in check["parts"].values():
        entry["machine"] = {key: value for key, value in MACHINE.items() if key != "gpu"}
    assert not report.trusted({"gpu_check": [check]})
    assert pages_of(check) == report.results_page({})


def test_what_the_sanitizer_found_is_told(check):
    masks = check["parts"]["masks"]
    masks["commands"]["compute-sanitizer racecheck"] = {"exit_status": 77, "seconds": 20.0}
    masks["commands"]["compute-sanitizer memcheck"] = {"stopped_after_s": 50.0}
    page = pages_of(check)
    assert "racecheck: not clean (exit status 77, seconds 20.0)" in page
    assert "memcheck: not clean (stopped after s 50.0)" in page
    masks["commands"], masks["sanitizer"] = {}, {"not_run": "compute-sanitizer was not found"}
    assert "compute-sanitizer was not run: compute-sanitizer was not found." in pages_of(check)


def test_failed_and_missing_providers_are_named(check):
    place = {"op": "o", "case": "c", "mode": "both", "model": "ViT-H/14"}
    check["parts"]["ops"]["rows"] += [
        place | {"provider": "ours", "failed": "WrongResult: 9"},
        place | {"provider": "xformers", "unavailable": "not here"},
    ]
    page = pages_of(check)
    assert "- ours, o, c, both, ViT-H/14: WrongResult: 9" in page and "- xformers: not here" in page


def test_targets_of_ops(check):
    found = {what: (wanted, measured, met) for what, wanted, measured, met in op_targets(check["parts"]["ops"]["rows"])}
    assert found["gather_patches, context, forward"] == ("85% of a copy", "91%", True)
    assert found["ema_, all parameters, forward"] == ("85% of a copy", "50%", False)
    assert found["ema_ over the mul_/add_ loop"] == ("1.5 times as fast", "1.40", False)
    assert found["adamw_ema_ over fused torch AdamW, _foreach_lerp_ and casts"] == ("1.4 times as fast", "", None)
    attention = [met for what, (_, _, met) in found.items() if what.startswith("varlen_attention")]
    assert sorted(attention, key=str) == [None] * 5 + [True]


def test_targets_of_steps():
    found = {what: (wanted, measured, met) for what, wanted, measured, met in step_targets([step_report()])}
    assert found["vit_h14, exact"] == ("640 images/s", "700", True)
    assert found["vit_h14, exact: context tokens/s over eager"] == ("3 times as fast", "7.00", True)
    assert found["vit_h14, exact: images/s over compiled"] == ("1.15 times as fast", "1.17", True)
    assert found["vit_h14, exact: peak memory over compiled"] == ("at most 1", "0.80", True)
    assert found["vit_b16, exact"] == ("4,000 images/s", "", None)


def test_marks_must_be_there_once():
    text = "a\n<!-- x: written by `python -m benchmarks.report` -->\nold\n<!-- end of x -->\nb"
    assert report.between(text, "x", "new").split("\n")[2] == "new"
    for broken in ("nothing", text + text):
        with pytest.raises(ValueError, match="the marks of 'x' must be there once"):
            report.between(broken, "x", "new")


def test_files_without_a_kind_are_left_out(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"mean": 1}))
    (tmp_path / "b.json").write_text(json.dumps({"kind": "step", "n": 2}))
    assert report.load(tmp_path) == {"step": [{"kind": "step", "n": 2, "file": "b.json"}]}


def test_charts(check, tmp_path):
    reports = report.load(ROOT / "benchmarks" / "results") | {"gpu_check": [deepcopy(check)]}
    drawn = charts.draw(reports, tmp_path)
    assert {path.name for path in drawn} >= {"bench_masks.png", "bench_ops.png", "bench_attention.png",
                                             "bench_steps.png"}  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    shown = set(re.findall(r"docs/images/(\w+\.png)", report.results_page(reports)))
    assert shown == {path.name for path in drawn}
    committed = re.findall(r"\.\./(docs/images/\w+\.png)", (ROOT / "benchmarks" / "RESULTS.md").read_text())
    assert committed and all((ROOT / name).exists() for name in committed)
