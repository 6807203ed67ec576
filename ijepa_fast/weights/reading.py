"""Weights from elsewhere: reading files without running code, and loading with checks, for all formats alike.

Nothing is copied into a module before every name and shape has been checked, so that a failure leaves it as it was.
"""

from __future__ import annotations

import difflib
import json
import math
import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ijepa_fast.model.vit import SIZES, VisionTransformer, resize_positions

LISTED = 8
"""Number of names of each kind that an error message lists."""

POSITION_TABLES = ("pos_embed", "predictor_pos_embed")
"""Names of position tables, without those of the modules they are in."""
LAYER_NORM_EPS = 1e-6
"""Eps of the layer norms of every run, of the official code, and of networks that are not told otherwise.
transformers writes another default into its configs."""
_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile give to the names of a module."""


class WeightsError(ValueError):
    """A file of weights is damaged, refused, or does not fit the model; the model is as it was."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of an encoder, read off its weights. The number of attention heads leaves no trace in them.

    Attributes:
        embed_dim, depth, patch_size, in_chans: as in ``VisionTransformer``.
        hidden: width inside the MLPs.
        num_patches: rows of the position table.
    """

    embed_dim: int
    depth: int
    patch_size: int
    in_chans: int
    hidden: int
    num_patches: int

    def __str__(self) -> str:
        patches = f"{self.num_patches} patches of {self.patch_size} px"
        return f"width {self.embed_dim}, {self.depth} blocks, MLP width {self.hidden}, {patches}"

    @property
    def num_heads(self) -> int:
        """Heads of the known size (``vit.SIZES``) with this width and depth.

        Raises:
            WeightsError: there is none.
        """
        for size in SIZES.values():
            if (size["embed_dim"], size["depth"]) == (self.embed_dim, self.depth):
                return size["num_heads"]
        raise WeightsError(
            f"weights do not tell the number of attention heads, and {self} is none of the known sizes: give num_heads"
        )

    @property
    def img_size(self) -> int:
        """Side of the square training image in pixels. Raises WeightsError if the patches form no square."""
        return square_side(self.num_patches) * self.patch_size


def square_side(num_patches: int) -> int:
    """Rows of a square grid. Raises WeightsError if the number is no square."""
    side = math.isqrt(num_patches)
    if num_patches < 1 or side * side != num_patches:
        raise WeightsError(f"{num_patches} patches do not form a square grid")
    return side


def architecture(state: Mapping[str, Tensor]) -> Architecture:
    """The sizes of an encoder, from its weights under their official names.

    Raises:
        WeightsError: these are not the weights of such an encoder.
    """
    needed = ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if absent := [name for name in needed if name not in state]:
        raise WeightsError(f"not the weights of a ViT encoder: no {', '.join(absent)} among {_listed(state) or 'none'}")
    dims = {name: state[name].dim() for name in needed}
    if list(dims.values()) != [3, 4, 2]:
        raise WeightsError(f"not the weights of a ViT encoder with square patches: their dimensions are {dims}")
    embed_dim, in_chans, patch_size = state["patch_embed.proj.weight"].shape[:3]
    depth = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    hidden, num_patches = state["blocks.0.mlp.fc1.weight"].shape[0], state["pos_embed"].shape[1]
    return Architecture(embed_dim, depth, patch_size, in_chans, hidden, num_patches)


def read_pickle(path: Path | str) -> object:
    """Contents of a file written by ``torch.save``, on the CPU. Only tensors and plain values are read.

    Raises:
        WeightsError: the file is damaged, or refused because it asks for code to be run.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if asked := re.search(r"GLOBAL (\w[\w.]*)|unrecognized function (.+)", str(error)):
                raise WeightsError(
                    f"{path} is refused: loading it would run code ({asked[1] or asked[2]}), and weights need none. "
                    "Ask whoever wrote it for the tensors alone (torch.save of a state_dict, or safetensors)"
                ) from None
            raise WeightsError(f"{path} is damaged or not a file of weights") from error
        except Exception as error:  # whatever an unpickler meets in bytes that are no pickle
            raise WeightsError(f"{path} is damaged or not a file of weights: {error}") from error


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        WeightsError: the file is damaged.
        OSError: it cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: {error}") from error


