"""I-JEPA: context encoder, target encoder, predictor and the loss between them (arXiv 2301.08243, section 3).

Legend: B images, N patches per image, D width, p patch size, K width of a target (D, or 3 * p * p for pixels), M target
blocks per image, T predicted rows, Tc, Tt packed rows of context and targets, W ranks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast import ops
from ijepa_fast.masks.sampler import Masks
from ijepa_fast.model.fp8 import Fp8Linear, convert_to_fp8
from ijepa_fast.model.fused_blocks import FusedBlock, fuse
from ijepa_fast.model.predictor_layout import PredictorLayout, predictor_layout
from ijepa_fast.model.vit import Predictor, VisionTransformer
from ijepa_fast.ops import accumulation_dtype
from ijepa_fast.ragged import PADDING, Ragged, take_rows
from ijepa_fast.side_stream import SideStream

TARGET_EPS = 1e-5
"""The eps of the layer-norm of targets."""


@dataclass(frozen=True)
class Objective:
    """The loss of pretraining.

    The sum of prediction, variance, covariance and invariance, each times its weight. The last three are those of
    VICReg (arXiv 2105.04906, section 4.1) on the average-pooled context features, as C-JEPA adds them to I-JEPA
    (arXiv 2410.19560), or on what the predictor's projector, if it has one, makes of them. Let z be either. Variance
    is the mean over dimensions of ``max(0, 1 - sqrt(var(z_d) + 1e-4))``, covariance the sum of squared off-diagonal
    covariances over the width of z, both over the global batch; invariance is the mean square distance between the z
    of two masks of one image, over all pairs of its masks. Pooling is over all context blocks of a mask together.
    Variance and covariance keep small data sets from collapsing; with invariance they learn in few steps what the
    contexts of an image have in common (docs/quality.md). The official recipes use none of the three.

    Args:
        loss: distance between prediction and target. The official code takes smooth_l1, the paper writes l2.
        prediction_weight: weight of the prediction loss.
        variance_weight: weight of the variance term.
        covariance_weight: weight of the covariance term.
        invariance_weight: weight of the invariance term, which needs at least two masks per image.
        targets: what is predicted for a target patch: features (of this patch, by the target encoder), average (the
            mean of its block's features, the same for every patch of the block), features_alone or average_alone (the
            same of a target encoder that sees each target block alone; otherwise it sees the whole image and the rows
            of the blocks are taken from its output, as in the paper) or pixels (of this patch; no target encoder takes
            part, which then is a running average for evaluation alone).
        normalize_targets: layer-normalise each patch's features (before any average) or pixels, without affine
            parameters. Pixels are normalised with the encoder's mean and std in any case.
    """

    loss: Literal["smooth_l1", "l2", "l1"] = "smooth_l1"
    prediction_weight: float = 1.0
    variance_weight: float = 0.0
    covariance_weight: float = 0.0
    invariance_weight: float = 0.0
    targets: Literal["features", "average", "features_alone", "average_alone", "pixels"] = "features"
    normalize_targets: bool = True

    def __post_init__(self) -> None:
        for name in ("loss", "targets"):
            choices = get_args(get_type_hints(Objective)[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"objective.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("prediction_weight", "variance_weight", "covariance_weight", "invariance_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name} must not be negative, got {getattr(self, name)}")

    def check_masks(self, per_image: int) -> None:
        """Raise ValueError where an image has too few masks for the invariance term."""
        if self.invariance_weight > 0 and per_image < 2:
            raise ValueError(
                f"objective.invariance_weight {self.invariance_weight} compares masks of one image, but "
                f"masks.per_image is {per_image}; give at least 2"
            )

    @property
    def averaged(self) -> bool:
        return self.targets in ("average", "average_alone")

    @property
    def regularised(self) -> bool:
        return self.variance_weight > 0 or self.covariance_weight > 0 or self.invariance_weight > 0


class Losses(NamedTuple):
    """Scalars on the device of the images. ``total`` carries the graph, the others are detached."""

    total: Tensor
    prediction: Tensor
    variance: Tensor
    covariance: Tensor
    invariance: Tensor


class Prediction(NamedTuple):
    """Result of ``IJEPA.predict`` for a batch.

    Attributes:
        values: [T, K]; the predictor's output, with the graph.
        targets: [R, K]; what is predicted.
        rows: int32 [T]; the row of ``targets`` each value is compared with, -1 for padding.
        cu_seqlens: int32; prefix sums of the predicted blocks.
        context: [Tc, D]; the context encoder's output, with the graph.
        pooled: [B, D] average-pooled target features, detached; None without a target encoder.
    """

    values: Tensor
    targets: Tensor
    rows: Tensor
    cu_seqlens: Tensor
    context: Tensor
    pooled: Tensor | None


class IJEPA(nn.Module):
    """The three networks of I-JEPA. ``forward`` gives the loss of one batch.

    Args:
        encoder: the context encoder; the target encoder starts as a frozen copy of it.
        predictor: on the same patch grid and width; to predict pixels, with a target_dim of in_chans * patch_size ** 2.
        objective: losses and their weights.

    Attributes:
        target_stream: where the target encoder runs, beside context encoder and predictor. None: on the current stream.

    Raises:
        ValueError: encoder and predictor do not fit together.
    """

    target_stream: SideStream | None = None

    def __init__(self, encoder: VisionTransformer, predictor: Predictor, objective: Objective | None = None):
        super().__init__()
        if predictor.grid != encoder.grid:
            raise ValueError(f"the predictor's patch grid {predictor.grid} is not the encoder's {encoder.grid}")
        if predictor.predictor_embed.in_features != encoder.embed_dim:
            raise ValueError(
                f"the predictor takes width {predictor.predictor_embed.in_features}, "
                f"the encoder gives {encoder.embed_dim}"
            )
        self.objective = objective or Objective()
        pixel_values = encoder.in_chans * encoder.patch_size**2
        if predictor.projector is not None and not self.objective.regularised:
            raise ValueError(
                f"the projector of projector_dim {predictor.projector.fc1.out_features} has nothing to learn from: "
                "objective.variance_weight, covariance_weight and invariance_weight are all 0"
            )
        target_dim = pixel_values if self.objective.targets == "pixels" else encoder.embed_dim
        if predictor.predictor_proj.out_features != target_dim:
            raise ValueError(
                f"the predictor gives width {predictor.predictor_proj.out_features}, "
                f"but targets of kind {self.objective.targets} have {target_dim}"
            )
        self.context_encoder = encoder
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = predictor

    def use_fp8_targets(self, device: torch.device) -> None:
        """Let the blocks of the target encoder multiply in FP8 from now on, in training mode (``fp8.Fp8Linear``).

        Args:
            device: where ``forward`` will be called. On a GPU, weights must be bf16 by then.

        Raises:
            ValueError: widths that are no multiples of 16, a GPU that cannot multiply FP8 numbers, pixels as targets,
                which no target encoder makes, or a target encoder of fused blocks.
        """
        if self.objective.targets == "pixels":
            raise ValueError("FP8 products are for a target encoder, but objective.targets is pixels")
        if any(isinstance(block, FusedBlock) for block in self.target_encoder.blocks):
            raise ValueError("FP8 products need plain blocks, but the target encoder's are fused")
        convert_to_fp8(self.target_encoder.blocks, device)

    def fuse_blocks(self, *, targets: bool = True) -> None:
        """Run the blocks of all three networks on the package's fused kernels from now on (``fused_blocks.py``).

        Call it on the device and in the dtype of the run: on a GPU with weights in bf16 or fp16 (``cast_weights``).

        Args:
            targets: those of the target encoder too; FP8 products need them plain.

        Raises:
            ValueError: the kernels cannot run here, with the reason, or the target encoder multiplies in FP8. Nothing
                is fused then.
        """
        if targets and any(isinstance(layer, Fp8Linear) for layer in self.target_encoder.modules()):
            raise ValueError("FP8 products need plain blocks in the target encoder: give fuse_blocks(targets=False)")
        for network in (self.context_encoder, self.predictor, *([self.target_encoder] if targets else [])):
            fuse(network)

    def forward(self, images: Tensor, masks: Masks, *, all_targets: bool = True) -> tuple[Losses, Tensor]:
        """Loss of one batch, and the pooled target features.

        Args:
            images: [B, C, h, w], uint8 or normalised float.
            masks: context and target blocks of these images, or several such masks of each (``Masks.per_image``): the
                loss is then the mean over them, and the target encoder sees each image once for all of them.
            all_targets: compute the target encoder's last block for every patch. False leaves out the rows that no
                target block reads; the pooled features are then over target patches alone. Without effect where the
                target encoder does not see whole images, or where the blocks have more rows than the images patches.

        Returns:
            ``Losses``, and average-pooled features [B, D] (detached) for monitoring: the target encoder's, or the
            context encoder's where pixels are predicted.
        """
        return self.losses(self.predict(images, masks, all_targets=all_targets), masks)

    def predict(self, images: Tensor, masks: Masks, *, all_targets: bool = True) -> Prediction:
        """The three networks on one batch; the arguments are those of ``forward``."""
        if masks.num_images != images.shape[0]:
            raise ValueError(f"the masks are for {masks.num_images} images, but there are {images.shape[0]}")
        # Which context goes with which target block, and where every row of the predictor's input comes from.
        layout = predictor_layout(masks.context, masks.targets, masks.num_contexts, masks.num_targets)
        grid = self.context_encoder.grid_of(*images.shape[2:])
        colors = masks.colors
        if colors is not None:
            colors = colors.repeat_interleave(masks.num_contexts, dim=0)  # all context blocks of a mask share its own
        # What is predicted does not depend on the prediction, so both may run at the same time.
        if self.target_stream is None:
            targets, rows, pooled = self._targets(images, masks, layout, all_targets)
            context = self.context_encoder(images, masks.context, colors=colors)
            values = self.predictor(context, layout, grid)
        else:
            with self.target_stream.beside(lambda: self._targets(images, masks, layout, all_targets)) as made:
                context = self.context_encoder(images, masks.context, colors=colors)
                values = self.predictor(context, layout, grid)
            targets, rows, pooled = made  # not before the streams are joined
        return Prediction(values, targets, rows, layout.predicted.cu_seqlens, context, pooled)

    def losses(self, predicted: Prediction, masks: Masks) -> tuple[Losses, Tensor]:
        """Losses and pooled features, as ``forward`` returns them, from the prediction of a batch with these masks.

        Raises:
            ValueError: the invariance term has a weight, but there is one mask per image.
        """
        objective, pooled = self.objective, predicted.pooled
        objective.check_masks(masks.per_image)
        # The mean over features, then over the rows of a block, then over blocks: small blocks count like large ones.
        # Averages were normalised before they were taken, so they are not once more.
        prediction_loss = ops.target_loss(
            predicted.values,
            predicted.targets,
            predicted.rows,
            predicted.cu_seqlens,
            objective.loss,
            objective.normalize_targets and not objective.averaged,
            TARGET_EPS,
        )
        total = objective.prediction_weight * prediction_loss
        variance = covariance = invariance = torch.zeros_like(prediction_loss)
        if objective.regularised or pooled is None:
            features = mean_pool(predicted.context, masks.context.every(masks.num_contexts))  # a row for every mask
        if pooled is None:  # without a target encoder the monitors watch the context encoder's features
            pooled = features.detach().unflatten(0, (-1, masks.per_image)).mean(1)
        if objective.regularised:
            features = gather_ranks(features)  # the terms, and a projector's batch norm, are over the global batch
            if self.predictor.projector is not None:
                features = self.predictor.projector(features)
            per_mask = features.unflatten(0, (-1, masks.per_image))
            # As for the prediction, the mean over the masks of an image: each number of mask is a batch of its own.
            terms = [variance_covariance(batch) for batch in per_mask.unbind(1)]
            variance, covariance = (torch.stack(values).mean() for values in zip(*terms, strict=True))
            total = total + objective.variance_weight * variance + objective.covariance_weight * covariance
            if objective.invariance_weight > 0:
                # The mean over all pairs of masks of a square distance is twice the variance over masks.
                invariance = 2 * per_mask.var(1).mean()
                total = total + objective.invariance_weight * invariance
        terms = (prediction_loss, variance, covariance, invariance)
        return Losses(total, *(term.detach() for term in terms)), pooled

    @torch.no_grad()
    def _targets(
        self, images: Tensor, masks: Masks, layout: PredictorLayout, all_targets: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Targets [R, K], which of their rows each prediction is compared with (int32 [T], -1 for padding), and pooled
        features [B, D] (None without a target encoder)."""
        encoder, objective, targets = self.target_encoder, self.objective, masks.targets
        if objective.targets == "pixels":
            dtype = accumulation_dtype(encoder.patch_embed.proj.weight.dtype)
            pixels = encoder.patch_embed.pixels(images, targets.indices, dtype)
            return pixels[:, : self.predictor.predictor_proj.out_features].contiguous(), layout.target_rows, None
        grid = encoder.grid_of(*images.shape[2:])
        patches, placed = images.shape[0] * grid[0] * grid[1], False  # whether row b * N + n is patch n of image b
        # The last block of the encoder need only compute the rows that are read. Those of several masks of an image are
        # in `read`, each once. Of one mask, a patch in several target blocks is read as often: where they have more
        # rows than there are patches, all patches once cost less.
        read = masks.read if masks.read is not None else targets.every(masks.per_image * masks.num_targets)
        if objective.targets.endswith("_alone"):
            features = encoder(images, targets)
            pooled = mean_pool(features, targets.every(masks.per_image * masks.num_targets))
        elif all_targets or read.num_rows >= patches:
            whole = encoder(images)
            pooled, features, placed = whole.mean(1, dtype=torch.float32), whole.flatten(0, 1), True
        else:
            features = encoder(images, queries=read)
            pooled = mean_pool(features, read)
            if masks.read is not None:
                grid_rows = features.new_zeros(patches + 1, features.shape[1])
                grid_rows[read.indices.long()] = features  # rows of no token, -1, go to the one that is too many
                features, placed = grid_rows, True
        if not objective.averaged:
            return features, layout.target_tokens if placed else layout.target_rows, pooled
        if placed:
            features = take_rows(features, targets.indices)
        if objective.normalize_targets:
            features = F.layer_norm(features.to(accumulation_dtype(features.dtype)), features.shape[1:], eps=TARGET_EPS)
        # A block's average is the target of each of its rows, for every context of the image.
        predicted = layout.predicted.sequence_ids()  # (image, context, target block)
        blocks = masks.num_targets
        rows = predicted // (masks.num_contexts * blocks) * blocks + predicted % blocks
        return mean_pool(features, targets), rows.masked_fill(layout.target_rows < 0, PADDING).int(), pooled


def mean_pool(x: Tensor, tokens: Ragged) -> Tensor:
    """Mean of each sequence's rows: packed [T, D] -> [S, D] in at least fp32; 0 for an empty sequence.

    A product with a [S, T] matrix, because a scattered sum has no fixed order on a GPU.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    member = tokens.sequence_ids() == torch.arange(tokens.num_sequences, device=x.device)[:, None]
    weight = member.to(wide.dtype) / tokens.lengths.clamp(min=1)[:, None]
    return weight @ wide


def variance_covariance(features: Tensor, target_std: float = 1.0, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
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
