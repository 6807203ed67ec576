"""I-JEPA: context encoder, target encoder, predictor and the loss between them (arXiv 2301.08243, section 3).

Legend: B images, N patches per image, D width, Tc, Tt packed rows of context and targets, W ranks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ijepa_fast import ops
from ijepa_fast.layout import predictor_layout
from ijepa_fast.masks import Masks
from ijepa_fast.ragged import Ragged
from ijepa_fast.vit import Predictor, VisionTransformer


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    ``prediction_weight * prediction + variance_weight * variance + covariance_weight * covariance``. The last two
    regularise the average-pooled context features z over the global batch, as in VICReg (arXiv 2105.04906, section
    4.1): variance is the mean over dimensions of ``max(0, target_std - sqrt(var(z_d) + variance_eps))``, covariance
    the sum of squared off-diagonal covariances over D. Pooling is over all context blocks of an image together. They
    keep small data sets from collapsing; the official recipes do not use them.

    Args:
        loss: distance between prediction and target features. The official code takes smooth_l1, the paper writes l2.
        prediction_weight: weight of the prediction loss.
        variance_weight: weight of the variance term.
        covariance_weight: weight of the covariance term.
        target_std: standard deviation below which the variance term pushes.
        variance_eps: added to the variance before its root.
        normalize_targets: layer-normalise the target features over their width, without affine parameters.
        target_eps: eps of that layer-norm.
    """

    loss: Literal["smooth_l1", "l2", "l1"] = "smooth_l1"
    prediction_weight: float = 1.0
    variance_weight: float = 0.0
    covariance_weight: float = 0.0
    target_std: float = 1.0
    variance_eps: float = 1e-4
    normalize_targets: bool = True
    target_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.loss not in ("smooth_l1", "l2", "l1"):
            raise ValueError(f"objective.loss must be smooth_l1, l2 or l1, got {self.loss!r}")
        for name in ("prediction_weight", "variance_weight", "covariance_weight", "target_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name} must not be negative, got {getattr(self, name)}")
        for name in ("variance_eps", "target_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name} must be positive, got {getattr(self, name)}")

    @property
    def regularised(self) -> bool:
        return self.variance_weight > 0 or self.covariance_weight > 0


class Losses(NamedTuple):
    """Scalars on the device of the images. ``total`` carries the graph, the others are detached."""

    total: Tensor
    prediction: Tensor
    variance: Tensor
    covariance: Tensor


class IJEPA(nn.Module):
    """The three networks of I-JEPA. ``forward`` gives the loss of one batch.

    Args:
        encoder: the context encoder; the target encoder starts as a frozen copy of it.
        predictor: on the same patch grid and width.
        objective: losses and their weights.

    Raises:
        ValueError: encoder and predictor do not fit together.
    """

    def __init__(self, encoder: VisionTransformer, predictor: Predictor, objective: Objective | None = None):
        super().__init__()
        if predictor.grid != encoder.grid:
            raise ValueError(f"the predictor's patch grid {predictor.grid} is not the encoder's {encoder.grid}")
        if predictor.predictor_embed.in_features != encoder.embed_dim:
            raise ValueError(
                f"the predictor takes width {predictor.predictor_embed.in_features}, "
                f"the encoder gives {encoder.embed_dim}"
            )
        self.context_encoder = encoder
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = predictor
        self.objective = objective or Objective()

    def forward(self, images: Tensor, masks: Masks, *, all_targets: bool = True) -> tuple[Losses, Tensor]:
        """Loss of one batch, and the pooled target features.

        Args:
            images: [B, C, h, w], uint8 or normalised float.
            masks: context and target blocks of these images.
            all_targets: compute the target encoder's last block for every patch. False leaves out the rows that no
                target block reads; the pooled features are then over target patches alone.

        Returns:
            ``Losses``, and the average-pooled target features [B, D] (detached), for monitoring.
        """
        if masks.num_images != images.shape[0]:
            raise ValueError(f"the masks are for {masks.num_images} images, but there are {images.shape[0]}")
        context_blocks, target_blocks = masks.num_contexts, masks.num_targets
        layout = predictor_layout(masks.context, masks.targets, context_blocks, target_blocks)
        target, pooled = self._targets(images, masks.targets, target_blocks, all_targets)
        context = self.context_encoder(images, masks.context)
        grid = self.context_encoder.grid_of(*images.shape[2:])
        prediction = self.predictor(context, layout, grid)
        objective = self.objective
        prediction_loss = ops.target_loss(
            prediction,
            target,
            layout.target_tokens if all_targets else layout.target_rows,
            layout.predicted.cu_seqlens,
            objective.loss,
            objective.normalize_targets,
            objective.target_eps,
        )
        total = objective.prediction_weight * prediction_loss
        variance = covariance = torch.zeros_like(prediction_loss)
        if objective.regularised:
            features = mean_pool(context, masks.context.every(context_blocks))
            variance, covariance = variance_covariance(
                gather_ranks(features), objective.target_std, objective.variance_eps
            )
            total = total + objective.variance_weight * variance + objective.covariance_weight * covariance
        return Losses(total, prediction_loss.detach(), variance.detach(), covariance.detach()), pooled

    @torch.no_grad()
    def _targets(self, images: Tensor, targets: Ragged, blocks: int, all_targets: bool) -> tuple[Tensor, Tensor]:
        if all_targets:
            features = self.target_encoder(images)
            return features.flatten(0, 1), features.mean(1, dtype=torch.float32)
        per_image = targets.every(blocks)
        features = self.target_encoder(images, queries=per_image)
        return features, mean_pool(features, per_image)


def mean_pool(x: Tensor, tokens: Ragged) -> Tensor:
    """Mean of each sequence's rows: packed [T, D] -> [S, D] in at least fp32; 0 for an empty sequence.

    A product with a [S, T] matrix, because a scattered sum has no fixed order on a GPU.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    member = tokens.sequence_ids() == torch.arange(tokens.num_sequences, device=x.device)[:, None]
    weight = member.to(wide.dtype) / tokens.lengths.clamp(min=1)[:, None]
    return weight @ wide


def variance_covariance(features: Tensor, target_std: float, eps: float) -> tuple[Tensor, Tensor]:
    """Variance and covariance terms of features [n, D], see ``Objective``.

    Raises:
        ValueError: fewer than two rows have no variance.
    """
    count, dim = features.shape
    if count < 2:
        raise ValueError(f"the variance-covariance term needs at least 2 images in the global batch, got {count}")
    centred = features - features.mean(0)
    variance = centred.square().sum(0) / (count - 1)
    hinge = (target_std - (variance + eps).sqrt()).clamp(min=0).mean()
    covariance = centred.T @ centred / (count - 1)
    off_diagonal = covariance - torch.diag_embed(covariance.diagonal())
    return hinge, off_diagonal.square().sum() / dim


class _GatherRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = x.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Each rank's loss depends on the rows of all ranks; the sum over ranks is W times the gradient of the one
        # global term, and the average over ranks that DistributedDataParallel takes divides by W again.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]


def gather_ranks(x: Tensor) -> Tensor:
    """Rows of all ranks, in rank order: [n, D] -> [W * n, D]. Differentiable; the same tensor without ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _GatherRanks.apply(x)
