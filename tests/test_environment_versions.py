"""What a page says it was made with."""

import json
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from ijepa_fast import __version__
from ijepa_fast.run import environment
from ijepa_fast.run.environment import commit_of, describe, nvidia_smi


def test_versions_are_those_in_use():
    found = describe()
    assert found["ijepa_fast"] == __version__ and found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__ and found["numpy"] == numpy.__version__
    assert ("gpu" in found) == torch.cuda.is_available()


def test_the_commit_of_a_checkout_and_whether_it_is_what_runs(tmp_path):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert commit_of(tmp_path) == (None, None)
    (tmp_path / ".git").mkdir()
    assert commit_of(tmp_path) == (None, None)
    git("init", "-q")
    assert commit_of(tmp_path) == (None, None)
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert commit_of(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "untracked").write_text("2")
    assert commit_of(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == (git("rev-parse", "HEAD"), True)
    (tmp_path / "inside").mkdir()
    assert commit_of(tmp_path / "inside") == (None, None)


def test_the_machine_is_described_without_names_of_people_or_places():
    found = environment.machine("cpu")
    assert found["torch"] == torch.__version__ and found["device"] == "cpu" and found["threads"] >= 1
    text = json.dumps(found)
    assert platform.node() not in text and str(Path.home()) not in text and "/" not in text.replace("N/A", "")


def test_the_commit_can_be_given_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.delenv("IJEPA_FAST_COMMIT", raising=False)
    assert commit_of(tmp_path) == (None, None)
    monkeypatch.setenv("IJEPA_FAST_COMMIT", "abc")
    assert commit_of(tmp_path) == ("abc", None)


@pytest.mark.parametrize("output", ["", "no devices were found\n", "580.1, 345\n"])
def test_an_nvidia_smi_that_says_something_else_is_no_error(monkeypatch, output):
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=output))
    assert nvidia_smi() == {"driver": None}


def test_nvidia_smi(monkeypatch):
    line = "580.1, 345, 1980, 3201, 700.00, 31\n"
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=line))
    found = nvidia_smi()
    assert found["driver"] == "580.1" and found["nvidia_smi"]["clocks.max.sm"] == "1980"
