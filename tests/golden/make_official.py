"""Write official.json: the numbers of tests/official_case.py, computed by a checkout of the official code.

    python -m tests.golden.make_official PATH/TO/ijepa

PATH is a clone of https://github.com/facebookresearch/ijepa. Its modules are run, none of their text is kept.
"""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.official_case import run


def official_api(checkout: str) -> SimpleNamespace:
    sys.path.insert(0, checkout)
    from src.helper import init_opt
    from src.masks.utils import apply_masks
    from src.models.vision_transformer import VisionTransformer, VisionTransformerPredictor
    from src.utils.tensors import repeat_interleave_batch

    return SimpleNamespace(
        VisionTransformer=VisionTransformer,
        VisionTransformerPredictor=VisionTransformerPredictor,
        apply_masks=apply_masks,
        repeat_interleave_batch=repeat_interleave_batch,
        init_opt=init_opt,
        norm={"norm_layer": partial(torch.nn.LayerNorm, eps=1e-6)},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    api = official_api(sys.argv[1])
    found = {"torch": torch.__version__, "fp64": run(api, torch.float64), "fp32": run(api, torch.float32)}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
    Path(__file__).with_name("official.json").write_text(f"{{\n{lines}\n}}\n")
