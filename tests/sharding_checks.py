"""Run by test_fsdp.py in four processes: shards against whole networks.

    python sharding_checks.py RANK WORLD_SIZE FOLDER

writes FOLDER/RANK.json: name of the check -> "" or the traceback, up to the first that failed.
"""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import Objective
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.optim.step_tensors import local
from ijepa_fast.run import sharded
from ijepa_fast.step.memory import gathered_bytes, state_bytes
from ijepa_fast.step.sharding import fill, shard, shard_mesh
from ijepa_fast.step.train_step import TrainStep
from tests.fsdp_checks import main
from tests.tiny import GRID, MASKS, MODEL, images

STEPS, BATCH = 10, 8
SEVERAL = MaskConfig(min_keep=1, per_image=2)
REGULARISED = Objective(variance_weight=1.0, covariance_weight=0.1, invariance_weight=1.0)
BATCH_MIN = MaskConfig(min_keep=1, group_size=2, context="batch_min")
FOLDER = Path(sys.argv[3]) if len(sys.argv) > 3 else None


def networks(objective=None, dtype=torch.float64):
    """With a projector, which IJEPA calls by itself, if the objective has terms for it."""
    torch.manual_seed(0)
    objective = objective or Objective()
    sizes = replace(MODEL, projector_dim=24) if objective.regularised else MODEL
    return sizes.build(objective).to(dtype)


def optimizer_of(model):
    return FusedAdamW(parameter_groups(model), lr=1e-2, max_grad_norm=0.05)


def trained(layout, masks=MASKS, objective=None, checkpointing=False, accumulate=1, low=None):
    """(losses, networks, optimizer) of ten steps in fp64. Layout: None for one process, "ddp", or the size of a shard
    group, whose shards are fp32 if ``low`` is what they are multiplied and summed over ranks in."""
    model, wrapped = networks(objective, torch.float32 if low else torch.float64), None
    if layout == "ddp":
        wrapped = DistributedDataParallel(model)
    elif layout is not None:
        shard(model, shard_mesh(dist.get_world_size(), layout, "cpu"), low or torch.float64, low)
    for network in (model.context_encoder, model.predictor):
        network.activation_checkpointing = checkpointing
    optimizer, sampler = optimizer_of(model), MaskSampler(masks, GRID)
    schedules = Schedules(total_steps=2 * STEPS, warmup_steps=2)
    step = TrainStep(model, optimizer, sampler, schedules, seed=0, wrapped=wrapped, accumulate=accumulate)
    share = BATCH if layout is None else BATCH // dist.get_world_size()
    first, losses = 0 if layout is None else dist.get_rank() * share, []
    for number in range(STEPS):
        loss = step(images(number, BATCH)[first : first + share], number, first).losses.total
        if layout is not None:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(float(loss))
    assert float(optimizer.grad_norm) > 0.05  # so the norm over all ranks counted
    return losses, model, optimizer


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(layouts, masks=MASKS, objective=None, **settings):
    losses, reference, _ = alone(None, masks, objective)
    for layout in layouts:
        found, model, _ = trained(layout, masks, objective, **settings)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=0, atol=1e-10)
        for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(whole(a.detach()), b.detach(), rtol=0, atol=1e-10, msg=f"{layout}: {name}")


def alone(*arguments):
    """Training in one process, although there are others."""
    with contextlib.ExitStack() as restored:
        for name in ("is_initialized", "is_available"):
            there = getattr(dist, name)
            setattr(dist, name, lambda: False)
            restored.callback(setattr, dist, name, there)
        return trained(*arguments)


def check_all_layouts_train_like_one_process():
    assert_same(["ddp", 4, 2])


def check_several_masks_and_terms_over_the_global_batch():
    assert_same([dist.get_world_size()], SEVERAL, REGULARISED)


def check_pixels_leave_the_target_encoder_out():
    assert_same([dist.get_world_size()], objective=Objective(targets="pixels", prediction_weight=100.0))


def check_sums_in_bf16_are_near_and_shards_stay_fp32():
    expected = torch.tensor(alone(None)[0])
    losses, model, optimizer = trained(dist.get_world_size(), low=torch.bfloat16)
    torch.testing.assert_close(torch.tensor(losses), expected, rtol=0.02, atol=0)
    kept = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    assert {value.dtype for value in kept} == {torch.float32}


