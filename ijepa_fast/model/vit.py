"""Vision transformer encoder and I-JEPA predictor over packed token sets.

Legend: B images, N patches per image, T packed rows, D width, H heads, S sequences.

Parameter names are those of the official checkpoints (and timm's), so that ``load_state_dict`` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast import ops
from ijepa_fast.model.blocks import Block, BlockStack, Init, LayerNorm, Linear, init_normal
from ijepa_fast.model.predictor_layout import PredictorLayout
from ijepa_fast.ragged import Ragged

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144 / 1408},
}
"""Encoder sizes of the paper and its code; ``VisionTransformer(patch_size=14, **SIZES["huge"])`` is ViT-H/14."""

PIXEL_CORRELATION, WHITENING_EPS = 0.95, 0.01

PREDICTOR_DEPTH = {"tiny": 6, "small": 6, "base": 6, "large": 12, "huge": 12, "giant": 16}


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine position table, fp32 [H * W, dim].

    The first half of the channels encodes the column, the second half the row; within a half the sines come before
    the cosines, at frequencies ``10000 ** (-i / (dim / 4))`` (arXiv 2104.02057, section 4.3, in the channel order of
    the official I-JEPA weights).

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"2-D sine-cosine positions need a width that is a multiple of 4, got {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    halves = []
    for coordinate in (column, row):
        angle = coordinate.flatten().double()[:, None] * frequency
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()


def resize_positions(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Bicubic interpolation of a position table [N, D] from one patch grid to another; [N', D]."""
    if grid == new_grid:
        return table
    image = table.float().view(1, *grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, new_grid, mode="bicubic", align_corners=False)
    return image.flatten(2)[0].T.to(table.dtype).contiguous()


class PatchEmbed(nn.Module):
    """Linear embedding of image patches; only the wanted patches are read."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.patch_size = patch_size
        self.mean, self.std = list(mean), list(std)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor, indices: Tensor, colors: Tensor | None = None) -> Tensor:
        """images [B, C, h, w] (uint8 and uint16: normalised here; float: taken as normalised), int32 [T] -> [T, D].

        colors [T, 2, C]: a factor and a shift for the normalised pixels of each patch.
        """
        weight = self.proj.weight
        patches = self.pixels(images, indices, weight.dtype)
        if colors is not None:
            gain, shift = colors.to(patches.dtype)[..., None].unbind(1)
            pixels = patches[:, : weight[0].numel()].unflatten(1, (weight.shape[1], -1))
            changed = (pixels * gain + shift).flatten(1)
            patches = F.pad(changed, (0, patches.shape[1] - changed.shape[1]))
        weight = F.pad(weight.flatten(1), (0, patches.shape[1] - weight[0].numel()))
        return F.linear(patches, weight, self.proj.bias.to(weight.dtype))

    def pixels(self, images: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalised pixel values of the patches [T, K]; K = C * p * p rounded up, see ``ops.gather_patches``."""
        mean, std = ([], []) if images.is_floating_point() else (self.mean, self.std)
        if images.dtype == torch.uint16:
            images = images.float() / torch.iinfo(torch.uint16).max
        return ops.gather_patches(images, indices, self.patch_size, mean, std, dtype)

    @torch.no_grad()
    def whiten(self) -> None:
        """Random weights after a whitening of the pixels, so that fine detail counts as much as the mean colour.

        Neighbouring pixels of photographs are so alike that random projections of them are nearly all of one colour.
        Their covariance is taken as 0.95 ** (horizontal + vertical distance), the first-order Markov field that the
        cosine transform of JPEG stands on, times 0.95 ** (distance in the order of channels). Outputs have a standard
        deviation of 0.6, that of the positions being 0.7. No image is needed.
        """
        at = torch.arange(max(self.patch_size, self.proj.in_channels), dtype=torch.float64)
        alike = PIXEL_CORRELATION ** (at[:, None] - at).abs()
        side, channels = alike[: self.patch_size, : self.patch_size], self.proj.in_channels
        covariance = torch.kron(alike[:channels, :channels].contiguous(), torch.kron(side, side))
        variances, directions = torch.linalg.eigh(covariance)
        whitening = directions * (variances + WHITENING_EPS).rsqrt() @ directions.T
        weight = torch.randn(self.proj.out_channels, len(covariance)).double() @ whitening
        weight *= 0.6 / (weight @ covariance * weight).sum(1).mean().sqrt()
        self.proj.weight.copy_(weight.view_as(self.proj.weight))


