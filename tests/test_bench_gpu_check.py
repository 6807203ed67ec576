"""gpu_check.sh as far as a CPU can take it: the whole chain, small, and what becomes of parts that fail or hang."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, implementations, masks, ops, processes
from ijepa_fast.bench import table

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "runs", "results")
JUNIT = """<testsuites><testsuite>
<testcase name="good"/><testcase name="bad"><failure message="assert 1 == 2&#10;more">x</failure></testcase>
<testcase name="broken"><error>x</error></testcase><testcase name="left"><skipped>x</skipped></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.extension, "library_path", lambda: Path("built"))
    run = gpu_check.Run("cpu", True, tmp_path / "out" / "report.json", tmp_path)
    run.report = {"schema": 1, "kind": "gpu_check", "parts": {}}
    return run


def value(command, flag):
    return command[command.index(flag) + 1]


def test_what_it_cannot_do_is_said(capsys):
    assert gpu_check.main(["--part", "ops"]) == 2 and "torch sees no CUDA device" in capsys.readouterr().out
    assert gpu_check.main(["--device", "cpu"]) == 2 and "only --tiny makes sense" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_check.main(["--steps", "vit_x"])
    assert "'vit_x' names none" in capsys.readouterr().err


@pytest.mark.slow
def test_pytest_fails_where_gpu_tests_are_asked_for_and_there_is_no_gpu():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/test_step_on_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 5 and "tests marked gpu deselected: torch sees no CUDA device" in done.stdout


def test_a_command_that_hangs_is_stopped_with_its_children_and_the_rest_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LEAST_SECONDS", 0.1)
    entry, pid = run.begin("ops", 100), tmp_path / "pid"
    child = f"import subprocess, sys; p = subprocess.Popen(['sleep', '600']); open({str(pid)!r}, 'w').write(str(p.pid))"
    started = time.monotonic()
    commands = ("hangs", f"{child}; p.wait()", None), ("fails", "import sys; sys.exit(3)", 3), ("works", "", 0)
    for name, code, status in commands:
        assert run.execute(entry, name, [sys.executable, "-c", code], limit=3 if status is None else 60) == status
    assert time.monotonic() - started < 60
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    run.deadline = 0
    assert run.execute(entry, "late", [sys.executable, "-c", ""]) is None
    written = json.loads(run.path.read_text())["parts"]
    assert written["ops"]["commands"].keys() == {"hangs", "fails", "works", "late"}
    words = gpu_check.summary(written)
    assert len(words) == 3 and words[0].startswith("ops: hangs was stopped after")
    assert words[1:] == ["ops: fails ended with exit status 3", "ops: late was not run: no time was left"]


def test_a_part_that_raises_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def broken(run, entry):
        entry["rows"] = []
        raise KeyError("masks")

    monkeypatch.setitem(gpu_check.PARTS, "masks", broken)
    monkeypatch.setitem(gpu_check.PARTS, "step", lambda run, entry: entry.update(reports=[]))
    arguments, path = ["--device", "cpu", "--tiny", "--out", str(tmp_path)], tmp_path / "gpu-dry-run.json"
    assert gpu_check.main(["--part", "masks", "step", *arguments]) == 1
    assert "masks: KeyError: 'masks'" in capsys.readouterr().out
    written = json.loads(path.read_text())["parts"]
    assert written["masks"]["rows"] == [] and written["step"]["reports"] == []
    # Running a part again replaces that part alone.
    monkeypatch.setitem(gpu_check.PARTS, "masks", lambda run, entry: entry.update(fine=True))
    assert gpu_check.main(["--part", "masks", *arguments]) == 0
    written = json.loads(path.read_text())["parts"]
    assert written["masks"]["fine"] and "reports" in written["step"]


SECTIONS = ["install", "quick", "step", "ops", "masks", "tests", "more", "scaling"]


@pytest.mark.parametrize("fault", ["dies", "hangs", "half a file"])
def test_a_fault_of_one_command_hides_no_other_in_any_section(tmp_path, monkeypatch, capsys, fault):
    """The first command of each section goes wrong, all others succeed."""
    path, hit, ran = tmp_path / "gpu-dry-run.json", set(), []
    monkeypatch.setattr(gpu_check.extension, "library_path", lambda: Path("built"))

    def execute(self, entry, name, command, limit=0, **environment):
        section = next(part for part, other in self.report["parts"].items() if other is entry)
        ran.append(section)
        wrong = section not in hit
        hit.add(section)
        if "--json" in command and not (wrong and fault == "dies"):
            Path(value(command, "--json")).write_text(
                '{"rows": [' if wrong and fault == "half a file" else '{"rows": []}'
            )
        result = {"stopped_after_s": 1.0} if wrong and fault == "hangs" else {"exit_status": 139 if wrong else 0}
        self.note(entry["commands"], name, result)
        json.loads(path.read_text())  # whole after every command
        return result.get("exit_status")

    monkeypatch.setattr(processes.Run, "execute", execute)
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--part", *SECTIONS]
    assert gpu_check.main(arguments) == 1
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == SECTIONS and hit == set(SECTIONS)
    said = capsys.readouterr().out.split("gpu-dry-run.json")[1]
    words = {"dies": "exit status 139", "hangs": "was stopped after", "half a file": "139"}[fault]
    assert all(f"{part}: " in said for part in SECTIONS) and said.count(words) >= len(SECTIONS)
    assert not any("error" in entry for entry in parts.values())
    # What came after the fault was run, where a section has more than one command.
    assert all(ran.count(part) > 1 for part in ("quick", "ops", "more"))


