"""The code of csrc/ that CUDA kernels run, checked without a GPU.

csrc/host_teams.cpp in this folder runs it on the host with teams of 1 to 32 lanes, under the sanitizers: the masks must
be those of the torch sampler, and no lane may leave a buffer, meet undefined behaviour or, without a sync, another
lane's data. csrc/cuda_launches.cpp runs the kernels themselves, against a stand-in for CUDA's header.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from mask_cases import CROWDED, HARD_CASES

from ijepa_fast.masks import extension
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler

ROOT = Path(__file__).resolve().parents[1]
SEED, STEP, FIRST_IMAGE = -(2**62) - 77, 2**32 - 1, 2**31

CASES = [
    *((config, grid) for config in HARD_CASES for grid in ((8, 11), (14, 14), (20, 37))),
    (MaskConfig(), (40, 70)),
    (MaskConfig(strategy="rasterized"), (7, 45)),
    (MaskConfig(strategy="rasterized", context="fixed", mask_ratio=0.9), (13, 14)),
    (MaskConfig(strategy="block", context="batch_min", group_size=1, size_per="image"), (16, 16)),
    (MaskConfig(strategy="random", context="fixed", mask_ratio=0.95, size_per="step"), (9, 33)),
    (MaskConfig(allow_overlap=True, context="fixed", num_contexts=2), (14, 14)),
    (replace(CROWDED, num_targets=40, target_scale=(0.15, 0.2), min_keep=5), (14, 14)),
    (MaskConfig(num_targets=1, target_scale=(1, 1), target_aspect=(1, 1), context_scale=(1, 1)), (32, 32)),
]


def compiled(folder, name, *flags, sources=("tests/csrc/host_teams.cpp",)):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "g++"
    program = folder / name
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Werror"]
    command = [compiler, "-std=c++17", "-g", "-O1", *warnings, "-pthread", "-Icsrc", *flags, *sources, "-o", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"a C++ compiler with sanitizers is needed:\n{done.stderr}"
    return program


def case_and_masks(config, grid, num_groups):
    """The program's line of input, and the four lines that it must print."""
    group_size = config.group_size or 2
    sampler = MaskSampler(replace(config, group_size=group_size), grid, implementation="torch")
    masks = sampler.sample(num_groups * group_size, seed=SEED, step=STEP, first_image=FIRST_IMAGE)
    line = [SEED, STEP, FIRST_IMAGE, num_groups * group_size, *extension.plan_numbers(sampler.plan)]
    tensors = masks.context.indices, masks.context.cu_seqlens, masks.targets.indices, masks.targets.cu_seqlens
    return " ".join(map(str, line)), [" ".join(map(str, tensor.tolist())) for tensor in tensors]


def masks_of(program, lanes, lines):
    """The printed lines, after a check that no sanitizer had anything to say."""
    done = subprocess.run([program, str(lanes)], input="\n".join(lines), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]
    return done.stdout.splitlines()


def check(program, lanes, num_groups):
    lines, expected = zip(*(case_and_masks(config, grid, num_groups) for config, grid in CASES), strict=True)
    printed = masks_of(program, lanes, lines)
    for number, (config, grid) in enumerate(CASES):
        assert printed[4 * number : 4 * number + 4] == expected[number], f"{config} on {grid}"


