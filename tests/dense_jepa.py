"""I-JEPA once more, as slowly and plainly as the paper states it: what the packed model is tested against.

One image, one context and one target block at a time, in plain torch, from Assran et al. 2023 (arXiv 2301.08243,
section 3) and the layout of the public checkpoints. Weights come from state dicts by their official names. Nothing of
the package is used, so an error in a shared op cannot hide by being on both sides.

Legend: N patches of an image, n patches of a set, D width, H heads, Dh head dim.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LAYER_NORM_EPS = 1e-6
TARGET_NORM_EPS = 1e-5

Weights = Mapping[str, Tensor]


def position_table(height: int, width: int, dim: int) -> Tensor:
    """fp64 [height * width, dim]: the first half of the channels encodes the column, the second half the row; each
    half is all its sines, then all its cosines, of coordinate / 10000 ** (k / quarter)."""
    quarter = dim // 4
    table = torch.empty(height * width, dim, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            for half, coordinate in enumerate((column, row)):
                for k in range(quarter):
                    angle = coordinate / 10000 ** (k / quarter)
                    table[row * width + column, half * 2 * quarter + k] = math.sin(angle)
                    table[row * width + column, half * 2 * quarter + quarter + k] = math.cos(angle)
    return table


def normalized(images: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 3, h, w]: uint8 images scaled to [0, 1] and normalised with ImageNet statistics; floats as they are."""
    if images.dtype != torch.uint8:
        return images.to(dtype)
    mean = torch.tensor(IMAGENET_MEAN, dtype=dtype).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, dtype=dtype).view(1, 3, 1, 1)
    return (images.to(dtype) / 255 - mean) / std


def _linear(weights: Weights, name: str, x_nD: Tensor) -> Tensor:
    y = x_nD @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def _layer_norm(x_nD: Tensor, eps: float) -> Tensor:
    centred = x_nD - x_nD.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)


def _norm(weights: Weights, name: str, x_nD: Tensor) -> Tensor:
    return _layer_norm(x_nD, LAYER_NORM_EPS) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attention(weights: Weights, name: str, x_nD: Tensor, num_heads: int) -> Tensor:
    q_nD, k_nD, v_nD = _linear(weights, f"{name}.qkv", x_nD).chunk(3, dim=-1)
    dim = x_nD.shape[1] // num_heads
    heads = []
    for head in range(num_heads):
        cut = slice(head * dim, (head + 1) * dim)
        scores_nn = q_nD[:, cut] @ k_nD[:, cut].T / math.sqrt(dim)
        heads.append(torch.softmax(scores_nn, dim=-1) @ v_nD[:, cut])
    return _linear(weights, f"{name}.proj", torch.cat(heads, dim=1))


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _blocks(weights: Weights, prefix: str, x_nD: Tensor, num_heads: int) -> list[Tensor]:
    """The residual stream after every pre-norm block."""
    stream = []
    while f"{prefix}.{len(stream)}.norm1.weight" in weights:
        name = f"{prefix}.{len(stream)}"
        x_nD = x_nD + _attention(weights, f"{name}.attn", _norm(weights, f"{name}.norm1", x_nD), num_heads)
        hidden = _gelu(_linear(weights, f"{name}.mlp.fc1", _norm(weights, f"{name}.norm2", x_nD)))
        x_nD = x_nD + _linear(weights, f"{name}.mlp.fc2", hidden)
        stream.append(x_nD)
    return stream


def patch_features(weights: Weights, images: Tensor) -> Tensor:
    """[B, N, D]: patch embedding of whole images by a strided convolution, positions added."""
    weight = weights["patch_embed.proj.weight"]
    x = F.conv2d(normalized(images, weight.dtype), weight, weights["patch_embed.proj.bias"], stride=weight.shape[-1])
    return x.flatten(2).transpose(1, 2) + weights["pos_embed"]


def encode(weights: Weights, images: Tensor, patches: Sequence[Sequence[int]], num_heads: int) -> list[Tensor]:
    """One [n, D] per image: the encoder on the patches of that image which `patches` names."""
    x_BND = patch_features(weights, images)
    return [_encode_tokens(weights, x_ND[list(rows)], num_heads) for x_ND, rows in zip(x_BND, patches, strict=True)]


def encode_layers(weights: Weights, image: Tensor, num_heads: int) -> list[Tensor]:
    """For one image [3, h, w]: [N, D] after every block, each through the encoder's final norm."""
    (x_ND,) = patch_features(weights, image[None])
    return [_norm(weights, "norm", stream_ND) for stream_ND in _blocks(weights, "blocks", x_ND, num_heads)]


def _encode_tokens(weights: Weights, x_nD: Tensor, num_heads: int) -> Tensor:
    return _norm(weights, "norm", _blocks(weights, "blocks", x_nD, num_heads)[-1])


def predict(weights: Weights, context_nD: Tensor, context: Sequence[int], block: Sequence[int], num_heads: int):
    """[len(block), D]: the predictor on one context (its encoded tokens and their patches) and one target block."""
    positions_ND = weights["predictor_pos_embed"][0]
    seen = _linear(weights, "predictor_embed", context_nD) + positions_ND[list(context)]
    asked = weights["mask_token"][0] + positions_ND[list(block)]
    x = _blocks(weights, "predictor_blocks", torch.cat([seen, asked]), num_heads)[-1]
    x = _norm(weights, "predictor_norm", x)
    return _linear(weights, "predictor_proj", x)[len(context) :]


