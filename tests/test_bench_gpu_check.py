"""gpu_check.sh as far as a CPU can take it: the whole chain, small, and what becomes of parts that fail or hang."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, implementations, masks, processes, targets

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "runs", "results")
JUNIT = """<testsuites><testsuite>
<testcase name="good"/><testcase name="bad"><failure>x</failure></testcase>
<testcase name="broken"><error>x</error></testcase><testcase name="left"><skipped>x</skipped></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def run(tmp_path):
    run = gpu_check.Run("cpu", True, tmp_path / "out" / "report.json", tmp_path)
    run.report = {"schema": 1, "kind": "gpu_check", "parts": {}}
    return run


def python(code):
    return [sys.executable, "-c", code]


def test_without_a_gpu_it_says_so_and_fails(capsys):
    assert gpu_check.main(["--part", "ops"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().out
    assert gpu_check.main(["--part", "ops", "--device", "cpu"]) == 2
    assert "only --tiny makes sense" in capsys.readouterr().out


@pytest.mark.slow
def test_pytest_fails_where_gpu_tests_are_asked_for_and_there_is_no_gpu():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/test_step_on_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 5 and "tests marked gpu deselected: torch sees no CUDA device" in done.stdout


def test_a_command_that_hangs_is_stopped_with_its_children_and_the_rest_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LEAST_SECONDS", 0.1)
    entry = run.begin("ops", 100)
    pid = tmp_path / "pid"
    child = f"import subprocess, sys; p = subprocess.Popen(['sleep', '600']); open({str(pid)!r}, 'w').write(str(p.pid))"
    started = time.monotonic()
    assert run.execute(entry, "hangs", python(child + "; p.wait()"), limit=3) is None
    assert time.monotonic() - started < 60
    time.sleep(0.1)
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert run.execute(entry, "fails", python("import sys; sys.exit(3)")) == 3
    assert run.execute(entry, "works", python("print('out')")) == 0
    run.deadline = 0
    assert run.execute(entry, "late", python("print('out')")) is None
    written = json.loads(run.path.read_text())
    assert written["parts"]["ops"]["commands"].keys() == {"hangs", "fails", "works", "late"}
    words = gpu_check.faults(written)
    assert len(words) == 3 and words[0].startswith("ops: hangs was stopped after")
    assert words[1:] == ["ops: fails ended with exit status 3", "ops: late was not run: no time was left"]


def test_a_part_that_raises_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def broken(run, entry):
        entry["rows"] = [{}]
        raise KeyError("masks")

    monkeypatch.setitem(gpu_check.PARTS, "masks", broken)
    monkeypatch.setitem(gpu_check.PARTS, "step", lambda run, entry: entry.update(reports=[]))
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert gpu_check.main(["--part", "masks", "step", *arguments]) == 1
    assert "masks: KeyError: 'masks'" in capsys.readouterr().out
    written = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert written["parts"]["masks"]["rows"] == [{}] and written["parts"]["step"]["reports"] == []
    # Running a part again replaces that part alone.
    monkeypatch.setitem(gpu_check.PARTS, "masks", lambda run, entry: entry.update(fine=True))
    assert gpu_check.main(["--part", "masks", *arguments]) == 0
    written = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert written["parts"]["masks"]["fine"] and "reports" in written["parts"]["step"]


def test_outcome_of_tests(tmp_path):
    junit = tmp_path / "junit.xml"
    assert gpu_check.outcome(junit, None) == {"passed": 0, "failed": ["stopped before its end"]}
    assert gpu_check.outcome(junit, 4) == {"passed": 0, "failed": ["exit status 4"]}
    junit.write_text(JUNIT)
    assert gpu_check.outcome(junit, 1) == {"passed": 1, "failed": ["bad", "broken", "left (skipped)"]}
    junit.write_text("<testsuites><testsuite></testsuite></testsuites>")
    assert gpu_check.outcome(junit, 5) == {"passed": 0, "failed": ["exit status 5"]}


def test_the_files_with_gpu_tests_are_found():
    names = {path.name for path in gpu_check.files_with_gpu_tests()}
    assert {"test_extension.py", "test_kernels_on_gpu.py", "test_step_on_gpu.py"} <= names
    assert Path(__file__).name not in names


def test_every_pass_is_one_that_the_command_takes(monkeypatch):
    from benchmarks import ops

    asked = []
    monkeypatch.setattr(ops.ops_table, "rows", lambda *arguments, **options: asked.append(options) or iter(()))
    for _, arguments in (*gpu_check.OPS_PASSES, *gpu_check.TINY_PASSES):
        ops.main(["--device", "cpu", "--seconds", "1", *arguments])
    assert len(asked) == len(gpu_check.OPS_PASSES) + len(gpu_check.TINY_PASSES)


def test_every_step_is_one_that_the_command_takes():
    for model, _, masks_of, names in (*gpu_check.STEPS, *gpu_check.TINY_STEPS):
        assert model in implementations.MODELS and masks_of in ("exact", "batch_min")
        kinds = [implementations.parse(name)[0] for name in names.split(",")]
        assert kinds[0] == "ours" and len(kinds) > 1
    places = [step[:3] for step in gpu_check.STEPS]
    peers = {place: "".join(names for *at, names in gpu_check.STEPS if tuple(at) == place) for place in places}
    assert all("eager" in names and "compiled" in names for names in peers.values())
    assert {(model, masks_of) for model, _, masks_of in peers} == {(model, m) for model, m, *_ in targets.STEPS}


def test_what_a_step_wrote_is_kept_and_a_process_that_died_is_tried_in_two(run, monkeypatch):
    asked = []

    def execute(entry, name, command, limit):
        asked.append(command[command.index("--impl") + 1])
        if asked[-1] != "ours,eager,compiled":  # which dies
            Path(command[command.index("--json") + 1]).write_text(json.dumps({"implementations": {"ours": {}}}))
        return 1 if asked[-1] in ("ours,eager,compiled", "ours,compiled") else 0

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
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"implementations": {"ours": {}}}))
        return 0

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(gpu_check.extension, "library_path", lambda: Path("built"))
    run.tiny, run.steps = False, "vit_l16 128 exact ours,compiled"
    gpu_check.step(run, run.begin("step", 1000))
    run.steps = "vit_b16 512 exact ours,eager"
    gpu_check.step(run, entry := run.begin("step", 1000))
    assert len(asked) == len(entry["reports"]) == len(entry["commands"]) == 2
    assert asked[0] == "step vit_l16 exact ours,compiled" and asked[1].startswith("step vit_b16 exact ours,eager")
    gpu_check.step(run, entry := run.begin("step", 1000))
    assert len(asked) == len(entry["reports"]) == 2  # measured before, and so not again
    run.steps = ""
    monkeypatch.setattr(gpu_check, "STEPS", gpu_check.STEPS[:1])
    gpu_check.step(run, entry := run.begin("step", 1000))
    assert len(entry["reports"]) == 1


