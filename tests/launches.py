"""Launches on a stand-in for a GPU, printed as JSON. Run as a script: pytest's process has Triton in interpreter mode.

With "listed" every launch of the compile tool, with names of ``STEPS`` training steps of small networks. The compiler
stops after its first stage, or these kernels would take ten minutes.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from triton.backends.nvidia.compiler import CUDABackend

from benchmarks import gpu_cache
from ijepa_fast.config import ModelConfig
from ijepa_fast.step.options import StepOptions

MODEL = ModelConfig(
    img_size=64, patch_size=8, embed_dim=64, depth=1, num_heads=1, predictor_embed_dim=32, predictor_depth=1
)
# Rows rounded as on a GPU; as they are, from users' own masks; by buckets.
STEPS = {
    "plain": (StepOptions(), 128),
    "any rows": (StepOptions(), 1),
    "fused": (StepOptions(blocks="fused"), 128),
    "capture": (StepOptions(capture=True), 64),
}
COUNT = 50


def leave_out_the_compiler() -> None:
    def binary(module, metadata):
        name = str(module).split("tt.func public @", 1)[1].split("(", 1)[0]
        sizes = {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in ("size", "align")}
        metadata.update(name=name, shared=0, tmem_size=0, tensordesc_meta=[], **sizes)
        return b"\x7fELF"

    stages = {"ttir": lambda module, metadata: module, "cubin": binary}
    CUDABackend.add_stages = lambda self, found, options, language: found.update(stages)


def steps(gpu: gpu_cache.StandIn, name: str) -> dict:
    """Launches of a step by kernel, how many different numbers of rows there were, and what was compiled late."""
    options, rows = STEPS[name]
    gpu_cache.launch_steps(MODEL, options, steps=3, round_rows=rows)
    launched, compiled = len(gpu.launches), len(gpu.compiled)
    gpu_cache.launch_steps(MODEL, options, steps=COUNT, round_rows=rows)
    seen = gpu.launches[launched:]
    return {
        "launches": {kernel: n / COUNT for kernel, n in Counter(launch.kernel for launch in seen).items()},
        "rows": len({launch.received[-1] for launch in seen if launch.kernel == "gather_patches_kernel"}),
        "compiled": [kernel for kernel, _ in gpu.compiled[compiled:]],
    }


def main(*names: str) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder, "cache"))
        gpu = gpu_cache.stand_in(Path(folder))
        leave_out_the_compiler()
        if names == ("listed",):
            gpu_cache.launch_listed()
        else:
            gpu_cache.ops_take_kernels()
            found = {name: steps(gpu, name) for name in names}
    print(json.dumps({"launches": [vars(launch) for launch in gpu.launches], "steps": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
