"""Encoder and predictor with the official constructors and calls.

Legend: B images, N patches per image, K kept patches, D width, C context masks, M target masks.

Masks are lists of int64 [B, K] patch indices, one entry per block; what comes out is stacked mask-major.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ijepa_fast.model import vit
from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.ragged import Ragged
from ijepa_fast.weights.reading import square_side

VIT_EMBED_DIMS = {f"vit_{size}": numbers["embed_dim"] for size, numbers in vit.SIZES.items()}

_ONLY = {
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "init_std": 0.02,
}
"""Official constructor arguments that no recipe changes, with the only value there is here."""


def as_masks(masks: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """A list of masks, checked.

    Raises:
        ValueError: no mask, or masks of different shapes.
    """
    masks = [masks] if isinstance(masks, Tensor) else list(masks)
    shapes = {tuple(mask.shape) for mask in masks}
    if len(shapes) != 1 or masks[0].dim() != 2:
        raise ValueError(f"masks must be one or more [B, K] tensors of one shape, got {sorted(shapes)}")
    return masks


def apply_masks(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Keep some patches: [B, N, D] and masks [B, K] -> [len(masks) * B, K, D]."""
    return torch.cat([torch.take_along_dim(x, mask[..., None], dim=1) for mask in as_masks(masks)])


def repeat_interleave_batch(x: Tensor, B: int, repeat: int) -> Tensor:
    """Repeat each block of B rows: [n * B, ...] -> [n * repeat * B, ...].

    Raises:
        ValueError: the rows are no whole number of blocks.
    """
    if B < 1 or x.shape[0] % B:
        raise ValueError(f"{x.shape[0]} rows cannot be cut into blocks of B={B}")
    return x.unflatten(0, (-1, B)).repeat_interleave(repeat, dim=0).flatten(0, 1)


def _check_options(options: dict) -> dict:
    """The options without those that have one value only.

    Raises:
        ValueError: one of them has another value.
    """
    for name, only in _ONLY.items():
        if options.get(name, only) not in (only, None):
            raise ValueError(f"{name}={options[name]!r} is not supported: I-JEPA is trained with {name}={only}")
    return {name: value for name, value in options.items() if name not in _ONLY}


def _freeze_table(module: nn.Module, name: str) -> None:
    """Make a position table a frozen parameter: the official optimizer groups and checkpoints count it."""
    table = module.get_buffer(name)
    del module._buffers[name]
    module.register_parameter(name, nn.Parameter(table, requires_grad=False))


