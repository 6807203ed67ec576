"""Run by test_fsdp.py in two processes: FusedAdamW and EMA on shards against the same without sharding.

    python fsdp_checks.py RANK WORLD_SIZE FOLDER

writes FOLDER/RANK.json: name of the check -> "" or the traceback, up to the first that failed.
"""

import copy
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ijepa_fast.optim import EMA, FusedAdamW

SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "max_grad_norm": 0.05}
BATCH = 4


def network(dtype=torch.float32, seed=0):
    """Sizes that two ranks cannot share equally; of the last layer, one rank has nothing."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), nn.Linear(3, 1)).to(dtype)


def shard(module, **options):
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(module, **options)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def equal(module, reference, **tolerance):
    for a, b in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(a.detach()), b.detach(), **tolerance)


def same(module, other):
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())


def backward(module, step, rank=None):
    """Gradients of the mean loss over a batch, of which each rank computes its part."""
    inputs = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))
    if rank is not None:
        inputs = inputs.chunk(dist.get_world_size())[rank]
    module.zero_grad()
    module(inputs.to(next(module.parameters()).dtype)).square().mean().backward()


def trained_pair(steps=4):
    """The same training with and without shards: (module, average, optimizer) each."""
    plain, average = network(), network(seed=1)
    sharded, sharded_average = shard(network()), shard(network(seed=1))
    expected = FusedAdamW(plain.parameters(), ema=average.parameters(), **SETTINGS)
    optimizer = FusedAdamW(sharded.parameters(), ema=sharded_average.parameters(), **SETTINGS)
    for step in range(steps):
        backward(plain, step)
        backward(sharded, step, dist.get_rank())
        expected.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, expected.grad_norm, rtol=1e-5, atol=0)
        assert float(expected.grad_norm) > SETTINGS["max_grad_norm"]
    return (plain, average, expected), (sharded, sharded_average, optimizer)


def check_training_is_that_of_the_whole_model():
    (plain, average, _), (sharded, sharded_average, _) = trained_pair()
    # The shards' gradients are means of two halves: another order of summation.
    equal(sharded, plain, rtol=1e-5, atol=1e-6)
    equal(sharded_average, average, rtol=1e-5, atol=1e-6)
    assert any(p.to_local().numel() == 0 for p in sharded.parameters()) == (dist.get_rank() == 1)


def check_replicated_shards_count_once():
    """HSDP: gradients are whole (in one shard) on both ranks."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    plain, sharded = network(), shard(network(), mesh=mesh)
    expected, optimizer = (FusedAdamW(module.parameters(), **SETTINGS) for module in (plain, sharded))
    backward(plain, 0)
    backward(sharded, 0, dist.get_rank())
    expected.step()
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, expected.grad_norm, rtol=1e-5, atol=0)
    equal(sharded, plain, rtol=1e-5, atol=1e-6)


def check_low_precision_shards_have_masters():
    plain, sharded = network(torch.bfloat16), shard(network(torch.bfloat16))
    average, sharded_average = network(torch.bfloat16), shard(network(torch.bfloat16))
    expected = FusedAdamW(plain.parameters(), ema=average.parameters(), lr=1e-4)
    optimizer = FusedAdamW(sharded.parameters(), ema=sharded_average.parameters(), lr=1e-4)
    for step in range(3):
        backward(plain, step)
        for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
            mine = torch.distributed.tensor.distribute_tensor(b.grad, a.device_mesh, a.placements)
            a.grad = mine
        expected.step()
        optimizer.step()
    equal(sharded, plain, rtol=0, atol=0)
    equal(sharded_average, average, rtol=0, atol=0)
    for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
        for name in ("master", "ema"):
            assert torch.equal(whole(optimizer.state[a][name]), expected.state[b][name])


def check_a_bad_gradient_on_one_rank_stops_all():
    module = shard(network())
    optimizer = FusedAdamW(module.parameters(), lr=0.1)
    before = [whole(p.detach()).clone() for p in module.parameters()]
    backward(module, 0, dist.get_rank())
    if dist.get_rank() == 1:
        next(module.parameters()).grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    assert int(optimizer.skipped) == 1
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(whole(parameter.detach()), old)


def check_state_dicts_of_torch_distributed_continue_to_the_bit(full=False):
    _, (module, average, optimizer) = trained_pair()
    options = StateDictOptions(full_state_dict=full)
    state = copy.deepcopy(
        (
            get_model_state_dict(module, options=options),
            get_model_state_dict(average, options=options),
            get_optimizer_state_dict(module, optimizer, options=options),
        )
    )
    other, other_average = shard(network(seed=2)), shard(network(seed=3))
    resumed = FusedAdamW(other.parameters(), ema=other_average.parameters(), **SETTINGS)
    options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
    set_model_state_dict(other, state[0], options=options)
    set_model_state_dict(other_average, state[1], options=options)
    set_optimizer_state_dict(other, resumed, state[2], options=options)
    for step in range(4, 6):
        for taken, chosen in ((module, optimizer), (other, resumed)):
            backward(taken, step, dist.get_rank())
            chosen.step()
    same(other, module)
    same(other_average, average)


def check_full_state_dicts_of_torch_distributed_continue_to_the_bit():
    check_state_dicts_of_torch_distributed_continue_to_the_bit(full=True)


def check_reading_the_state_before_the_first_step_changes_nothing():
    module, average = shard(network()), shard(network(seed=1))
    optimizer = FusedAdamW(module.parameters(), ema=average.parameters(), lr=0.1)
    state = get_optimizer_state_dict(module, optimizer)["state"]
    assert {name.rpartition(".")[0] for name in state} == {"0", "2", "3"}
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in state.values())
    equal(module, network(), rtol=0, atol=0)
    equal(average, network(seed=1), rtol=0, atol=0)


def check_checkpoint_files_continue_to_the_bit():
    import torch.distributed.checkpoint as dcp

    _, (module, _, optimizer) = trained_pair()
    folder = str(Path(sys.argv[3]) / "checkpoint")
    dcp.save(
        {"model": get_model_state_dict(module), "optim": get_optimizer_state_dict(module, optimizer)},
        checkpoint_id=folder,
    )
    other = shard(network(seed=2))
    resumed = FusedAdamW(other.parameters(), **SETTINGS)
    state = {"model": get_model_state_dict(other), "optim": get_optimizer_state_dict(other, resumed)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, resumed, state["optim"])
    for taken, chosen in ((module, optimizer), (other, resumed)):
        backward(taken, 4, dist.get_rank())
        chosen.step()
    same(other, module)


def check_ema_alone():
    target, source = network(seed=1), network()
    sharded_target, sharded_source = shard(network(seed=1)), shard(network())
    EMA(target, source).update(0.75)
    EMA(sharded_target, sharded_source).update(0.75)
    equal(sharded_target, target, rtol=0, atol=0)


def check_what_does_not_fit_is_refused():
    module = shard(network())
    for settings, message in (
        ({"ema": network().parameters()}, "or is sharded differently"),
        ({"flat_gradients": True}, "for parameters that are not sharded"),
    ):
        try:
            FusedAdamW(module.parameters(), **settings)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{settings} were accepted")


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def main(checks: dict, rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(minutes=5))
    outcomes = {}
    for name, check in checks.items():
        try:
            check()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
            break  # the other ranks may be waiting in a collective: they get an error now
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    if not any(outcomes.values()):
        dist.destroy_process_group()


if __name__ == "__main__":
    main(CHECKS, int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