@pytest.fixture(scope="module")
def watched_program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host_teams")
    return compiled(folder, "host_teams", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
def test_no_address_or_arithmetic_error_and_the_same_masks(watched_program):
    check(watched_program, lanes=1, num_groups=20)
    check(watched_program, lanes=32, num_groups=1)


def any_plan(random):
    """Numbers in the ranges of csrc/mask_plan.h, whether or not MaskSampler would make such a plan."""
    strategy, group_size = random.randrange(4), random.randint(1, 3)
    num_targets, num_contexts = (random.randint(1, 9), random.randint(1, 3)) if strategy == 0 else (3, 1)
    height, width = random.randint(1, 40), random.randint(1, 70)
    rules = []
    for _ in range(2):
        rules += sorted(random.randint(1, 2 ** random.randint(1, 24)) for _ in range(2))
        rules += sorted(random.randint(2**18, 2 ** random.randint(18, 30)) for _ in range(2))
    return [
        *(extension.PLAN_FORMAT, strategy, random.randrange(3), random.randrange(3), random.randrange(2)),
        *(num_targets, num_contexts, group_size, height, width),
        *(random.randint(1, height), random.randint(1, width), random.randrange(2), *rules),
        *(random.randint(1, height * width), random.randint(0, num_targets), random.randint(0, height * width)),
        random.randint(1, 3),
    ]


@pytest.mark.slow
def test_no_plan_that_is_accepted_leaves_its_buffers_or_divides_the_lanes(watched_program):
    random = Random(0)
    lines = []
    for _ in range(300):
        plan = any_plan(random)
        lines.append(" ".join(map(str, [random.getrandbits(63), random.getrandbits(32), 0, 2 * plan[7], *plan])))
    assert masks_of(watched_program, 1, lines) == masks_of(watched_program, 5, lines)


@pytest.mark.slow
def test_no_lane_depends_on_another_without_a_sync(tmp_path):
    program = compiled(tmp_path, "host_teams", "-fsanitize=thread")
    check(program, lanes=7, num_groups=1)


@pytest.mark.slow
def test_a_missing_sync_would_be_found(tmp_path):
    """The check above can fail: without the syncs of teams, lanes race."""
    source = (ROOT / "tests/csrc/host_teams.cpp").read_text()
    broken = tmp_path / "host_teams.cpp"
    broken.write_text(
        source.replace("void sync() { pthread_barrier_wait(&meeting_.barrier); }", "void sync() { meet(); }")
    )
    program = compiled(tmp_path, "broken", "-fsanitize=thread", sources=[broken])
    line, _ = case_and_masks(MaskConfig(), (14, 14), 1)
    done = subprocess.run([program, "7"], input=line, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "data race" in done.stderr


@pytest.mark.slow
def test_the_glue_for_cuda_compiles_beside_any_build_of_torch(tmp_path):
    from torch.utils import cpp_extension

    include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    flags = ["-fsyntax-only", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    compiled(
        tmp_path, "unused", *flags, "-DUSE_CUDA", "-DIJEPA_FAST_WITH_CUDA", *include, sources=["csrc/bindings.cpp"]
    )


def kernels_for_the_host(folder):
    """csrc/block_masks_cuda.cu as C++: launches are calls, launch bounds constants."""
    source = (ROOT / "csrc" / "block_masks_cuda.cu").read_text()
    bounds = r"__global__ void __launch_bounds__\((.*?)\)\s+(\w+)\("
    source, kernels = re.subn(bounds, r"constexpr stand_in::Bounds \2_bounds{\1};\nvoid \2(", source)
    launch = r'stand_in::launch("\1", \1_bounds, \1, \2)('
    source, launches = re.subn(r"(\w+)<<<(.*?)>>>\(", launch, source)
    assert kernels == launches == 3 and "__global__" not in source
    (folder / "kernels.cpp").write_text(source)
    return folder / "kernels.cpp"


@pytest.mark.slow
def test_kernels_are_launched_within_their_bounds_and_draw_the_masks_of_the_torch_sampler(tmp_path):
    """On the stream that is given, without shared memory, and with nothing that waits or copies: see the stand-in."""
    sources = ["tests/csrc/cuda_launches.cpp", kernels_for_the_host(tmp_path)]
    program = compiled(tmp_path, "cuda_launches", "-Itests/csrc/stand_in", sources=sources)
    cases = [(config, grid, 3) for config, grid in CASES[::8]] + [(MaskConfig(), (14, 14), 20)]
    lines, expected = zip(*(case_and_masks(*case) for case in cases), strict=True)
    done = subprocess.run([program, "3"], input="\n".join(lines), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr
    printed = done.stdout.splitlines()
    for number, case in enumerate(cases):
        context, context_ends, targets, target_ends, launches = printed[5 * number : 5 * number + 5]
        want = expected[number]
        assert [context, context_ends] == [f"{want[0]} -1 -1 -1", want[1]], case
        assert [targets, target_ends] == [f"{want[2]} -1 -1 -1", want[3]], case
        masks = int(lines[number].split()[3]) * case[0].per_image
        blocks = -(-masks // 4)
        assert (
            launches
            == f"draw_kernel {blocks} 128 0 0x57; starts_kernel 2 1024 0 0x57; pack_kernel {blocks} 128 0 0x57; "
        )
    # Too few rows are told by the assertion of the kernel, and nothing else.
    done = subprocess.run([program, "-1"], input=lines[0], capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "mask tokens do not fit the capacity" in done.stderr


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reports_of_the_cuda_compiler_are_read():
    report = """
ptxas info    : 190 bytes gmem
ptxas info    : Compiling entry function '_ZN5ijepa52_GLOBAL__N__828d11pack_kernelENS_5BatchE' for 'sm_90'
ptxas info    : Function properties for _ZN5ijepa52_GLOBAL__N__828d11pack_kernelENS_5BatchE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compile time = 120.610 ms
ptxas info    : Compiling entry function '_ZN5ijepa52_GLOBAL__N__828d11draw_kernelENS_5BatchEPKl' for 'sm_90'
ptxas info    : Function properties for _ZN5ijepa52_GLOBAL__N__828d11draw_kernelENS_5BatchEPKl
    8 bytes stack frame, 16 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 8 bytes cumulative stack size
"""
    assert load_tool("nvcc_check").parse(report) == [("pack_kernel", 32, 0, 0), ("draw_kernel", 64, 8, 20)]


def test_the_plan_format_is_the_one_of_the_sources():
    header = (ROOT / "csrc" / "mask_plan.h").read_text()
    assert f"kPlanFormat = {extension.PLAN_FORMAT};" in header
    plan = MaskSampler(MaskConfig(), (14, 14)).plan
    assert f"kPlanNumbers = {len(extension.plan_numbers(plan))};" in header
