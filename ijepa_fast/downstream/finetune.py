"""``ijepa-fast finetune``: all of an encoder trained on labelled images, with layer-wise learning-rate decay."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ijepa_fast.data import Batch, EvalLoader, TrainLoader
from ijepa_fast.downstream.classify import chance, drawn, open_classes
from ijepa_fast.downstream.encoders import Loaded, digest, training_size
from ijepa_fast.downstream.heads import CROP_SCALE, FLIP, cosine, train
from ijepa_fast.downstream.store import BATCH, Part
from ijepa_fast.downstream.subject import Options, keyed
from ijepa_fast.evaluate.features import pool_features
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.optim import FusedAdamW
from ijepa_fast.optim.groups import decays, layer_of
from ijepa_fast.ranks import ranks
from ijepa_fast.run.environment import describe
from ijepa_fast.run.files import write_json
from ijepa_fast.weights.encoder_file import save_encoder


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
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
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
        What finetune.json holds, on every rank: accuracy on the test images, loss of every epoch, the recipe. The
        encoder is written to encoder.safetensors, which ``evaluate`` reads.

    Raises:
        ValueError: images or settings cannot be used.
    """
    options = Options(image_size=recipe.image_size, limit=recipe.limit)
    options.check(loaded.encoder)
    sources = open_classes(data, evaluation_data, options, loaded.images(own=data == loaded.data))
    rows = drawn(torch.from_numpy(sources.train.labels), recipe.shots, recipe.seed, 0).numpy()
    train_images = Part(sources.train, rows)
    size = recipe.image_size or training_size(loaded.encoder)
    key = asdict(recipe) | {"workers": None, "weights": digest(loaded.encoder), "images": train_images.fingerprint}
    with ranks(device) as me:
        batch = min(recipe.batch_size, len(train_images)) // me.world_size * me.world_size
        if not batch:
            raise ValueError(f"{len(train_images)} training images cannot be shared by {me.world_size} ranks")
        torch.manual_seed(recipe.seed)
        encoder = loaded.encoder.requires_grad_()  # a run's target encoder, which its loss never trains, comes frozen
        model = wrapped = Classifier(encoder, int(train_images.labels.max()) + 1).to(me.device)
        if me.world_size > 1:
            wrapped = DistributedDataParallel(model, device_ids=[me.device] if me.device.type == "cuda" else None)
        loader = TrainLoader(
            train_images,
            image_size=size,
            global_batch=batch,
            seed=recipe.seed,
            rank=me.rank,
            world_size=me.world_size,
            workers=recipe.workers,
            scale=CROP_SCALE,
            flip=FLIP,
        )

        def batches(done: int, total: int) -> Iterable[Batch]:
            loader.start_at(done, total - done)
            return loader

        def logits(module: nn.Module, images: Tensor) -> Tensor:
            with torch.autocast(me.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                return module(images.to(me.device, non_blocking=True)).float()

        def loss(some: Batch) -> Tensor:
            labels = some.labels.to(me.device, non_blocking=True)
            return F.cross_entropy(logits(wrapped, some.images), labels, label_smoothing=recipe.label_smoothing)

        rate = recipe.lr * batch / 256
        optimizer = FusedAdamW(layer_groups(model, encoder, recipe.layer_decay, recipe.weight_decay), lr=rate)
        warmup, per_epoch = recipe.warmup_epochs / recipe.epochs, loader.steps_per_epoch
        first = 1 / (recipe.epochs * per_epoch)

        def factor(progress: float) -> float:
            if progress < warmup:
                return (progress + first) / (warmup + first)
            return cosine((progress - warmup) / (1 - warmup))

        kept, started = keyed(out / "work", key).with_suffix(".pt"), time.monotonic()
        losses = train(
            kept, model, optimizer, factor, recipe.epochs, per_epoch, batches, loss, "finetune", main=me.is_main
        )
        test = Part(sources.test, np.flatnonzero(sources.test.labels >= 0)[me.rank :: me.world_size])
        counts = torch.zeros(2, dtype=torch.float64, device=me.device)
        with torch.no_grad():
            for some in EvalLoader(test, size, BATCH, recipe.workers, resize_ratio=loaded.resize_ratio):
                right = logits(model, some.images).argmax(1).cpu() == some.labels
                counts += torch.tensor([right.sum(), len(right)], device=me.device)
        if me.world_size > 1:
            torch.distributed.all_reduce(counts)
        report = loaded.about | {
            "accuracy": float(counts[0] / counts[1]),
            "chance": chance(sources.test),
            "training images": len(train_images),
            "losses": losses,
            "recipe": asdict(recipe),
            "seconds": round(time.monotonic() - started, 1),
            "environment": describe(),
        }
        if me.is_main:
            write_json(out / "finetune.json", report)
            save_encoder(out / "encoder.safetensors", model.encoder, {"encoder": "fine-tuned"})
        me.barrier()
    return report


def layer_groups(model: nn.Module, encoder: VisionTransformer, layer_decay: float, weight_decay: float) -> list[dict]:
    """Parameter groups whose learning rate falls by ``layer_decay`` from what is above an encoder to its embedding.

    Frozen parameters have no part in them; the encoder's final norm goes with what is above it.
    """
    depth = len(encoder.blocks)
    layers = {parameter: layer_of(name, depth) for name, parameter in encoder.named_parameters()}
    groups: dict[tuple, dict] = {}
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        scale = layer_decay ** (depth + 1 - layers.get(parameter, depth + 1))
        decay = weight_decay if decays(parameter) else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())
