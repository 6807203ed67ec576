"""Finds or makes the environment of this checkout, then runs Python in it: what every `make` target goes through.

    python3 tools/environment.py [--own-venv] --extras train -- -m ijepa_fast --help

An active virtualenv or conda environment that has torch >= 2.10 is used in place, and its torch is never changed.
Otherwise `.venv` is made with the versions in constraints.txt. A stamp inside the environment says what was set up
there, so that the next run starts at once. The variable PIP_ARGS holds further arguments for `pip install`; without
it, a Linux machine without an NVIDIA driver gets the CPU build of torch, if PyTorch's index of it can be reached.
Standard library only.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 10)

if sys.version_info < OLDEST_PYTHON:
    sys.exit(
        f"setup: {sys.executable} is Python {sys.version.split()[0]}; ijepa_fast needs Python 3.10 or later. "
        "Name one, for example: make demo PYTHON=python3.12"
    )

ROOT = Path(__file__).resolve().parents[1]
INPUTS = ("setup.py", "pyproject.toml", "constraints.txt", "tools/environment.py")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GPU_DEVICES = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg")  # the last is a GPU under WSL
STAMP = "ijepa_fast_setup.json"
# Run by the environment's own interpreter, which need not be the one that runs this file.
PROBE = """
import importlib.metadata as m, importlib.util, json, sys
name = lambda d: (d.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-")
print(json.dumps({
    "prefix": sys.prefix, "python": list(sys.version_info[:2]), "pip": importlib.util.find_spec("pip") is not None,
    "packages": {name(d): d.version for d in m.distributions()},
}))
"""


def say(message: str) -> None:
    print(f"setup: {message}", file=sys.stderr, flush=True)


def probe(python: Path) -> dict | None:
    """Prefix, Python version and installed packages of the environment of `python`; None if that does not run."""
    try:
        # Neither PYTHONPATH nor this folder: the checkout on sys.path must not pass for an installed package.
        environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, env=environ, cwd=python.parent)
    except OSError:
        return None
    return {"executable": str(python), **json.loads(done.stdout)} if done.returncode == 0 else None


def active_environments() -> list[Path]:
    """Interpreters of the active virtualenv and conda environment, also where only PATH tells that one is active."""
    prefixes = [os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    found = [Path(prefix, "bin", "python") for prefix in prefixes if prefix]
    if not found and (sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir()):
        found.append(Path(sys.executable))
    return found


def usable_in_place(found: dict | None, python: Path) -> bool:
    """Whether the active environment can be used as it is; says why where it cannot."""
    if found is None:
        say(f"the active environment's {python} does not run: not used")
        return False
    torch = found["packages"].get("torch")
    if tuple(found["python"]) < OLDEST_PYTHON:
        say(f"the active environment {found['prefix']} has Python {'.'.join(map(str, found['python']))}: not used")
        return False
    if torch is None or tuple(map(int, re.findall(r"\d+", torch)[:2])) < OLDEST_TORCH:
        say(f"the active environment {found['prefix']} has {f'torch {torch}' if torch else 'no torch'}: not used")
        return False
    return True


def own_environment(clear_other_python: bool) -> dict:
    """The checkout's `.venv`, made if it is not there, made anew if its Python does not run or is too old.

    `clear_other_python`: made anew, too, if its Python is another release than the one that runs this file.
    """
    folder = ROOT / ".venv"
    python = folder / "bin" / "python"
    found = probe(python) if python.exists() else None
    if found:
        release = tuple(found["python"])
        if release >= OLDEST_PYTHON and (not clear_other_python or release == sys.version_info[:2]):
            return found
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        release = f"{sys.version_info[0]}.{sys.version_info[1]}"
        sys.exit(
            f"setup: {sys.executable} (Python {release}) lacks the standard modules venv and ensurepip, which make "
            f".venv. On Debian and Ubuntu: apt install python{release}-venv (or python3-venv). Or activate an "
            "environment that has torch >= 2.10, or name another Python: PYTHON=python3.12"
        )
    say(f"making {folder} with Python {sys.version.split()[0]}")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", folder]).returncode:
        sys.exit(f"setup: {sys.executable} -m venv {folder} failed (above)")
    return probe(python) or sys.exit(f"setup: {python} does not run")


def constraints_in_place(constraints: str, installed: dict[str, str]) -> str:
    """The tested versions for what is missing; torch as it is; nothing for what else is there: pip leaves it alone.

    `installed` maps normalised package names to versions. Requirement lines are as in constraints.txt.
    """
    lines = [f"torch=={installed['torch']}"]
    for line in constraints.splitlines():
        name = re.match(r"[\w.-]*", line).group().lower().replace("_", "-").replace(".", "-")
        if name and name not in installed:
            lines.append(line)
    return "\n".join(lines) + "\n"


def further_pip_arguments(has_torch: bool) -> list[str]:
    """PIP_ARGS; without it, the index of torch's CPU builds where the CUDA build would be of no use."""
    given = shlex.split(os.environ.get("PIP_ARGS", ""))
    if given or has_torch or sys.platform != "linux" or any(map(os.path.exists, GPU_DEVICES)):
        return given
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
    except (OSError, ValueError) as error:
        say(
            "this machine has no NVIDIA driver, yet pip may bring torch with gigabytes of CUDA libraries, because the "
            f"index of CPU builds cannot be reached ({CPU_INDEX}: {error})"
        )
        return []
    say(
        f"this machine has no NVIDIA driver: torch comes from the index of its CPU builds, {CPU_INDEX} "
        "(for the CUDA build, give pip arguments of your own, such as PIP_ARGS=--prefer-binary)"
    )
    return ["--extra-index-url", CPU_INDEX]


def install(environment: dict, extras: set[str], in_place: bool) -> None:
    """Puts this checkout (editable) and the named extras into the environment."""
    python, text = environment["executable"], (ROOT / "constraints.txt").read_text()
    if not environment["pip"] and subprocess.run([python, "-m", "ensurepip"]).returncode:
        sys.exit(f"setup: {environment['prefix']} has no pip, and ensurepip could not bring it: install pip there")
    if in_place:
        text = constraints_in_place(text, environment["packages"])
    say(f"installing ijepa_fast [{', '.join(sorted(extras))}] into {environment['prefix']}")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(text)
        command = [python, "-m", "pip", "install", "--disable-pip-version-check", "-c", constraints]
        command += [*further_pip_arguments("torch" in environment["packages"]), "-e", f".[{','.join(sorted(extras))}]"]
        if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
            sys.exit("setup: pip install failed (above). PIP_ARGS= gives pip further arguments, such as an index")


def ensure_set_up(environment: dict, extras: set[str], in_place: bool) -> None:
    """Installs what the stamp in the environment does not vouch for."""
    state = hashlib.sha256(str(ROOT).encode())
    for name in INPUTS:
        state.update((ROOT / name).read_bytes())
    stamp = Path(environment["prefix"], STAMP)
    packages = environment["packages"]
    wanted = {"inputs": state.hexdigest(), "torch": packages.get("torch"), "package": packages.get("ijepa-fast")}
    done = json.loads(stamp.read_text()) if stamp.exists() else {}
    have = set(done.pop("extras", [])) if done.get("inputs") == wanted["inputs"] else set()
    if have and done == wanted and extras <= have:
        return
    install(environment, extras | have, in_place)
    packages = probe(Path(environment["executable"]))["packages"]
    if not {"torch", "ijepa-fast"} <= set(packages):
        sys.exit(f"setup: pip reported success, but torch and ijepa-fast are not in {environment['prefix']}")
    wanted.update(torch=packages["torch"], package=packages["ijepa-fast"], extras=sorted(extras | have))
    stamp.write_text(json.dumps(wanted) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="train", help="extras of setup.py, with commas between")
    parser.add_argument("--own-venv", action="store_true", help="use .venv, made by this Python, whatever is active")
    parser.add_argument("arguments", nargs="*", help="what the environment's Python is run with")
    options = parser.parse_args()

    environment, in_place = None, False
    if not options.own_venv:
        for python in active_environments():
            found = probe(python)
            if usable_in_place(found, python):
                environment, in_place = found, True
                break
    if environment is None:
        environment = own_environment(clear_other_python=options.own_venv)
    ensure_set_up(environment, set(options.extras.split(",")), in_place)
    if options.arguments:
        os.execv(environment["executable"], [environment["executable"], *options.arguments])


if __name__ == "__main__":
    main()
