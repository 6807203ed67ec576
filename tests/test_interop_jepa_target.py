"""The target encoder of JEPAModel follows any optimizer by itself: once per step, and no step is missed."""

import copy
import gc
import itertools
import logging
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from tiny_jepa import images, same, tiny, train, trained, weights
from torch import nn

from ijepa_fast import FusedAdamW, JEPAModel, parameter_groups
from ijepa_fast.jepa_model import model as jepa_model
from ijepa_fast.jepa_model import optimizer_steps
from ijepa_fast.optim.schedules import Schedules


class Half(torch.optim.SGD):
    """A subclass around another step, whose hooks are therefore called twice; the weights move after the inner one."""

    def step(self, closure=None):
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)
        with torch.no_grad():
            for p, old in zip((p for group in self.param_groups for p in group["params"]), before, strict=True):
                p.lerp_(old, 0.5)


class Around(torch.optim.Optimizer):
    """An optimizer around another one."""

    def __init__(self, params):
        self.inner = torch.optim.SGD(params, 0.1)
        super().__init__(self.inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.99)


def halves(model: JEPAModel) -> list[torch.optim.Optimizer]:
    wide = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim != 2]
    return [torch.optim.SGD(wide, 0.1), torch.optim.AdamW(rest, 1e-2)]


OPTIMIZERS = {
    "sgd": lambda model: [torch.optim.SGD(model.parameters(), 0.1)],
    "adamw foreach": lambda model: [torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)],
    "adamw fused": lambda model: [torch.optim.AdamW(model.parameters(), 1e-2, fused=True)],
    "ours": lambda model: [FusedAdamW(model.parameters(), 1e-2)],
    "ours with ema": lambda model: [FusedAdamW(parameter_groups(model), 1e-2, momentum=0.1)],
    "two": halves,
    "muon and adamw": lambda model: [torch.optim.Muon(halves(model)[0].param_groups[0]["params"]), halves(model)[1]],
    "subclass": lambda model: [Half(trained(model), 0.1)],
    "around": lambda model: [Around(trained(model))],
    "encoder and predictor": lambda model: [
        torch.optim.SGD(model.predictor.parameters(), 0.1),
        torch.optim.SGD(model.context_encoder.parameters(), 0.1),
    ],
}


