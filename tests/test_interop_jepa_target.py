"""The target encoder of JEPAModel follows any optimizer by itself: once per step, and no step is missed."""

import copy
import gc
import itertools
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from tiny_jepa import images, same, tiny, train, trained, weights
from torch import nn

from ijepa_fast import FusedAdamW, JEPAModel, cast_weights, parameter_groups
from ijepa_fast.jepa_model.following import holds
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
    @pytest.mark.parametrize("follow", [False, True])
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_it_follows_once_per_step(self, make, accumulate, follow):
        model = tiny(total_steps=2)
        optimizers = make(model)
        schedule = Schedules(total_steps=2, momentum=(0.9, 1.0), momentum_shape="cosine")
        expected = [w.double() for w in weights(model.target_encoder)]
        if follow:
            model.follow(*(o for o in optimizers if holds(o, model.context_encoder)))
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
            for ours, theirs in zip(model.target_encoder.parameters(), expected, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
            assert int(model.updates) == step + 1
        assert momentum == 1.0 and model.calls == 3 * accumulate
        assert not any(p.requires_grad or p.grad is not None for p in model.target_encoder.parameters())

    @pytest.mark.parametrize(
        "make",
        [
            lambda model: torch.optim.SGD(model.parameters(), 0.1),
            lambda model: torch.optim.AdamW(model.parameters(), 1e-2, fused=True),
            lambda model: FusedAdamW(model.parameters(), 1e-2),
            lambda model: FusedAdamW(parameter_groups(model), 1e-2),
            lambda model: FusedAdamW(model.context_encoder.parameters(), ema=model.target_encoder.parameters()),
        ],
        ids=["sgd", "adamw fused", "ours", "ours with ema", "ours with ema by hand"],
    )
    @pytest.mark.parametrize("how", ["by itself", "update_target", "follow"])
    def test_steps_that_the_scaler_leaves_out_are_left_out(self, make, how):
        model = tiny()
        optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=8.0)
        if how == "follow":
            model.follow(optimizer)
        for step, bad in enumerate([False, True, False, True, False]):
            before = weights(model.target_encoder)
            scaler.scale(model(images(step))[0]).backward()
            if bad:
                model.context_encoder.norm.bias.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if how == "update_target":
                model.update_target()
            assert same(weights(model.target_encoder), before) == bad
        assert int(model.updates) == 3

    @pytest.mark.parametrize("follow", [False, True])
    def test_a_blocked_step_of_ours_is_left_out(self, follow):
        model = tiny()
        optimizer = FusedAdamW(model.parameters(), 1e-2)
        optimizer.blocked = torch.ones(())
        if follow:
            model.follow(optimizer)
        before = weights(model.target_encoder)
        train(model, optimizer, range(1))
        assert same(weights(model.target_encoder), before) and int(model.updates) == 0

    def test_other_optimizers_do_not_matter(self):
        model, other = tiny(), nn.Linear(2, 2)
        model(images())[0].backward()
        for parameters in (other.parameters(), model.predictor.parameters()):
            optimizer = torch.optim.SGD(parameters, 0.1)
            other(torch.ones(2)).sum().backward()
            optimizer.step()
        model.update_target()
        assert int(model.updates) == 0
        with pytest.raises(ValueError, match="SGD holds no parameters of the context encoder"):
            model.follow(optimizer)

    def test_two_models_in_one_optimizer(self):
        models = [tiny(), tiny()]
        optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], 0.1)
        models[0].follow(optimizer)
        (models[0](images())[0] + models[1](images())[0]).backward()
        optimizer.step()
        for model in models:
            model.update_target()
            assert int(model.updates) == 1

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

    @pytest.mark.parametrize(
        "cast",
        [
            lambda model: model.double(),
            lambda model: model.bfloat16(),
            lambda model: model.to(torch.bfloat16).float(),
            lambda model: model.accelerate(device="cpu", precision="bf16"),
            lambda model: cast_weights(model, torch.float16),
            lambda model: model.context_encoder.bfloat16(),
        ],
        ids=["double", "bf16", "and back", "accelerate", "cast_weights", "context encoder"],
    )
    def test_a_cast_is_no_step(self, cast):
        model = tiny()
        model(images())
        cast(model)
        model.update_target()
        assert int(model.updates) == 0

    def test_a_step_before_a_cast_counts(self):
        model, expected = stepped()
        model.double()
        for ours, theirs in zip(model.target_encoder.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs.double())
        assert int(model.updates) == 1

    def test_a_channels_last_step_is_seen(self):
        model = tiny().to(memory_format=torch.channels_last)
        train(model, torch.optim.SGD([model.context_encoder.patch_embed.proj.weight], 0.1), range(2))
        model.update_target()
        assert int(model.updates) == 2

    def test_a_loop_without_calls_of_the_model_updates_by_hand(self):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(2):
            masks = model.draw_masks(images(step))
            model.losses(model.predict(images(step), masks), masks)[0].total.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_target()
            assert int(model.updates) == step + 1

    @pytest.mark.parametrize("follow", [False, True])
    def test_a_step_that_changes_nothing_counts_where_it_is_followed(self, follow):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        if follow:
            model.follow(optimizer)
        train(model, optimizer, range(2))
        model.update_target()
        assert int(model.updates) == 2 * follow


