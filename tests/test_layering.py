"""The import rule of the package, held by reading the source: who may import whom, and which third-party packages.

A wing (a folder, or a module at the top) may import what it stands on in STANDS_ON, directly or further down, and
nothing else of the package. A new wing must be given its place there.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

STANDS_ON = {
    # The core: tensors in, tensors out.
    "ragged": "",
    "philox": "",
    "kernels": "",
    "side_stream": "",
    "ranks": "",
    "ops": "ragged philox kernels",
    "attention": "ops",
    "masks": "ops",
    "model": "attention masks side_stream",
    "optim": "ops",
    "step": "model masks optim",
    "config": "step",
    "command_line": "config",
    # Around it: a run, its data, and what is shown of it.
    "run": "config ranks",
    "data": "philox ranks side_stream",
    "plots": "evaluate",
    "evaluate": "config data",
    "configure": "run data",
    "start": "evaluate weights",
    "train": "start plots configure",
    "weights": "run",
    "jepa_model": "weights evaluate",
    "interop": "jepa_model command_line",
    "report": "downstream",
    "downstream": "plots jepa_model command_line",
    "bench": "run command_line",
    "doctor": "attention masks run",
    "cli": "train report interop doctor bench",
    "__main__": "cli",
    "__init__": "",  # names its modules as strings and imports them on first use
}
THIRD_PARTY = {
    **dict.fromkeys(STANDS_ON, "torch numpy"),
    "kernels": "torch triton",
    "data": "torch numpy PIL",
    "plots": "torch numpy PIL matplotlib",
    "run": "torch numpy safetensors tqdm",
    "weights": "torch numpy safetensors",
    "report": "torch numpy PIL yaml",
    "downstream": "torch numpy PIL tqdm",
    "cli": "yaml",
    "jepa_model": "torch numpy safetensors",
    "interop": "torch numpy safetensors yaml transformers timm lightning",
}
# Optional packages, imported by the function that needs them and never when the module is loaded.
INSIDE_FUNCTIONS = {
    "attention": "flash_attn flash_attn_interface xformers",
    "bench": "flash_attn flash_attn_interface xformers yaml",
    "data": "webdataset fsspec tifffile pillow_heif datasets pyarrow",
    "downstream": "safetensors sklearn pyarrow torchvision faster_coco_eval",
    "doctor": "triton",
    "config": "yaml",
    "command_line": "jsonargparse yaml",
    "interop": "yaml huggingface_hub onnxscript",
    "run": "yaml PIL wandb mlflow",
}


class Import(NamedTuple):
    name: str  # dotted and absolute
    inside_function: bool


def component_of(path: Path) -> str:
    """ijepa_fast/data/loader.py -> data, kernels/ema.py -> kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "ijepa_fast" else parts[0]


def imports_of(tree: ast.Module, package: str) -> list[Import]:
    """Every import of a module; `package` is the dotted package that relative imports start from."""
    found = []

    def visit(node: ast.AST, inside_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.extend(Import(f"{module}.{alias.name}", inside_function) for alias in node.names)
        inside_function |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside_function)

    visit(tree, False)
    return found


def reach(component: str) -> set[str]:
    """What `component` may import: all that it stands on."""
    below = STANDS_ON[component].split()
    return set(below).union(*map(reach, below))


def violations(component: str, imports: list[Import]) -> list[str]:
    """The imports that the rule forbids to `component`, in words."""
    if component not in STANDS_ON:
        return [f"{component} has no place in STANDS_ON of tests/test_layering.py"]
    found = []
    for name, inside_function in imports:
        top, _, rest = name.partition(".")
        if top == "ijepa_fast":
            target = rest.partition(".")[0]
            if target not in {component, "__version__", *reach(component)}:
                found.append(f"{component} imports {name}")
        elif top not in sys.stdlib_module_names and top not in THIRD_PARTY[component].split():
            if not (inside_function and top in INSIDE_FUNCTIONS.get(component, "").split()):
                found.append(f"{component} imports {name}" + ("" if inside_function else " when it is loaded"))
    return found


def parsed(folder: str) -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(), str(path))) for path in sorted((ROOT / folder).rglob("*.py"))]


def package_of(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).parent.parts)
    return dotted.replace("kernels", "ijepa_fast.kernels", 1) if dotted.startswith("kernels") else dotted


@pytest.mark.parametrize("folder", ["ijepa_fast", "kernels"])
def test_imports_go_leftwards_and_third_party_packages_stay_in_their_place(folder):
    files = parsed(folder)
    assert files
    found = []
    for path, tree in files:
        found += [
            f"{path.relative_to(ROOT)}: {v}" for v in violations(component_of(path), imports_of(tree, package_of(path)))
        ]
    assert not found, "\n".join(found)