class VisionTransformer(BlockStack):
    """ViT encoder without class token, with fixed 2-D sine-cosine positions (arXiv 2301.08243, appendix A).

    Args:
        img_size: side of the square training image in pixels, or (height, width).
        patch_size: pixels; must divide both sides.
        in_chans: channels of the images.
        embed_dim: D, a multiple of 4.
        depth: number of blocks.
        num_heads: H; must divide D.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: whether the query, key and value projections have a bias.
        init: "flat", "depth_scaled" or "whitened", see ``BlockStack._initialise``.
        mean, std: per channel, in units of [0, 1] images; used for uint8 and uint16 images.
        attention: backend of ``ijepa_fast.attention.dispatch``.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: sizes that do not divide, with the numbers.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init: Init = "flat",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        attention: str = "auto",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self._check(embed_dim, depth, num_heads, mlp_ratio, init, attention)
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"patch_size must be at least 1 pixel, one number for square patches, got {patch_size}")
        if len(mean) != in_chans or len(std) != in_chans:
            raise ValueError(f"mean and std need {in_chans} values, got {list(mean)} and {list(std)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be positive, got {list(std)}")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_size, self.embed_dim, self.num_heads = patch_size, embed_dim, num_heads
        self.in_chans = in_chans
        self.grid = self.grid_of(height, width)
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, mean, std)
        self.register_buffer("pos_embed", sincos_positions(embed_dim, self.grid)[None])
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, attention) for _ in range(depth))
        self.norm = LayerNorm(embed_dim)
        self._initialise(self.blocks, init)
        if init == "whitened":
            self.patch_embed.whiten()

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of an image. Raises ValueError if the patch size does not divide its sides."""
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} px cannot be cut into patches of {self.patch_size} px")
        return height // self.patch_size, width // self.patch_size

    def forward(
        self,
        images: Tensor,
        tokens: Ragged | Sequence[Tensor] | Tensor | None = None,
        queries: Ragged | None = None,
        colors: Tensor | None = None,
    ) -> Tensor:
        """Features of patches.

        Args:
            images: [B, C, h, w]; uint8 (of 255) and uint16 (of 65535) are normalised here, float is taken as
                normalised. Sides other than ``img_size`` interpolate the positions.
            tokens: which patches the encoder sees. None: all of them. A ``Ragged`` of token indices: packed sets. A
                list of int64 [B, K] (or one such tensor): the official layout.
            queries: rows of the packed input whose features are wanted; the last block computes no others.
            colors: fp32 [S, 2, C]; each of the S sequences of tokens sees its normalised pixels times the first, plus
                the second, channel by channel.

        Returns:
            None: [B, N, D]. Ragged: [T, D], zeros on padding rows. Official layout: [len(tokens) * B, K, D].
            With ``queries``: [len(queries.indices), D].
        """
        grid = self._grid_of_images(images)
        # Whatever is asked for becomes one packed batch: the patches of all sets behind one another, without padding
        # between them, so that no product is spent on patches that are masked out.
        packed = self._token_sets(tokens, images, grid[0] * grid[1])
        if queries is not None and queries.num_sequences != packed.num_sequences:
            raise ValueError(
                f"queries have {queries.num_sequences} sequences and tokens {packed.num_sequences} sequences"
            )
        x = self._embed(images, packed, grid, colors)
        x = self._features(self.run_blocks(self.blocks, x, packed, queries))
        # Rows that were added to reach a round number hold something, and must not leak into means and losses.
        if queries is not None:
            return x.masked_fill((queries.indices < 0)[:, None], 0)
        if isinstance(tokens, Ragged):
            return x if packed.uniform else x.masked_fill(~packed.valid[:, None], 0)
        return x.unflatten(0, (packed.num_sequences, packed.max_seqlen))

    def _grid_of_images(self, images: Tensor) -> tuple[int, int]:
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be [B, {self.in_chans}, h, w], got {list(images.shape)}")
        if images.dtype not in (torch.uint8, torch.uint16) and not images.is_floating_point():
            raise ValueError(f"images must be uint8, uint16 or normalised float, got {images.dtype}")
        return self.grid_of(*images.shape[2:])

    def _embed(self, images: Tensor, tokens: Ragged, grid: tuple[int, int], colors: Tensor | None = None) -> Tensor:
        positions = resize_positions(self.pos_embed[0], self.grid, grid)
        if colors is not None:  # of a row by that of its sequence; rows of no token are cleared below
            colors = colors[tokens.sequence_ids().clamp(max=len(colors) - 1)]
        patches = self.widened(self.patch_embed(images, tokens.indices, colors))
        return ops.gather_add(patches, positions, tokens.indices)

    def _features(self, x: Tensor) -> Tensor:
        """The final norm, in the dtype of the weights whatever that of the sums."""
        return self.norm(x).to(self.patch_embed.proj.weight.dtype) if self.wide_residual else self.norm(x)

    @staticmethod
    def _token_sets(tokens, images: Tensor, num_patches: int) -> Ragged:
        if tokens is None:
            return Ragged.full(images.shape[0], num_patches, images.device)
        if isinstance(tokens, Ragged):
            return tokens
        masks = [tokens] if isinstance(tokens, Tensor) else tokens
        packed = Ragged.from_masks(masks, num_patches)
        if masks[0].shape[0] != images.shape[0]:
            raise ValueError(f"masks are for {masks[0].shape[0]} images, but there are {images.shape[0]}")
        if not packed.uniform:
            raise ValueError("masks of one call must all keep the same number of patches; pass a Ragged instead")
        return packed

    def intermediate_layers(self, images: Tensor, n: int = 4) -> list[Tensor]:
        """Outputs of the last ``n`` blocks, each [B, N, D] through the final norm; the last one is ``self(images)``.

        Raises:
            ValueError: n is not between 1 and the depth.
        """
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n must be between 1 and the depth {len(self.blocks)}, got {n}")
        grid = self._grid_of_images(images)
        tokens = Ragged.full(images.shape[0], grid[0] * grid[1], images.device)
        x = self._embed(images, tokens, grid)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x, tokens)
            if i >= len(self.blocks) - n:
                outputs.append(self._features(x).unflatten(0, (images.shape[0], -1)))
        return outputs


