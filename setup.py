"""Packaging: one package, ijepa_fast, whose Triton kernels stand in kernels/ at the top of the checkout."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

if os.environ.get("IJEPA_FAST_BUILD_EXT", "0") != "0":
    raise SystemExit("IJEPA_FAST_BUILD_EXT is set, but this version has no C++/CUDA sources to build: unset it")

ROOT = Path(__file__).parent


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


EXTRAS = {
    "xformers": ["xformers>=0.0.35"],
    "flash-attn": ["flash-attn>=2.7"],
    "train": [
        "jsonargparse[signatures]>=4.40",
        "matplotlib>=3.8",
        "pillow>=10.1",
        "safetensors>=0.4.3",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    "dev": ["ruff>=0.12"],
}
# setuptools: a test builds the wheel. transformers: a test holds that our kernels/ does not disturb it.
EXTRAS["test"] = [
    *EXTRAS["train"],
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-benchmark>=4",
    "setuptools>=70.1",
    "transformers>=4.56",
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
    install_requires=["torch>=2.10", "numpy>=1.26", 'triton>=3.6; platform_system == "Linux"'],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ijepa-fast = ijepa_fast.cli:main"]},
)