def test_only_ops_registers_with_torch_library():
    for path, tree in [*parsed("ijepa_fast"), *parsed("kernels")]:
        uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.library"]
        uses += [i for i in imports_of(tree, package_of(path)) if i.name.startswith("torch.library")]
        assert not uses or ROOT / "ijepa_fast" / "ops" in path.parents, f"{path.relative_to(ROOT)} uses torch.library"


def test_nothing_imports_kernels_as_a_top_level_package():
    for folder in ("ijepa_fast", "kernels", "tests", "benchmarks", "examples", "tools"):
        for path, tree in parsed(folder):
            names = [i.name for i in imports_of(tree, package_of(path)) if i.name.partition(".")[0] == "kernels"]
            assert not names, f"{path.relative_to(ROOT)} imports {names}: ours is ijepa_fast.kernels"


def test_the_kernels_package_itself_is_one_docstring():
    (statement,) = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr) and isinstance(statement.value.value, str)


@pytest.mark.parametrize(
    ("component", "source"),
    [
        ("model", "from ijepa_fast.train import Trainer"),
        ("model", "from ijepa_fast import ragged, step"),
        ("model", "def late():\n    import ijepa_fast.data.loader"),
        ("model", "from . import step"),
        ("model", "from PIL import Image"),
        ("masks", "from ijepa_fast.model.vit import VisionTransformer"),
        ("optim", "import ijepa_fast.model.jepa"),
        ("ops", "import triton"),
        ("kernels", "from ijepa_fast.ragged import Ragged"),
        ("kernels", "import numpy"),
        ("train", "from ijepa_fast.interop import official"),
        ("attention", "import xformers.ops"),
        ("nowhere", "import math"),
    ],
)
def test_the_rule_sees_what_is_forbidden(component, source):
    assert violations(component, imports_of(ast.parse(source), "ijepa_fast"))


@pytest.mark.parametrize(
    ("component", "source"),
    [
        ("model", "from ijepa_fast import ops\nfrom ijepa_fast.ragged import Ragged\nimport torch.nn.functional as F"),
        ("attention", "def load():\n    from xformers.ops import memory_efficient_attention"),
        ("kernels", "import argparse\nimport triton.language as tl\nfrom ijepa_fast.kernels.ema import launch"),
        ("data", "from .source import Source"),
        ("cli", "from ijepa_fast import __version__"),
    ],
)
def test_the_rule_lets_pass_what_is_allowed(component, source):
    package = "ijepa_fast.data" if component == "data" else "ijepa_fast"
    assert not violations(component, imports_of(ast.parse(source), package))


def run_at_root(code: str) -> str:
    """Output of a fresh interpreter whose sys.path begins with the root of the checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_does_not_import_torch():
    assert run_at_root("import sys, ijepa_fast; print('torch' in sys.modules)") == "False\n"


def test_public_names_are_imported_on_first_use():
    assert run_at_root("import ijepa_fast; print(ijepa_fast.Ragged.__module__)") == "ijepa_fast.ragged\n"
    assert run_at_root("import ijepa_fast; print(hasattr(ijepa_fast, 'Raged'))") == "False\n"


def test_kernels_is_importable_inside_the_package():
    where = run_at_root("import ijepa_fast.kernels as k; print(k.__name__, k.__file__)").split(maxsplit=1)
    assert where[0] == "ijepa_fast.kernels" and Path(where[1].strip()) == ROOT / "kernels" / "__init__.py"


def test_kernels_is_importable_in_a_checkout_that_is_not_installed():
    """Or installed as a copy: Python finds the checkout's package first wherever it is started at its root."""
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
import ijepa_fast.kernels.row_tiles
print(ijepa_fast.kernels.row_tiles.__file__)
"""
    assert Path(run_at_root(code).strip()) == ROOT / "kernels" / "row_tiles.py"


def test_transformers_works_with_our_kernels_folder_on_its_path():
    # transformers looks for Hugging Face's package `kernels` and, from this root, finds and imports ours.
    code = """
import importlib.util, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
print(importlib.util.find_spec("kernels").origin)
from transformers import IJepaConfig, IJepaModel
from transformers.utils import is_kernels_available
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
IJepaModel(IJepaConfig(**sizes, patch_size=16))
print(is_kernels_available(), [name for name in sys.modules if name.startswith("ijepa_fast.")])
"""
    origin, rest = run_at_root(code).splitlines()
    assert Path(origin) == ROOT / "kernels" / "__init__.py"
    assert rest == "False []"
