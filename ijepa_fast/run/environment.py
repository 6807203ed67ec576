"""With what a run, or a page about it, was made."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import numpy
import torch

from ijepa_fast import __version__


def describe() -> dict[str, str]:
    """Name -> version of the package, Python, torch and numpy, and the machine; "commit" if this is a checkout.

    "with changes" behind a commit says that tracked files differ from it.
    """
    found = {"ijepa_fast": __version__}
    if commit := _commit(Path(__file__).parents[1]):
        found["commit"] = commit
    found |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _commit(root: Path) -> str | None:
    # Installed packages may lie inside somebody else's checkout, whose commit would say nothing.
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
