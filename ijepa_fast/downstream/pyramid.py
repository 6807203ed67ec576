"""A pyramid of feature maps from a plain ViT, as a backbone of torchvision's detectors.

ViTDet's simple feature pyramid (arXiv 2203.16527, section 3): all scales come from the last block. Attention is global
at all resolutions; ViTDet's windows, which save time at 1,024 px, are left out.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.model.vit import VisionTransformer


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Maps "0" to "3" at 4, 2, 1 and 1/2 times the patch grid, and "pool" at 1/4.

    torchvision reads the stride of a map off its size and takes it for a power of two. So that this is true, images
    are resized by 14/16 before they are cut into patches of 14 px, and for other sizes alike.

    Args:
        encoder: trained along, or frozen by ``encoder.requires_grad_(False)``.
        out_channels: of all maps.

    Attributes:
        strides: pixels from one place of each map to the next.
        out_channels: what torchvision asks a backbone for.

    Raises:
        ValueError: patches are too small to be cut into four.
    """

    def __init__(self, encoder: VisionTransformer, out_channels: int = 256):
        super().__init__()
        width, patch = encoder.embed_dim, encoder.patch_size
        if patch < 3:
            raise ValueError(f"a feature pyramid needs patches of at least 3 px, got {patch}")
        self.encoder, self.out_channels = encoder, out_channels
        stride = 2 ** round(math.log2(patch))
        self.strides = [stride // 4, stride // 2, stride, 2 * stride, 4 * stride]
        half, quarter = width // 2, width // 4

        def up(before: int, after: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(before, after, 2, stride=2)

        scales = [
            (nn.Sequential(up(width, half), ChannelNorm(half), nn.GELU(), up(half, quarter)), quarter),
            (up(width, half), half),
            (nn.Identity(), width),
            (nn.MaxPool2d(2), width),
        ]
        self.scales = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                ChannelNorm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                ChannelNorm(out_channels),
            )
            for scale, channels in scales
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Normalised images [B, C, h, w], whose sides are multiples of the largest stride -> maps by name."""
        grid = [side // self.strides[2] for side in images.shape[2:]]
        if self.strides[2] != self.encoder.patch_size:
            sides = [self.encoder.patch_size * cells for cells in grid]
            images = F.interpolate(images, sides, mode="bilinear", antialias=True)
        x = self.encoder(images).unflatten(1, grid).permute(0, 3, 1, 2)
        maps = OrderedDict((str(place), scale(x)) for place, scale in enumerate(self.scales))
        maps["pool"] = F.max_pool2d(maps["3"], 1, 2)
        return maps


def mask_rcnn(encoder: VisionTransformer, classes: int, size: int, out_channels: int = 256, **options) -> nn.Module:
    """torchvision's ``MaskRCNN`` on the pyramid of an encoder.

    Args:
        classes: with the background, which is class 0.
        size: images are resized until their shorter side has so many pixels, or the longer one 4/3 as many.
        out_channels: of the pyramid and of the mask head.
        options: of ``MaskRCNN``.
    """
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import AnchorGenerator

    backbone = SimpleFeaturePyramid(encoder, out_channels)
    anchors = AnchorGenerator(tuple((8 * stride,) for stride in backbone.strides), ((0.5, 1.0, 2.0),) * 5)
    model = MaskRCNN(
        backbone,
        classes,
        min_size=size,
        image_mean=encoder.patch_embed.mean,
        image_std=encoder.patch_embed.std,
        rpn_anchor_generator=anchors,
        size_divisible=backbone.strides[-1],
        **{"max_size": size * 4 // 3} | options,
    )
    # torchvision's mask head has 256 channels whatever the pyramid has.
    model.roi_heads.mask_head = MaskRCNNHeads(out_channels, (out_channels,) * 4, dilation=1)
    model.roi_heads.mask_predictor = MaskRCNNPredictor(out_channels, out_channels, classes)
    return model
