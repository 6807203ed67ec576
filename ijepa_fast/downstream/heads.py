"""Heads trained on random crops seen by the frozen encoder: the paper's linear protocol, and attentive probing.

Legend: B images of a batch, N patches, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ijepa_fast.data import Source, TrainLoader
from ijepa_fast.downstream.classify import accuracies, check_choice
from ijepa_fast.downstream.store import BATCH, Part
from ijepa_fast.downstream.subject import Subject
from ijepa_fast.evaluate.probe import stratified_split
from ijepa_fast.run.files import write_whole

CROP_SCALE, FLIP = (0.08, 1.0), 0.5
"""Random-resized crops and flips, as in all linear probing since Inception."""
VALIDATION_SHARE = 0.1
"""Share of the training images by which the best of the heads is chosen; the test images have no part in that."""

PAPER_BATCH, PAPER_STEPS = 16_384, 78
"""Batch of the linear protocol, and how many of them ImageNet-1k gives in an epoch."""
PAPER_RATES = tuple(rate * PAPER_BATCH / 256 for rate in (0.05, 0.01, 0.001))
"""Learning rates of the linear protocol, the paper's (its table 8, as stable-pretraining's benchmarks quote it). LARS
makes steps in proportion to the weights, so it is the number of steps that must be kept, not the batch: smaller sets
have smaller batches and the same rates."""
PAPER_DECAYS = (0.0005, 0.0)

ATTENTIVE_RATES, ATTENTIVE_DECAY = (3e-4, 1e-3, 3e-3), 0.001
ATTENTIVE_EPOCHS, ATTENTIVE_BATCH = 20, 1024
"""V-JEPA's for images (facebookresearch/jepa, configs/evals/vith16_in1k.yaml), whose one rate is 1e-3."""


class LinearHead(nn.Module):
    """One linear layer on the last ``inputs`` of pooled features [B, .], behind a batch norm without weights or not."""

    def __init__(self, inputs: int, classes: int, norm: bool):
        super().__init__()
        self.inputs = inputs
        self.norm = nn.BatchNorm1d(inputs, affine=False) if norm else nn.Identity()
        self.linear = nn.Linear(inputs, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(self.norm(pooled[:, -self.inputs :]))


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

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm1(tokens.float())
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

    LARS, 50 epochs, learning rate divided by 10 after each 15 of them; of the last block or of the last four, with and
    without a batch norm. VISSL has the heads, the schedule and LARS without biases in
    configs/config/benchmark/linear_image_classification/imagenet1k/models/vit_h16_no_cls.yaml.
    """
    blocks = 4 if len(subject.encoder.blocks) >= 4 else 1
    heads, groups = {}, []
    for layers in sorted({1, blocks}):
        for norm, rate, decay in product((True, False), PAPER_RATES, PAPER_DECAYS):
            head = LinearHead(layers * subject.encoder.embed_dim, _classes(subject), norm)
            heads[f"last {layers}, {'batch norm' if norm else 'plain'}, rate {rate:g}, decay {decay:g}"] = head
            groups.append({"params": list(head.parameters()), "lr": rate, "weight_decay": decay})
    batch = min(PAPER_BATCH, len(subject.data.train) // PAPER_STEPS)

    def factor(progress: float) -> float:
        return 0.1 ** int(progress * 50 / 15)

    features = partial(subject.pooled, blocks=blocks)
    return fit(subject, "linear_protocol", heads, Lars(groups, lr=0.0), features, factor, 50, batch)


def attentive(subject: Subject) -> dict:
    """An attentive probe on the patch features of the last block, best of three learning rates."""
    width, classes = subject.encoder.embed_dim, _classes(subject)
    heads = {f"rate {rate:g}": AttentiveHead(width, classes, subject.encoder.num_heads) for rate in ATTENTIVE_RATES}
    groups = [{"params": list(h.parameters()), "lr": r} for h, r in zip(heads.values(), ATTENTIVE_RATES, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=ATTENTIVE_DECAY)
    batch = min(ATTENTIVE_BATCH, len(subject.data.train) // 20)
    return fit(subject, "attentive", heads, optimizer, subject.tokens, cosine, ATTENTIVE_EPOCHS, batch)


def fit(
    subject: Subject,
    name: str,
    heads: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    features: Callable[[Tensor], Tensor],
    factor: Callable[[float], float],
    epochs: int,
    batch: int,
) -> dict:
    """Train classifiers side by side on the same crops, choose one by held-out images, and test that one.

    Args:
        heads: modules on what ``features`` makes of images, by name.
        features: of the frozen encoder; it sees ``BATCH`` images at once, however many a step has.
        factor: as in ``train``.
        epochs: unless ``Options.epochs`` says otherwise.
        batch: images of a step, but 16 at least, and whole multiples of ``BATCH`` above it.
    """
    device, seed, epochs = subject.device, subject.options.seed, subject.options.epochs or epochs
    part, held_out = _split(subject.data.train, seed)
    batch = min(max(16, batch), len(part))
    at_once = min(batch, BATCH)
    loaded = batch // at_once
    loader = TrainLoader(
        part,
        image_size=subject.image_size,
        global_batch=at_once,
        seed=seed,
        workers=subject.options.workers,
        scale=CROP_SCALE,
        flip=FLIP,
    )
    models = nn.ModuleList(heads.values()).to(device)

    def batches(done: int, total: int) -> Iterable[tuple[Tensor, Tensor]]:
        loader.start_at(done * loaded, (total - done) * loaded)
        images = iter(loader)
        for _ in range(done, total):
            taken = [
                (features(some.images.to(device, non_blocking=True)), some.labels) for some in islice(images, loaded)
            ]
            yield torch.cat([x for x, _ in taken]), torch.cat([labels for _, labels in taken]).to(device)

    def loss(features_and_labels: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = features_and_labels
        return sum(F.cross_entropy(head(x), labels) for head in models)

    key = {"task": name, "heads": list(heads), "images": part.fingerprint, "batch": loaded * at_once, "epochs": epochs}
    kept = subject.work(key | {"seed": seed, **subject.key()}).with_suffix(".pt")
    train(kept, models, optimizer, factor, epochs, loader.steps_per_epoch // loaded, batches, loss, name)
    chosen = score(subject, models, features, held_out)
    best = int(np.argmax(chosen))
    (accuracy,) = score(subject, models[best : best + 1], features, subject.data.test)
    return accuracies(subject, {"accuracy": accuracy}) | {
        "head": list(heads)[best],
        "validation": dict(zip(heads, chosen, strict=True)),
        "epochs": epochs,
        "batch": loaded * at_once,
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
def score(
    subject: Subject, heads: Iterable[nn.Module], features: Callable[[Tensor], Tensor], source: Source
) -> list[float]:
    """Accuracy of every head on the central crops of the labelled images."""
    correct, count = 0, 0
    for some in subject.crops(source):
        x = features(some.images.to(subject.device, non_blocking=True))
        correct += torch.stack([(head(x).argmax(1).cpu() == some.labels).sum() for head in heads])
        count += len(some.labels)
    return (correct.double() / count).tolist()


def _split(source: Source, seed: int) -> tuple[Part, Part]:
    """Labelled training images to fit on and to choose by."""
    check_choice(source)
    rows = np.flatnonzero(source.labels >= 0)
    held = stratified_split(torch.from_numpy(source.labels[rows]), VALIDATION_SHARE, seed).numpy()
    return Part(source, rows[~held]), Part(source, rows[held])


def _classes(subject: Subject) -> int:
    return int(subject.data.train.labels.max()) + 1
