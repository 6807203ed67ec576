"""Heads trained on random crops seen by the frozen encoder: the paper's linear protocol, and attentive probing.

Legend: B images of a batch, N patches, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ijepa_fast.data import Batch, EvalLoader, Source, TrainLoader
from ijepa_fast.downstream.classify import accuracies
from ijepa_fast.downstream.store import BATCH, Part
from ijepa_fast.downstream.tasks import Subject
from ijepa_fast.evaluate.features import pool_features
from ijepa_fast.evaluate.probe import stratified_split
from ijepa_fast.run.files import write_whole

CROP_SCALE, FLIP = (0.08, 1.0), 0.5
"""Random-resized crops and flips, as in all linear probing since Inception."""
VALIDATION_SHARE = 0.1
"""Share of the training images by which the best of the heads is chosen; the test images have no part in that."""

PAPER_BATCH, PAPER_STEPS = 16_384, 78
"""Batch of the linear protocol, and how many of them ImageNet-1k gives in an epoch."""
PAPER_RATES = tuple(rate * PAPER_BATCH / 256 for rate in (0.05, 0.01, 0.001))
"""Learning rates of the linear protocol. LARS makes steps in proportion to the weights, so it is the number of steps
that must be kept, not the batch: smaller sets have smaller batches and the same rates."""
PAPER_DECAYS = (0.0005, 0.0)

ATTENTIVE_RATES = (3e-4, 1e-3, 3e-3)
ATTENTIVE_EPOCHS, ATTENTIVE_BATCH, ATTENTIVE_DECAY = 20, 256, 0.01


class LinearHead(nn.Module):
    """Average pool of the last ``layers`` blocks, batch norm without weights, one linear layer."""

    def __init__(self, width: int, classes: int, layers: int):
        super().__init__()
        self.layers = layers
        self.norm = nn.BatchNorm1d(layers * width, affine=False)
        self.linear = nn.Linear(layers * width, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        return self.linear(self.norm(pool_features(outputs[-self.layers :])))


class AttentiveHead(nn.Module):
    """One cross-attention block whose query is learned, then one linear layer (V-JEPA, arXiv 2404.08471, section 4)."""

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, width))
        nn.init.normal_(self.query, std=0.02)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.linear = nn.Linear(width, classes)

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        tokens = self.norm1(outputs[-1].float())
        query = self.query.expand(len(tokens), -1, -1)
        x = query + self.attention(query, tokens, tokens, need_weights=False)[0]
        return self.linear((x + self.mlp(self.norm2(x)))[:, 0])


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled to the weights of each matrix (arXiv 1708.03888); biases as in SGD."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                step = weight.grad
                if weight.ndim > 1:
                    step = step + group["weight_decay"] * weight
                    size, length = weight.norm(), step.norm()
                    step = step * torch.where((size > 0) & (length > 0), group["trust"] * size / length, 1.0)
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.mul_(group["momentum"]).add_(step)
                weight.sub_(group["lr"] * momentum)


def linear_protocol(subject: Subject) -> dict:
    """The linear evaluation of the I-JEPA paper (arXiv 2301.08243, appendix A), best of several heads.

    LARS, 50 epochs, learning rate divided by 10 after each 15 of them, of the last block or of the last four. The paper
    does not name a normalisation; features are batch-normalised here, as in VISSL's protocol that it follows.
    """
    epochs = subject.options.epochs or 50
    images = len(subject.data.train)
    batch = max(16, min(PAPER_BATCH, images // PAPER_STEPS))
    width, classes = subject.encoder.embed_dim, _classes(subject)
    heads, groups = {}, []
    for layers in (1, 4) if len(subject.encoder.blocks) >= 4 else (1,):
        for rate in PAPER_RATES:
            for decay in PAPER_DECAYS:
                heads[f"last {layers}, rate {rate:g}, decay {decay:g}"] = head = LinearHead(width, classes, layers)
                groups.append({"params": list(head.parameters()), "lr": rate, "weight_decay": decay})

    def factor(progress: float) -> float:
        return 0.1 ** int(progress * 50 / 15)

    return fit(subject, "linear_protocol", heads, partial(Lars, groups, lr=0.0), factor, epochs, batch)


def attentive(subject: Subject) -> dict:
    """An attentive probe on the patch features of the last block, best of three learning rates."""
    width, classes = subject.encoder.embed_dim, _classes(subject)
    heads = {f"rate {rate:g}": AttentiveHead(width, classes, subject.encoder.num_heads) for rate in ATTENTIVE_RATES}
    groups = [{"params": list(h.parameters()), "lr": r} for h, r in zip(heads.values(), ATTENTIVE_RATES, strict=True)]
    epochs = subject.options.epochs or ATTENTIVE_EPOCHS
    batch = max(16, min(ATTENTIVE_BATCH, len(subject.data.train) // 20))
    optimizer = partial(torch.optim.AdamW, groups, weight_decay=ATTENTIVE_DECAY)
    return fit(subject, "attentive", heads, optimizer, cosine, epochs, batch)


def fit(
    subject: Subject,
    name: str,
    heads: dict[str, nn.Module],
    optimizer: Callable[[], torch.optim.Optimizer],
    factor: Callable[[float], float],
    epochs: int,
    batch: int,
) -> dict:
    """Train classifiers side by side on the same crops, choose one by held-out images, and test that one.

    Args:
        heads: modules on lists of [B, N, D], the outputs of the last blocks, by name.
        optimizer: makes the optimizer, once the heads are on the device.
        factor, epochs: as in ``train``.
        batch: images of a step.
    """
    device, seed = subject.device, subject.options.seed
    part, held_out = _split(subject.data.train, seed)
    batch = min(batch, len(part))
    loader = TrainLoader(
        part,
        image_size=subject.image_size,
        global_batch=batch,
        seed=seed,
        workers=subject.options.workers,
        scale=CROP_SCALE,
        flip=FLIP,
    )
    models = nn.ModuleList(heads.values()).to(device)

    def batches(done: int, total: int) -> Iterable[Batch]:
        loader.start_at(done, total - done)
        return loader

    def loss(images: Batch) -> Tensor:
        outputs = subject.outputs(images.images.to(device, non_blocking=True))
        labels = images.labels.to(device, non_blocking=True)
        return sum(F.cross_entropy(head(outputs), labels) for head in models)

    key = {"task": name, "images": part.fingerprint, "batch": batch, "epochs": epochs, "seed": seed, **subject.key()}
    kept = subject.work(key).with_suffix(".pt")
    train(kept, models, optimizer(), factor, epochs, loader.steps_per_epoch, batches, loss, name)
    chosen = score(subject, models, held_out)
    best = int(np.argmax(chosen))
    return accuracies(subject, {"accuracy": score(subject, models, subject.data.test)[best]}) | {
        "head": list(heads)[best],
        "validation": dict(zip(heads, chosen, strict=True)),
        "epochs": epochs,
        "batch": batch,
    }


def train(
    kept: Path,
    models: nn.Module,
    optimizer: torch.optim.Optimizer,
    factor: Callable[[float], float],
    epochs: int,
    per_epoch: int,
    batches: Callable[[int, int], Iterable],
    loss: Callable[[Any], Tensor],
    title: str,
    main: bool = True,
) -> list[float]:
    """Train, keep what is done after every epoch, and continue from that after a stop.

    Args:
        kept: file for what is done, of these settings alone.
        models: what the file holds, on its device.
        optimizer: its groups have the full learning rates.
        factor: of the learning rates, by the share of the steps that are done.
        batches: (steps done, steps in all) -> the batches of the steps that remain.
        loss: of one batch.
        title: for the progress bar.
        main: whether this process writes the file and shows the bar.

    Returns:
        Mean loss of every epoch.
    """
    device, total, done = next(models.parameters()).device, epochs * per_epoch, 0
    rates, losses = [group["lr"] for group in optimizer.param_groups], []
    if kept.exists():
        state = torch.load(kept, map_location=device, weights_only=True)
        models.load_state_dict(state["models"])
        optimizer.load_state_dict(state["optimizer"])
        done, losses = state["steps"], state["losses"]
    models.train()
    sums = torch.zeros((), device=device)
    with tqdm(total=total, initial=done, desc=title, unit="step", disable=None if main else True) as bar:
        for step, batch in enumerate(batches(done, total) if done < total else (), start=done):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step / total)
            optimizer.zero_grad()
            now = loss(batch)
            now.backward()
            optimizer.step()
            sums += now.detach()
            bar.update()
            if (step + 1) % per_epoch == 0:
                if torch.distributed.is_initialized():
                    torch.distributed.all_reduce(sums)
                    sums /= torch.distributed.get_world_size()
                losses.append(round(float(sums) / per_epoch, 4))
                sums.zero_()
                state = {"models": models.state_dict(), "optimizer": optimizer.state_dict()}
                if main:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(kept, partial(torch.save, state | {"steps": step + 1, "losses": losses}))
    models.eval()
    return losses


def cosine(progress: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * progress)


@torch.no_grad()
def score(subject: Subject, models: nn.ModuleList, source: Source) -> list[float]:
    """Accuracy of every head on the central crops of the labelled images."""
    correct, count = torch.zeros(len(models), dtype=torch.float64), 0
    for images in EvalLoader(
        source, subject.image_size, BATCH, subject.options.workers, resize_ratio=subject.resize_ratio
    ):
        outputs = subject.outputs(images.images.to(subject.device, non_blocking=True))
        rows = images.labels >= 0
        for place, head in enumerate(models):
            correct[place] += (head(outputs).argmax(1).cpu() == images.labels)[rows].sum()
        count += int(rows.sum())
    return (correct / count).tolist()


def _split(source: Source, seed: int) -> tuple[Part, Part]:
    """Labelled training images to fit on and to choose by."""
    rows = np.flatnonzero(source.labels >= 0)
    held = stratified_split(torch.from_numpy(source.labels[rows]), VALIDATION_SHARE, seed).numpy()
    if not held.any():
        raise ValueError(f"choosing among heads needs a class of two training images; there are {len(rows)} images")
    return Part(source, rows[~held]), Part(source, rows[held])


def _classes(subject: Subject) -> int:
    return int(subject.data.train.labels.max()) + 1