def test_a_part_by_itself_builds_what_it_needs(run, monkeypatch, capsys):
    built = []
    monkeypatch.setattr(gpu_check.extension, "library_path", lambda: None)
    monkeypatch.setattr(run, "execute", lambda entry, name, command, *_, **more: built.append(name))
    run.tiny, run.steps = False, "vit_l16 128 exact ours,compiled"
    gpu_check.step(run, run.begin("step", 1000))
    assert built[0] == "build csrc"
    with pytest.raises(SystemExit):
        gpu_check.main(["--part", "step", "--device", "cpu", "--tiny", "--steps", "vit_x", "--out", str(run.scratch)])
    assert "'vit_x' names none" in capsys.readouterr().err


def test_accuracy_takes_what_data_names(run, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(gpu_check.extension, "library_path", lambda: Path("built"))
    monkeypatch.setattr(run, "execute", lambda entry, name, command, limit: asked.append((command, limit)))
    run.tiny, run.data = False, [("cifar10_vits4", "a"), ("imagenette", "b")]
    gpu_check.accuracy(run, run.begin("accuracy", 2000))
    for (command, limit), recipe, path in zip(asked, ("cifar10_vits4", "imagenette"), "ab", strict=True):
        assert command[command.index("--recipe") + 1] == recipe and command[command.index("--data") + 1] == path
        assert 60 * gpu_check.TRAININGS * float(command[command.index("--minutes") + 1]) < limit
    for arguments, words in (["--part", "accuracy"], "needs --data"), (["--data", "a"], "RECIPE=PATH, got 'a'"):
        with pytest.raises(SystemExit):
            gpu_check.main(arguments)
        assert words in capsys.readouterr().err


def test_a_whole_run_fits_into_nine_minutes():
    assert sum(gpu_check.RESERVED.values()) < gpu_check.WHOLE_SECONDS < 540
    assert set(gpu_check.WHOLE_RUN) <= set(gpu_check.BUDGETS) == set(gpu_check.PARTS)


def test_masks_without_the_extension_measure_nothing(capsys, tmp_path):
    path = tmp_path / "masks.json"
    assert masks.main(["--device", "cpu", "--json", str(path)]) == 1
    assert "the C++/CUDA extension is not built" in capsys.readouterr().out and not path.exists()


def test_masks_that_differ_are_no_rate():
    sampler = masks.MaskSampler(masks.CONFIGS["exact"], (14, 14))
    first, second = (sampler.sample(4, seed=seed, step=0) for seed in (0, 1))
    masks.assert_equal(first, first)
    with pytest.raises(AssertionError, match="of context differ"):
        masks.assert_equal(first, second)


@pytest.mark.slow
def test_the_whole_chain_on_a_cpu(tmp_path):
    """In a copy of the checkout, because it builds there. Installing is left out: it would change this environment."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    command = ["bash", copy / "benchmarks" / "gpu_check.sh", "--device", "cpu", "--tiny", "--seconds", "900"]
    command += ["--part", "masks", "tests", "step", "ops", "scaling", "accuracy", "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable, "IJEPA_FAST_COMMIT": "0123456789ab"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-dry-run.json").read_text())["parts"]
    assert all(entry["machine"]["commit"] == "0123456789ab" for entry in report.values())
    assert report["masks"]["report"]["equal"]["comparisons"] > 10
    assert report["tests"]["passed"] >= 15 and not report["tests"]["failed"]
    assert {row["op"] for row in report["ops"]["rows"]} >= {"gather_patches", "varlen_attention", "adamw_ema_", "ema_"}
    assert all("times" in row or "unavailable" in row for row in report["ops"]["rows"])
    assert {"ours", "eager"} == report["step"]["reports"][0]["implementations"].keys()
    assert all("us_per_token" in point for point in report["scaling"]["reports"][0]["points"])
    assert len(report["accuracy"]["reports"][0]["runs"]) == 3