def test_outcome_of_tests(tmp_path):
    junit = tmp_path / "junit.xml"
    assert gpu_check.outcome(junit, None) == {"passed": 0, "failed": ["stopped before its end"]}
    assert gpu_check.outcome(junit, 4) == {"passed": 0, "failed": ["exit status 4"]}
    junit.write_text(JUNIT)
    bad = ["bad (assert 1 == 2)", "broken (error)", "left (skipped)"]
    assert gpu_check.outcome(junit, 1) == {"passed": 1, "failed": bad}
    junit.write_text("<testsuites><testsuite></testsuite></testsuites>")
    assert gpu_check.outcome(junit, 5) == {"passed": 0, "failed": ["exit status 5"]}


def test_the_summary_has_failures_first_and_an_end():
    found = {"images_per_second": 700.0, "share_of_matmul_peak": 0.4}
    settings = {"model": "vit_h14", "masks": "exact"}
    report = {"settings": settings, "implementations": {"ours": found}, "failed": {"ours+x": "no"}}
    rows = [{"model": "m", "op": "o", "case": "c", "mode": "both", "provider": "ours"}]
    parts = {
        "quick": {"rows": [rows[0] | {"failed": "WrongResult: off"}], "commands": {}},
        "step": {"reports": [report], "commands": {}},
        "tests": {"passed": 3, "failed": [f"test {n}" for n in range(50)], "commands": {}},
    }
    lines = gpu_check.summary(parts)
    assert len(lines) == gpu_check.SUMMARY_LINES and lines[-1].endswith("lines more")
    failures = ["quick: ours of o, c, both (m): WrongResult: off", "step: ours+x: no", "tests: test 0 did not pass"]
    assert lines[:3] == failures
    parts["tests"]["failed"] = []
    assert gpu_check.summary(parts)[2:] == [
        "quick: 1 rows of ours, checked",
        "step: vit_h14 exact ours: 700.0 images/s, 40% of matmul",
        "tests: 3 tests passed",
    ]


def test_the_files_with_gpu_tests_are_found_the_important_ones_first():
    names = [path.name for path in gpu_check.files_with_gpu_tests()]
    assert set(names[: len(gpu_check.FIRST_TESTS)]) == set(gpu_check.FIRST_TESTS)
    assert "test_extension.py" in names and Path(__file__).name not in names


def test_every_pass_is_one_that_the_command_takes(monkeypatch):
    asked = []
    monkeypatch.setattr(table, "rows", lambda *arguments, **options: asked.append(options) or iter(()))
    for _, arguments in (*gpu_check.OPS_PASSES, *gpu_check.TINY_PASSES):
        ops.main(["--device", "cpu", "--seconds", "1", *arguments])
    batch = table.Batch.draw(ops.TINY["tiny"], 1, ops.torch.device("cpu"))
    assert set(gpu_check.HOTTEST) == {case.key for case in table.cases(batch) if asked[0]["wanted"](case)}


def test_every_step_is_one_that_the_command_takes():
    for model, _, masks_of, names in (*gpu_check.STEPS, *gpu_check.TINY_STEPS):
        assert model in implementations.MODELS and masks_of in ("exact", "batch_min")
        assert all(implementations.parse(name) for name in names.split(",")) and names.startswith("ours,")
    peers = {}
    for model, _, masks_of, names in gpu_check.STEPS:
        peers[model, masks_of] = peers.get((model, masks_of), "") + names
    assert all("eager" in names and "compiled" in names for names in peers.values())
    timed = {name for *_, names in gpu_check.STEPS[: gpu_check.WHOLE_STEPS] for name in names.split(",")}
    plain = {"eager", "ours+plain", "ours+fused"}  # nothing of these is compiled by torch
    assert timed - plain == set(gpu_check.COMPILED)


