"""Linear and k-NN segmentation, and linear depth, on frozen patch features.

Legend: B images, N = gh * gw patches, D width, C classes, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.downstream.dense_data import IGNORED, DenseLoader, Pairs, Sample
from ijepa_fast.downstream.heads import cosine, train
from ijepa_fast.downstream.store import spread
from ijepa_fast.downstream.subject import Subject
from ijepa_fast.evaluate.knn import MAX_BANK, knn_predict

EPOCHS, BATCH, DECAY = 32, 16, 1e-4
"""Those of DINOv2's linear segmentation: AdamW, 40,000 steps of 16 images of ADE20K."""
RATE_TIMES_WIDTH = 1.0
"""DINOv2 has 1e-3 for widths from 384 to 1,536. A step of Adam changes every weight by about the learning rate, and so
an output by that times the width."""


class DenseHead(nn.Module):
    """Batch norm and one linear layer for each patch [B, N, D], interpolated to the size of targets: [B, C, H, W]."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, outputs)

    def forward(self, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        x = self.linear(self.norm(tokens.float().flatten(0, 1))).unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)
        return F.interpolate(x, size, mode="bilinear", align_corners=False)


def segmentation(subject: Subject) -> dict:
    """mIoU and pixel accuracy at the size of the masks: of a linear head, and of 20 nearest patches.

    The k-NN vote takes up to 50,000 training patches, each with the class of most of its pixels.
    """
    ids = subject.data.train.ids
    count = len(ids)
    head = _fit(subject, "segmentation", count, _cross_entropy)
    bank, labels = _bank(subject, count)
    linear, nearest, constant = (torch.zeros(count, count, dtype=torch.int64) for _ in range(3))
    for tokens, grid, target in _whole(subject, subject.data.test):
        linear += confusion(head(tokens, grid, target.shape)[0].argmax(0).cpu(), target, count)
        voted = knn_predict(bank, labels, tokens[0]).view(1, 1, *grid).float()
        nearest += confusion(F.interpolate(voted, target.shape)[0, 0].long().cpu(), target, count)
    constant[:, int(linear.sum(1).argmax())] = linear.sum(1)
    told = {name: scores(matrix) for name, matrix in (("linear", linear), ("k-NN", nearest))}
    chance = scores(constant)
    names = ("mIoU", "pixel accuracy")
    return {
        "figures": {f"{name} {what}": told[name][what] for name in told for what in names},
        "chance": {f"{name} {what}": chance[what] for name in told for what in names},
        "class ids": list(ids),
        "IoU": {name: told[name]["IoU"] for name in told},
        "resolution": subject.image_size,
    }


def depth(subject: Subject) -> dict:
    """delta1 (share of pixels within a factor of 1.25) and RMSE of a linear head on the logarithm of the depth.

    Both are means over images of the figure of each, as in the field since Eigen et al. (arXiv 1406.2283).
    """
    head = _fit(subject, "depth", 1, _log_error)
    pairs = subject.data.train
    maps = (pairs.target(index) for index in range(len(pairs)))
    middle = float(torch.stack([metres[metres > 0].log().mean() for metres in maps]).nanmean().exp())
    found = []
    for tokens, grid, target in _whole(subject, subject.data.test):
        metres = head(tokens, grid, target.shape)[0, 0].exp().cpu()
        found.append(torch.stack([depth_scores(m, target) for m in (metres, torch.full_like(metres, middle))]))
    mine, constant = (
        dict(zip(("delta1", "RMSE (m)"), row, strict=True)) for row in torch.stack(found).nanmean(0).tolist()
    )
    return {"figures": mine, "chance": constant, "resolution": subject.image_size}


def confusion(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """int64 [C, C]: pixels by their class and by the predicted one; pixels with target -1 do not count."""
    counted = target >= 0
    return torch.bincount(target[counted] * classes + predicted[counted], minlength=classes**2).view(classes, classes)


def scores(matrix: Tensor) -> dict:
    """mIoU over the classes that are there or were predicted, pixel accuracy, and the IoU of every class."""
    right = matrix.diag().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    iou = right / union
    return {
        "mIoU": float(iou[union > 0].mean()),
        "pixel accuracy": float(right.sum() / matrix.sum()),
        "IoU": [None if math.isnan(value) else round(value, 4) for value in iou.tolist()],
    }


def depth_scores(predicted: Tensor, target: Tensor) -> Tensor:
    """fp64 [2]: share of pixels within a factor of 1.25, and root mean squared error; NaN where none was measured."""
    known = target > 0
    p, t = predicted[known].double(), target[known].double()
    return torch.stack([(torch.maximum(p / t, t / p) < 1.25).double().mean(), (p - t).square().mean().sqrt()])


def _fit(subject: Subject, task: str, outputs: int, loss: Callable[[Tensor, Tensor], Tensor]) -> DenseHead:
    width, pairs, epochs = subject.encoder.embed_dim, subject.data.train, subject.options.epochs or EPOCHS
    head = DenseHead(width, outputs).to(subject.device)
    batch = min(BATCH, len(pairs))

    def of(sample: Sample) -> Tensor:
        targets = torch.stack(sample[1]).to(subject.device)
        return loss(head(*_tokens(subject, sample[0]), targets.shape[1:]), targets)

    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE_TIMES_WIDTH / width, weight_decay=DECAY)
    key = {"task": task, "images": pairs.fingerprint, "epochs": epochs, "seed": subject.options.seed, **subject.key()}
    crops = partial(_loader(subject, pairs).crops, batch)
    train(subject.work(key).with_suffix(".pt"), head, optimizer, cosine, epochs, len(pairs) // batch, crops, of, task)
    return head.requires_grad_(False)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # A sum over no pixel at all is 0, a mean would be NaN.
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp_min(1)


def _log_error(predicted: Tensor, targets: Tensor) -> Tensor:
    known = targets > 0
    error = (predicted[:, 0] - torch.where(known, targets, 1.0).log()).abs()
    return (error * known).sum() / known.sum().clamp_min(1)


def _bank(subject: Subject, count: int) -> tuple[Tensor, Tensor]:
    """Features [n, D] of training patches and the class of most pixels of each."""
    pairs = subject.data.train
    pairs = pairs.part(spread(len(pairs), MAX_BANK))
    generator = torch.Generator().manual_seed(subject.options.seed)
    features, labels = [], []
    for tokens, grid, target in _whole(subject, pairs):
        votes = patch_votes(target, grid, count)
        rows = torch.randperm(len(votes), generator=generator)
        rows = rows[(votes.sum(1) > 0)[rows]][: math.ceil(MAX_BANK / len(pairs))]
        features.append(tokens[0][rows.to(tokens.device)])
        labels.append(votes.argmax(1)[rows])
    kept = spread(sum(map(len, labels)), MAX_BANK)
    return torch.cat(features)[kept], torch.cat(labels)[kept].to(subject.device)


def patch_votes(target: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """int64 [N, C]: pixels of each class in each patch."""
    rows, columns = (torch.arange(side) * cells // side for side, cells in zip(target.shape, grid, strict=True))
    patch = (rows[:, None] * grid[1] + columns)[target >= 0]
    cell = patch * classes + target[target >= 0]
    return torch.bincount(cell, minlength=math.prod(grid) * classes).view(-1, classes)


def _whole(subject: Subject, pairs: Pairs) -> Iterator[tuple[Tensor, tuple[int, int], Tensor]]:
    """(patch features [1, N, D], patch grid, target [H, W] on the CPU) of whole images, one after the other."""
    for images, (target,) in _loader(subject, pairs).whole():
        yield *_tokens(subject, images), target


def _loader(subject: Subject, pairs: Pairs) -> DenseLoader:
    options = subject.options
    size = subject.image_size if isinstance(subject.image_size, int) else min(subject.image_size)
    return DenseLoader(pairs, size, subject.encoder.patch_size, options.workers, options.seed)


def _tokens(subject: Subject, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    return subject.tokens(images.to(subject.device)), subject.encoder.grid_of(*images.shape[2:])
