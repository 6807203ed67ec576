"""Write timm.json: names and features of a small timm model with the weights of tests/official_case.py.

    python -m tests.golden.make_timm

needs timm.
"""

import json
from pathlib import Path

import timm
import torch

from ijepa_fast.weights.timm import timm_arguments
from tests import official_case as case
from tests.test_interop_timm import encoder_of_the_case

if __name__ == "__main__":
    arguments = timm_arguments(encoder_of_the_case())
    model = timm.create_model(**arguments)
    case.fill(model, 0.0)
    model.pos_embed.data.copy_(encoder_of_the_case().pos_embed)
    with torch.no_grad():
        features, pooled = model.double().eval().forward_features(case.images(0)), model(case.images(0))
    found = {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "arguments": arguments,
        "names": [[name, list(value.shape)] for name, value in model.state_dict().items()],
        "features": case.digest(features),
        "pooled": case.digest(pooled),
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
    Path(__file__).with_name("timm.json").write_text(f"{{\n{lines}\n}}\n")
