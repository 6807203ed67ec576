"""tools/environment.py: which environment `make` uses, what it installs there, and what it says where it cannot."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "environment.py"


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """The script as a module, its checkout a copy of the inputs in tmp_path, with no environment active."""
    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in module.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PIP_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "GPU_DEVICES", (str(tmp_path),))  # as if there were a GPU
    return module


def found(prefix: Path, **packages: str) -> dict:
    """What probe() reports of an environment with these packages."""
    python = str(prefix / "bin" / "python")
    return {"executable": python, "prefix": str(prefix), "python": [3, 12], "pip": True, "packages": packages}


def test_in_place_torch_is_pinned_and_what_is_installed_is_left_alone(environment):
    tested = '# comment\ntorch==2.13.0\ntriton>=3.6,<3.10\n\nnumpy==2.2.6 ; python_version == "3.10"\ntqdm==4.70.1\n'
    installed = {"torch": "2.11.0+cu128", "triton": "3.6.0", "numpy": "1.26.4"}
    lines = environment.constraints_in_place(tested, installed).splitlines()
    assert lines == ["torch==2.11.0+cu128", "tqdm==4.70.1"]


@pytest.mark.parametrize(
    ("torch", "usable"),
    [("2.10.0", True), ("2.13.0+cpu", True), ("3.0", True), ("2.12.0a0+git1", True), ("2.9.1", False), (None, False)],
)
def test_an_active_environment_is_used_if_its_torch_is_new_enough(environment, tmp_path, capsys, torch, usable):
    packages = {"torch": torch} if torch else {}
    assert environment.usable_in_place(found(tmp_path, **packages), tmp_path) is usable
    assert usable == ("not used" not in capsys.readouterr().err)


def test_active_environments_are_read_from_the_variables(environment, monkeypatch):
    monkeypatch.setenv("CONDA_PREFIX", "/conda")
    monkeypatch.setenv("VIRTUAL_ENV", "/venv")
    assert environment.active_environments() == [Path("/venv/bin/python"), Path("/conda/bin/python")]
    assert environment.probe(Path("/venv/bin/python")) is None


def test_a_virtualenv_that_only_the_path_names_is_active(environment, monkeypatch):
    monkeypatch.setattr(environment.sys, "base_prefix", "/usr")
    monkeypatch.setattr(environment.sys, "prefix", "/venv")
    assert environment.active_environments() == [Path(sys.executable)]
    monkeypatch.setattr(environment.sys, "prefix", "/usr")
    assert environment.active_environments() == []


def test_probe_reports_this_environment(environment):
    here = environment.probe(Path(sys.executable))
    assert here["python"] == list(sys.version_info[:2]) and here["prefix"] == sys.prefix
    assert {"torch", "numpy", "pytest"} <= set(here["packages"])


def test_set_up_is_done_once_and_again_when_something_changed(environment, monkeypatch, tmp_path):
    installed = found(tmp_path, torch="2.11.0")
    installs = []

    def install(into, extras, in_place):
        installs.append(sorted(extras))
        installed["packages"]["ijepa-fast"] = "0.1.0"

    monkeypatch.setattr(environment, "install", install)
    monkeypatch.setattr(environment, "probe", lambda python: installed)

    def set_up(*extras):
        before = len(installs)
        environment.ensure_set_up(installed, set(extras), in_place=True)
        return installs[before:]

    assert set_up("train") == [["train"]]
    assert set_up("train") == []
    assert set_up("train", "test") == [["test", "train"]]
    assert set_up("train") == []
    installed["packages"]["torch"] = "2.12.0"
    assert set_up("train") == [["test", "train"]], "another torch came in: pin that one"
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert set_up("train") == [["train"]]
    del installed["packages"]["ijepa-fast"]
    assert set_up("train") == [["train"]]


def test_pip_is_given_the_constraints_and_the_further_arguments(environment, monkeypatch, tmp_path):
    seen = {}

    def run(command, **options):
        seen.update(command=list(map(str, command)), text=Path(command[command.index("-c") + 1]).read_text())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(environment.subprocess, "run", run)
    monkeypatch.setenv("PIP_ARGS", "--extra-index-url 'https://example.org/a b'")
    environment.install(found(tmp_path), {"train"}, in_place=False)
    assert seen["command"][-4:] == ["--extra-index-url", "https://example.org/a b", "-e", ".[train]"]
    assert "torch==2.13.0\n" in seen["text"]
    environment.install(found(tmp_path, torch="2.11.0", numpy="2.0.0"), {"train"}, in_place=True)
    assert "torch==2.11.0\n" in seen["text"] and "torch==2.13.0" not in seen["text"]


def test_without_a_gpu_the_cpu_build_is_taken_where_its_index_answers(environment, monkeypatch, capsys):
    asked = []

    def answer(url, timeout):
        asked.append(url)
        if len(asked) > 1:
            raise OSError("no network")
        return io.BytesIO()

    monkeypatch.setattr(environment.urllib.request, "urlopen", answer)
    monkeypatch.setattr(environment.sys, "platform", "linux")
    assert environment.further_pip_arguments(has_torch=False) == [] == asked, "a GPU is there"
    monkeypatch.setattr(environment, "GPU_DEVICES", ())
    assert environment.further_pip_arguments(has_torch=True) == [] == asked
    assert environment.further_pip_arguments(has_torch=False) == ["--extra-index-url", environment.CPU_INDEX]
    assert "no NVIDIA driver: torch comes from the index of its CPU builds" in capsys.readouterr().err
    assert environment.further_pip_arguments(has_torch=False) == []
    assert "gigabytes of CUDA libraries" in capsys.readouterr().err
    monkeypatch.setenv("PIP_ARGS", "--prefer-binary")
    assert environment.further_pip_arguments(has_torch=False) == ["--prefer-binary"] and len(asked) == 2
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    monkeypatch.delenv("PIP_ARGS")
    assert environment.further_pip_arguments(has_torch=False) == [] and len(asked) == 2


def test_a_failed_installation_ends_with_its_reason_and_leaves_no_stamp(environment, monkeypatch, tmp_path):
    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    with pytest.raises(SystemExit, match="PIP_ARGS"):
        environment.ensure_set_up(found(tmp_path, torch="2.11.0"), {"train"}, in_place=True)
    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0))
    monkeypatch.setattr(environment, "probe", lambda python: found(tmp_path, torch="2.11.0"))
    with pytest.raises(SystemExit, match="ijepa-fast are not in"):
        environment.ensure_set_up(found(tmp_path, torch="2.11.0"), {"train"}, in_place=True)
    assert not (tmp_path / environment.STAMP).exists()


def test_a_missing_venv_module_is_named(environment, monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"lacks the standard modules venv and ensurepip.*apt install python3"):
        environment.own_environment(clear_other_python=False)


def test_an_own_environment_is_made_once_and_made_anew_when_it_does_not_run(environment, monkeypatch, tmp_path):
    # Without ensurepip in it a venv is made in well under a second.
    run = subprocess.run
    monkeypatch.setattr(
        environment.subprocess, "run", lambda c, **k: run([*c, "--without-pip"] if "venv" in c else c, **k)
    )
    made = environment.own_environment(clear_other_python=True)
    assert made["python"] == list(sys.version_info[:2]) and "torch" not in made["packages"]
    assert made["prefix"] == str(tmp_path / ".venv")
    marker = tmp_path / ".venv" / "marker"
    marker.touch()
    environment.own_environment(clear_other_python=True)
    assert marker.exists()
    (tmp_path / ".venv" / "bin" / "python").unlink()
    environment.own_environment(clear_other_python=False)
    assert not marker.exists()
