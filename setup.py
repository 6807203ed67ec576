"""Packaging: one package, ijepa_fast, whose Triton kernels stand in kernels/ at the top of the checkout."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# What the CUDA code is built for where TORCH_CUDA_ARCH_LIST does not say otherwise, if nvcc knows it.
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
OLDEST_TORCH_ABI = 0x020A000000000000  # 2.10: the library then runs with every later torch, too


def mask_extension():
    """Arguments of setup() that build csrc/ as ijepa_fast/_block_masks.abi3.so; none unless IJEPA_FAST_BUILD_EXT=1.

    C++ always; CUDA where torch is a CUDA build and its toolkit is there whole, whether or not there is a GPU.
    """
    if os.environ.get("IJEPA_FAST_BUILD_EXT", "0") == "0":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"IJEPA_FAST_BUILD_EXT=1 builds against the installed torch, but it cannot be imported ({error}): "
            "install torch, setuptools and ninja first, and pass --no-build-isolation to pip"
        ) from error

    sources = ["csrc/bindings.cpp", "csrc/block_masks_cpu.cpp"]
    flags = {"cxx": ["-O3", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH_ABI:#x}"]}
    make_extension = cpp_extension.CppExtension
    toolkit = cpp_extension.CUDA_HOME
    problem = cuda_problem(torch, cpp_extension)
    if problem is None:
        make_extension = cpp_extension.CUDAExtension
        sources.append("csrc/block_masks_cuda.cu")
        flags["cxx"] += ["-DIJEPA_FAST_WITH_CUDA", "-DUSE_CUDA"]
        flags["nvcc"] = ["-O3", *cuda_architecture_flags(Path(toolkit, "bin", "nvcc"))]
    target = f"CPU and CUDA ({toolkit})" if problem is None else f"CPU only, without CUDA code: {problem}"
    print(f"building csrc/ with torch {torch.__version__} for {target}")
    extension = make_extension(
        "ijepa_fast._block_masks", sources, include_dirs=["csrc"], extra_compile_args=flags, py_limited_api=True
    )
    extension.depends = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.h"))]
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def cuda_problem(torch, cpp_extension):
    """Why CUDA code cannot be built here, None if it can: found out by linking a program of one call with libcudart."""
    if not torch.version.cuda:
        return "this torch is not a CUDA build"
    toolkit = cpp_extension.CUDA_HOME
    if not toolkit:
        return "no CUDA toolkit is found"
    try:
        told = subprocess.run([Path(toolkit, "bin", "nvcc"), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvcc of {toolkit} does not run ({error})"
    release = re.search(r"release (\d+)", told.stdout)
    if release is None or release[1] != torch.version.cuda.partition(".")[0]:
        return f"nvcc of {toolkit} is of another CUDA than torch's {torch.version.cuda}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "link.cpp")
        source.write_text("#include <cuda_runtime_api.h>\nint main() { int n; return cudaGetDeviceCount(&n); }\n")
        includes = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths("cuda")]
        command = [os.environ.get("CXX", "c++"), source, *includes, "-o", Path(folder, "link"), *libraries, "-lcudart"]
        try:
            linked = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return None  # there is no compiler: the build says so
    return None if linked.returncode == 0 else f"libcudart cannot be linked with: {_last_line(linked.stderr)}"


def _last_line(text):
    """The line of a compiler's output that names the error."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "cannot find" in line or "fatal error" in line), lines[-1] if lines else "")


def cuda_architecture_flags(nvcc):
    """-gencode flags for nvcc: machine code for each known architecture, PTX of the last one for GPUs to come."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []  # torch's build reads the variable itself
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    targets = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in targets]
    return [*flags, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]


EXTRAS = {
    "xformers": ["xformers>=0.0.35"],
    "flash-attn": ["flash-attn>=2.7"],
    "train": [
        "jsonargparse[signatures]>=4.40",
        "pyyaml",
        "matplotlib>=3.8",
        "pillow>=10.1",
        "safetensors>=0.4.3",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    "shards": ["webdataset>=1.0", "aiohttp>=3.9"],
    "images": ["tifffile>=2024.8.10", "imagecodecs", "pillow-heif"],
    "huggingface": ["transformers>=4.56", "safetensors>=0.4.3"],
    "lightning": ["lightning>=2.4"],
    "onnx": ["onnx>=1.17", "onnxscript>=0.5"],
    "wandb": ["wandb>=0.19"],
    "mlflow": ["mlflow-skinny>=3"],
    "evaluate": ["scikit-learn>=1.4"],
    "parquet": ["pyarrow>=15"],
    "datasets": ["datasets>=3"],
    "detection": ["torchvision>=0.25", "faster-coco-eval>=1.6"],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"],
    "dev": ["ruff>=0.12"],
}
# setuptools: a test builds the wheel.
EXTRAS["test"] = [
    *EXTRAS["train"],
    *EXTRAS["shards"],
    "tifffile>=2024.8.10",
    *EXTRAS["huggingface"],
    *EXTRAS["lightning"],
    *EXTRAS["datasets"],
    *EXTRAS["evaluate"],
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-benchmark>=4",
    "setuptools>=70.1",
]
# The attention libraries are left out: each fits certain CUDA and torch builds only.
EXTRAS["all"] = [*EXTRAS["test"], *EXTRAS["dev"]]

setup(
    name="ijepa-fast",
    version=re.search(r'^__version__ = "(.+)"', read("ijepa_fast/__init__.py"), re.MULTILINE).group(1),
    description="I-JEPA pretraining on packed token sets: variable-length attention, no padding, fused Triton kernels",
    long_description=read("README.md") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["ijepa_fast", "ijepa_fast.*"]),
        "ijepa_fast.kernels",
        *(f"ijepa_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    # Hugging Face publishes a package named `kernels`: ours is installed inside ijepa_fast only.
    package_dir={"ijepa_fast.kernels": "kernels"},
    package_data={"ijepa_fast": ["recipes/**/*.yaml"]},
    # 2.10 to 2.14 are supported; CONTRIBUTING.md says what a later one needs.
    install_requires=["torch>=2.10", "numpy>=1.26", 'triton>=3.6; platform_system == "Linux"'],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ijepa-fast = ijepa_fast.cli:main"]},
    **mask_extension(),
)