def test_what_a_step_wrote_is_kept_and_a_process_that_died_is_tried_in_two(run, monkeypatch):
    asked = []

    def execute(entry, name, command, limit):
        asked.append(value(command, "--impl"))
        if asked[-1] != "ours,eager,compiled":  # which dies
            Path(value(command, "--json")).write_text(json.dumps({"implementations": {"ours": {}}}))
        entry["commands"][name] = {"exit_status": int(asked[-1] in ("ours,eager,compiled", "ours,compiled"))}

    monkeypatch.setattr(run, "execute", execute)
    steps = [("vit_tiny", 2, "exact", names) for names in ("ours,eager,compiled", "ours,compiled")]
    monkeypatch.setattr(gpu_check, "TINY_STEPS", steps)
    gpu_check.step(run, entry := run.begin("step", 1000))
    # The last one names what failed beside what it measured, and is not run again.
    assert asked == ["ours,eager,compiled", "ours", "eager,compiled", "ours,compiled"] and len(entry["reports"]) == 3


def test_steps_that_are_named_join_those_measured_before(run, monkeypatch):
    asked = []

    def execute(entry, name, command, limit):
        asked.append(name)
        entry["commands"][name] = {"exit_status": 0}
        Path(value(command, "--json")).write_text(json.dumps({"implementations": {"ours": {}}}))

    monkeypatch.setattr(run, "execute", execute)
    run.tiny = False
    for names, count in (("ours,compiled", 1), ("ours,eager", 2), ("ours,eager", 2)):
        run.steps = f"vit_l16 128 exact {names}"
        gpu_check.step(run, entry := run.begin("step", 1000))
        assert len(asked) == len(entry["reports"]) == len(entry["commands"]) == count
    run.steps, run.whole = "", True
    gpu_check.step(run, entry := run.begin("step", 1000))
    assert len(entry["reports"]) == gpu_check.WHOLE_STEPS


def test_what_is_timed_later_is_compiled_beside_the_checks_in_networks_of_one_block(run, monkeypatch):
    ran = []

    def execute(entry, name, command, *limit):
        ran.append((name, command))
        entry["commands"][name] = {"exit_status": 0}

    monkeypatch.setattr(run, "execute", execute)
    run.tiny = False
    gpu_check.quick(run, run.begin("quick", 1000))
    compiled, steps = ran[:-2], ran[-2:]
    assert {name for name, _ in compiled} == {"ops, check"} | {
        f"compile {model} {name}" for model in ("vit_h14", "vit_b16") for name in gpu_check.COMPILED
    }
    assert all(value(command, "--depth") == "1" for name, command in compiled if name != "ops, check")
    assert all("--depth" not in command and value(command, "--impl") == "ours" for _, command in steps)


def test_a_whole_run_fits_into_nine_minutes():
    *kept, rest = gpu_check.WHOLE_RUN.values()
    assert sum(kept) < gpu_check.WHOLE_SECONDS < 540 and gpu_check.WHOLE_RUN.keys() < gpu_check.PARTS.keys()


def test_masks_that_differ_or_lack_the_extension_are_no_rate(capsys, tmp_path):
    sampler = masks.MaskSampler(masks.CONFIGS["exact"], (14, 14))
    first, second = (sampler.sample(4, seed=seed, step=0) for seed in (0, 1))
    masks.assert_equal(first, first)
    with pytest.raises(AssertionError, match="of context differ"):
        masks.assert_equal(first, second)
    path = tmp_path / "masks.json"
    assert masks.main(["--device", "cpu", "--json", str(path)]) == 1
    assert "the C++/CUDA extension is not built" in capsys.readouterr().out and not path.exists()


@pytest.mark.slow
def test_the_whole_chain_on_a_cpu(tmp_path):
    """In a copy of the checkout, because it builds there. Installing is left out: it would change this environment."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    command = ["bash", copy / "benchmarks" / "gpu_check.sh", "--device", "cpu", "--tiny", "--seconds", "900"]
    command += ["--part", "quick", "masks", "tests", "step", "ops", "more", "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable, "IJEPA_FAST_COMMIT": "0123456789ab"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-dry-run.json").read_text())["parts"]
    assert all(entry["machine"]["commit"] == "0123456789ab" for entry in report.values())
    assert report["masks"]["report"]["equal"]["comparisons"] > 10
    assert report["tests"]["passed"] >= 13 and not report["tests"]["failed"]
    for part, measured in (("quick", "error"), ("ops", "times")):
        rows = report[part]["rows"]
        assert {row["op"] for row in rows} >= {"gather_patches", "varlen_attention", "adamw_ema_", "ema_"}
        assert all(measured in row or "unavailable" in row for row in rows)
    assert {"ours", "eager"} == report["step"]["reports"][0]["implementations"].keys()
    assert all("us_per_token" in point for point in report["more"]["reports"][0]["points"])
