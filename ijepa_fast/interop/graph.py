"""An encoder as a graph of plain torch operations: files of ``torch.export`` and ONNX."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.model.vit import VisionTransformer, resize_positions
from ijepa_fast.run.files import write_whole

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
ONE_FILE = 1 << 30
"""Bytes of weights up to which an ONNX file holds them itself; the format cannot hold 2 GiB."""


class DenseEncoder(nn.Module):
    """The encoder on whole images of one size: what exporters understand, where packed sets are custom operators.

    Args:
        encoder: whose weights are used, not copied.
        grid: patch rows and columns, to which the positions are interpolated.
    """

    def __init__(self, encoder: VisionTransformer, grid: tuple[int, int]):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("positions", resize_positions(encoder.pos_embed[0], encoder.grid, grid)[None])

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float [B, C, h, w] -> features [B, N, D]."""
        encoder = self.encoder
        x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.positions
        for block in encoder.blocks:
            attention, mlp = block.attn, block.mlp
            qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            x = x + attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + mlp.fc2(F.gelu(mlp.fc1(block.norm2(x))))
        return encoder.norm(x)


def save_graph(
    encoder: VisionTransformer,
    to: str,
    out: Path,
    image_size: tuple[int, int] | None = None,
    batch: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> str:
    """Write the graph of an fp32 encoder on the CPU; how to run it, in words.

    Args:
        to: "torch", a program of ``torch.export``, or "onnx", which needs the package onnxscript.
        image_size: height and width of the images; by default those the encoder was trained on.
        batch: number of images of every call; None for any.
        value_range: values of images that are 0 and 1 to the encoder, where their type does not say so.

    Raises:
        ValueError: a batch below 1, a file of another suffix, or sides that cannot be cut into patches.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if out.suffix != SUFFIXES[to]:
        raise ValueError(f"files of {to} end in {SUFFIXES[to]}, got {out}")
    grid = encoder.grid if image_size is None else encoder.grid_of(*image_size)
    sides = [side * encoder.patch_size for side in grid]
    images = torch.zeros(batch or 2, encoder.in_chans, *sides)
    dynamic = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    about = {"mean": encoder.patch_embed.mean, "std": encoder.patch_embed.std, "image_size": sides}
    scaled = "in [0, 1]"
    if value_range is not None:
        about["value_range"] = list(value_range)
        scaled = f"of {value_range[0]:g} to {value_range[1]:g} taken to [0, 1],"
    module = DenseEncoder(encoder, grid).eval()
    with torch.no_grad():
        program = torch.export.export(module, (images,), dynamic_shapes=dynamic)
        if to == "torch":
            write_whole(out, lambda file: _save_program(program, file, about))
            use = f'torch.export.load("{out}").module()(images)'
        else:
            _save_onnx(program, out, about)
            use = f'onnxruntime.InferenceSession("{out}").run(None, {{"images": images}})[0]'
    shape = f"[{batch or 'B'}, {encoder.in_chans}, {sides[0]}, {sides[1]}]"
    return f"{use}\nimages: float {shape}, values {scaled} less mean {about['mean']}, by std {about['std']}"


def _save_program(program: torch.export.ExportedProgram, file: Path, about: dict) -> None:
    with file.open("wb") as opened:  # torch warns of paths with another suffix
        torch.export.save(program, opened, extra_files={"ijepa_fast.json": json.dumps(about)})


def _save_onnx(program: torch.export.ExportedProgram, out: Path, about: dict) -> None:
    import onnxscript  # noqa: F401, torch's own message would not name what to install

    converted = torch.onnx.export(
        program, input_names=["images"], output_names=["features"], dynamo=True, verbose=False
    )
    converted.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    large = sum(value.nbytes for value in program.state_dict.values()) > ONE_FILE
    if large:  # weights go to a second file, which the first one names
        converted.save(out, external_data=True)
    else:
        write_whole(out, lambda file: converted.save(file, external_data=False))