class TestTargetEncoder:
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_it_follows_once_per_step(self, make, accumulate):
        model = tiny(total_steps=2)
        optimizers = make(model)
        schedule = Schedules(total_steps=2, momentum=0.9)
        expected = [w.double() for w in weights(model.target_encoder)]
        held = model.target_encoder  # nobody asks the model for it again
        for step in range(3):
            momentum = schedule.momentum_at(step)
            for part in range(accumulate):
                loss, metrics = model(images(step * accumulate + part))
                loss.backward()
                assert math.isclose(metrics["momentum"], momentum)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            expected = [
                momentum * target + (1 - momentum) * source.double()
                for target, source in zip(expected, weights(model.context_encoder), strict=True)
            ]
            assert int(model.updates) == step + 1
            for ours, theirs in zip(held.parameters(), expected, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
        assert momentum == 1.0 and model.calls == 3 * accumulate
        assert not any(p.requires_grad or p.grad is not None for p in held.parameters())

    def test_a_closure(self):
        model = tiny()
        optimizer = torch.optim.LBFGS(trained(model), 0.1, max_iter=3)

        def closure():
            optimizer.zero_grad()
            loss, _ = model(images())
            loss.backward()
            return loss

        for step in range(3):
            optimizer.step(closure)
            assert int(model.updates) == step + 1

    @pytest.mark.parametrize(
        "make",
        [
            lambda model: torch.optim.SGD(model.parameters(), 0.1),
            lambda model: torch.optim.AdamW(model.parameters(), 1e-2, fused=True),
            lambda model: FusedAdamW(model.parameters(), 1e-2),
            lambda model: FusedAdamW(parameter_groups(model), 1e-2),
        ],
        ids=["sgd", "adamw fused", "ours", "ours with ema"],
    )
    @pytest.mark.parametrize("explicit", [False, True])
    def test_steps_that_the_scaler_leaves_out_are_left_out(self, make, explicit):
        model = tiny()
        optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=8.0)
        for step, bad in enumerate([False, True, False, True, False]):
            before = weights(model.target_encoder)
            scaler.scale(model(images(step))[0]).backward()
            if bad:
                model.context_encoder.norm.bias.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if explicit:
                model.update_target()
            assert same(weights(model.target_encoder), before) == bad
        assert int(model.updates) == 3

    def test_a_blocked_step_of_ours_is_left_out(self):
        model = tiny()
        optimizer = FusedAdamW(model.parameters(), 1e-2)
        optimizer.blocked = torch.ones(())
        before = weights(model.target_encoder)
        model(images())[0].backward()
        optimizer.step()
        assert int(model.updates) == 0 and same(weights(model.target_encoder), before)

    def test_an_interrupted_step_leaves_nothing_behind(self):
        class Interrupted(torch.optim.SGD):
            broken = True

            def step(self, closure=None):
                super().step(closure)
                if self.broken:
                    raise KeyboardInterrupt

        model = tiny()
        optimizer = Interrupted(trained(model), 0.1)
        model(images())[0].backward()
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        assert int(model.updates) == 0
        optimizer.broken = False
        optimizer.step()
        assert int(model.updates) == 1

    def test_other_optimizers_do_not_matter(self):
        model, other = tiny(), nn.Linear(2, 2)
        for parameters in (other.parameters(), model.predictor.parameters()):
            optimizer = torch.optim.SGD(parameters, 0.1)
            other(torch.ones(2)).sum().backward()
            optimizer.step()
        assert int(model.updates) == 0

    def test_two_models_in_one_optimizer_and_one_that_is_gone(self):
        first, second = tiny(), tiny()
        gone = tiny()
        gc.collect()  # models of earlier tests
        before = len(optimizer_steps._watchers)
        del gone
        gc.collect()
        assert len(optimizer_steps._watchers) == before - 1
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1)
        (first(images())[0] + second(images())[0]).backward()
        optimizer.step()
        assert int(first.updates) == int(second.updates) == 1

    def test_weights_that_move_and_change_type_are_found_again(self):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for change in (lambda: None, model.double, model.float):
            change()
            expected = [0.9 * w for w in weights(model.target_encoder)]
            model(images().float().to(model.predictor.mask_token.dtype))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            expected = [e + 0.1 * w for e, w in zip(expected, weights(model.context_encoder), strict=True)]
            for ours, theirs in zip(model.target_encoder.parameters(), expected, strict=True):
                torch.testing.assert_close(ours.detach(), theirs)


def half_stepped() -> tuple[JEPAModel, list[torch.Tensor]]:
    """A model of which one of two optimizers has stepped, and what its target encoder then has to be."""
    model = tiny()
    first, _ = halves(model)
    model(images())[0].backward()
    first.step()
    held = model._modules["target_encoder"]
    pairs = zip(weights(held), weights(model.context_encoder), strict=True)
    expected = [0.9 * target + 0.1 * source for target, source in pairs]
    assert int(model.updates) == 0
    return model, expected