def elementwise_loss(difference: Tensor, kind: str) -> Tensor:
    size = difference.abs()
    if kind == "l1":
        return size
    if kind == "l2":
        return size.square()
    return torch.where(size < 1, size.square() / 2, size - 0.5)


def variance_term(pooled_BD: Tensor, target_std: float, eps: float) -> Tensor:
    """VICReg (arXiv 2105.04906, eq. 1): hinge on the standard deviation over the batch, mean over the features."""
    std = torch.sqrt((pooled_BD - pooled_BD.mean(0)).square().sum(0) / (len(pooled_BD) - 1) + eps)
    return torch.clamp(target_std - std, min=0).mean()


def covariance_term(pooled_BD: Tensor) -> Tensor:
    """VICReg (arXiv 2105.04906, eq. 3-4): squared off-diagonal covariances, summed and divided by the width."""
    total = pooled_BD.new_zeros(())
    centred = pooled_BD - pooled_BD.mean(0)
    covariance = centred.T @ centred / (len(pooled_BD) - 1)
    for i in range(len(covariance)):
        for j in range(len(covariance)):
            if i != j:
                total = total + covariance[i, j] ** 2
    return total / len(covariance)


class DenseJEPA:
    """The objective of one batch, with gradients to the weights of context encoder and predictor.

    `contexts[b]` lists the contexts of image b and `targets[b]` its target blocks, each a list of patch numbers in
    [0, N). Every context predicts every block of its image.
    """

    def __init__(
        self,
        encoder: Weights,
        target_encoder: Weights,
        predictor: Weights,
        num_heads: int,
        kind: str = "smooth_l1",
        normalize_targets: bool = True,
    ):
        self.encoder, self.predictor = _leaves(encoder), _leaves(predictor)
        self.target_encoder = {name: value.detach() for name, value in target_encoder.items()}
        self.num_heads, self.kind, self.normalize_targets = num_heads, kind, normalize_targets

    def context_features(self, images: Tensor, contexts) -> list[list[Tensor]]:
        x_BND = patch_features(self.encoder, images)
        return [
            [_encode_tokens(self.encoder, x_ND[list(context)], self.num_heads) for context in of_image]
            for x_ND, of_image in zip(x_BND, contexts, strict=True)
        ]

    def target_features(self, images: Tensor) -> Tensor:
        """[B, N, D]: what the target encoder makes of whole images, not yet normalised."""
        everything = [range(self.target_encoder["pos_embed"].shape[1])] * len(images)
        with torch.no_grad():
            return torch.stack(encode(self.target_encoder, images, everything, self.num_heads))

    def predictions(self, images: Tensor, contexts, targets) -> list[list[list[Tensor]]]:
        """[image][context][block] of [len(block), D]."""
        features = self.context_features(images, contexts)
        return [
            [
                [predict(self.predictor, x_nD, context, block, self.num_heads) for block in blocks]
                for x_nD, context in zip(of_image, of_image_patches, strict=True)
            ]
            for of_image, of_image_patches, blocks in zip(features, contexts, targets, strict=True)
        ]

    def prediction_loss(self, images: Tensor, contexts, targets) -> Tensor:
        """Mean over features, then over the rows of a block, then over all blocks."""
        wanted_BND = self.target_features(images)
        losses = []
        for image, of_image in enumerate(self.predictions(images, contexts, targets)):
            for of_context in of_image:
                for block, predicted in zip(targets[image], of_context, strict=True):
                    wanted = wanted_BND[image, list(block)]
                    if self.normalize_targets:
                        wanted = _layer_norm(wanted, TARGET_NORM_EPS)
                    losses.append(elementwise_loss(predicted - wanted, self.kind).mean(dim=1).mean())
        return torch.stack(losses).mean()

    def pooled_context(self, images: Tensor, contexts) -> Tensor:
        """[B, D]: mean over the tokens of all contexts of an image."""
        return torch.stack([torch.cat(of_image).mean(0) for of_image in self.context_features(images, contexts)])

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Gradient of every trained parameter, named "encoder.<name>" and "predictor.<name>"; zero where unused."""
        leaves = {f"encoder.{name}": leaf for name, leaf in self.encoder.items() if leaf.requires_grad}
        leaves |= {f"predictor.{name}": leaf for name, leaf in self.predictor.items() if leaf.requires_grad}
        values = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if value is None else value
            for (name, leaf), value in zip(leaves.items(), values, strict=True)
        }


def randomize_(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter values that matter: zero biases, unit norms and tiny weights hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(noise / fan_in**0.5 + (parameter if parameter.dim() == 1 else 0))


def _leaves(weights: Weights) -> dict[str, Tensor]:
    """Fresh leaves that ask for gradients, except the fixed position tables."""
    return {name: value.detach().clone().requires_grad_("pos_embed" not in name) for name, value in weights.items()}
