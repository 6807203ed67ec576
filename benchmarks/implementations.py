"""The whole training steps that are compared, on the same model, images and masks, and the proof that they agree.

``ours`` is the step of this package. Suffixes turn its options on, ``ours+compile+capture``: see
``ijepa_fast.step.options.SUFFIXES``.
``eager`` is the published algorithm (baselines.py), ``compiled`` what a skilled user has without this package
(compiled.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import Eager, load_weights, mask_lists
from benchmarks.compiled import Compiled, Packed
from ijepa_fast.bench.steps import LIMITS, differences, disagreement, gradients_of
from ijepa_fast.config import ModelConfig, RunConfig, TrainConfig
from ijepa_fast.masks.sampler import MaskConfig, Masks, MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import IMAGENET_MEAN, IMAGENET_STD, PREDICTOR_DEPTH, SIZES
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.run.build import assemble
from ijepa_fast.step.flops import StepFlops, TokenCounts, step_flops
from ijepa_fast.step.options import SUFFIXES, StepOptions, with_suffixes

MODELS = {
    "vit_tiny": ("tiny", 16),
    "vit_small": ("small", 16),
    "vit_b16": ("base", 16),
    "vit_l16": ("large", 16),
    "vit_h14": ("huge", 14),
    "vit_g16": ("giant", 16),
}
KINDS = ("ours", "eager", "compiled")
SEED = 0


def parse(name: str) -> tuple[str, list[str]]:
    """Kind and suffixes of an implementation's name.

    Raises:
        ValueError: there is no such implementation, with those there are.
    """
    kind, *suffixes = name.split("+")
    if kind not in KINDS:
        raise ValueError(f"implementations are {', '.join(KINDS)}, got {name!r}")
    if suffixes and kind != "ours":
        raise ValueError(f"suffixes are for ours, got {name!r}")
    with_suffixes(suffixes)
    return kind, suffixes


def run_config(suffixes: Sequence[str], batch: int, precision: str, device: str = "auto") -> RunConfig:
    """The run of ours with these suffixes, without activation checkpointing: what does not fit into memory is told.

    Raises:
        ValueError: options exclude one another, or the device.
    """
    options = with_suffixes(suffixes, StepOptions(activation_checkpointing=False))
    train = TrainConfig(batch_size=batch, precision=precision, device=device)
    return RunConfig(seed=SEED, train=train, step=options)


def model_config(name: str, img_size: int = 224) -> ModelConfig:
    size, patch_size = MODELS[name]
    return ModelConfig(img_size, patch_size, predictor_depth=PREDICTOR_DEPTH[size], **SIZES[size])


@dataclass
class Candidate:
    """One implementation, ready to run.

    Attributes:
        holder: has the ``optimizer``, and the networks (``networks``).
        run: of a step number; trains once.
        tokens, flops: per image, means over the masks of the case.
        captured: steps are replayed from graphs, each captured when its shapes are met for the second time.
        approximate, no_phases: see ``step.options.Suffix``.
    """

    name: str
    kind: str
    holder: Any
    run: Callable[[int], Any]
    tokens: TokenCounts
    flops: StepFlops
    captured: bool = False
    approximate: bool = False
    no_phases: str | None = None

    @property
    def networks(self) -> nn.Module:
        return self.holder.model if self.kind == "ours" else self.holder


class Case:
    """Model, images and masks that all implementations of a run share.

    Args:
        batch: images per step; batch_min cuts contexts to the shortest of the batch.
        masks: exact or batch_min, of ours and compiled.
        steps: masks are drawn for so many steps, beforehand for the baselines.
    """

    def __init__(self, model: ModelConfig, batch: int, masks: str, device: torch.device, precision: str, steps: int):
        self.model, self.batch, self.device, self.precision, self.steps = model, batch, device, precision, steps
        side = model.img_size // model.patch_size
        self.grid = (side, side)
        official = MaskSampler(MaskConfig.official(batch), self.grid)
        self.sampler = official if masks == "batch_min" else MaskSampler(MaskConfig(), self.grid)
        self.truncated, self.drawn = (
            [sampler.sample(batch, seed=SEED, step=n) for n in range(steps)] for sampler in (official, self.sampler)
        )
        generator = torch.Generator().manual_seed(SEED)
        shape = (batch, 3, model.img_size, model.img_size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.normalised = (self.images / 255 - mean) / std
        torch.manual_seed(SEED)
        with device:  # a CPU takes ten seconds to draw the weights of ViT-H
            self.state = {name: value.cpu() for name, value in model.build(Objective()).state_dict().items()}
        self.schedules = Schedules(total_steps=1000, warmup_steps=10)

    def make(self, name: str) -> Candidate:
        """An implementation that starts from the case's weights.

        Raises:
            ValueError: of ``parse``, or options that do not fit together or run on this device.
        """
        kind, suffixes = parse(name)
        if kind == "ours":
            return self._ours(name, suffixes)
        with self.device:
            holder = {"eager": Eager, "compiled": Compiled}[kind](self.model, self.schedules, self.precision)
        load_weights(holder, self.state)
        drawn = self.truncated if kind == "eager" else self.drawn
        masks = [self.lists(m) if kind == "eager" else Packed.of(m, self.device) for m in drawn]
        return self._candidate(name, kind, holder, lambda n: holder(self.normalised, masks[n % self.steps], n), drawn)

    def _ours(self, name: str, suffixes: Sequence[str]) -> Candidate:
        config = replace(run_config(suffixes, self.batch, self.precision), model=self.model)
        with self.device:
            model = config.model.build(config.objective)
        model.load_state_dict(self.state)
        step = assemble(model, config, self.sampler, self.schedules, self.batch, self.device)
        return self._candidate(
            name,
            "ours",
            step,
            lambda n: step(self.images, n % self.steps),
            self.drawn,
            captured=config.step.capture,
            approximate=any(SUFFIXES[suffix].approximate for suffix in suffixes),
            no_phases=next((why for suffix in suffixes if (why := SUFFIXES[suffix].no_phases)), None),
        )

    def _candidate(self, name: str, kind: str, holder: Any, run: Callable, masks: list[Masks], **more) -> Candidate:
        tokens, plain = TokenCounts.of(*masks), kind != "ours"
        flops = step_flops(self.model, tokens, all_targets=plain, all_predictions=plain)
        return Candidate(name, kind, holder, run, tokens, flops, **more)

    def lists(self, masks: Masks) -> tuple[list[Tensor], list[Tensor]]:
        """Masks in the layout of ``Eager``: lists of contexts and of targets."""
        patches = self.grid[0] * self.grid[1]
        return mask_lists(masks.context, 1, patches), mask_lists(masks.targets, masks.num_targets, patches)


REHEARSAL = (0, 0, 0)
"""Step numbers: a captured step meets the shapes of step 0, captures them, and replays."""


def first_batch(case: Case, candidate: Candidate, masks: Masks) -> dict[str, Any]:
    """Loss and fp32 gradients of one batch, without training on it; of approximate targets no gradients, which are
    others."""
    networks = candidate.networks
    if candidate.kind == "ours":
        loss = networks(case.images, masks.to(case.device), all_targets=False)[0].total
    elif candidate.kind == "eager":
        lists = ([mask.to(case.device) for mask in part] for part in case.lists(masks))
        loss = networks.loss(case.normalised, *lists)
    else:
        loss = networks.loss(case.normalised, Packed.of(masks, case.device))
    gradients = gradients_of(loss, networks, candidate.holder.optimizer, dtype=torch.float32)
    described = {"loss": float(loss.detach()), "gradient": gradients}
    return {"loss": described["loss"]} if candidate.approximate else described


@torch.no_grad()
def target_distance(case: Case, candidate: Candidate, reference: Candidate, masks: Masks) -> float:
    """One less the cosine similarity of the target features of two variants of ours, mean over rows."""
    features, want = (
        c.networks.predict(case.images, masks.to(case.device), all_targets=False).targets
        for c in (candidate, reference)
    )
    return 1 - float(F.cosine_similarity(features.float(), want.float(), dim=1).mean())


def check_agreement(case: Case, candidates: Sequence[Candidate]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Whether implementations that see the same masks train the same.

    They are compared with ``eager`` where it can see the masks, else with the first that is not approximate, by loss
    and gradients; those of approximate targets by loss and targets. Then every variant of ours trains the same few
    steps, and losses are compared with those of the first: optimizer, graphs and streams are seen by no comparison of
    gradients.

    Returns:
        "name/reference" -> differences (``bench.steps.differences``, and "targets", see ``target_distance``), and
        name -> what is wrong, of those that differ by more than rounding explains.
    """
    compared: dict[str, dict[str, float]] = {}
    wrong: dict[str, str] = {}

    def note(candidate: Candidate, reference: Candidate, apart: dict[str, float]) -> None:
        compared.setdefault(f"{candidate.name}/{reference.name}", {}).update(apart)
        limits = LIMITS[case.precision]
        if candidate.approximate or reference.approximate:
            limits = LIMITS["approximate"]
        elif candidate.kind != reference.kind:
            limits = LIMITS.get(f"{case.precision}, others", limits)
        if said := disagreement(apart, limits):
            wrong.setdefault(candidate.name, f"does not train what {reference.name} trains: {said}")

    together = [case.drawn[0]]
    if any(c.kind == "eager" for c in candidates) and not _equal_lengths(case.drawn[0]):
        together.append(case.truncated[0])
    for masks in together:
        seeing = [c for c in candidates if c.kind != "eager" or _equal_lengths(masks)]
        exact = [c for c in seeing if not c.approximate]
        if not exact:
            continue
        reference = next((c for c in exact if c.kind == "eager"), exact[0])
        plain = next((c for c in exact if c.kind == "ours"), None)
        want = first_batch(case, reference, masks)
        for candidate in seeing:
            if candidate is not reference and candidate.name not in wrong:
                apart = differences(first_batch(case, candidate, masks), want, case.precision)
                if candidate.approximate and plain is not None:
                    apart["targets"] = target_distance(case, candidate, plain, masks)
                note(candidate, reference, apart)
    ours = [c for c in candidates if c.kind == "ours"]
    if len(ours) > 1:
        losses = [{"losses": [float(c.run(number).losses.total) for number in REHEARSAL]} for c in ours]
        for candidate, of in zip(ours[1:], losses[1:], strict=True):
            note(candidate, ours[0], differences(of, losses[0], case.precision))
    return compared, wrong


def _equal_lengths(masks: Masks) -> bool:
    return all(len(set(part.lengths.tolist())) == 1 for part in (masks.context, masks.targets))
