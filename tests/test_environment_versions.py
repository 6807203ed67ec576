"""What a page says it was made with."""

import platform
import subprocess

import numpy
import torch

from ijepa_fast import __version__
from ijepa_fast.run.environment import _commit, describe


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

    assert _commit(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert _commit(tmp_path) is None
    git("init", "-q")
    assert _commit(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert _commit(tmp_path) == git("rev-parse", "HEAD")[:12]
    (tmp_path / "untracked").write_text("2")
    assert _commit(tmp_path) == git("rev-parse", "HEAD")[:12]
    (tmp_path / "file").write_text("2")
    assert _commit(tmp_path) == git("rev-parse", "HEAD")[:12] + " with changes"
    (tmp_path / "inside").mkdir()
    assert _commit(tmp_path / "inside") is None
