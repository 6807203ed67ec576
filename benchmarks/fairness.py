"""Is the eager baseline a fair stand-in for the official code? Both run side by side, on the same weights and batches.

    python -m benchmarks.fairness PATH_OF_A_CHECKOUT_OF_FACEBOOKRESEARCH_IJEPA --json FILE

The official training loop runs as it is, on the CPU, as the only rank of a process group. Its data loader is replaced
by one that hands it random images and its own collator's masks, and that runs a step of ``benchmarks.baselines.Eager``
on the same batch whenever the loop comes for the next one. Reported are the operations of a step, its time, and how far
the losses of the two come apart over the run.

The official code is under CC-BY-NC-4.0; nothing of it is part of this package.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import Eager
from benchmarks.implementations import MODELS, model_config
from ijepa_fast.bench.measure import Took, results, save, stopwatch
from ijepa_fast.optim.schedules import Schedules

OFFICIAL_NAMES = {"vit_tiny": "vit_tiny", "vit_small": "vit_small", "vit_b16": "vit_base"}


def settings(model: str, batch: int, folder: str) -> dict[str, dict[str, Any]]:
    """The official configuration of ImageNet-1k, for one CPU."""
    config = model_config(model)
    return {
        "meta": {
            "use_bfloat16": False, "model_name": OFFICIAL_NAMES[model], "load_checkpoint": False,
            "read_checkpoint": None, "copy_data": False, "pred_depth": config.predictor_depth,
            "pred_emb_dim": config.predictor_embed_dim,
        },
        "data": {
            "use_gaussian_blur": False, "use_horizontal_flip": False, "use_color_distortion": False,
            "color_jitter_strength": 0.0, "batch_size": batch, "pin_mem": False, "num_workers": 0, "root_path": None,
            "image_folder": None, "crop_size": config.img_size, "crop_scale": (0.3, 1.0),
        },
        "mask": {
            "allow_overlap": False, "patch_size": config.patch_size, "num_enc_masks": 1, "min_keep": 10,
            "enc_mask_scale": (0.85, 1.0), "num_pred_masks": 4, "pred_mask_scale": (0.15, 0.2),
            "aspect_ratio": (0.75, 1.5),
        },
        "optimization": {
            "ema": (0.996, 1.0), "ipe_scale": 1.0, "weight_decay": 0.04, "final_weight_decay": 0.4, "epochs": 1,
            "warmup": 0.5, "start_lr": 2e-4, "lr": 1e-3, "final_lr": 1e-6,
        },
        "logging": {"folder": folder, "write_tag": "run"},
    }  # fmt: skip


class SideBySide:
    """A data loader that runs the baseline on each batch after the official step on it, and times both."""

    def __init__(self, model: str, batch: int, steps: int):
        self.config, self.batch, self.steps = model_config(model), batch, steps
        schedules = Schedules(total_steps=steps, warmup_steps=int(0.5 * steps))
        self.eager = Eager(self.config, schedules)
        self.collate = None
        self.took: dict[str, list[Took]] = {"official": [], "eager": []}
        self.flops: dict[str, int] = {}
        self.losses: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the official loop calls this on its sampler."""

    def adopt(self, encoder: torch.nn.Module, predictor: torch.nn.Module) -> None:
        """Start from the weights of the official networks."""
        for mine, theirs in (
            (self.eager.context_encoder, encoder),
            (self.eager.target_encoder, encoder),
            (self.eager.predictor, predictor),
        ):
            mine.load_state_dict(theirs.state_dict())

    def __iter__(self) -> Iterator:
        generator = torch.Generator().manual_seed(0)
        side = self.config.img_size
        for step in range(self.steps):
            images = [torch.randn(3, side, side, generator=generator) for _ in range(self.batch)]
            batch, contexts, targets = self.collate([(image, 0) for image in images])
            # The first step counts operations, which takes time of its own, so it is not among the times.
            with self._measured("official", step):
                yield batch, contexts, targets
            with self._measured("eager", step):
                self.losses.append(self.eager(batch[0], (contexts, targets), step))

    @contextmanager
    def _measured(self, name: str, step: int) -> Iterator[None]:
        counter = FlopCounterMode(display=False) if step == 0 else nullcontext()
        with counter, stopwatch(self.took[name] if step > 0 else []):
            yield
        if step == 0:
            self.flops[name] = counter.get_total_flops()


def run(checkout: Path, model: str, batch: int, steps: int) -> dict[str, Any]:
    """Both implementations for ``steps`` steps."""
    loader = SideBySide(model, batch, steps)

    def make_loader(collator, **_):
        loader.collate = collator
        return None, loader, loader

    # The modules of the official code that read images need torchvision; the loop only imports two names from them.
    for name, function in (("datasets.imagenet1k", "make_imagenet1k"), ("transforms", "make_transforms")):
        stand_in = types.ModuleType(f"src.{name}")
        setattr(stand_in, function, make_loader if name.startswith("datasets") else lambda **_: None)
        sys.modules[f"src.{name}"] = stand_in
    sys.path.insert(0, str(checkout))
    from src import train as official

    logging.disable(logging.INFO)
    make_networks = official.init_model

    def init_model(**arguments):
        networks = make_networks(**arguments)
        loader.adopt(*networks)
        return networks

    official.init_model = init_model
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", world_size=1, rank=0)
        try:
            official.main(settings(model, batch, folder))
        finally:
            dist.destroy_process_group()
        with open(Path(folder) / "run_r0.csv") as file:
            official_losses = [float(row["loss"]) for row in csv.DictReader(file)]

    took, flops = loader.took, loader.flops
    pairs = list(zip(took["eager"], took["official"], strict=True))
    return {
        "gflops_per_step": {name: value / 1e9 for name, value in flops.items()},
        "ms": {name: statistics.median(each.wall for each in of) * 1e3 for name, of in took.items()},
        "cpu_ms": {name: statistics.median(each.cpu for each in of) * 1e3 for name, of in took.items()},
        "eager_over_official": {
            "flops": flops["eager"] / flops["official"],
            "time": statistics.median(a.wall / b.wall for a, b in pairs),
            "cpu_time": statistics.median(a.cpu / b.cpu for a, b in pairs),
        },
        "losses": {"official": official_losses, "eager": [round(value, 5) for value in loader.losses]},
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of facebookresearch/ijepa")
    parser.add_argument("--model", choices=sorted(set(MODELS) & set(OFFICIAL_NAMES)), default="vit_small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="the first counts operations and is not timed")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps must be at least 3, got {options.steps}")
    if not (options.checkout / "src" / "train.py").is_file():
        parser.error(f"{options.checkout} holds no src/train.py")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("model", "batch", "steps")}
    report = results("fairness", "cpu", settings=settings) | run(options.checkout.resolve(), **settings)
    for name, value in report["eager_over_official"].items():
        print(f"eager/official {name}: {value:.3f}")
    pairs = zip(report["losses"]["official"], report["losses"]["eager"], strict=True)
    print(f"losses differ by at most {max(abs(a - b) for a, b in pairs):.1e}")
    save(options.json, report)
    return report


if __name__ == "__main__":
    main()