class VisionTransformer(vit.VisionTransformer):
    """The encoder of ``ijepa_fast.model.vit`` with the official constructor, call and attributes.

    Args:
        img_size: [side] of the training image in pixels, or the side, or (height, width).
        others: as in ``ijepa_fast.model.vit.VisionTransformer``. Dropout rates may be given and must be 0.

    Raises:
        ValueError: sizes that do not fit, or an option without support.
    """

    wide_residual = True  # under autocast too, sums between blocks are fp32 in the official code

    def __init__(self, img_size: int | Sequence[int] = (224,), patch_size: int = 16, **options):
        if not isinstance(img_size, int) and len(img_size) == 1:
            img_size = img_size[0]
        options.setdefault("init", "depth_scaled")
        super().__init__(img_size, patch_size, **_check_options(options))
        _freeze_table(self, "pos_embed")
        self.num_features = self.embed_dim
        self.patch_embed.num_patches = self.grid[0] * self.grid[1]
        self.patch_embed.img_size = self.grid[0] * patch_size

    def forward(self, x: Tensor, masks: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        """Images [B, C, h, w] -> [B, N, D]; with masks [len(masks) * B, K, D].

        Raises:
            ValueError: the masks are for another number of images, or of different shapes.
        """
        return super().forward(x, None if masks is None else as_masks(masks))


class VisionTransformerPredictor(vit.Predictor):
    """The predictor of ``ijepa_fast.model.vit`` with the official constructor and call.

    Args:
        num_patches: of the training image, a square number.
        others: as in ``ijepa_fast.model.vit.Predictor``. Dropout rates may be given and must be 0.

    Raises:
        ValueError: the number is no square, sizes do not fit, or an option is without support.
    """

    wide_residual = True

    def __init__(
        self,
        num_patches: int,
        embed_dim: int = 768,
        predictor_embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        **options,
    ):
        side = square_side(num_patches)
        options.setdefault("init", "depth_scaled")
        super().__init__((side, side), embed_dim, predictor_embed_dim, depth, num_heads, **_check_options(options))
        _freeze_table(self, "predictor_pos_embed")

    def forward(self, x: Tensor, masks_x: Sequence[Tensor] | Tensor, masks: Sequence[Tensor] | Tensor) -> Tensor:
        """Predict every target block from every context block.

        Args:
            x: [C * B, Kc, D], the encoder's output for ``masks_x``.
            masks_x: C context masks [B, Kc].
            masks: M target masks [B, Kt].

        Returns:
            [M * C * B, Kt, D], ordered by target, then context, then image.

        Raises:
            ValueError: features and masks do not belong together.
        """
        contexts, targets = as_masks(masks_x), as_masks(masks)
        (images, kept), blocks = contexts[0].shape, len(contexts)
        if x.shape[:2] != (blocks * images, kept) or targets[0].shape[0] != images:
            raise ValueError(
                f"features {list(x.shape)} and {len(targets)} target masks {list(targets[0].shape)} do not fit "
                f"{blocks} context masks {list(contexts[0].shape)}"
            )
        layout = predictor_layout(self._packed(contexts), self._packed(targets), blocks, len(targets))
        context_BCKD = x.unflatten(0, (blocks, images)).transpose(0, 1)
        predicted = super().forward(context_BCKD.flatten(0, 2), layout)
        predicted_BCMKD = predicted.view(images, blocks, len(targets), targets[0].shape[1], -1)
        return predicted_BCMKD.permute(2, 1, 0, 3, 4).flatten(0, 2)

    def _packed(self, masks: list[Tensor]) -> Ragged:
        """Masks [B, K] as image-major token sets."""
        images, kept = masks[0].shape
        whole = Ragged.full(images * len(masks), kept, masks[0].device)
        first = torch.arange(images, device=masks[0].device)[:, None, None] * (self.grid[0] * self.grid[1])
        indices = (torch.stack(masks, dim=1) + first).flatten().to(torch.int32)
        return Ragged(indices, whole.cu_seqlens, kept, uniform=True)


def vit_predictor(**options) -> VisionTransformerPredictor:
    """``VisionTransformerPredictor`` by its official short name."""
    return VisionTransformerPredictor(**options)


def _encoder_of(size: str) -> Callable[..., VisionTransformer]:
    def build(patch_size: int = 16, **options) -> VisionTransformer:
        return VisionTransformer(patch_size=patch_size, **vit.SIZES[size], **options)

    build.__name__ = build.__qualname__ = f"vit_{size}"
    build.__doc__ = (
        f"ViT encoder of size {size!r} of ``ijepa_fast.model.vit.SIZES``; options as in ``VisionTransformer``."
    )
    return build


ENCODERS = {f"vit_{size}": _encoder_of(size) for size in vit.SIZES}
vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_giant = ENCODERS.values()


def init_model(
    device: torch.device | str,
    patch_size: int = 16,
    model_name: str = "vit_base",
    crop_size: int = 224,
    pred_depth: int = 6,
    pred_emb_dim: int = 384,
) -> tuple[VisionTransformer, VisionTransformerPredictor]:
    """Encoder and predictor with fresh weights (std 0.02 at all depths), on a device.

    Raises:
        ValueError: no such model, or sizes that do not fit.
    """
    if model_name not in ENCODERS:
        raise ValueError(f"model_name must be one of {', '.join(ENCODERS)}, got {model_name!r}")
    encoder = ENCODERS[model_name](patch_size, img_size=[crop_size], init="flat")
    predictor = vit_predictor(
        num_patches=encoder.patch_embed.num_patches,
        embed_dim=encoder.embed_dim,
        predictor_embed_dim=pred_emb_dim,
        depth=pred_depth,
        num_heads=encoder.num_heads,
        init="flat",
    )
    return encoder.to(device), predictor.to(device)
