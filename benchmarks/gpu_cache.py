"""``python -m benchmarks.gpu_cache``: Triton's kernels for an H200, compiled where no GPU is, to save time on one.

    python -m benchmarks.gpu_cache triton_cache.tar.xz

Run it with the Python and the Triton of the GPU's machine: Triton's library is part of the cache's keys.
``gpu_check.sh`` unpacks a file of that name, if there is one, and says what was missing from it.

Below Triton lies a stand-in for libcuda (stand_in_cuda.c), so launches take their whole way: specialisation, compiler,
launcher, module, launch. Launched are the configurations of the compile tool, and steps of the models that gpu_check
times, with one transformer block in place of all: blocks of one width share their kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._pytree import tree_map
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from benchmarks.gpu_check import unpack
from ijepa_fast import ops
from ijepa_fast.config import ModelConfig
from ijepa_fast.kernels import specs
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.step.captured import CapturedStep
from ijepa_fast.step.options import StepOptions, apply
from ijepa_fast.step.train_step import TrainStep

STREAM = 0x57
"""What stands for torch's current stream."""
MODELS = ("vit_h14", "vit_b16", "vit_l16", "vit_g16")
_READ = {"*": ctypes.c_uint64, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


@dataclass(frozen=True)
class Launch:
    """One launch as CUDA sees it. ``handed`` and ``received``: arguments that Triton was given, and CUDA from it."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int | None
    handed: tuple
    received: tuple


@dataclass
class StandIn:
    """An H200 that takes launches and runs nothing: what it was asked to do.

    Attributes:
        compiled: (kernel, whether the cache had it) of each specialisation.
    """

    launches: list[Launch] = field(default_factory=list)
    compiled: list[tuple[str, bool]] = field(default_factory=list)


def stand_in(folder: Path) -> StandIn:
    """Make Triton use a stand-in, for the rest of this process; its library is built into ``folder``."""
    library, current = folder / "libcuda.so.1", []
    headers = Path(nvidia.__file__).parent / "include"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    subprocess.run([*command, Path(__file__).with_name("stand_in_cuda.c"), "-o", library], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    gpu = StandIn()

    class Launcher(nvidia.CudaLauncher):
        def __init__(self, src, metadata):
            super().__init__(src, metadata)
            self.types = list(src.signature.values())

        def __call__(self, *arguments):
            # Grid, stream and function, two kinds of metadata and two hooks come before the kernel's own.
            current[:] = [(t, a) for t, a in zip(self.types, arguments[9:], strict=True) if t != "constexpr"]
            super().__call__(*arguments)

    listener = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, *[ctypes.POINTER(ctypes.c_uint)], *[ctypes.c_uint] * 2, *[ctypes.c_void_p] * 2
    )

    def note(name, grid, threads, shared, stream, parameters):
        places = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        received = tuple(
            _READ[kind[0] if kind[0] == "*" else kind].from_address(places[i]).value
            for i, (kind, _) in enumerate(current)
        )
        handed = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for _, a in current)
        gpu.launches.append(Launch(name.decode(), tuple(grid[:3]), threads, shared, stream, handed, received))

    loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # found again by its name when Triton links with it
    gpu.listener = listener(note)
    loaded.stand_in_listen(gpu.listener)
    active = nvidia.CudaDriver()
    active.launcher_cls = Launcher
    active.get_device_capability = lambda device=0: (9, 0)
    active.get_current_device, active.set_current_device = lambda: 0, lambda device: None
    active.get_current_stream = lambda device: STREAM
    driver.set_active(active)
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: gpu.compiled.append((src.name, cache_hit))
    return gpu


def launch_listed(files: Sequence[str] | None = None) -> None:
    """Everything that the compile tool lists for sm_90, or what it lists for some files of kernels. Call it before a
    file of kernels is imported."""

    def launch(arch: str, case: str, launcher, *arguments: Any, **properties: Any) -> list[specs.CompileSpec]:
        def on_host(value):
            meta = isinstance(value, torch.Tensor)
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if meta else value

        with torch.no_grad():
            launcher(*tree_map(on_host, arguments))
        return [specs.CompileSpec(case, None, {}, {})]

    specs.record_specs = launch
    tool = importlib.import_module("ijepa_fast.kernels.compile")
    for module in tool.load(files or tool.module_names()):
        list(getattr(module, "compile_specs", lambda _: ())("sm_90"))


def ops_take_kernels() -> None:
    """The package's ops launch their kernels for tensors of the CPU too, for the rest of this process."""
    for name, op in vars(ops).items():
        if hasattr(op, "definition"):

            def launch(*arguments, module=f"ijepa_fast.kernels.{op.kernel}", name=name):
                return getattr(importlib.import_module(module), name)(*arguments)

            op.register_kernel("cpu")(launch)
            op.definition = op  # which the optimizer calls on the CPU

    def tables(op: str, *lists):
        built = importlib.import_module(f"ijepa_fast.kernels.{op.rstrip('_')}").tables(*lists)
        return dict(zip(("tensor_table", "program_table"), built, strict=True))

    ops.pointer_tables = tables


def launch_steps(
    model: ModelConfig, options: StepOptions, steps: int, images: int = 2, round_rows: int | None = 128
) -> None:
    """Training steps whose ops are kernels; results are whatever lay in memory. After ``ops_take_kernels``."""
    networks = model.build(Objective())
    apply(replace(options, activation_checkpointing=False), networks, device=torch.device("cpu"), precision="bf16")
    optimizer = FusedAdamW(parameter_groups(networks), max_grad_norm=1.0, flat_gradients=options.capture)
    sampler, schedules = (
        MaskSampler(MaskConfig(min_keep=4), networks.context_encoder.grid),
        Schedules(total_steps=steps),
    )
    kind = partial(CapturedStep, graphs=Replays()) if options.capture else TrainStep
    step = kind(networks, optimizer, sampler, schedules, seed=0, round_rows=round_rows)
    pixels = torch.zeros(images, 3, model.img_size, model.img_size, dtype=torch.uint8)
    for number in range(steps):
        step(pixels, number, all_targets=number % 8 == 0)


class Replays:
    """Stands for CUDA graphs: a replay does the work again."""

    def run(self, work):
        return work()

    def capture(self, work):
        return work


def fill(files: Sequence[str] | None = None) -> None:
    """Launch what a GPU will be asked for, as far as it is known; or of some files of kernels what is listed alone."""
    launch_listed(files)
    if files:
        return
    from benchmarks.implementations import model_config  # which loads half of torch.compile

    ops_take_kernels()
    for name in MODELS:
        model = replace(model_config(name), depth=1, predictor_depth=1)
        for options in (StepOptions(), StepOptions(blocks="fused"), StepOptions(fp8_targets=True)):
            launch_steps(model, options, steps=2)


def pack(cache: Path, file: Path) -> None:
    """What a launch reads of the cache: binaries and their descriptions, not what they were made from."""
    with tarfile.open(file, "w:xz") as archive:
        for path in sorted(cache.glob("*/*")):
            if path.suffix in (".cubin", ".json", ".so"):
                archive.add(path, path.relative_to(cache))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cache", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="archive to write (.tar.xz)")
    parser.add_argument("--files", nargs="+", metavar="NAME", help="of these files of kernels alone")
    parser.add_argument("--check", action="store_true", help="read the archive instead, and name what it lacks")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        os.environ["TRITON_CACHE_DIR"] = str(cache)
        if options.check:
            unpack(options.file, cache)
        gpu = stand_in(Path(folder))
        fill(options.files)
        missed = [kernel for kernel, hit in gpu.compiled if not hit]
        print(f"Triton {triton.__version__}: {len(gpu.launches)} launches, {len(gpu.compiled)} kernels")
        if options.check:
            print(f"{len(missed)} kernels are not in {options.file}:", *missed)
            return 1 if missed else 0
        pack(cache, options.file)
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.1f} MB", flush=True)
    # In a process of its own and in another folder, as on the GPU's machine.
    command = [sys.executable, "-m", "benchmarks.gpu_cache", options.file, "--check"]
    return subprocess.run([*command, *(["--files", *options.files] if options.files else [])]).returncode


if __name__ == "__main__":
    sys.exit(main())
