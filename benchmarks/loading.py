"""Decoded and cropped images per second of processor time, beside plain Pillow and SPDL; memory of a loader's worker.

    python -m benchmarks.loading PHOTOGRAPHS [--memory 100000] --json benchmarks/results/loading-cpu.json

All but SPDL, which has no processes, load through a torch DataLoader with one worker. Processor time is that of the
worker and of the process that takes the batches, so busy neighbours disturb it less than the clock; the best of several
rounds counts. What is timed is checked first: crops differ from those of Pillow by less than 8 levels on average.

"plain Pillow" is what torchvision's ImageFolder, RandomResizedCrop, ToTensor and Normalize do: the file decoded whole,
cut out, resized, a normalised float tensor; "plain Pillow, uint8" leaves the last away, as a loader may that normalises
on the device. Enlarged photographs are the same ones at 2000 x 1500, JPEG of quality 90.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ijepa_fast.bench.measure import results, save
from ijepa_fast.data import ImageFolder, TrainLoader
from ijepa_fast.data.crops import ASPECT_RATIO, OFFICIAL_SCALE, random_box
from ijepa_fast.data.order import sample_indices
from ijepa_fast.data.shards import TarShards

BATCH, SIZES, ENLARGED = 50, (96, 224), (2000, 1500)
BAR = 1.3
"""Rate that ijepa_fast is to reach on untouched photographs, in rates of plain Pillow."""
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def box_of(width: int, height: int, index: int) -> tuple[int, int, int, int]:
    return random_box(width, height, scale=OFFICIAL_SCALE, ratio=ASPECT_RATIO, seed=0, epoch=0, index=index)


class PlainPillow(Dataset):
    """Crops as torchvision makes them, of the same boxes as ours."""

    def __init__(self, folder: ImageFolder, side: int, floats: bool):
        self._folder, self._side, self._floats = folder, side, floats

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with open(self._folder.path(index), "rb") as file:
            image = Image.open(file).convert("RGB")
        crop = image.crop(box_of(*image.size, index)).resize((self._side, self._side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
        return (pixels.float().div(255).sub(MEAN).div(STD) if self._floats else pixels), 0


def plain(folder: ImageFolder, side: int, floats: bool) -> Iterator[Tensor]:
    order = sample_indices(0, len(folder) // BATCH * BATCH, len(folder), seed=0).indices.tolist()
    loader = DataLoader(PlainPillow(folder, side, floats), BATCH, sampler=order, num_workers=1, prefetch_factor=2)
    for images, _ in loader:
        yield images


def ours(source: Any, side: int) -> Iterator[Tensor]:
    steps = len(source) // BATCH
    for batch in TrainLoader(source, image_size=side, global_batch=BATCH, seed=0, workers=1, num_steps=steps):
        yield batch.images


def spdl(folder: ImageFolder, sizes: list[tuple[int, int]], side: int) -> Iterator[Tensor]:
    """SPDL decodes with FFmpeg; image sizes, which its filters do not know, are given to it."""
    from spdl import io

    order = sample_indices(0, len(folder) // BATCH * BATCH, len(folder), seed=0).indices.reshape(-1, BATCH).tolist()
    for indices in order:
        frames = []
        for index in indices:
            left, top, right, bottom = box_of(*sizes[index], index)
            crop = f"crop={right - left}:{bottom - top}:{left}:{top}:exact=1"
            chain = f"{crop},scale={side}:{side}:flags=bicubic,format=pix_fmts=rgb24"
            frames.append(io.decode_packets(io.demux_image(folder.path(index)), filter_desc=chain))
        yield torch.from_numpy(io.to_numpy(io.convert_frames(frames))).permute(0, 3, 1, 2)


def processor_seconds(make: Callable[[], Iterator[Tensor]]) -> tuple[float, int, Tensor]:
    """Seconds of this process and of workers that ended; images; the first batch."""

    def spent() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    before, first, count = spent(), None, 0
    for images in make():
        first = images.clone() if first is None else first
        count += len(images)
    return spent() - before, count, first


def contenders(folder: ImageFolder, shards: TarShards | None, side: int) -> dict[str, Callable[[], Iterator[Tensor]]]:
    found = {
        "ijepa_fast": lambda: ours(folder, side),
        "plain Pillow": lambda: plain(folder, side, True),
        "plain Pillow, uint8": lambda: plain(folder, side, False),
    }
    if shards is not None:
        found["ijepa_fast, shards"] = lambda: ours(shards, side)
    try:
        from spdl import io  # noqa: F401
    except (ImportError, RuntimeError) as error:
        print(f"SPDL does not load: {str(error)[:200]}")
    else:
        sizes = [Image.open(folder.path(index)).size for index in range(len(folder))]
        found["SPDL"] = lambda: spdl(folder, sizes, side)
    return found


def rates(of: str, folder: ImageFolder, shards: TarShards | None, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender and size of crop."""
    rows = []
    for side in SIZES:
        calls = contenders(folder, shards, side)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            names = list(calls)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seconds, count, first = processor_seconds(calls[name])
                taken[name].append(count / seconds)
                if name == "plain Pillow":
                    first = (first * STD + MEAN) * 255
                if number == 0:
                    check(first.float(), folder, side, name)
        rows += [
            {"contender": name, "images": of, "crop": side, "images_per_second": round(max(each), 1)}
            | {"median": round(statistics.median(each), 1), "rounds": rounds}
            for name, each in taken.items()
        ]
        for row in rows[-len(calls) :]:
            print(f"{of:<12}{side:>4}  {row['contender']:<20}{row['images_per_second']:>8.0f} images/s", flush=True)
    return rows


