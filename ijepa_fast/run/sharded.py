"""Checkpoints in shards: a folder with one safetensors file for each rank that wrote, and about.json beside them.

torch.distributed.checkpoint writes and reads them. The header of each file says where its shards lie in the whole
tensors, so any number of ranks can read them, each its own share; about.json knows the checksums of the files. Nothing
is ever pickled.

The folder gets its name when all files in it are whole and on the disk; until then it is called NAME.partial.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_fast.run.files import flush, write_json

FORMAT = "ijepa_fast-sharded-1"
ABOUT = "about.json"


def _writer(folder: Path, about: dict, finished: Callable[[], object]):
    """Writes into FOLDER.partial. The first rank, when all have written, adds about.json and gives it its name."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    temporary = folder.with_name(folder.name + ".partial")

    class Writer(HuggingFaceStorageWriter):
        def write_data(self, plan, planner) -> torch.futures.Future:
            written, results = super().write_data(plan, planner).wait(), torch.futures.Future()
            sums = {name: _checksum(temporary / name) for name in {of.storage_data.relative_path for of in written}}
            named = [(of, of.storage_data.relative_path) for of in written]
            results.set_result([replace(of, storage_data=(name, sums[name])) for of, name in named])
            return results

        def finish(self, metadata, results) -> None:
            sums = dict(sorted({result.storage_data for of_rank in results for result in of_rank}))
            if missing := [name for name in sums if not (temporary / name).exists()]:
                raise OSError(
                    f"{missing[0]} was written, but the first rank does not see it; all hosts must share the folder"
                )
            for entry in temporary.iterdir():
                if entry.name not in sums:  # of a save by more ranks that was cut off
                    entry.unlink()
            sizes = {name: (temporary / name).stat().st_size for name in sums}
            write_json(temporary / ABOUT, {"format": FORMAT, "files": sizes, "sha256": sums, **about})
            flush(temporary)
            if is_whole(folder):  # of the same step of the same run
                shutil.rmtree(temporary)
            else:
                if folder.exists():
                    remove(folder)
                os.replace(temporary, folder)
                flush(folder.parent)
            finished()

    return Writer(str(temporary), save_distributed=True)


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    about: dict,
    *,
    group: dist.ProcessGroup | None = None,
    background: bool = False,
    finished: Callable[[], object] = lambda: None,
) -> Future | None:
    """Write tensors as a checkpoint. Every rank must come here.

    Args:
        folder: of the checkpoint.
        tensors: shards (DTensors) or whole tensors, which one of the ranks that have them writes.
        about: JSON beside them; that of the first rank counts.
        group: ranks, on a backend of the CPU. A save in the background needs it for itself.
        background: copy all of it to the CPU, and return while it is being written.
        finished: called by the first rank when the folder has its name.

    Returns:
        With ``background``, what ``wait`` takes.

    Raises:
        OSError: they cannot be written; nothing has the name of the folder then.
        ValueError: this torch cannot write shards.
    """
    try:
        import torch.distributed.checkpoint as dcp

        writer = _writer(folder, copy.deepcopy(about), finished)
    except (ImportError, TypeError) as error:
        raise ValueError(
            "train.parallel fsdp and hsdp and train.async_save need torch 2.10 or later, "
            f"and this is {torch.__version__}: {error}"
        ) from error
    _leave_out_warning()
    alone = not (dist.is_available() and dist.is_initialized())
    tensors = {name: value.detach() for name, value in tensors.items()}
    if background:
        return dcp.async_save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
    except (dcp.CheckpointException, OSError) as error:
        raise failed(folder, error) from error
    return None


def failed(folder: Path, error: BaseException) -> OSError:
    """Why a checkpoint could not be written, on which ranks."""
    shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
    failures = getattr(error, "failures", None) or {0: (error, None)}
    text = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in sorted(failures.items()))
    return OSError(f"{folder} cannot be written: {text}")


def about(folder: Path) -> dict:
    """The JSON of a checkpoint whose files are all there and as long as they were written.

    Raises:
        ValueError, OSError: they are not.
    """
    found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    tables = isinstance(found, dict) and [found.get("files"), found.get("sha256", {})]
    if not tables or found.get("format") != FORMAT or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"its {ABOUT} is none of a checkpoint of format {FORMAT}")
    for name, size in found["files"].items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            raise ValueError(f"{name} is missing" if there is None else f"{name} has {there} bytes of {size}")
    return found


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint is there, with all its files."""
    try:
        return bool(about(folder))
    except (OSError, ValueError):
        return False


def changed(folder: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Files of a checkpoint that are no longer what was written, among those that this one of ``ranks`` looks at.

    Checkpoints of earlier versions have no checksums to tell by.
    """
    sums = sorted(about(folder).get("sha256", {}).items())
    return [name for name, checksum in sums[rank::ranks] if _checksum(folder / name) != checksum]


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def empty_tensors(folder: Path) -> dict[str, Tensor]:
    """A tensor for each one of a checkpoint, of its whole shape and its dtype, without its values."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: torch.empty(of.size, dtype=of.properties.dtype, device="meta") for name, of in found.items()}


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors from a checkpoint: of DTensors, the shards of this rank, and nothing else is read.

    Raises:
        ValueError: they are not in it, or cannot be read.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    _leave_out_warning()
    try:
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:  # no Exception, so nobody would catch it
        raise ValueError("; ".join(str(cause) for cause, _ in error.failures.values())) from error


def _leave_out_warning() -> None:
    """Let torch not warn that there are no other ranks, which is meant so."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def remove(folder: Path) -> None:
    """Remove a checkpoint, so that half of it never has its name."""
    aside = folder.with_name(folder.name + ".old.partial")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)
