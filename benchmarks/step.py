"""Whole training steps, this package's beside the published algorithm and a skilled user's, interleaved in one run.

    python -m benchmarks.step --model vit_small --batch 16 --masks batch_min --impl ours,eager --device cpu --json FILE

Every round runs one step of each implementation on the same images, from the same weights; the ratio of two is the
median over rounds. ``eager`` can only use masks of equal lengths, so it always runs the official truncated ones, while
``ours`` and ``compiled`` run those that --masks names. Before anything is timed, losses and gradients of
implementations that see the same masks are compared. On the CPU the report also has ratios of CPU time, which busy
neighbours disturb less.

Drawing masks is part of our step. The others are handed theirs (``eager_mask_loop_ms`` in the report is what the
published loop over images takes), and normalised images, as from DataLoader workers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Eager, draw_masks, load_weights, mask_lists
from benchmarks.compiled import Compiled, Packed
from ijepa_fast.bench.measure import machine, matmul_rate, write_json
from ijepa_fast.config import ModelConfig
from ijepa_fast.flops import StepFlops, TokenCounts, step_flops
from ijepa_fast.jepa import Objective
from ijepa_fast.masks import MaskConfig, Masks, MaskSampler
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.schedules import Schedules
from ijepa_fast.step import PRECISION_DTYPES, TrainStep
from ijepa_fast.vit import IMAGENET_MEAN, IMAGENET_STD, PREDICTOR_DEPTH, SIZES, cast_weights

MODELS = {
    "vit_tiny": ("tiny", 16),
    "vit_small": ("small", 16),
    "vit_b16": ("base", 16),
    "vit_l16": ("large", 16),
    "vit_h14": ("huge", 14),
    "vit_g16": ("giant", 16),
}
IMPLEMENTATIONS = ("ours", "eager", "compiled")
SEED = 0


def model_config(name: str, img_size: int = 224) -> ModelConfig:
    size, patch_size = MODELS[name]
    return ModelConfig(img_size, patch_size, predictor_depth=PREDICTOR_DEPTH[size], **SIZES[size])


class Candidate:
    """One implementation, ready to run: ``step(n)`` trains once and returns when the device is done."""

    def __init__(self, name: str, networks: Any, run: Callable[[int], Any], tokens: TokenCounts, flops: StepFlops):
        self.name, self.networks, self.run, self.tokens, self.flops = name, networks, run, tokens, flops


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
        self.state = model.build(Objective()).state_dict()
        self.schedules = Schedules(total_steps=1000, warmup_steps=10)

    def make(self, name: str) -> Candidate:
        return {"ours": self._ours, "eager": self._eager, "compiled": self._compiled}[name]()

    def _candidate(self, name: str, networks: Any, run: Callable, masks: list[Masks], plain: bool) -> Candidate:
        tokens = TokenCounts.of(*masks)
        flops = step_flops(self.model, tokens, all_targets=plain, all_predictions=plain)
        return Candidate(name, networks, run, tokens, flops)

    def _ours(self) -> Candidate:
        model = self.model.build(Objective())
        model.load_state_dict(self.state)
        model.to(self.device)
        cast_weights(model, PRECISION_DTYPES[self.precision])
        step = TrainStep(
            model, FusedAdamW(parameter_groups(model)), self.sampler, self.schedules, seed=SEED, all_targets=False
        )
        return self._candidate("ours", step, lambda n: step(self.images, n % self.steps), self.drawn, False)

    def _eager(self) -> Candidate:
        step = Eager(self.model, self.schedules, self.precision)
        load_weights(step, self.state)
        step.to(self.device)
        masks = [self.lists(drawn) for drawn in self.truncated]
        run = lambda n: step(self.normalised, masks[n % self.steps], n)  # noqa: E731
        return self._candidate("eager", step, run, self.truncated, True)

    def _compiled(self) -> Candidate:
        step = Compiled(self.model, self.schedules, self.precision)
        load_weights(step, self.state)
        step.to(self.device)
        masks = [Packed.of(drawn, self.device) for drawn in self.drawn]
        run = lambda n: step(self.normalised, masks[n % self.steps], n)  # noqa: E731
        return self._candidate("compiled", step, run, self.drawn, True)

    def lists(self, masks: Masks) -> tuple[list[Tensor], list[Tensor]]:
        """In the layout of ``Eager``."""
        patches = self.grid[0] * self.grid[1]
        return mask_lists(masks.context, 1, patches), mask_lists(masks.targets, masks.num_targets, patches)


def networks_of(candidate: Candidate) -> nn.Module:
    return candidate.networks.model if candidate.name == "ours" else candidate.networks


def loss_and_gradients(case: Case, candidate: Candidate, masks: Masks) -> tuple[float, dict[str, Tensor]]:
    """Of one batch, without training on it."""
    networks = networks_of(candidate)
    if candidate.name == "ours":
        loss = networks(case.images, masks.to(case.device), all_targets=False)[0].total
    elif candidate.name == "eager":
        lists = ([mask.to(case.device) for mask in part] for part in case.lists(masks))
        loss = networks.loss(case.normalised, *lists)
    else:
        loss = networks.loss(case.normalised, Packed.of(masks, case.device))
    loss.backward()
    gradients = {name: p.grad.float() for name, p in networks.named_parameters() if p.grad is not None}
    networks.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def check_agreement(case: Case, candidates: Sequence[Candidate]) -> dict[str, dict[str, float]]:
    """Relative differences of losses and gradients between implementations that see the same masks.

    Of the gradients, the largest over parameters; those that are next to nothing count relative to the whole gradient.

    Raises:
        ValueError: they are larger than rounding explains.
    """
    loss_tolerance, tolerance, nothing = {"fp32": (1e-5, 1e-3, 1e-4), "bf16": (2e-2, 0.2, 1e-2)}[case.precision]
    found = {}
    for masks in {id(case.drawn[0]): case.drawn[0], id(case.truncated[0]): case.truncated[0]}.values():
        results = {
            c.name: loss_and_gradients(case, c, masks) for c in candidates if c.name != "eager" or _equal_lengths(masks)
        }
        for name, (loss, gradients) in results.items():
            reference = "eager" if "eager" in results else next(iter(results))
            if name == reference:
                continue
            want_loss, want = results[reference]
            if gradients.keys() != want.keys():
                raise ValueError(f"{name} and {reference} train different parameters")
            whole = sum(float(value.square().sum()) for value in want.values()) ** 0.5
            off = max(
                float((gradients[k] - value).norm()) / (float(value.norm()) + nothing * whole)
                for k, value in want.items()
            )
            differences = {"loss": abs(loss - want_loss) / abs(want_loss), "gradient": off}
            if not (differences["loss"] <= loss_tolerance and off <= tolerance):
                raise ValueError(f"{name} does not train what {reference} trains: relative differences {differences}")
            found[f"{name}/{reference}"] = differences
    return found


def _equal_lengths(masks: Masks) -> bool:
    return all(len(set(part.lengths.tolist())) == 1 for part in (masks.context, masks.targets))


class Clock:
    """Marks in the stream of work; the time from one to the next belongs to the first one's name."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (name, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            took = start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3
            spent[name] = spent.get(name, 0.0) + took
        self.marks.clear()
        return spent