def check(batch: Tensor, folder: ImageFolder, side: int, name: str) -> None:
    """AssertionError unless the first crops are those of Pillow, but for what decoding at half scale changes."""
    if "shards" in name:  # another order
        return
    order = sample_indices(0, len(folder) // BATCH * BATCH, len(folder), seed=0).indices
    for row in range(4):
        expected = PlainPillow(folder, side, False)[order[row]][0].float()
        difference = (batch[row] - expected).abs().mean().item()
        assert difference < 8, f"{name}: crops differ by {difference:.1f} levels on average"


def enlarged(folder: ImageFolder, to: Path, count: int) -> ImageFolder:
    for index in np.linspace(0, len(folder) - 1, count).astype(int).tolist():
        with Image.open(folder.path(index)) as image:
            image.convert("RGB").resize(ENLARGED, Image.Resampling.BICUBIC).save(to / f"{index}.jpg", quality=90)
    return ImageFolder(to)


def packed(folder: ImageFolder, to: Path) -> TarShards:
    import tarfile

    with tarfile.open(to / "images.tar", "w") as tar:
        for index in range(len(folder)):
            tar.add(folder.path(index), f"{index:06d}.jpg")
    return TarShards([to / "images.tar"], cache=str(to / "cache"))


def memory(folder: ImageFolder, samples: int, side: int = 96) -> list[dict[str, int]]:
    """Megabytes of a worker that nobody else uses, as samples come out of it."""
    import multiprocessing

    rows, steps = [], samples // BATCH
    loader = TrainLoader(folder, image_size=side, global_batch=BATCH, seed=0, workers=1, num_steps=steps)
    for step, _ in enumerate(loader, 1):
        if step * BATCH % (samples // 20) == 0 or step == 40:
            (worker,) = multiprocessing.active_children()
            lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
            sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
            private = sizes["Private_Clean"] + sizes["Private_Dirty"]
            rows.append({"samples": step * BATCH, "private_mb": round(private / 1024), "rss_mb": sizes["Rss"] >> 10})
            print(rows[-1], flush=True)
    return rows


def described(folder: ImageFolder) -> dict[str, Any]:
    sizes = [Image.open(folder.path(index)).size for index in range(len(folder))]
    middle = [int(statistics.median(side)) for side in zip(*sizes, strict=True)]
    kb = statistics.mean(os.path.getsize(folder.path(index)) for index in range(len(folder))) / 1000
    return {"count": len(folder), "median_size": middle, "mean_kb": round(kb, 1)}


def versions() -> dict[str, str]:
    found = {"pillow": Image.__version__, "libjpeg-turbo": features.version_feature("libjpeg_turbo")}
    for package in ("spdl_io",):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder of JPEGs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--enlarged", type=int, default=100, help="photographs that are enlarged, too")
    parser.add_argument("--memory", type=int, default=0, help="samples after which a worker's memory is to be flat")
    parser.add_argument("--note", action="append", default=[], help="a line for the results file")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = ImageFolder(options.photographs)
    with tempfile.TemporaryDirectory() as place:
        large = Path(place, "large")
        large.mkdir()
        large, shards = enlarged(folder, large, options.enlarged), packed(folder, Path(place))
        report = results(
            "loading",
            "cpu",
            packages=versions(),
            images={"photographs": described(folder), "enlarged": described(large)},
            batch=BATCH,
            bar=BAR,
            notes=options.note,
            rates=[
                *rates("photographs", folder, shards, options.rounds),
                *rates("enlarged", large, None, options.rounds),
            ],
        )
    if options.memory:
        report["memory"] = memory(folder, options.memory)
    save(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
