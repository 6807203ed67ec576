"""Image features for evaluation: of a frozen encoder, and of two baselines that need no network.

Legend: B images of one batch, n images in all, N patches per image, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layers = Literal["last", "last4"]
UNLABELLED = -1
_ROWS_AT_ONCE = 1 << 16


def pool_features(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Average over patches: [B, N, D] -> fp32 [B, D]; a list of n such outputs -> their concatenation [B, n * D]."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.cat([output.mean(1, dtype=torch.float32) for output in outputs], dim=1)


def extract_features(
    encoder: nn.Module,
    batches: Iterable,
    *,
    layers: Layers = "last",
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Average-pooled features of a frozen encoder.

    The paper evaluates the target encoder, with the better of the last layer and the last four layers concatenated
    (arXiv 2301.08243, appendix A). Both come from one pass: the last D columns of "last4" are "last".

    Args:
        encoder: gives [B, N, D] for images; for "last4" also ``encoder.intermediate_layers(images, n=4)``, the outputs
            of its last four blocks, each through the final norm. Runs in eval mode; afterwards every module is in
            the mode it was in.
        batches: of (images, labels), or objects with these attributes, or images alone. Labels may be None.
        layers: "last" or "last4".
        device: where to compute. None: where the encoder's parameters are.
        amp_dtype: autocast to this dtype. None: the encoder's own precision.

    Returns:
        Features fp32 [n, D] or [n, 4 * D] and labels int64 [n] (-1: no label), both on ``device``.

    Raises:
        ValueError: ``layers`` is unknown, or there are no batches.
    """
    if layers not in ("last", "last4"):
        raise ValueError(f"layers must be 'last' or 'last4', got {layers!r}")
    if device is None:
        device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
    device = torch.device(device)

    def pooled(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            return pool_features(encoder(images) if layers == "last" else encoder.intermediate_layers(images, n=4))

    with evaluation_mode(encoder):
        return collect_features(pooled, batches, device=device)


@torch.no_grad()  # not inference_mode: what an encoder caches on the way must stay usable in training
def collect_features(
    function: Callable[[Tensor], Tensor], batches: Iterable, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Apply ``function``, images [B, ...] -> [B, D], to every batch: features fp32 [n, D] and labels int64 [n].

    ``batches`` and labels are as in ``extract_features``. Raises ValueError if there are no batches.
    """
    features, labels = [], []
    for batch in batches:
        images, batch_labels = _images_and_labels(batch)
        images = images.to(device, non_blocking=True)
        features.append(function(images).float())
        if batch_labels is None:
            batch_labels = torch.full((len(images),), UNLABELLED)
        labels.append(torch.as_tensor(batch_labels, dtype=torch.int64).to(device, non_blocking=True))
    if not features:
        raise ValueError("there are no images to take features of: the iterable of batches is empty")
    return torch.cat(features), torch.cat(labels)


def pixel_features(images: Tensor, max_side: int = 16) -> Tensor:
    """Raw pixels as features: [B, C, h, w] -> fp32 [B, C * h' * w'], area-averaged so that no side exceeds max_side.

    Integers are scaled to [0, 1]; float is taken as it is.
    """
    pixels = in_unit_range(images)
    height, width = pixels.shape[2:]
    shrink = max_side / max(height, width)
    if shrink < 1:
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        pixels = F.adaptive_avg_pool2d(pixels, size)
    return pixels.flatten(1)


def in_unit_range(images: Tensor) -> Tensor:
    """fp32 images in [0, 1] of uint8 and uint16 ones; float ones as they are."""
    return images.float() if images.is_floating_point() else images.float() / torch.iinfo(images.dtype).max


def colour_histogram(images: Tensor, bins: int = 8) -> Tensor:
    """Joint colour histogram, Hellinger-mapped: [B, C, h, w] -> fp32 [B, bins ** C] of unit length.

    Of more than three channels, the histograms of each, side by side: [B, bins * C] of length sqrt(C).

    Entries are square roots of the shares of pixels, which serves linear probes and cosine k-NN better than the shares
    themselves (Arandjelovic and Zisserman, CVPR 2012): the inner product of two is their Bhattacharyya coefficient.

    Args:
        images: uint8, uint16, or float in [0, 1].
        bins: per channel, over equal intervals.

    Raises:
        ValueError: bins is not between 1 and 256, or float images leave [0, 1].
    """
    if not 1 <= bins <= 256:
        raise ValueError(f"bins must be between 1 and 256, got {bins}")
    images = in_unit_range(images) if images.dtype == torch.uint16 else images
    if images.dtype == torch.uint8:
        level = images.long() * bins // 256
    else:
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"float images must be in [0, 1], got values from {low.item():g} to {high.item():g}")
        level = (images * bins).long().clamp_max(bins - 1)
    batch, channels = images.shape[:2]
    if channels > 3:
        return torch.cat([colour_histogram(one, bins) for one in images.split(1, dim=1)], dim=1)
    place = bins ** torch.arange(channels, device=images.device)
    cell = (level * place.view(1, -1, 1, 1)).sum(1).flatten(1)
    cell += torch.arange(batch, device=images.device)[:, None] * bins**channels
    counts = torch.bincount(cell.flatten(), minlength=batch * bins**channels).view(batch, -1)
    return (counts / (images.shape[2] * images.shape[3])).sqrt()


def labelled(features: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The rows that have a label (not -1), as fp32 [n, D] and int64 [n] on the features' device.

    Raises:
        ValueError: shapes do not fit, no row has a label, or a feature is not finite; ``name`` says whose.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{name} features must be [n, D] with labels [n], got {list(features.shape)} and {list(labels.shape)}"
        )
    labels = labels.to(features.device, torch.int64)
    kept = labels != UNLABELLED
    if not kept.any():
        raise ValueError(f"{name} data has no labelled image")
    # Features may be a file larger than memory: they are copied only where rows are left out.
    features = features.detach().float()
    if not kept.all():
        features, labels = features[kept], labels[kept]
    broken = sum(int((~part.isfinite().all(1)).sum()) for part in features.split(_ROWS_AT_ONCE))
    if broken:
        raise ValueError(f"{name} features of {broken} of {len(labels)} images are not finite")
    return features, labels


def _images_and_labels(batch) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if hasattr(batch, "images"):
        return batch.images, batch.labels
    images, labels, *_ = batch
    return images, labels


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for all of ``module``; on leaving, each part is back in its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