def check_only_the_first_rank_builds_whole_networks():
    expected = networks().state_dict()
    for shards in (4, 2):
        with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
            model = networks()
        whole_state = model.state_dict() if dist.get_rank() == 0 else {}
        shard(model, shard_mesh(4, shards, "cpu"), torch.float64)
        fill(model, whole_state)
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(whole(found[name]), value) for name, value in expected.items())


def check_masks_in_groups():
    assert_same([2], BATCH_MIN)


def check_selective_checkpointing_and_micro_batches_change_nothing():
    assert_same([4], checkpointing="selective", accumulate=2)


def check_memory_is_as_estimated():
    """State to the byte; of gathered weights, what modules hold while they run is within the estimate."""
    model = networks(dtype=torch.float32)
    shard(model, shard_mesh(4, 4, "cpu"), torch.float32)
    optimizer, gathered = optimizer_of(model), []

    def count(*_):
        plain = [p for p in model.parameters() if not isinstance(p, DTensor)]
        gathered.append(sum(p.untyped_storage().nbytes() for p in plain))

    for network in (model.context_encoder, model.predictor, model.target_encoder):
        for block in getattr(network, "blocks", None) or network.predictor_blocks:
            block.norm2.register_forward_hook(count)
    masks = MaskSampler(MASKS, GRID).sample(2, seed=0, step=0, first_image=2 * dist.get_rank())
    model(images(0, 2), masks)[0].total.backward()
    held = [*map(local, model.parameters()), *(local(p.grad) for p in model.parameters() if p.grad is not None)]
    held += [local(value) for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert state_bytes(model) == sum(tensor.nbytes for tensor in held)
    block = sum(p.numel() for p in model.context_encoder.blocks[0].parameters()) * 4
    # The block that runs, and what its network has beside blocks: never two blocks, and never a network.
    ends = [model.context_encoder.patch_embed, model.context_encoder.norm]
    rest = sum(p.numel() for end in ends for p in end.parameters()) * 4
    assert block <= max(gathered) <= block + rest <= gathered_bytes(model, 4)


def state_of(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {f"{names[p]}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()}
    return {f"model.{name}": value for name, value in model.state_dict().items()} | moments


def check_shards_are_written_and_read_by_any_number_of_ranks():
    _, model, optimizer = trained(4)
    state, group = state_of(model, optimizer), dist.new_group(backend="gloo")
    for background in (False, True):
        folder = FOLDER / f"step_{background:09d}"
        kept = {name: whole(value).clone() for name, value in state.items()}
        extra = {"only.rank0": torch.arange(3.0)} if dist.get_rank() == 0 else {}
        writing = sharded.save(folder, state | extra, {"step": 1}, group=group, background=background)
        if background:
            for parameter in model.parameters():  # the save has its own copy
                local(parameter.detach()).zero_()
            writing.result()
        dist.barrier()
        assert sharded.about(folder)["step"] == 1 and not list(FOLDER.glob("*.partial"))
        tensors = {name: torch.empty_like(t, device="cpu") for name, t in sharded.empty_tensors(folder).items()}
        sharded.read_into(folder, tensors)  # by one process, whole
        assert tensors.pop("only.rank0").tolist() == [0, 1, 2]
        assert tensors.keys() == kept.keys()
        assert all(torch.equal(tensors[name], kept[name]) for name in kept)
        other = networks()
        shard(other, shard_mesh(4, 2, "cpu"), torch.float64)  # each half of the ranks has all of it
        wanted = state_of(other, optimizer_of(other))
        sharded.read_into(folder, wanted)
        assert all(torch.equal(whole(wanted[name]), kept[name]) for name in kept)


def check_a_failed_save_is_told_and_leaves_nothing():
    tensors = {"x": torch.ones(2)}
    (FOLDER / "locked").write_text("a file where a folder should be")
    dist.barrier()
    for background in (False, True):
        try:
            writing = sharded.save(FOLDER / "locked" / "step", tensors, {}, background=background)
            if background:
                raise sharded.failed(FOLDER / "locked" / "step", writing.exception())
        except OSError as error:
            assert "cannot be written: rank" in str(error), error
        else:
            raise AssertionError("the save went through")


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


if __name__ == "__main__":
    main(CHECKS, int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
