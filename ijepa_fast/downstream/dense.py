"""Linear and k-NN segmentation, and linear depth, on frozen patch features.

Legend: B images, N = gh * gw patches, D width, C classes, H x W pixels.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.downstream.dense_data import DenseData, DenseLoader, DenseSample
from ijepa_fast.downstream.heads import cosine, train
from ijepa_fast.downstream.tasks import Subject
from ijepa_fast.evaluate.knn import MAX_BANK, knn_predict

EPOCHS, BATCH, RATE, DECAY = 20, 16, 1e-2, 1e-4
IGNORED = -1


class DenseHead(nn.Module):
    """Batch norm and one linear layer for each patch: [B, N, D] -> [B, C, gh, gw]."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, outputs)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.linear(self.norm(tokens.float().flatten(0, 1)))
        return x.unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)


def segmentation(subject: Subject) -> dict:
    """mIoU and pixel accuracy at the size of the masks: of a linear head, and of 20 nearest patches.

    The k-NN vote takes up to 50,000 training patches, each with the class of most of its pixels.
    """
    data: DenseData = subject.data
    dense = _table(data.ids)
    head = _fit(subject, "segmentation", len(data.ids), partial(_cross_entropy, dense))
    bank, labels = _bank(subject, dense)
    count = len(data.ids)
    linear, nearest, constant = (torch.zeros(count, count, dtype=torch.int64) for _ in range(3))
    for tokens, grid, target in _tested(subject):
        target = dense[target]
        logits = F.interpolate(head(tokens, grid), target.shape, mode="bilinear", align_corners=False)
        linear += confusion(logits[0].argmax(0).cpu(), target, count)
        voted = knn_predict(bank, labels, tokens[0]).view(1, 1, *grid).float()
        nearest += confusion(F.interpolate(voted, target.shape)[0, 0].long().cpu(), target, count)
    constant[:, int(linear.sum(1).argmax())] = linear.sum(1)
    told = {name: scores(matrix) for name, matrix in (("linear", linear), ("k-NN", nearest))}
    chance = scores(constant)
    names = ("mIoU", "pixel accuracy")
    return {
        "figures": {f"{name} {what}": told[name][what] for name in told for what in names},
        "chance": {f"{name} {what}": chance[what] for name in told for what in names},
        "class ids": list(data.ids),
        "IoU": {name: told[name]["IoU"] for name in told},
        "resolution": subject.image_size,
    }


def depth(subject: Subject) -> dict:
    """delta1 (share of pixels within a factor of 1.25) and RMSE of a linear head on the logarithm of the depth."""
    head = _fit(subject, "depth", 1, _log_error)
    pairs = subject.data.train
    maps = (torch.from_numpy(pairs.target(index)) for index in range(len(pairs)))
    middle = float(torch.stack([metres[metres > 0].log().mean() for metres in maps]).nanmean().exp())
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for tokens, grid, target in _tested(subject):
        metres = F.interpolate(head(tokens, grid), target.shape, mode="bilinear", align_corners=False)[0, 0].exp().cpu()
        for place, predicted in enumerate((metres, torch.full_like(metres, middle))):
            sums[place] += depth_sums(predicted, target)
    figures = [{"delta1": float(s[0] / s[2]), "RMSE (m)": math.sqrt(s[1] / s[2])} for s in sums]
    return {"figures": figures[0], "chance": figures[1], "resolution": subject.image_size}


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


def depth_sums(predicted: Tensor, target: Tensor) -> Tensor:
    """fp64 [3]: pixels within a factor of 1.25, sum of squared errors, and pixels; where nothing was measured none."""
    known = target > 0
    p, t = predicted[known].double(), target[known].double()
    return torch.stack(
        [(torch.maximum(p / t, t / p) < 1.25).sum().double(), (p - t).square().sum(), known.sum().double()]
    )


def _fit(subject: Subject, task: str, outputs: int, loss) -> DenseHead:
    head = DenseHead(subject.encoder.embed_dim, outputs).to(subject.device)
    batch = min(BATCH, len(subject.data.train))
    loader = _loader(subject, "train")
    epochs = subject.options.epochs or EPOCHS

    def of(sample: DenseSample) -> Tensor:
        tokens, grid = _tokens(subject, sample.images)
        targets = torch.stack(sample.targets).to(subject.device)
        return loss(F.interpolate(head(tokens, grid), targets.shape[1:], mode="bilinear", align_corners=False), targets)

    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    images, seed = subject.data.train.fingerprint, subject.options.seed
    key = {"task": task, "images": images, "outputs": outputs, "epochs": epochs, "seed": seed, **subject.key()}
    kept = subject.work(key).with_suffix(".pt")
    per_epoch = len(subject.data.train) // batch
    train(kept, head, optimizer, cosine, epochs, per_epoch, partial(loader.crops, batch), of, task)
    return head.requires_grad_(False)


def _cross_entropy(dense: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    targets = dense.to(targets.device)[targets]
    # A sum over no pixel at all is 0, a mean would be NaN.
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp_min(1)


def _log_error(predicted: Tensor, targets: Tensor) -> Tensor:
    known = targets > 0
    error = (predicted[:, 0] - torch.where(known, targets, 1.0).log()).abs()
    return (error * known).sum() / known.sum().clamp_min(1)


def _bank(subject: Subject, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, D] of training patches and the class of most pixels of each."""
    share = math.ceil(MAX_BANK / len(subject.data.train))
    generator = torch.Generator().manual_seed(subject.options.seed)
    features, labels = [], []
    for tokens, grid, target in _tested(subject, "train"):
        classes = dense[target]
        votes = F.one_hot(classes + 1, int(dense.max()) + 2)[..., 1:].permute(2, 0, 1)[None].float()
        shares = F.adaptive_avg_pool2d(votes, grid)[0].flatten(1)
        rows = torch.randperm(shares.shape[1], generator=generator)
        rows = rows[(shares.sum(0) > 0)[rows]][:share]
        features.append(tokens[0][rows.to(tokens.device)])
        labels.append(shares.argmax(0)[rows])
    return torch.cat(features), torch.cat(labels).to(subject.device)


def _tested(subject: Subject, split: str = "test"):
    """(patch features [1, N, D], patch grid, target [H, W] on the CPU) of whole images, one after the other."""
    for sample in _loader(subject, split).whole():
        yield *_tokens(subject, sample.images), sample.targets[0]


def _loader(subject: Subject, split: str) -> DenseLoader:
    patch, options = subject.encoder.patch_size, subject.options
    return DenseLoader(getattr(subject.data, split), subject.image_size, patch, options.workers, options.seed)


def _tokens(subject: Subject, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    return subject.tokens(images.to(subject.device)), subject.encoder.grid_of(*images.shape[2:])


def _table(ids: tuple[int, ...]) -> Tensor:
    """Class id -> its place among the ids, -1 for those that do not count."""
    table = torch.full((max(1 << 16, max(ids) + 1),), IGNORED)
    table[list(ids)] = torch.arange(len(ids))
    return table
