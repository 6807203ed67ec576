"""The machine and the versions that something was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ijepa_fast import __version__

_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def describe() -> dict[str, str]:
    """Versions and machine in short: what a run and its page keep. "commit" is there if this is a checkout.

    "with changes" behind a commit says that tracked files differ from it.
    """
    import torch

    found = machine("cuda" if torch.cuda.is_available() else "cpu")
    short = {"ijepa_fast": found["ijepa_fast"]}
    if found["commit"]:
        short["commit"] = found["commit"][:12] + (" with changes" if found["dirty"] else "")
    short |= {"python": found["python"], "torch": found["torch"], "numpy": found["numpy"], "machine": found["system"]}
    return short | ({"gpu": found["gpu"]} if "gpu" in found else {})


def machine(device: Any) -> dict[str, Any]:
    """All that a reader of measured times must know of where they were taken. Settings are read, never changed.

    The commit is that of the checkout the package stands in, or what IJEPA_FAST_COMMIT says where there is none.
    """
    import torch

    device = torch.device(device)
    commit, dirty = commit_of(Path(__file__).resolve().parents[2])
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "ijepa_fast": __version__,
        "torch": torch.__version__,
        "numpy": installed("numpy"),
        "triton": installed("triton"),
        "commit": commit,
        "dirty": dirty,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mb": round(properties.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda,
            **nvidia_smi(),
        }
    return found


def nvidia_smi() -> dict[str, Any]:
    """Driver and clocks as nvidia-smi reads them; the driver alone as None where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {"driver": None}
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    if done.returncode or len(values) != len(_SMI_FIELDS):
        return {"driver": None}
    return {"driver": values[0], "nvidia_smi": dict(zip(_SMI_FIELDS[1:], values[1:], strict=True))}


def commit_of(root: Path) -> tuple[str | None, bool | None]:
    """Commit of a checkout, and whether files differ from it; results and what git ignores do not count."""
    given = os.environ.get("IJEPA_FAST_COMMIT"), None
    # Installed packages may lie inside somebody else's checkout, whose commit would say nothing.
    if not (root / ".git").exists():
        return given

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return commit, bool(changed)
    except (OSError, subprocess.SubprocessError):
        return given


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
