"""What this machine offers and what it lacks, with reasons: the command ``ijepa-fast doctor``.

torch is imported when a report is made, so that a torch that cannot be loaded is a line of the report.
"""

import os
import platform
import shutil
import sys
from dataclasses import replace

from ijepa_fast import __version__
from ijepa_fast.run.environment import installed, nvidia_smi

OPTIONAL_PACKAGES = (
    "pillow",
    "tqdm",
    "matplotlib",
    "jsonargparse",
    "safetensors",
    "tensorboard",
    "flash-attn",
    "flash-attn-4",
    "xformers",
)
OLDEST_CAPABILITY = (8, 0)
"""Triton kernels here use bf16 matrix units and asynchronous copies, which came with Ampere (sm_80)."""


def report() -> dict:
    """Everything that ``doctor`` prints, as plain JSON types.

    Returns:
        ``versions`` {name: version or why there is none}; ``optional`` {package: version or None}; ``gpus`` list of
        {name, capability, memory_gib, driver}; and for each of ``gpu``, ``triton`` None if it is usable, else the
        reason why not; ``extension`` the same for the C++/CUDA mask sampler on each type of device; ``attention`` the
        same for every backend, and ``attention_auto``, the name of the backend that "auto" takes for a typical sequence
        here. Without a loadable torch only the first two are there.
    """
    versions = {
        "ijepa_fast": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "numpy": installed("numpy"),
        "torch": installed("torch"),
        "triton": installed("triton"),
    }
    found = {"versions": versions, "optional": {name: installed(name) for name in OPTIONAL_PACKAGES}}
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch that cannot be loaded
        versions["torch"] = f"{versions['torch'] or 'not installed'}, cannot be imported: {error}"
        return found
    from ijepa_fast.masks import extension

    versions["torch"] = str(torch.__version__)  # names the build, which the package's metadata may not
    found["gpus"] = _gpus(torch)
    found["gpu"] = _why_no_gpu(torch)
    found["triton"] = _why_no_triton(found["gpus"])
    found["extension"] = {device_type: extension.reason(device_type) for device_type in ("cpu", "cuda")}
    found["attention"], found["attention_auto"] = _attention(torch)
    return found


def text(found: dict) -> str:
    """The report for a person: one line per fact, a reason beside everything that is missing."""
    lines = [*_section("Versions", {name: value or "not installed" for name, value in found["versions"].items()})]
    lines += _section(
        "Optional packages", {name: value or "not installed" for name, value in found["optional"].items()}
    )
    if "gpu" not in found:
        return "\n".join(lines)
    parts = {
        "GPU": found["gpu"] or "; ".join(_describe(gpu) for gpu in found["gpus"]),
        "Triton": _usable(found["triton"]),
    }
    lines += _section("Hardware and kernels", parts)
    samplers = {
        device_type: f"vectorised torch: {reason}" if reason else "C++/CUDA extension"
        for device_type, reason in found["extension"].items()
    }
    lines += _section("Mask sampler, by device", samplers)
    lines += _section("Attention backends", {name: _usable(reason) for name, reason in found["attention"].items()})
    lines.append(f"  auto takes {found['attention_auto']}")
    return "\n".join(lines)


def _section(title: str, facts: dict[str, str]) -> list[str]:
    width = max(map(len, facts))
    return [title, *(f"  {name:<{width}}  {value}" for name, value in facts.items())]


def _usable(reason: str | None) -> str:
    return "usable" if reason is None else f"not used: {reason}"


def _describe(gpu: dict) -> str:
    return f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB, driver {gpu['driver']}"


def _gpus(torch) -> list[dict]:
    if not torch.cuda.is_available():
        return []
    driver = _driver_version()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30),
            "driver": driver or "unknown",
        }
        for gpu in properties
    ]


def _driver_version() -> str | None:
    return nvidia_smi()["driver"]


def _why_no_gpu(torch) -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.backends.mps.is_available():
        return "none that is used: nothing here has run on Apple's GPUs (mps) yet"
    driver = _driver_version()
    if torch.version.cuda is None:
        hint = f", although there is an NVIDIA driver {driver}: install a CUDA build of torch" if driver else ""
        return f"none: torch {torch.__version__} is built without CUDA{hint}"
    seen = f"driver {driver}" if driver else "nvidia-smi finds no driver either"
    return f"none: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no device ({seen})"


def _why_no_triton(gpus: list[dict]) -> str | None:
    """Why Triton kernels cannot run, None if they can."""
    try:
        import triton  # noqa: F401
    except (ImportError, OSError) as error:
        return f"triton cannot be imported: {error}"
    if not gpus:
        return "no CUDA device; on the CPU every op runs its torch reference"
    old = [gpu for gpu in gpus if tuple(map(int, gpu["capability"].split("."))) < OLDEST_CAPABILITY]
    if old:
        return f"{_describe(old[0])} is older than sm_{OLDEST_CAPABILITY[0]}{OLDEST_CAPABILITY[1]}"
    if not any(filter(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))):
        return "no C compiler: Triton builds its launchers with one (install gcc, or set CC)"
    return None


def _attention(torch) -> tuple[dict[str, str | None], str]:
    """Each attention backend's reason against sequences of one typical length on this machine, which ask the least of
    it, and the choice of "auto" for any lengths."""
    from ijepa_fast.attention import dispatch as attention

    cuda = torch.cuda.is_available()
    typical = attention.Request(
        device=torch.device("cuda" if cuda else "cpu"),
        dtype=torch.bfloat16 if cuda else torch.float32,
        head_dim=64,
        max_seqlen=256,
    )
    easiest = replace(typical, uniform=True)
    reasons = {name: backend.reason(easiest) for name, backend in attention.BACKENDS.items()}
    return reasons, attention.resolve("auto", typical)