def description_in(metadata: Mapping[str, str], key: str, entries: Iterable[str], path: Path | str) -> dict:
    """The JSON object that a file's metadata holds under ``key``, with at least these entries.

    Raises:
        WeightsError: there is none, it is not a JSON object, or an entry is missing.
    """
    if key not in metadata:
        raise WeightsError(f"{path} was not written by ijepa_fast: its metadata have no {key!r}")
    try:
        described = json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} is damaged: its metadata {key!r} are not JSON ({error})") from error
    missing = [name for name in entries if not isinstance(described, dict) or name not in described]
    if missing:
        raise WeightsError(f"{path} is damaged: its metadata {key!r} do not say {', '.join(missing)}")
    return described


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their names without the prefixes of DistributedDataParallel and torch.compile.

    Raises:
        WeightsError: something in it is no tensor.
    """
    plain = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"a state dict maps names to tensors, but {name!r} is {type(value).__name__}")
        while name.startswith(_WRAPPERS):
            name = name[len(next(prefix for prefix in _WRAPPERS if name.startswith(prefix))) :]
        plain[name] = value
    return plain


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while inner := getattr(module, "module", None) or getattr(module, "_orig_mod", None):
        module = inner
    return module


def encoder_in(module: nn.Module) -> VisionTransformer:
    """The encoder inside DistributedDataParallel and torch.compile. Raises ValueError for any other module."""
    encoder = unwrapped(module)
    if not isinstance(encoder, VisionTransformer):
        parts = [name for name, part in encoder.named_children() if isinstance(part, VisionTransformer)]
        hint = f": give its {' or its '.join(parts)}" if parts else ""
        raise ValueError(f"an encoder (VisionTransformer) is needed, got {type(encoder).__name__}{hint}")
    return encoder


def layer_norm_eps(encoder: VisionTransformer) -> float:
    """The eps of all its layer norms. Raises ValueError if they have several, for which no format has a place."""
    found = {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)}
    if len(found) > 1:
        raise ValueError(f"the layer norms of an encoder must have one eps, got {sorted(found)}")
    return found.pop()


def set_layer_norm_eps(encoder: VisionTransformer, eps: float) -> None:
    """Give all its layer norms this eps."""
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def interpolate_positions(state: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Weights with their (square) position tables interpolated to another patch grid, bicubically.

    Raises:
        WeightsError: the tables are not those of a square grid.
    """
    resized = dict(state)
    for name, value in state.items():
        if _is_position_table(name):
            side = square_side(value.shape[1])
            resized[name] = resize_positions(value[0], (side, side), grid)[None]
    return resized


def _is_position_table(name: str) -> bool:
    return name.rpartition(".")[2] in POSITION_TABLES


def check_fit(module: nn.Module, state: Mapping[str, Tensor], source: str = "the state dict") -> dict[str, Tensor]:
    """The weights under the names of ``unwrapped(module)``, all of them and no others.

    Raises:
        WeightsError: names are missing or unexpected (they are listed, with the nearest ones), shapes differ, or it
            is the network of another architecture; ``source`` says in the message where the weights are from.
    """
    module, state = unwrapped(module), plain_names(state)
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    other = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if not (missing or unexpected or other):
        return state
    lines = [f"{source} does not fit this {type(module).__name__}, which is left as it was:"]
    lines += _other_architecture(wanted, state)
    if other and not missing and not unexpected and all(map(_is_position_table, other)):
        there, here = state[other[0]].shape[1], wanted[other[0]].shape[1]
        lines.append(
            f"it was trained on {there} patches per image and the model is built for {here}. Build the model with the "
            "img_size of the weights: images of other sizes then have their positions interpolated in each call. Or "
            "interpolate once: load_weights(model, interpolate_positions(state, grid)), with grid = model.grid or "
            "model.context_encoder.grid"
        )
    else:
        if missing:
            lines.append(f"{len(missing)} missing: {_with_nearest(missing, unexpected)}")
        if unexpected:
            lines.append(f"{len(unexpected)} unexpected: {_with_nearest(unexpected, missing or list(wanted))}")
        if other:
            shapes = [f"{name} {list(state[name].shape)} instead of {list(wanted[name].shape)}" for name in other]
            lines.append(f"{len(other)} of another shape: {_listed(shapes)}")
    raise WeightsError("\n  ".join(lines))


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str = "the state dict") -> None:
    """Load all weights of a module, or none. Prefixes of wrappers do not matter on either side.

    Raises:
        WeightsError: as ``check_fit``.
    """
    fitting = check_fit(module, state, source)
    unwrapped(module).load_state_dict(fitting)


def _other_architecture(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    try:
        here, there = architecture(wanted), architecture(state)
    except WeightsError:
        return []
    return [f"it has {there}; the model has {here}"] if here != there else []


def _listed(names: Collection[str]) -> str:
    names = list(names)
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _with_nearest(names: list[str], candidates: list[str]) -> str:
    described = []
    for name in names[:LISTED]:
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
        described.append(f"{name} (nearest: {near[0]})" if near else name)
    rest = len(names) - LISTED
    return ", ".join(described) + (f" and {rest} more" if rest > 0 else "")