PHASES = ("masks and images", "target encoder", "context encoder", "predictor", "loss and backward", "update")


def phases(candidate: Candidate, device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds of every phase, medians over rounds. On a GPU these are of the stream: gaps count."""
    clock, networks = Clock(device), networks_of(candidate)
    after = {"target_encoder": PHASES[0], "context_encoder": PHASES[0], "predictor": PHASES[4]}
    names = dict(zip(("target_encoder", "context_encoder", "predictor"), PHASES[1:4], strict=True))
    hooks = []
    for part, name in names.items():
        module = getattr(networks, part)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: clock.mark(name)))
        hooks.append(module.register_forward_hook(lambda *_, name=after[part]: clock.mark(name)))
    optimizer = candidate.networks.optimizer
    hooks.append(optimizer.register_step_pre_hook(lambda *_: clock.mark("update")))
    samples = []
    for n in range(rounds):
        clock.mark(PHASES[0])
        candidate.run(n)
        clock.mark("end")
        samples.append(clock.milliseconds())
    for hook in hooks:
        hook.remove()
    return {name: round(statistics.median(s.get(name, 0.0) for s in samples), 3) for name in PHASES}


def timed(candidate: Candidate, n: int, device: torch.device) -> tuple[float, float]:
    """Seconds of one step, wall-clock and CPU time of the process; the device is idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    candidate.run(n)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of every pair, the median over rounds."""
    return {
        f"{a}/{b}": statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        for a in seconds
        for b in seconds
        if a != b
    }


def peak_memory(case: Case, name: str) -> int:
    """Bytes at the peak of a step, weights and optimizer included; the implementation alone on the GPU."""
    before = torch.cuda.memory_allocated()
    candidate = case.make(name)
    torch.cuda.reset_peak_memory_stats()
    for n in range(2):
        candidate.run(n)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def mask_loop_ms(case: Case, rounds: int = 5) -> float:
    """Milliseconds that the published loop over images takes for one batch."""
    generator, samples = torch.Generator().manual_seed(SEED), []
    for _ in range(rounds):
        start = time.perf_counter()
        draw_masks(case.batch, case.grid, generator)
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples)


def measure(case: Case, names: Sequence[str], rounds: int, warm_up: int) -> dict[str, Any]:
    """Check, warm up, then time ``rounds`` steps of each, one after another in turn."""
    memory = {name: peak_memory(case, name) for name in names} if case.device.type == "cuda" else {}
    candidates = [case.make(name) for name in names]
    agreement = check_agreement(case, candidates)
    for n in range(warm_up):
        for candidate in candidates:
            candidate.run(n)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = []
    for n in range(rounds):
        peaks.append(matmul_rate(case.device))
        # Each starts a round once in len(names) rounds: a disturbance that grows within a round hits all alike.
        order = [candidates[(n + i) % len(candidates)] for i in range(len(candidates))]
        for candidate in order:
            wall, cpu = timed(candidate, warm_up + n, case.device)
            seconds[candidate.name].append(wall)
            cpu_seconds[candidate.name].append(cpu)
    peak = statistics.median(peaks)
    report: dict[str, Any] = {"agreement": agreement, "matmul_tflops": peak / 1e12, "implementations": {}}
    for candidate in candidates:
        median = statistics.median(seconds[candidate.name])
        rate = candidate.flops.total * case.batch / median
        report["implementations"][candidate.name] = {
            "images_per_second": case.batch / median,
            "ms": median * 1e3,
            "ms_of_rounds": [round(s * 1e3, 2) for s in seconds[candidate.name]],
            "cpu_ms": statistics.median(cpu_seconds[candidate.name]) * 1e3,
            "phases_ms": phases(candidate, case.device, min(rounds, 5)),
            "context_tokens": candidate.tokens.context,
            "target_tokens": candidate.tokens.targets,
            "useful_gflops_per_image": candidate.flops.total / 1e9,
            "useful_tflops": rate / 1e12,
            "share_of_matmul_peak": rate / peak,
            "peak_memory_bytes": memory.get(candidate.name),
        }
    report["ratio"] = ratios(seconds)
    if case.device.type == "cpu":
        report["cpu_time_ratio"] = ratios(cpu_seconds)
    if "eager" in names:
        report["eager_mask_loop_ms"] = mask_loop_ms(case)
    return report


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit_small")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--masks", choices=("exact", "batch_min"), default="exact")
    parser.add_argument("--impl", default="ours,eager", help="comma-separated, of ours, eager, compiled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32 on the CPU, bf16 on CUDA by default")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args(arguments)
    names = options.impl.split(",")
    for name in names:
        if name not in IMPLEMENTATIONS:
            parser.error(f"--impl must name some of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    model = model_config(options.model, options.img_size)
    case = Case(model, options.batch, options.masks, device, precision, steps=options.rounds + options.warm_up)
    settings = {name: getattr(options, name) for name in ("model", "img_size", "batch", "masks", "rounds", "warm_up")}
    report = {
        "schema": 1,
        "kind": "step",
        "machine": machine(device),
        "settings": settings | {"precision": precision},
        **measure(case, names, options.rounds, options.warm_up),
    }
    for name, result in report["implementations"].items():
        print(
            f"{name:9} {result['ms']:9.1f} ms  {result['images_per_second']:8.2f} images/s  "
            f"{result['useful_tflops']:7.3f} TFLOP/s ({result['share_of_matmul_peak']:.0%} of matmul)  "
            f"{result['context_tokens']:.1f} context tokens"
        )
    for pair, ratio in report["ratio"].items():
        print(f"{pair}: {ratio:.3f}")
    if options.json:
        write_json(options.json, report)
    return report


if __name__ == "__main__":
    main()