class Predictor(BlockStack):
    """Narrow ViT that predicts target features from context features and positions (arXiv 2301.08243, section 3).

    Args:
        grid: patch rows and columns of the training image.
        embed_dim: D, the encoder's width.
        predictor_embed_dim: Dp, a multiple of 4.
        depth, num_heads, mlp_ratio, qkv_bias, init, attention, activation_checkpointing: as in the encoder.
        target_dim: width of what is predicted; None for the encoder's.
        projector_dim: width of a ``Projector`` beside the blocks, which is trained with them; None for none.
    """

    def __init__(
        self,
        grid: tuple[int, int] = (14, 14),
        embed_dim: int = 768,
        predictor_embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init: Init = "flat",
        attention: str = "auto",
        activation_checkpointing: bool = False,
        target_dim: int | None = None,
        projector_dim: int | None = None,
    ):
        super().__init__()
        self._check(predictor_embed_dim, depth, num_heads, mlp_ratio, init, attention)
        self.grid = tuple(grid)
        self.activation_checkpointing = activation_checkpointing
        self.predictor_embed = Linear(embed_dim, predictor_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_embed_dim))
        self.register_buffer("predictor_pos_embed", sincos_positions(predictor_embed_dim, self.grid)[None])
        self.predictor_blocks = nn.ModuleList(
            Block(predictor_embed_dim, num_heads, mlp_ratio, qkv_bias, attention) for _ in range(depth)
        )
        self.predictor_norm = LayerNorm(predictor_embed_dim)
        self.predictor_proj = Linear(predictor_embed_dim, embed_dim if target_dim is None else target_dim)
        self._initialise(self.predictor_blocks, init)
        init_normal(self.mask_token)
        # Last, so that the other weights are those of a predictor without it.
        self.projector = None if projector_dim is None else Projector(embed_dim, projector_dim)

    def forward(self, context: Tensor, layout: PredictorLayout, grid: tuple[int, int] | None = None) -> Tensor:
        """Predicted features of every target token.

        Args:
            context: [Tc, D], the context encoder's packed output.
            layout: from ``predictor_layout(context_tokens, target_tokens, C, M)``.
            grid: patch grid of these images, if it is not the training grid.

        Returns:
            [T, target_dim], rows as in ``layout.predicted``; zeros on padding rows.
        """
        positions = resize_positions(self.predictor_pos_embed[0], self.grid, grid or self.grid)
        # One sequence for each pair of a context and a target block: the context's rows, then a mask token with the
        # position of each patch to be predicted. A context row is copied before each of its image's target blocks.
        x, mask_token = self.widened(self.predictor_embed(context)), self.mask_token.flatten()
        x = ops.predictor_tokens(x, mask_token, positions, layout.tokens.indices, layout.sources, layout.copies)
        # Only mask tokens are predicted from, so the last block computes no other rows.
        x = self.run_blocks(self.predictor_blocks, x, layout.tokens, layout.predicted)
        x = self.predictor_proj(self.predictor_norm(x))
        return x if layout.predicted.uniform else x.masked_fill(~layout.predicted.valid[:, None], 0)


class Projector(nn.Module):
    """Pooled features, widened for VICReg's terms: linear, batch norm, ReLU, linear.

    As in arXiv 2105.04906, section 4.2, with two layers instead of three. The terms shape its output, so that the
    features before it need not give up what they know.

    Args:
        embed_dim: D.
        projector_dim: P, of both layers.
    """

    def __init__(self, embed_dim: int, projector_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, projector_dim)
        self.norm = nn.BatchNorm1d(projector_dim, track_running_stats=False)  # it is never used outside of training
        self.fc2 = nn.Linear(projector_dim, projector_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, D] -> [n, P], in the dtype of the features, with the statistics of these n rows."""
        return self.fc2(F.relu(self.norm(self.fc1(features))))


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear and patch projections to ``dtype``, in place.

    Norms, biases, the mask token and the position tables stay as they are: they are small, and their precision is
    felt (arXiv 2301.08243's code trains them under autocast, in fp32). So does a ``Projector``, which has few rows and
    whose covariances are sums of small numbers.
    """
    kept = {child for part in module.modules() if isinstance(part, Projector) for child in part.modules()}
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)) and child not in kept:
            child.weight.data = child.weight.data.to(dtype)
