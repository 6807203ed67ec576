"""The ahead-of-time compilation of kernels: what it reports, and that it sees each fault it is there to see."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa_fast.kernels import compile as tool
from ijepa_fast.kernels.sass import TMA_BITS, parse
from ijepa_fast.kernels.specs import CompileSpec

ROOT = Path(__file__).resolve().parents[1]
USAGE = "Function k:\n  REG:40 STACK:16 SHARED:128 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0"
# As cuobjdump prints: a loop 0x20 to 0x50 with a matrix instruction, a loop 0x60 to 0x80 without, a branch to itself.
SASS = """
	code for sm_90
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
                                                                              /* 0x000fe20000000f00 */
        /*0010*/              @!P0 LDG.E.LTC128B R9, desc[UR4][R2.64+0x10] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   LDL.64 R6, [R1+0x8] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   STL [R1], R6 ;
        /*0070*/                   LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;
        /*0080*/              @!P2 BRA 0x60 ;
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00a0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def run(*command: str) -> subprocess.CompletedProcess:
    """A process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    done = run("tests/compiled_kernels.py", "sm_90")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_good_kernels_have_no_failures(reports):
    good = reports["good"]
    assert good["failures"] == [] and good["main_load_bits"] == 128 and good["matrix"] == {}
    assert good["registers"] > 0 and good["stack"] == good["spills"] == 0
    product = reports["good product"]
    assert product["failures"] == [] and product["matrix"]["HGMMA"] > 0 and product["shared"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spills", "spill instructions in a memory-bound kernel"),
        ("spills in a loop with matrix instructions", "spill instructions in a loop with matrix instructions"),
        ("does not compile", "does not compile: CompilationError"),
        ("too much shared memory", "bytes of shared memory, 232448 allowed"),
        ("a buffer too few", "1 buffers are filled while a product may still read them"),
        ("no write", "a trap stands in place of the kernel, or it writes nothing"),
        ("narrow loads", "main loads of 16 bits, 128 wanted"),
        ("no matrix instructions", "no matrix instructions in a kernel of products"),
    ],
)
def test_each_fault_is_reported(reports, name, message):
    (failure,) = reports[name]["failures"]
    assert message in failure


def test_disassembly_is_understood():
    code = parse(SASS, USAGE)
    assert (code.registers, code.stack, code.shared) == (40, 16, 128)
    assert code.matrix == {"HGMMA": 1}
    assert code.loads == {TMA_BITS: 1, 128: 2, 32: 1, 16: 1}
    assert (code.spills, code.matrix_loop_spills, code.writes) == (2, 1, 1)


def test_output_of_another_tool_raises():
    with pytest.raises(RuntimeError, match="not understood: 0 instructions"):
        parse("", USAGE)


def test_main_loads_are_those_that_carry_half_of_the_data():
    code = parse(SASS, USAGE)
    assert code.main_load_bits(data_bytes=2 * 128 * 128, threads=128) == TMA_BITS
    narrow = parse("\n".join(line for line in SASS.splitlines() if "UTMALDG" not in line), USAGE)
    wide_bytes, rest = 2 * 16 * 128, (4 + 2) * 128
    assert narrow.main_load_bits(wide_bytes * 2, 128) == 128
    assert narrow.main_load_bits((wide_bytes + rest) * 2, 128) == 16
    assert narrow.main_load_bits((wide_bytes + rest) * 3, 128) == 0


def test_data_is_what_is_loaded_but_indices():
    ttgir = """
    %0 = tt.load %a : !tt.ptr<i32> loc(#loc)
    %1 = tt.load %b, %m : tensor<16x!tt.ptr<i32>, #ttg.slice<{dim = 1, parent = #blocked}>> loc(#loc)
    %2 = tt.load %c, %m, %z : tensor<16x256x!tt.ptr<bf16>, #blocked> loc(#loc)
    %3 = tt.load %d : tensor<8x!tt.ptr<i8>, #blocked> loc(#loc)
    %4 = ttg.async_copy_global_to_local %e, %f mask %m : tensor<64x!tt.ptr<f32>, #b> -> <64xf32, #shared, #smem> loc(#l)
    """
    assert tool.loaded_bytes(ttgir) == 16 * 256 * 2 + 8 + 64 * 4


def test_what_depends_on_the_architecture_is_judged_by_it():
    spec = CompileSpec("k", None, {}, {}, memory_bound=True)
    code = parse(SASS, USAGE)
    assert tool.judge(spec, "sm_80", 166912, 0, 0, 128, code) == []
    (failure,) = tool.judge(spec, "sm_80", 166913, 0, 0, 128, code)
    assert failure == "166913 bytes of shared memory, 166912 allowed"
    assert len(tool.judge(spec, "sm_100", 166913, 512, 0, 128, code)) == 2  # spills: in a loop, and memory-bound
    assert any("a trap" in failure for failure in tool.judge(spec, "sm_80", 0, 0, 1, 128, code))
    assert "513 columns of tensor memory, 512 allowed" in tool.judge(spec, "sm_100", 0, 513, 0, 128, code)


def test_interpreter_mode_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--arch", "sm_90"])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path):
    report = tmp_path / "report.json"
    arguments = ("--arch", "sm_90", "--modules", "gather_patches", "--json", str(report))
    done = run("-m", "ijepa_fast.kernels.compile", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert {kernel["arch"] for kernel in found["kernels"]} == {"sm_90"}
    assert all(kernel["name"] in done.stdout for kernel in found["kernels"])


def test_unknown_architecture_is_refused():
    done = run("-m", "ijepa_fast.kernels.compile", "--arch", "sm_75")
    assert done.returncode == 2 and "sm_75" in done.stderr


class Processes:
    """Stands for ``subprocess.run``: pip, and a compile tool that reports what the test wants of each Triton."""

    def __init__(self, failures: dict[str, list[str]], installed: str = "3.9.0", brought: str = "3.6.0"):
        self.failures, self.installed, self.brought = failures, installed, brought
        self.commands = []

    def __call__(self, command, env=None, **options):
        self.commands.append(command)
        if "pip" in command:
            return subprocess.CompletedProcess(command, 0)
        assert "TRITON_INTERPRET" not in env and Path(env["TRITON_CACHE_DIR"]) != Path.home() / ".triton"
        version = self.brought if "PYTHONPATH" in env else self.installed
        found = self.failures.get(version, [])
        if found is not None:
            kernel = {"name": "ema_kernel", "arch": "sm_90", "failures": found}
            report = {"triton": version, "kernels": [kernel]}
            Path(command[command.index("--json") + 1]).write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, 1 if found else 0, stdout="the table")


@pytest.fixture
def kernel_check():
    spec = importlib.util.spec_from_file_location("kernel_check", ROOT / "tools" / "kernel_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_kernels(kernel_check, monkeypatch, *arguments: str, **kwargs) -> tuple[int, list[list[str]]]:
    processes = Processes(**kwargs)
    monkeypatch.setattr(kernel_check.subprocess, "run", processes)
    return kernel_check.main(list(arguments)), processes.commands


def test_the_check_compiles_with_the_installed_and_with_the_oldest_triton(kernel_check, monkeypatch, capsys):
    code, (first, pip, second) = check_kernels(kernel_check, monkeypatch, "--arch", "sm_80", "sm_100", failures={})
    assert code == 0 and pip[-1] == "triton==3.6.0"
    assert first[first.index("--arch") :][:3] == second[second.index("--arch") :][:3] == ["--arch", "sm_80", "sm_100"]
    assert "Triton 3.9.0: 1 kernels" in capsys.readouterr().out


def test_the_check_compiles_once_where_the_oldest_triton_is_the_installed_one(kernel_check, monkeypatch):
    code, commands = check_kernels(kernel_check, monkeypatch, failures={}, installed="3.6.0")
    assert code == 0 and len(commands) == 1 and "sm_90" in commands[0]


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ({"failures": {"3.9.0": ["it spills"]}}, "Triton 3.9.0: ema_kernel sm_90: it spills"),
        ({"failures": {"3.6.0": ["it spills"]}}, "Triton 3.6.0: ema_kernel sm_90: it spills"),
        ({"failures": {"3.6.0": None}}, "and no report:\nthe table"),
        ({"failures": {}, "brought": "3.9.0"}, "3.9.0 compiled where 3.6.0 was installed"),
    ],
)
def test_the_check_fails_on_findings_of_either_triton(kernel_check, monkeypatch, capsys, processes, message):
    code, _ = check_kernels(kernel_check, monkeypatch, **processes)
    assert code == 1 and message in capsys.readouterr().err


def test_the_check_fails_where_the_tool_fails_without_a_finding_of_a_kernel(kernel_check, monkeypatch, capsys):
    """A kernel that stands in no compile_specs."""

    def run(command, **options):
        done = Processes({})(command, **options)
        return subprocess.CompletedProcess(command, int("--json" in command), stdout=done.stdout)

    monkeypatch.setattr(kernel_check.subprocess, "run", run)
    assert kernel_check.main([]) == 1
    assert "ended with 1 and 1 kernels:\nthe table" in capsys.readouterr().err
