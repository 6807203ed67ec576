"""Compiles every Triton kernel ahead of time, with the installed Triton and with the oldest supported one.

    python3 tools/environment.py --extras train,test -- tools/kernel_check.py [--arch sm_80 sm_90 sm_100] [--jobs N]

Needs no GPU. Fails (exit 1) on whatever `python -m ijepa_fast.kernels.compile` finds wrong with the machine code: two
versions, because what one keeps in registers the other may spill. pip brings the older wheel into a temporary folder;
the variable PIP_ARGS holds further arguments for it.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "3.6.0"


def install_oldest(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [*shlex.split(os.environ.get("PIP_ARGS", "")), "--target", str(folder), f"triton=={OLDEST}"]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"kernel_check: pip could not install triton=={OLDEST} (above). PIP_ARGS= gives pip further arguments")


def environment(triton_folder: Path | None) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return environ if triton_folder is None else {**environ, "PYTHONPATH": str(triton_folder)}


def compile_kernels(arguments: list[str], scratch: Path, triton_folder: Path | None) -> tuple[str, list[str]]:
    """Run the compile tool, with the Triton in ``triton_folder`` or else the installed one.

    Returns:
        The version that compiled, and what is wrong (in words; empty if nothing is).
    """
    report = scratch / "report.json"
    report.unlink(missing_ok=True)
    environ = environment(triton_folder) | {"TRITON_CACHE_DIR": str(scratch / "cache")}
    command = [sys.executable, "-m", "ijepa_fast.kernels.compile", *arguments, "--json", str(report)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not report.exists():
        return "unknown", [f"the compile tool ended with {done.returncode} and no report:\n{done.stdout}"]
    found = json.loads(report.read_text())
    kernels = found["kernels"]
    print(
        f"kernel_check: Triton {found['triton']}: {len(kernels)} kernels in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    wrong = [f"{k['name']} {k['arch']}: {failure}" for k in kernels for failure in k["failures"]]
    if not kernels or (done.returncode and not wrong):
        wrong.append(f"the compile tool ended with {done.returncode} and {len(kernels)} kernels:\n{done.stdout}")
    return found["triton"], wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help="architectures; sm_90 if none is given")
    parser.add_argument("--jobs", default="2", help="processes; 2 if not given")
    options = parser.parse_args(arguments)
    passed_on = ["--arch", *options.arch, "--jobs", options.jobs]
    with tempfile.TemporaryDirectory() as folder:
        scratch, oldest = Path(folder), Path(folder, "triton")
        version, wrong = compile_kernels(passed_on, scratch, None)
        findings = [f"Triton {version}: {finding}" for finding in wrong]
        if version != OLDEST:
            install_oldest(oldest)
            version, wrong = compile_kernels(passed_on, scratch, oldest)
            findings += [f"Triton {version}: {finding}" for finding in wrong]
            if version != OLDEST:
                findings.append(f"Triton {version} compiled where {OLDEST} was installed")
    for finding in findings:
        print(f"kernel_check: FAILED {finding}", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
