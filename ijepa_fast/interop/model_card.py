"""The model card of an exported encoder, and its way to the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path

from ijepa_fast import __version__
from ijepa_fast.config import RunConfig, flatten
from ijepa_fast.run.checkpoint import Checkpoint
from ijepa_fast.run.files import write_text

PRIVATE = {"data", "output", "init", "resume", "log", "evaluation.data", "evaluation.labels"}
"""Settings that name places of one machine, which a card does not tell, or say nothing about the training."""

CARD = """---
license: {license}
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [i-jepa, self-supervised-learning, vision, ijepa_fast]
---

# {title}

The {encoder} encoder of an I-JEPA ([arXiv 2301.08243](https://arxiv.org/abs/2301.08243)) that was {made} by
ijepa_fast {version}: a vision transformer of {depth} blocks of width {width}, for images of
{height} x {width_px} px in patches of {patch} px.

```python
import torch
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("{name}"), AutoModel.from_pretrained("{name}")
with torch.no_grad():
    features = model(**processor(image, return_tensors="pt")).last_hidden_state  # [1, {patches}, {width}]
embedding = features.mean(1)
```

## Training

{training}

## Figures

{figures}

## Limits

Nobody has looked at what these features say about people, or how they do on images unlike those of the training.
{origin}
"""


TRAINING = """{steps} steps of {batch} images{data}. Settings that differ from the defaults:

```yaml
{settings}
```"""


def write_card(
    folder: Path, name: str, encoder: str, run: Path, state: Checkpoint, config: RunConfig, license: str
) -> None:
    """Write README.md into an exported folder.

    Args:
        name: by which the model is loaded: of a repository on the Hub, or the folder.
        encoder: "target" or "context".
        run: folder of the run, whose summary.json has the figures.
        state: the checkpoint that was exported.
        license: an identifier of the Hub, such as apache-2.0.
    """
    model = config.model
    height, width_px = model.size
    told, default = flatten(config), flatten(RunConfig())
    changed = {k: v for k, v in told.items() if v != default.get(k) and k not in PRIVATE}
    kind, _, rest = (state.extra.get("data") or "").partition(":")
    count = rest.partition(":")[0]
    imported = bool(state.extra.get("imported"))
    training = TRAINING.format(
        steps=state.step,
        batch=config.train.batch_size,
        data=f", drawn from {int(count):,}" if kind != "stream" and count.isdigit() else "",
        settings="\n".join(f"{k}: {json.dumps(v)}" for k, v in sorted(changed.items())) or "{}",
    )
    text = CARD.format(
        license=license,
        title=name.rpartition("/")[2],
        encoder=encoder,
        version=__version__,
        depth=model.depth,
        width=model.embed_dim,
        height=height,
        width_px=width_px,
        patch=model.patch_size,
        name=name,
        patches=model.patches,
        made="imported" if imported else "pretrained without labels",
        training="Elsewhere: these weights are as they were imported." if imported else training,
        figures=_figures(run / "summary.json", state.step, encoder),
        origin="Its first weights were not drawn at random: the licence of where they came from holds for them."
        if imported or "origin" in state.extra or config.init is not None
        else "",
    )
    write_text(folder / "README.md", text.rstrip() + "\n")


def _figures(summary: Path, step: int, encoder: str) -> str:
    """What the end of the run found about the exported encoder, as a table."""
    found = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    if encoder != "target" or found.get("steps") != step or "after" not in found:
        return "None were taken of these weights."
    rows = [("raw pixels", "pixels"), ("before training", "before"), ("**after training**", "after")]
    lines = ["| features of held-out images | k-NN | linear probe | rank |", "|---|---|---|---|"]
    for title, key in rows:
        if figures := found.get(key):
            shares = [f"{figures[name]:.1%}" if name in figures else "" for name in ("knn", "probe")]
            rank = f"{figures['rank']:.1f}" if "rank" in figures else ""
            lines.append(f"| {title} | {' | '.join(shares)} | {rank} |")
    return "\n".join(lines)


def hub_account() -> None:
    """Raises ValueError unless somebody is logged in to the Hub; ImportError without its package."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ValueError("--push needs an account: log in with `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # of its HTTP library, too
        raise OSError(f"the Hugging Face Hub cannot be reached or refuses the account: {error}") from error


def push(folder: Path, name: str) -> str:
    """Upload a folder to a repository of the Hub, which is made, private, where there is none; its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(name, private=True, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Encoder of ijepa_fast")
    return str(address)
