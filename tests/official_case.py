"""One small I-JEPA training run, as numbers: what tests/golden/official.json holds of the official code.

`run(api, dtype)` is the same for the official modules (tests/golden/make_official.py) and for ours. Weights, images and
masks come from formulas, so that no random generator is involved.

Legend: B images, N patches, C context masks, M target masks.
"""

import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, PATCH, WIDTH, HEADS, DEPTH = 48, 8, 24, 3, 2
PREDICTOR_WIDTH, PREDICTOR_DEPTH = 12, 2
B, N, STEPS = 3, 36, 10
SCHEDULE = {
    "iterations_per_epoch": 5,
    "start_lr": 2e-4,
    "ref_lr": 1e-3,
    "warmup": 1,
    "num_epochs": 4,
    "wd": 0.04,
    "final_wd": 0.4,
    "final_lr": 1e-6,
    "ipe_scale": 1.25,
}
SCHEDULE_STEPS = 25  # ipe_scale * num_epochs * iterations_per_epoch
MOMENTUM = (0.996, 1.0)
MOMENTUM_STEPS = 20


def wave(shape: tuple[int, ...], phase: float, scale: float) -> Tensor:
    """scale * sin(0.7 * i + phase) over the flattened index i, fp64."""
    count = math.prod(shape)
    return (torch.arange(count, dtype=torch.float64) * 0.7 + phase).sin().mul(scale).view(shape)


@torch.no_grad()
def fill(module: nn.Module, phase: float) -> None:
    """Weights by formula: matrices of amplitude 0.1, norm weights around 1; position tables stay."""
    for number, (name, parameter) in enumerate(module.named_parameters()):
        if name.endswith("pos_embed"):
            continue
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(base + wave(tuple(parameter.shape), phase + number, 0.1))


def images(step: int) -> Tensor:
    return wave((B, 3, SIDE, SIDE), 100.0 + step, 1.5)


def masks(step: int, count: int, kept: int, offset: int) -> list[Tensor]:
    """`count` int64 masks [B, kept] of ascending patches."""
    found = []
    for block in range(count):
        rows = [sorted((5 * i + 7 * b + 3 * block + offset + step) % N for i in range(kept)) for b in range(B)]
        found.append(torch.tensor(rows))
    return found


def context_masks(step: int) -> list[Tensor]:
    return masks(step, 2, 11, 0)


def target_masks(step: int) -> list[Tensor]:
    return masks(step, 3, 6, 1)


def digest(tensor: Tensor) -> list[float]:
    """Norm, and products with two waves: changes with every element and with their order."""
    flat = tensor.detach().double().flatten()
    probes = [wave((flat.numel(),), phase, 1.0) for phase in (0.0, 1.3)]
    return [float(flat.norm()), *(float(flat @ probe) for probe in probes)]


def models(api: SimpleNamespace, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Encoder, predictor and target encoder with the weights of the case."""
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    encoder = api.VisionTransformer([SIDE], PATCH, mlp_ratio=4, qkv_bias=True, **sizes, **api.norm).to(dtype)
    predictor = api.VisionTransformerPredictor(
        num_patches=N,
        embed_dim=WIDTH,
        predictor_embed_dim=PREDICTOR_WIDTH,
        depth=PREDICTOR_DEPTH,
        num_heads=HEADS,
        mlp_ratio=4,
        qkv_bias=True,
        **api.norm,
    ).to(dtype)
    fill(encoder, 0.0)
    fill(predictor, 0.5)
    target = copy.deepcopy(encoder)
    fill(target, 0.2)
    return encoder, predictor, target.requires_grad_(False)


def loss_of(api: SimpleNamespace, encoder, predictor, target, x: Tensor, context, targets) -> tuple[Tensor, Tensor]:
    """Smooth-L1 between predictions and normalised target features; also the predictions."""
    with torch.no_grad():
        features = F.layer_norm(target(x), (WIDTH,))
        wanted = api.repeat_interleave_batch(api.apply_masks(features, targets), B, repeat=len(context))
    predicted = predictor(encoder(x, context), context, targets)
    return F.smooth_l1_loss(predicted, wanted), predicted


def run(api: SimpleNamespace, dtype: torch.dtype) -> dict:
    """Everything that is compared, as plain numbers."""
    encoder, predictor, target = models(api, dtype)
    found = {
        "names": {
            part: [[name, list(value.shape)] for name, value in module.state_dict().items()]
            for part, module in (("encoder", encoder), ("predictor", predictor))
        },
        "positions": {"encoder": digest(encoder.pos_embed), "predictor": digest(predictor.predictor_pos_embed)},
    }
    x, context, targets = images(0).to(dtype), context_masks(0), target_masks(0)
    found["features"] = {
        "all": digest(encoder(x)),
        "context": digest(encoder(x, context)),
        "shape": list(encoder(x, context).shape),
    }
    loss, predicted = loss_of(api, encoder, predictor, target, x, context, targets)
    loss.backward()
    found["predicted"] = {"values": digest(predicted), "shape": list(predicted.shape)}
    networks = {"encoder": encoder, "predictor": predictor}
    found["gradients"] = {
        f"{part}.{name}": digest(parameter.grad)
        for part, module in networks.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    for module in networks.values():
        module.zero_grad()
    _, _, schedule, decay_schedule = api.init_opt(encoder=encoder, predictor=predictor, **SCHEDULE)
    found["schedules"] = {
        "lr": [schedule.step() for _ in range(SCHEDULE_STEPS)],
        "weight_decay": [decay_schedule.step() for _ in range(SCHEDULE_STEPS)],
    }
    found |= train(api, encoder, predictor, target, dtype)
    return found


def train(api: SimpleNamespace, encoder, predictor, target, dtype: torch.dtype) -> dict:
    """Ten steps of optimizer and EMA: losses, schedule values, weights at the end, and the optimizer's numbering."""
    optimizer, _, schedule, decay_schedule = api.init_opt(encoder=encoder, predictor=predictor, **SCHEDULE)
    found = {"loss": [], "lr": [], "weight_decay": [], "momentum": []}
    for step in range(STEPS):
        found["lr"].append(schedule.step())
        found["weight_decay"].append(decay_schedule.step())
        momentum = MOMENTUM[0] + step * (MOMENTUM[1] - MOMENTUM[0]) / MOMENTUM_STEPS
        found["momentum"].append(momentum)
        loss, _ = loss_of(
            api, encoder, predictor, target, images(step).to(dtype), context_masks(step), target_masks(step)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(target.parameters(), encoder.parameters(), strict=True):
                average.lerp_(parameter, 1 - momentum)
        found["loss"].append(float(loss.detach()))
    found["weights"] = {
        f"{part}.{name}": digest(value)
        for part, module in (("encoder", encoder), ("predictor", predictor), ("target_encoder", target))
        for name, value in module.state_dict().items()
    }
    state = optimizer.state_dict()
    found["optimizer"] = {
        "groups": [group["params"] for group in state["param_groups"]],
        "excluded": [bool(group.get("WD_exclude")) for group in state["param_groups"]],
        "weight_decay": [float(group["weight_decay"]) for group in state["param_groups"]],
        "with_state": sorted(state["state"]),
        "exp_avg": {str(number): digest(values["exp_avg"]) for number, values in state["state"].items()},
        "step": sorted({float(values["step"]) for values in state["state"].values()}),
    }
    return found
