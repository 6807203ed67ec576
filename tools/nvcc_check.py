"""Compiles csrc/block_masks_cuda.cu for every GPU generation it is meant for and judges what became of each kernel.

    python tools/nvcc_check.py

Needs nvcc but neither a GPU nor torch. Fails (exit 1) where a kernel spills registers or has a stack frame, or the host
calls more of CUDA's runtime than launches; where there is no nvcc it says so and passes.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "block_masks_cuda.cu"
ARCHITECTURES = ("80", "90", "100")
RUNTIME_CALLS = {"cudaLaunchKernel", "cudaGetLastError", "cudaGetErrorString"}


class Resources(NamedTuple):
    """What one kernel takes, registers per thread and bytes of stack and spills."""

    kernel: str
    registers: int
    stack: int
    spills: int


def parse(report: str) -> list[Resources]:
    """The kernels in what `ptxas -v` prints."""
    pattern = re.compile(
        r"Compiling entry function '\S*?(?P<kernel>[a-z]+_kernel)\S*'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        Resources(m["kernel"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in pattern.finditer(report)
    ]


def compile_for(nvcc: str, architecture: str) -> list[Resources]:
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-c", SOURCE]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-o", Path(folder, "object.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"nvcc_check: {SOURCE.name} does not compile for sm_{architecture}:\n{done.stdout}{done.stderr}")
        symbols = subprocess.run(["nm", "-u", command[-1]], capture_output=True, text=True).stdout
    if others := set(re.findall(r" (cuda\w+)", symbols)) - RUNTIME_CALLS:
        sys.exit(f"nvcc_check: {SOURCE.name} calls {', '.join(sorted(others))}, but must launch and never wait or copy")
    return parse(done.stdout + done.stderr)


def main() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc_check: SKIPPED, there is no nvcc on the PATH: the CUDA kernels of csrc/ were not compiled")
        return
    failed = False
    for architecture in ARCHITECTURES:
        kernels = compile_for(nvcc, architecture)
        if len(kernels) != 3:
            sys.exit(f"nvcc_check: found {[kernel.kernel for kernel in kernels]} for sm_{architecture}, not 3 kernels")
        for kernel in kernels:
            bad = bool(kernel.stack or kernel.spills)
            failed |= bad
            print(
                f"sm_{architecture:<4} {kernel.kernel:<14} {kernel.registers:>3} registers  stack {kernel.stack}  "
                f"spills {kernel.spills}" + ("  FAILED" if bad else "")
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
