"""``ijepa-fast finetune``: all of an encoder trained on labelled images, with layer-wise learning-rate decay."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ijepa_fast.data import EvalLoader, TrainLoader
from ijepa_fast.data.datasets import Sources
from ijepa_fast.downstream.classify import chance, drawn, open_classes
from ijepa_fast.downstream.encoders import Loaded, digest
from ijepa_fast.downstream.heads import CROP_SCALE, FLIP
from ijepa_fast.downstream.store import BATCH, Part
from ijepa_fast.downstream.tasks import Options
from ijepa_fast.evaluate.features import pool_features
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.optim import FusedAdamW
from ijepa_fast.optim.groups import decays, layer_of
from ijepa_fast.optim.schedules import interpolate
from ijepa_fast.ranks import Ranks, ranks
from ijepa_fast.run.environment import describe
from ijepa_fast.run.files import write_json, write_whole
from ijepa_fast.weights.encoder_file import save_encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finetuning:
    """A recipe of fine-tuning. The defaults are MAE's for ViT-L (arXiv 2111.06377, table 9) without mixtures of images,
    random erasing, augmentation of colours, and drop path.

    Args:
        shots: labelled images used, all (100%), a share (1%), or a number of each class (5).
        epochs: passes over them.
        batch_size: images per step on all ranks together; fewer where there are fewer.
        lr: learning rate of the head for a batch of 256; larger and smaller batches in proportion.
        layer_decay: factor of the learning rate from each block to the one below.
        weight_decay: of all but biases and norms.
        warmup_epochs: of the learning rate, which then follows half a cosine to zero.
        label_smoothing: share of the target that is spread over all classes.
        image_size: side of the crops in pixels, by default that of pretraining.
        limit: at most so many training and so many test images.
        precision: fp32, or bf16 for autocast.
        workers: decoding processes.
        seed: of head, order, crops and shots.
    """

    shots: str = "100%"
    epochs: int = 50
    batch_size: int = 1024
    lr: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    label_smoothing: float = 0.1
    image_size: int | None = None
    limit: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be fewer than the {self.epochs} epochs")


class Classifier(nn.Module):
    """Encoder, average over patches, layer norm, linear layer."""

    def __init__(self, encoder: VisionTransformer, classes: int):
        super().__init__()
        self.encoder, self.norm = encoder, nn.LayerNorm(encoder.embed_dim)
        self.head = nn.Linear(encoder.embed_dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(pool_features(self.encoder(images))))


def finetune(
    loaded: Loaded, data: str, evaluation_data: str | None, recipe: Finetuning, out: Path, device: str
) -> dict:
    """Fine-tune on one process or, under torchrun, on several; kept after every epoch, and continued after a stop.

    Returns:
        What finetune.json holds: accuracy on the test images, loss of every epoch, the recipe. On other ranks than the
        first the same. The encoder is written to encoder.safetensors, which ``evaluate`` reads.

    Raises:
        ValueError: images or settings cannot be used; or the folder holds a fine-tuning with other ones.
    """
    options = Options(image_size=recipe.image_size, limit=recipe.limit)
    options.check(loaded.encoder)
    sources = open_classes(data, evaluation_data, options)
    rows = drawn(torch.from_numpy(sources.train.labels), recipe.shots, recipe.seed, 0).numpy()
    sources = sources._replace(train=Part(sources.train, rows))
    key = asdict(recipe) | {"weights": digest(loaded.encoder), "images": sources.train.fingerprint}
    with ranks(device) as me:
        return _Run(loaded, sources, recipe, out, key, me).run()


class _Run:
    """One fine-tuning."""

    def __init__(self, loaded: Loaded, sources: Sources, recipe: Finetuning, out: Path, key: dict, me: Ranks):
        self.loaded, self.sources, self.recipe, self.out, self.key, self.me = loaded, sources, recipe, out, key, me
        torch.manual_seed(recipe.seed)
        classes = int(sources.train.labels.max()) + 1
        self.model = Classifier(loaded.encoder, classes).to(me.device)
        self.optimizer = FusedAdamW(layer_groups(self.model, recipe.layer_decay, recipe.weight_decay), lr=0.0)
        self.size = recipe.image_size or loaded.encoder.grid[0] * loaded.encoder.patch_size
        batch = min(recipe.batch_size, len(sources.train)) // me.world_size * me.world_size
        if not batch:
            raise ValueError(f"{len(sources.train)} training images cannot be shared by {me.world_size} ranks")
        self.batch, self.kept = batch, out / "finetune.pt"
        self.done, self.losses = 0, []

    def run(self) -> dict:
        self._continue()
        started = time.monotonic()
        if self.me.world_size > 1:
            gpus = [self.me.device] if self.me.device.type == "cuda" else None
            model = DistributedDataParallel(self.model, device_ids=gpus)
        else:
            model = self.model
        self._train(model)
        accuracy = self._accuracy()
        report = self.loaded.about | {
            "accuracy": accuracy,
            "chance": chance(self.sources.test),
            "training images": len(self.sources.train),
            "losses": self.losses,
            "recipe": asdict(self.recipe),
            "seconds": round(time.monotonic() - started, 1),
            "environment": describe(),
        }
        if self.me.is_main:
            write_json(self.out / "finetune.json", report)
            save_encoder(self.out / "encoder.safetensors", self.model.encoder, {"encoder": "fine-tuned"})
        self.me.barrier()
        return report

    def _train(self, model: nn.Module) -> None:
        recipe, me = self.recipe, self.me
        loader = TrainLoader(
            self.sources.train,
            image_size=self.size,
            global_batch=self.batch,
            seed=recipe.seed,
            rank=me.rank,
            world_size=me.world_size,
            workers=recipe.workers,
            scale=CROP_SCALE,
            flip=FLIP,
        )
        per_epoch = loader.steps_per_epoch
        total, first = recipe.epochs * per_epoch, self.done * per_epoch
        if first == total:
            return
        loader.start_at(first, total - first)
        peak, warmup = recipe.lr * self.batch / 256, recipe.warmup_epochs * per_epoch
        losses = torch.zeros((), device=me.device)
        model.train()
        with tqdm(
            total=total, initial=first, desc="finetune", unit="step", disable=None if me.is_main else True
        ) as bar:
            for step, batch in enumerate(loader, start=first):
                rising = interpolate("linear", 0.0, peak, (step + 1) / max(warmup, 1))
                falling = interpolate("cosine", peak, 0.0, (step - warmup) / max(total - warmup, 1))
                for group in self.optimizer.param_groups:
                    group["lr"] = min(rising, falling)
                labels = batch.labels.to(me.device, non_blocking=True)
                logits = self._logits(model, batch.images)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses += loss.detach()
                bar.update()
                if (step + 1) % per_epoch == 0:
                    self.losses.append(round(float(losses) / per_epoch, 4))
                    losses.zero_()
                    self._keep((step + 1) // per_epoch)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        device = self.me.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return model(images.to(device, non_blocking=True)).float()

    @torch.no_grad()
    def _accuracy(self) -> float:
        """On all labelled test images, of which every rank takes a share."""
        test = self.sources.test
        mine = Part(test, np.flatnonzero(test.labels >= 0)[self.me.rank :: self.me.world_size])
        self.model.eval()
        counts = torch.zeros(2, dtype=torch.float64, device=self.me.device)
        ratio = self.loaded.resize_ratio
        for batch in EvalLoader(mine, self.size, BATCH, self.recipe.workers, resize_ratio=ratio):
            right = self._logits(self.model, batch.images).argmax(1).cpu() == batch.labels
            counts += torch.tensor([right.sum(), len(right)], device=self.me.device)
        if self.me.world_size > 1:
            dist.all_reduce(counts)
        return float(counts[0] / counts[1])

    def _keep(self, epochs: int) -> None:
        if self.me.is_main:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epochs": epochs}
            self.out.mkdir(parents=True, exist_ok=True)
            write_whole(self.kept, partial(torch.save, state | {"losses": self.losses, "key": self.key}))

    def _continue(self) -> None:
        if not self.kept.exists():
            return
        state = torch.load(self.kept, map_location=self.me.device, weights_only=True)
        if changed := [name for name, value in self.key.items() if state["key"].get(name) != value]:
            raise ValueError(f"{self.out} holds a fine-tuning with another {', '.join(changed)}: give another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.losses = state["epochs"], state["losses"]
        log.info("%d of %d epochs are done already", self.done, self.recipe.epochs)


def layer_groups(model: Classifier, layer_decay: float, weight_decay: float) -> list[dict]:
    """Parameter groups whose learning rate falls by ``layer_decay`` from the head over the blocks to the embedding."""
    depth = len(model.encoder.blocks)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        # The embedding is layer 0, block i layer i + 1; the encoder's final norm goes with the head.
        layer = layer_of(name.removeprefix("encoder."), depth) if name.startswith("encoder.") else depth + 1
        scale = layer_decay ** (depth + 1 - layer)
        decay = weight_decay if decays(parameter) else 0.0
        group = groups.setdefault((layer, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())