class TestFollow:
    def test_a_closure(self):
        model = tiny()
        optimizer = torch.optim.LBFGS(trained(model), 0.1, max_iter=3)
        model.follow(optimizer)

        def closure():
            optimizer.zero_grad()
            loss, _ = model(images())
            loss.backward()
            return loss

        for step in range(3):
            optimizer.step(closure)
            model.update_target()
            assert int(model.updates) == step + 1

    @pytest.mark.parametrize("make", ["sgd", "subclass", "two", "ours with ema"])
    @pytest.mark.parametrize("follow", [False, True])
    def test_several_steps_without_a_call_in_between(self, make, follow):
        model = tiny()
        optimizers = OPTIMIZERS[make](model)
        if follow:
            model.follow(*optimizers)
            model.follow(*optimizers)  # a second time changes nothing
        model(images())[0].backward()
        expected = weights(model.target_encoder)
        for step in range(3):
            for optimizer in optimizers:
                optimizer.step()
            if follow or make == "ours with ema" or step == 2:
                now = weights(model.context_encoder)
                expected = [0.9 * e + 0.1 * w for e, w in zip(expected, now, strict=True)]
        for ours, theirs in zip(model.target_encoder.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs)
        assert int(model.updates) == (3 if follow else 1) or make == "ours with ema"

    def test_when_the_optimizer_is_gone_the_model_looks_by_itself_again(self):
        model = tiny()
        model.follow(torch.optim.SGD(model.parameters(), 0.1))
        gc.collect()
        train(model, torch.optim.SGD(model.parameters(), 0.1), range(2))
        model.update_target()
        assert int(model.updates) == 2

    @pytest.mark.parametrize("read", ["state_dict", "update_target"])
    def test_its_last_step_counts_when_it_is_gone(self, read):
        model = tiny()

        def loop():
            optimizer = torch.optim.AdamW(model.parameters())
            model.follow(optimizer)
            train(model, optimizer, range(3))

        loop()
        gc.collect()
        getattr(model, read)()
        assert int(model.updates) == 3
        train(model, torch.optim.SGD(model.parameters(), 0.1), range(2))
        model.update_target()
        assert int(model.updates) == 5

    def test_all_or_none_average_by_themselves(self):
        model = tiny()
        source, target = model.context_encoder, model.target_encoder
        ours = FusedAdamW(source.blocks.parameters(), ema=target.blocks.parameters())
        rest = torch.optim.AdamW(source.norm.parameters())
        with pytest.raises(ValueError, match="all or none must average by themselves .*, got AdamW, FusedAdamW"):
            model.follow(ours, rest)
        model.follow(ours)
        with pytest.raises(ValueError, match="all or none"):
            model.follow(rest)

    def test_loading_other_weights_forgets_the_step(self):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.follow(optimizer)
        train(model, optimizer, range(1))
        model.load_state_dict(tiny(seed=1).state_dict())
        model.update_target()
        assert int(model.updates) == 0


def stepped() -> tuple[JEPAModel, list[torch.Tensor]]:
    """A model whose optimizer has stepped, and what its target encoder then has to be."""
    model = tiny()
    train(model, torch.optim.SGD(model.parameters(), 0.1), range(1))
    pairs = zip(weights(model._modules["target_encoder"]), weights(model.context_encoder), strict=True)
    return model, [0.9 * target + 0.1 * source for target, source in pairs]


def in_inference_mode(model: JEPAModel) -> dict:
    with torch.inference_mode():
        model.target_encoder(images())
    return cut(model.state_dict())