class TestNothingIsMissed:
    """Where only a part of the parameters was stepped, the update happens when something needs it."""

    READERS = {
        "target_encoder": lambda model: model.target_encoder.state_dict(),
        "state_dict": lambda model: cut(model.state_dict()),
        "the state dict of a wrapper": lambda model: cut(nn.ModuleDict({"m": model}).state_dict(), "m."),
        "deepcopy": lambda model: copy.deepcopy(model).target_encoder.state_dict(),
        "pickle": lambda model: pickle.loads(pickle.dumps(model)).target_encoder.state_dict(),
        "update_target": lambda model: [model.update_target(), cut(model.state_dict())][1],
        "a call": lambda model: [model(images()), cut(model.state_dict())][1],
    }

    @pytest.mark.parametrize("read", READERS.values(), ids=READERS)
    def test_readers(self, read):
        model, expected = half_stepped()
        found = read(model)
        for (name, _), theirs in zip(model.target_encoder.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name], theirs)
        assert int(model.updates) == 1

    def test_loading_other_weights_forgets_the_step(self):
        model, _ = half_stepped()
        loaded = tiny(seed=1).state_dict()
        model.load_state_dict(loaded)
        assert same(weights(model.target_encoder), [loaded[f"target_encoder.{n}"] for n, _ in named(model)])
        assert int(model.updates) == 0

    def test_the_same_optimizer_twice(self):
        model = tiny()
        optimizer, _ = halves(model)
        model(images())[0].backward()
        optimizer.step()
        optimizer.step()
        assert int(model.updates) == 1  # of the first, which was due before the second
        model.update_target()
        assert int(model.updates) == 2


def named(model: JEPAModel):
    return model.target_encoder.named_parameters()


def cut(state: dict, prefix: str = "") -> dict:
    prefix += "target_encoder."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


class TestUpdateTarget:
    def test_after_each_step_it_changes_nothing(self):
        model, alone = tiny(), tiny()
        for one in (model, alone):
            optimizer = torch.optim.SGD(one.parameters(), 0.1)
            for step in range(3):
                one(images(step))[0].backward()
                optimizer.step()
                with torch.no_grad():  # somebody clips weights
                    one.context_encoder.norm.weight.clamp_(max=0.9)
                optimizer.zero_grad()
                if one is model:
                    one.update_target()
        assert int(model.updates) == 3 and same(model.parameters(), alone.parameters())

    def test_weights_that_were_changed_by_hand(self):
        model = tiny()
        with torch.no_grad():
            model.context_encoder.norm.bias += 1
        model.update_target()
        torch.testing.assert_close(model.target_encoder.norm.bias, torch.full((16,), 0.1), rtol=0, atol=1e-6)
        model.update_target()
        assert int(model.updates) == 1

    def test_without_auto_ema_only_calls_count(self):
        model = tiny(auto_ema=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = weights(model.target_encoder)
        model(images())[0].backward()
        optimizer.step()
        assert int(model.updates) == 0 and same(weights(model.target_encoder), before)
        model.update_target()
        model.update_target()
        assert int(model.updates) == 2 and not same(weights(model.target_encoder), before)

    def test_a_target_that_never_moves_is_reported(self, monkeypatch, caplog):
        monkeypatch.setattr(jepa_model, "_PATIENCE", 3)
        model = tiny()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                model(images())
            assert not caplog.records
            for _ in range(5):
                model(images())
        assert len(caplog.records) == 1 and "auto_ema=False" in caplog.text


def distributed(model: JEPAModel, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    blocks = (model.context_encoder.blocks, model.target_encoder.blocks, model.predictor.predictor_blocks)
    for block in itertools.chain(*blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def rank_main(rank: int, how: str, store: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    inner = tiny()
    model = distributed(inner, how)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    for step in range(2):
        loss, _ = model(images(step)[rank * 2 : rank * 2 + 2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in inner.state_dict().items()}
    queue.put((rank, {name: value.numpy() for name, value in state.items()}))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_ranks_are_one_process_with_twice_the_images(how, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    store = str(tmp_path / "store")
    processes = [context.Process(target=rank_main, args=(rank, how, store, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    single = tiny()
    train(single, torch.optim.SGD(single.parameters(), 0.1), range(2))
    for rank, (name, value) in itertools.product(found, single.state_dict().items()):
        torch.testing.assert_close(torch.as_tensor(found[rank][name]), value, rtol=1e-4, atol=1e-6)
