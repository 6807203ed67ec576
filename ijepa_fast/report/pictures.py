"""The pictures of a run's report, drawn from its newest checkpoint and from its images as they are now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ijepa_fast import plots
from ijepa_fast.config import RunConfig
from ijepa_fast.data import EvalLoader, Source
from ijepa_fast.evaluate import pool_features
from ijepa_fast.model.jepa import IJEPA
from ijepa_fast.plots.run import draw_masks, picture_images
from ijepa_fast.report.record import RunRecord
from ijepa_fast.run import checkpoint as checkpoints
from ijepa_fast.weights.runs import networks_of, of_networks

log = logging.getLogger(__name__)

NEIGHBOURS = 7
_BATCH = 64


@dataclass(frozen=True)
class Picture:
    """One picture of the page.

    Attributes:
        title: heading.
        caption: what is seen; without a picture, why it is left out.
        alt: for those who do not see it.
        png: the file, or None.
    """

    title: str
    caption: str
    alt: str = ""
    png: bytes | None = None


@dataclass(frozen=True)
class Trained:
    """What the newest checkpoint of a run holds.

    Attributes:
        config: of the run.
        step: steps done.
        model: the networks.
        untrained: a target encoder with random weights; what the run began with, unless that was weights of others.
        data: fingerprint of the images trained on.
        best: "step", "score" and "by" of the run's best checkpoint by then, None before there is one.
    """

    config: RunConfig
    step: int
    model: IJEPA
    untrained: torch.nn.Module
    data: str
    best: dict | None = None


def trained_by(run: RunRecord, device: torch.device, which: str = "newest") -> Trained:
    """The networks of a run's newest or best checkpoint, and an untrained target encoder beside them.

    Raises:
        CheckpointError, ValueError, RuntimeError: there is none, it is damaged, or does not fit this version.
    """
    path = checkpoints.find(run.folder, which)
    state = checkpoints.load(path, values=of_networks)
    with torch.random.fork_rng(devices=[]):
        model, config = networks_of(state, path)
        torch.manual_seed(config.seed)
        untrained = config.model.build(config.objective).target_encoder
    networks = model.to(device).eval(), untrained.to(device).eval()
    return Trained(config, state.step, *networks, state.extra["data"], state.extra.get("best"))


def default_patches(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Patches on the diagonal: at a quarter, a half and three quarters of the grid."""
    height, width = grid
    return list(dict.fromkeys((height * quarter // 4, width * quarter // 4) for quarter in (1, 2, 3)))


class Attempt(NamedTuple):
    """A result, or None and the reason why there is none."""

    value: Any
    failure: str | None


def attempt(what: Callable, *arguments) -> Attempt:
    """Call ``what``; whatever data, files or machine are to blame for becomes a reason."""
    try:
        return Attempt(what(*arguments), None)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return Attempt(None, " ".join(str(error).split()) or type(error).__name__)


def all_pictures(
    run: RunRecord,
    trained: Attempt,
    sources: Attempt,
    config: Attempt,
    *,
    images: int,
    patches: Sequence[tuple[int, int]],
    candidates: int,
) -> list[Picture]:
    """PCA maps, similarity maps, neighbours and masks; one that cannot be drawn says why instead.

    Args:
        run: whose pictures.
        trained, sources, config: attempts at a ``Trained``, ``Sources`` and a ``RunConfig``.
        images: how many are shown.
        patches: chosen patches of the similarity maps, or none for ``default_patches``.
        candidates: images among which neighbours are looked for.
    """
    no_masks = config.failure or sources.failure
    shown = Attempt(None, trained.failure or sources.failure)
    if shown.failure is None:
        source = sources.value.train if sources.value.test is None else sources.value.test
        shown = attempt(_Shown, trained.value, source, images, candidates)
    pictures = []
    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "picture.png"

        def add(title: str, saved: str | None, reason: str | None, draw: Callable[[], tuple[str, str]]) -> None:
            """Draw one, or take the one that training saved, or say why there is none."""
            if reason is None:
                log.info("drawing: %s", title)
                told, reason = attempt(draw)
                if reason is None:
                    pictures.append(Picture(title, *told, out.read_bytes()))
                    return
            kept = run.folder / saved if saved else None
            if kept is not None and attempt(_check_image, kept).failure is None:
                caption = f"Drawn when the run ended; it cannot be drawn anew: {reason}"
                pictures.append(Picture(title, caption, f"{title}, as the run itself drew them", kept.read_bytes()))
            else:
                pictures.append(Picture(title, f"Left out: {reason}"))

        add("PCA maps of patch features", "pca.png", shown.failure, lambda: shown.value.pca(out))
        add("Similarity to chosen patches", None, shown.failure, lambda: shown.value.similarity(out, patches))
        add("Nearest neighbours", None, shown.failure, lambda: shown.value.neighbours(out))
        add("Masks", "masks.png", no_masks, lambda: _masks(config.value, sources.value.train, out, images))
    return pictures


def _masks(config: RunConfig, source: Source, out: Path, count: int) -> tuple[str, str]:
    draw_masks(config, source, out, min(count, len(source)))
    return (
        "The blocks of step 0 over some training images: the context encoder sees the context, the predictor has to "
        "fill in the targets.",
        "One row per image: the image, its context block, and its target blocks, each with its number of patches",
    )


def _check_image(path: Path) -> None:
    with Image.open(path, formats=["PNG"]) as image:
        image.load()


class _Shown:
    """The images that are shown, and their features.

    Args:
        trained: whose features.
        source: of the images.
        count: how many are shown.
        candidates: images among which their neighbours are looked for.
    """

    def __init__(self, trained: Trained, source: Source, count: int, candidates: int):
        self.trained, self.source, self.count, self.candidates = trained, source, count, candidates
        self.encoder = trained.model.target_encoder
        self.images = picture_images(source, trained.config, count)
        self.after = self._features(self.encoder, self.images)
        self.before = self._features(trained.untrained, self.images)

    @torch.no_grad()
    def _features(self, encoder: torch.nn.Module, images: Tensor) -> Tensor:
        device = encoder.pos_embed.device
        return torch.cat([encoder(some.to(device)).float().cpu() for some in images.split(_BATCH)])

    def pca(self, out: Path) -> tuple[str, str]:
        plots.plot_pca(self.images, self.after, self.encoder.grid, out, before=self.before)
        return (
            "The first three principal components of the target encoder's patch features as red, green and blue, "
            "common to all images. Patches with one colour have features alike.",
            f"{len(self.images)} images, and below each its patch features as colours, before and after training",
        )

    def similarity(self, out: Path, patches: Sequence[tuple[int, int]]) -> tuple[str, str]:
        patches = patches or default_patches(self.encoder.grid)
        plots.plot_similarity(self.images, self.after, self.encoder.grid, patches, out, before=self.before)
        return (
            "Cosine similarity of each outlined patch (row, column) to all patches of its image, in the target "
            "encoder's features before and after training; one colour scale for all.",
            f"One row per image: the image with {len(patches)} outlined patches, and a map of the similarity to each, "
            "before and after training",
        )

    def neighbours(self, out: Path) -> tuple[str, str]:
        log.info("features of %d images, to find neighbours", min(self.candidates, len(self.source)))
        wanted = np.unique(np.linspace(0, len(self.source) - 1, min(self.candidates, len(self.source))).round())
        features, indices = [], []
        for batch in self._loader(wanted.astype(np.int64)):
            features.append(pool_features(self._features(self.encoder, batch.images)))
            indices.append(batch.indices)
        features_nD, indices_n = torch.cat(features), torch.cat(indices)
        if len(indices_n) < 2:
            raise ValueError("there is only one image")
        queries = np.unique(np.linspace(0, len(indices_n) - 1, self.count).round().astype(np.int64)).tolist()
        k = min(NEIGHBOURS, len(indices_n) - 1)
        rows_Qk, similarity_Qk = plots.nearest_neighbours(features_nD, queries, k)
        found_QK = torch.cat([torch.tensor(queries)[:, None], rows_Qk], dim=1)
        pictures = self._load(indices_n[found_QK.flatten()]).unflatten(0, found_QK.shape)
        names, same = {}, ""
        if self.source.labels is not None:
            labels_QK = self.source.labels[indices_n[found_QK].numpy()]
            of = self.source.classes
            names["query_names"] = [of[label] for label in labels_QK[:, 0]]
            names["neighbour_names"] = [[of[label] for label in row] for row in labels_QK[:, 1:]]
            hits = int((labels_QK[:, 1:] == labels_QK[:, :1]).sum())
            same = f" {hits} of the {rows_Qk.numel()} neighbours shown have the class of their query."
        plots.plot_neighbours(pictures[:, 0], pictures[:, 1:], similarity_Qk, out, **names)
        return (
            f"Left, an image; beside it the most similar of {len(indices_n) - 1:,} others, by cosine similarity of the "
            f"target encoder's average-pooled features.{same}",
            f"{len(queries)} rows, each an image and its {k} nearest neighbours, with their cosine similarities",
        )

    def _load(self, indices: Tensor) -> Tensor:
        distinct, place = indices.unique(return_inverse=True)
        images = torch.cat([batch.images for batch in self._loader(distinct.numpy())])
        return images[place]

    def _loader(self, indices: np.ndarray) -> EvalLoader:
        config = self.trained.config
        return EvalLoader(
            self.source,
            config.model.img_size,
            _BATCH,
            indices=indices,
            resize_ratio=config.evaluation.resize_ratio,
        )
