"""A run as one self-contained HTML page: the command ``ijepa-fast report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ijepa_fast.config import RunConfig, from_dict
from ijepa_fast.data.datasets import Sources, open_sources
from ijepa_fast.ranks import pick_device
from ijepa_fast.report.findings import findings
from ijepa_fast.report.page import page
from ijepa_fast.report.pictures import Attempt, Trained, all_pictures, attempt, trained_by
from ijepa_fast.report.record import RunRecord, read_record
from ijepa_fast.run.environment import describe
from ijepa_fast.run.files import write_text

__all__ = ["parse_patch", "write_report"]


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    images: int = 6,
    patches: Sequence[tuple[int, int]] = (),
    candidates: int = 1000,
    device: str = "auto",
    checkpoint: str = "newest",
) -> Path:
    """Write the page of a run, finished or not; what cannot be shown is named on it, with the reason.

    The same run, images and versions give the same file.

    Args:
        folder: of the run.
        out: file to write; ``report.html`` in the folder by default.
        images: rows or columns of the pictures.
        patches: (row, column) of the patches whose similarity to the others is shown; some on the diagonal by default.
        candidates: images among which the nearest neighbours of others are looked for.
        device: auto, cpu or cuda.
        checkpoint: newest or best, of which the pictures are.

    Returns:
        The path written.

    Raises:
        ValueError: the folder holds no run, a number is not positive, or a patch is outside the grid.
        OSError: the file cannot be written.
    """
    for name, value in (("images", images), ("candidates", candidates)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    run = read_record(Path(folder))
    trained = attempt(trained_by, run, pick_device(device, 0), checkpoint)
    config = attempt(_config, run) if trained.failure else Attempt(trained.value.config, None)
    sources = Attempt(None, config.failure)
    if not config.failure:
        height, width = config.value.model.grid
        for row, column in patches:
            if not (0 <= row < height and 0 <= column < width):
                raise ValueError(f"patch {row},{column} is outside the {height} x {width} grid (rows, columns from 0)")
        sources = attempt(lambda: open_sources(**config.value.images))
    pictures = all_pictures(run, trained, sources, config, images=images, patches=patches, candidates=candidates)
    warnings = findings(run)
    if trained.value and sources.value and trained.value.data != sources.value.train.fingerprint:
        warnings.append(
            "The images are no longer those that the run was trained on; its pictures show what is there now."
        )
    html = page(
        run,
        warnings,
        pictures,
        facts=_facts(run, trained.value, sources.value),
        made_with=describe(),
        classes=_classes(sources.value),
    )
    out = run.folder / "report.html" if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html)
    return out


def parse_patch(text: str) -> tuple[int, int]:
    """ "3,5" -> (3, 5). Raises ValueError for anything else."""
    row, _, column = text.partition(",")
    if not (row.strip().isdecimal() and column.strip().isdecimal()):
        raise ValueError(f"a patch is ROW,COLUMN, counted from 0 at the top left, got {text!r}")
    return int(row), int(column)


def _config(run: RunRecord) -> RunConfig:
    if not run.config:
        raise ValueError("the settings of the run are not known")
    try:
        config = from_dict(run.config, strict=False)
        assert config.model.grid
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"config.yaml does not fit this version: {error}") from error
    return config


def _classes(sources: Sources | None) -> int | None:
    if sources is None or sources.test is None or sources.test.classes is None:
        return None
    return len(sources.test.classes)


def _facts(run: RunRecord, trained: Trained | None, sources: Sources | None) -> dict[str, str]:
    facts = {}
    if trained is not None:
        model = trained.config.model
        weights = {
            name: sum(p.numel() for p in getattr(trained.model, name).parameters())
            for name in ("context_encoder", "predictor")
        }
        facts["encoder"] = (
            f"ViT, width {model.embed_dim}, depth {model.depth}, {model.num_heads} heads, "
            f"{weights['context_encoder'] / 1e6:.3g} M parameters"
        )
        facts["predictor"] = (
            f"width {model.predictor_embed_dim}, depth {model.predictor_depth}, {weights['predictor'] / 1e6:.3g} M "
            "parameters"
        )
        size = str(model.img_size) if isinstance(model.img_size, int) else " x ".join(map(str, model.img_size))
        channels = "" if model.in_chans == 3 else f", {model.in_chans} channel{'s' * (model.in_chans > 1)}"
        rows, columns = model.grid
        facts["input"] = f"{size} px in {rows} x {columns} patches of {model.patch_size} px{channels}"
        facts["pictures of"] = f"checkpoint at step {trained.step:,}"
        if trained.best is not None:
            score = trained.best["score"]
            score = f"online k-NN {score:.1%}" if trained.best["by"] == "knn" else f"rank {score:.1f}"
            facts["best checkpoint so far"] = f"step {trained.best['step']:,}, {score}"
    facts["data"] = str(run.config.get("data"))
    if sources is not None:
        facts["training images"] = f"{len(sources.train):,}"
        if sources.test is not None:
            facts["held-out images"] = f"{len(sources.test):,}"
    for name, key in (("context", "context_tokens_per_image"), ("target", "target_tokens_per_image")):
        if line := run.series(key):
            facts[f"{name} tokens per image"] = f"{sum(value for _, value in line) / len(line):.1f}"
    return facts
