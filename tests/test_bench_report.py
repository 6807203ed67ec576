"""Pages say what the results files say, and nothing where there is none or where tests failed."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.report import __main__ as report
from benchmarks.report import charts, sections
from benchmarks.results_files import NOT_MEASURED, PHASES, between, load, trusted

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {
    "device": "cuda", "gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0",
    "cpu": "CPU", "threads": 1, "cores": 16, "python": "3.12.3", "commit": "0123456789abcdef", "dirty": False,
}  # fmt: skip
CPU_MACHINE = {key: value for key, value in MACHINE.items() if key not in ("gpu", "driver", "cuda")} | {"device": "cpu"}


def op_row(op, case, mode="forward", provider="ours", p50=100.0, share=0.9, **more):
    times = {"graph": {"p20": p50 - 1, "p50": p50, "p80": p50 + 1, "runs": 30, "method": "graph"}}
    row = {"model": "ViT-H/14", "op": op, "case": case, "mode": mode, "provider": provider, "times": times}
    return row | {"gb_per_s": 3870.0, "floor": "copy", "of_floor": share, "faster_than": {}} | more


RATES = {"ours": 700.0, "eager": 200.0, "ours+capture": 650.0}
STEP = {
    "kind": "step",
    "machine": MACHINE,
    "settings": {"model": "vit_h14", "batch": 128, "masks": "exact"},
    "implementations": {
        name: {"images_per_second": rate, "ms": 128e3 / rate, "context_tokens": 100.0, "useful_tflops": 500.0,
               "share_of_matmul_peak": 0.63, "peak_memory_bytes": 80 << 30, "phases_ms": dict.fromkeys(PHASES, 10.5)}
        for name, rate in RATES.items()
    },
    "ratio": {"ours/eager": 0.286},
    "failed": {"ours+fused": "CompilationError: no"},
}  # fmt: skip
STEP["implementations"]["ours+capture"] |= {"phases_ms": None, "no_phases": "a replayed graph is one launch"}


def scaling_report(machine=MACHINE):
    measured = {"tokens_per_image": 980.0, "ms": 40.0, "update_ms": 5.0, "attention_ms": 4.0, "us_per_token": 1.0}
    full = {"img_size": 448, "batch": 512, "not_run": "does not fit into memory"}
    points = [{"img_size": 224, "batch": 32} | measured, full]
    settings = {"model": "vit_h14", "impl": "ours", "precision": "bf16"}
    return {"kind": "scaling", "machine": machine, "settings": settings, "points": points, "spread": 0.08}


def accuracy_report():
    runs = [
        {"contender": name, "seed": seed, "steps": steps, "probe": probe + 0.02 * seed, "knn": 0.3, "rank": 12.0}
        for seed in (0, 1)
        for name, steps, probe in (("exact", 100, 0.5), ("eager", 150, 0.49), ("eager", 100, 0.4))
    ]
    settings = {"data": "CIFAR-10 (JPEG)", "batch": 64, "precision": "fp32", "regularised": True, "device": "cpu",
                "model": {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4}}  # fmt: skip
    return {
        "kind": "train_to_accuracy", "machine": CPU_MACHINE, "settings": settings, "steps_per_epoch": 200,
        "step_seconds": {"exact": 3.0, "eager": 2.0}, "runs": runs,
        "untrained": [{"seed": seed, "probe": 0.3, "knn": 0.2, "rank": 3.0} for seed in (0, 1)],
        "steps": {"time": {"exact": 100, "eager": 150}, "epochs": {"exact": 100, "eager": 100}},
    }  # fmt: skip


@pytest.fixture
def check():
    """A GPU run in which everything went well but two providers."""
    place = {"op": "o", "case": "c", "mode": "both", "model": "ViT-H/14"}
    rows = [
        op_row("gather_patches", "context", p50=9.25, share=0.91),
        op_row("varlen_attention", "context", "both", p50=150.0, faster_than={"torch_varlen": 1.5}),
        op_row("varlen_attention", "context", "both", "torch_varlen", p50=225.0),
        place | {"provider": "ours", "failed": "WrongResult: 9"},
        place | {"provider": "xformers", "unavailable": "not here"},
    ]
    device_times = [{"images": 2048, "recipe": "official", "grid": "16x16", "times": {"p50": 41.5}}]
    sanitizer = {"compute-sanitizer memcheck": {"exit_status": 0, "seconds": 20.0}}
    parts = {
        "tests": {"passed": 120, "failed": []},
        "masks": {"report": {"device_times": device_times}},
        "more": {"commands": sanitizer},
        "ops": {"rows": rows},
        "step": {"reports": [STEP]},
        "scaling": {"reports": [scaling_report()]},
    }
    entries = {name: {"machine": MACHINE, "commands": {}, **part} for name, part in parts.items()}
    return {"kind": "gpu_check", "file": "gpu-nvidia-h200.json", "parts": entries}


def page_of(check):
    return sections.results_page({"gpu_check": [check]})


def test_committed_pages_are_those_of_the_committed_results():
    for path, text in report.pages(ROOT, load(ROOT / "benchmarks" / "results")).items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run python -m benchmarks.report"
    committed = re.findall(r"\.\./(docs/images/\w+\.png)", (ROOT / "benchmarks" / "RESULTS.md").read_text())
    assert committed and all((ROOT / name).exists() for name in committed)


def test_no_results_are_no_figures():
    page = sections.results_page({})
    assert page.count("not measured yet") == 5 and "not run yet" in page
    assert not re.search(r"\d", re.sub(r"Wanted.*|\|.*|L2", "", page))
    assert "have not been timed on a GPU yet" in sections.speed({})
    page = sections.precision({})
    assert "not measured yet" in page and "precision.png" not in page


def test_a_gpu_run_is_shown(check):
    page = page_of(check)
    for words in (
        "NVIDIA H200; torch 2.11.0, Triton 3.6.0, CUDA 13.0, driver 580.1, Python 3.12.3; commit 0123456789ab",
        "| gather_patches | context | forward | 9.2 (8.2 to 10.2) | 3,870 GB/s | 91% |  |",
        "| varlen_attention | context | both | 150.0 (149.0 to 151.0) | 3,870 GB/s | 90% | torch_varlen 1.50 |",
        "- ours, o, c, both, ViT-H/14: WrongResult: 9",
        "- xformers: not here",
        "| 2048 | official | 16x16 | 41.5 |",
        "compute-sanitizer memcheck: clean.",
        "120 tests passed.",
        "| vit_h14 | 128 | exact | ours | 700.0 | 182.9 | 100.0 | 500.0 (63%) | 80.0 |  |",
        "| vit_h14 | 128 | batch_min | eager | 200.0 | 640.0 | 100.0 | 500.0 (63%) | 80.0 | 0.286 |",
        "| vit_h14 | 128 | exact | ours | 10.5 | 10.5 |",
        "No phases of ours+capture: a replayed graph is one launch.",
        "- ours+fused (vit_h14, exact): CompilationError: no",
        "| 224 | 32 | 980.0 | 40.0 | 5.0 | 4.0 | 1 |",
        "| 448 | 512 | does not fit into memory |",
        "Largest over smallest: 8.0% more.",
    ):
        assert words in page
    assert "700.0" in sections.speed({"gpu_check": [check]})


@pytest.mark.parametrize("tests", [{"passed": 119, "failed": ["test_x.py: test_y"]}, {"passed": 0, "failed": []}, None])
def test_nothing_is_shown_of_a_run_whose_tests_failed(check, tests):
    if tests is None:
        del check["parts"]["tests"]
    else:
        check["parts"]["tests"] |= tests
    page = page_of(check)
    assert "Times of this run are not shown." in page
    assert "9.2" not in page and "700.0" not in page and "41.5" not in page


def test_a_dry_run_is_no_gpu_run(check):
    for entry in check["parts"].values():
        entry["machine"] = {key: value for key, value in MACHINE.items() if key != "gpu"}
    assert not trusted({"gpu_check": [check]}) and page_of(check) == sections.results_page({})


def test_what_the_sanitizer_found_is_told(check):
    more = check["parts"]["more"]
    more["commands"]["compute-sanitizer racecheck"] = {"exit_status": 77, "seconds": 20.0}
    assert "racecheck: not clean (exit status 77, seconds 20.0)" in page_of(check)
    more["commands"], more["sanitizer"] = {}, {"not_run": "compute-sanitizer was not found"}
    assert "compute-sanitizer was not run: compute-sanitizer was not found." in page_of(check)


def test_time_per_token_on_a_cpu_is_no_figure_of_a_gpu():
    page = sections.results_page({"scaling": [scaling_report(machine=CPU_MACHINE)]})
    assert "Largest over smallest: 8.0% more." in page and f"Time per token on a GPU: {NOT_MEASURED}." in page


def test_accuracy_is_shown_by_comparison():
    page = sections.results_page({"train_to_accuracy": [accuracy_report()]})
    for words in (
        "CIFAR-10 (JPEG), 32 px, patches of 4 px, width 96, 4 blocks; steps of 64 images in fp32; everyone minimises "
        "the prediction loss and the variance-covariance term.",
        "| untrained |  |  |  | 30.0 ± 0.0 | 20.0 ± 0.0 | 3.0 ± 0.0 |  |",
        "| exact | 100 | 0.50 | 5.0 | 51.0 ± 1.4 | 30.0 ± 0.0 | 12.0 ± 0.0 |  |",
        "| eager | 150 | 0.75 | 5.0 | 50.0 ± 1.4 | 30.0 ± 0.0 | 12.0 ± 0.0 | -1.0, -1.0 |",
        "| eager | 100 | 0.50 | 3.3 | 41.0 ± 1.4 | 30.0 ± 0.0 | 12.0 ± 0.0 | -10.0, -10.0 |",
    ):
        assert words in page
    assert page.index("At equal time:") < page.index("| eager | 150") < page.index("At equal epochs:")


def test_marks_must_be_there_once():
    text = "a\n<!-- x -->\nold\n<!-- end -->\nb <!-- end -->"
    assert between(text, "<!-- x -->\n", "<!-- end -->", "new\n") == text.replace("old", "new")
    for broken in ("nothing", text + text, "<!-- x -->\nno end"):
        with pytest.raises(ValueError, match="the marks must be there once: <!-- x --> ... <!-- end -->"):
            between(broken, "<!-- x -->\n", "<!-- end -->", "new\n")


def test_files_without_a_kind_are_left_out(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"mean": 1}))
    (tmp_path / "b.json").write_text(json.dumps({"kind": "step", "n": 2}))
    assert load(tmp_path) == {"step": [{"kind": "step", "n": 2, "file": "b.json"}]}


def test_every_chart_is_drawn_and_shown(tmp_path):
    reports = load(ROOT / "benchmarks" / "results")
    drawn = {path.name: path.read_bytes() for path in charts.draw(reports, tmp_path)}
    assert len(drawn) == 3 and all(png.startswith(b"\x89PNG") for png in drawn.values())
    assert drawn.keys() == set(
        re.findall(r"images/((?:bench|precision)\w*\.png)", "".join(report.pages(ROOT, reports).values()))
    )


def test_the_baseline_is_said_to_be_fair_in_the_words_of_its_file():
    found = {
        "machine": CPU_MACHINE, "settings": {"model": "vit_small", "batch": 16, "steps": 2},
        "eager_over_official": {"flops": 1.0, "time": 0.75, "cpu_time": 1.25},
        "losses": {"official": [0.5, 0.4], "eager": [0.5, 0.375]},
    }  # fmt: skip
    said = sections.fairness_of_eager(found)
    assert "1.000 times its operations, 0.750 times its time, 1.250 times its processor time" in said
    assert said.endswith("losses at most 0.025 apart.")
    found["losses"]["eager"] = [0.5, 0.4]
    assert sections.fairness_of_eager(found).endswith("equal in every digit that it prints.")