class TestNothingIsMissed:
    READERS = {
        "target_encoder": lambda model: model.target_encoder.state_dict(),
        "inference": in_inference_mode,
        "state_dict": lambda model: cut(model.state_dict()),
        "the state dict of a wrapper": lambda model: cut(nn.ModuleDict({"m": model}).state_dict(), "m."),
        "deepcopy": lambda model: copy.deepcopy(model).target_encoder.state_dict(),
        "pickle": lambda model: pickle.loads(pickle.dumps(model)).target_encoder.state_dict(),
        "update_target": lambda model: [model.update_target(), cut(model.state_dict())][1],
        "a call": lambda model: [model(images()), cut(model.state_dict())][1],
        "a call in eval mode": lambda model: [model.eval()(images()), cut(model.state_dict())][1],
    }

    @pytest.mark.parametrize("read", READERS.values(), ids=READERS)
    def test_readers(self, read):
        model, expected = stepped()
        found = read(model)
        for (name, _), theirs in zip(model.target_encoder.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name], theirs)
        assert int(model.updates) == 1

    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
    def test_a_loaded_target_is_averaged_on(self, precision):
        model = tiny(ema_momentum=0.5).to(precision)
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, range(2))
        model.load_state_dict({name: torch.full_like(value, 7) for name, value in model.state_dict().items()})
        model.update_target()
        with torch.no_grad():
            for parameter in model.context_encoder.parameters():
                parameter += 1
        model.update_target()
        assert all(torch.equal(w, torch.full_like(w, 7.5)) for w in weights(model.target_encoder))

    def test_a_step_before_the_context_encoder_alone_is_loaded_counts(self):
        for load in (
            lambda model, state: model.context_encoder.load_state_dict(state),
            lambda model, state: model.load_state_dict({f"context_encoder.{k}": state[k] for k in state}, strict=False),
        ):
            model, expected = stepped()
            load(model, tiny(encoder_heads=2).context_encoder.state_dict())
            for ours, theirs in zip(model.target_encoder.parameters(), expected, strict=True):
                torch.testing.assert_close(ours.detach(), theirs)
            assert int(model.updates) == 1

    def test_an_encoder_is_copied_alone(self):
        encoder = pickle.loads(pickle.dumps(copy.deepcopy(tiny().context_encoder)))
        assert encoder.model is None
        encoder.load_state_dict(encoder.state_dict())

    @pytest.mark.parametrize("whole", [False, True])
    def test_loading_other_weights_is_no_step(self, whole):
        model, _ = stepped()
        loaded = tiny(seed=1)
        for part in ("context_encoder", "target_encoder"):
            model.get_submodule(part).load_state_dict(loaded.get_submodule(part).state_dict())
        if whole:
            model.load_state_dict(loaded.state_dict())
        assert same(model.target_encoder.parameters(), loaded.target_encoder.parameters())
        updates = 0 if whole else 1  # of the step before
        assert int(model.updates) == updates
        train(model, torch.optim.SGD(model.parameters(), 0.1), range(1))
        model.update_target()
        assert int(model.updates) == updates + 1


def cut(state: dict, prefix: str = "") -> dict:
    prefix += "target_encoder."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


class TestUpdateTarget:
    def test_after_each_step_it_changes_nothing(self):
        model, alone = tiny(), tiny()
        train(model, torch.optim.SGD(model.parameters(), 0.1), range(3), after=model.update_target)
        train(alone, torch.optim.SGD(alone.parameters(), 0.1), range(3))
        alone.update_target()
        assert int(model.updates) == int(alone.updates) == 3 and same(model.parameters(), alone.parameters())

    def test_weights_that_were_changed_by_hand(self):
        model = tiny()
        model(images())
        with torch.no_grad():
            model.context_encoder.norm.bias += 1
        model.update_target()
        torch.testing.assert_close(model.target_encoder.norm.bias, torch.full((16,), 0.1), rtol=0, atol=1e-6)
        model.update_target()
        assert int(model.updates) == 1

    def test_without_auto_ema_only_calls_count(self):
        model = tiny(auto_ema=False)
        before = weights(model.target_encoder)
        train(model, torch.optim.SGD(model.parameters(), 0.1), range(2))
        assert int(model.updates) == 0 and same(weights(model.target_encoder), before)
        model.update_target()
        model.update_target()
        assert int(model.updates) == 2 and not same(weights(model.target_encoder), before)


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
        with torch.no_grad():  # FSDP leaves the gathered parameters of the outermost module behind
            model.eval()(images(step)[:2])
        model.train()
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
