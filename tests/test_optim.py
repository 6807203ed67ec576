"""FusedAdamW against torch.optim.AdamW and a separate EMA, in every precision, and as an ordinary optimizer."""

import copy

import pytest
import torch
from torch import nn

from ijepa_fast import ops
from ijepa_fast.optim import EMA, FusedAdamW, parameter_groups
from tests.tiny import tiny_model

STEPS = 6


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).to(dtype)


def give_gradients(module, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        parameter.grad = gradient.to(parameter.dtype)


def same(first, second, **tolerance):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_equals_torch_adamw_and_an_ema_afterwards():
    ours, theirs = network(), network()
    ours_average, theirs_average = network(), network()
    optimizer = FusedAdamW(ours.parameters(), ema=ours_average.parameters(), lr=0.01, weight_decay=0.1, momentum=0.9)
    expected = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        for group in (optimizer.param_groups[0], expected.param_groups[0]):
            group["lr"] = 0.01 / (step + 1)
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        expected.step()
        with torch.no_grad():
            for average, parameter in zip(theirs_average.parameters(), theirs.parameters(), strict=True):
                average.mul_(0.9).add_(parameter, alpha=0.1)
    same(ours, theirs, rtol=1e-12, atol=1e-14)
    same(ours_average, theirs_average, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_step_on_the_cpu_is_what_the_ops_do_without_dispatching_them(dtype, monkeypatch):
    straight, dispatched = (network(dtype), network(dtype)), (network(dtype), network(dtype))
    optimizers = []
    for module, average in (straight, dispatched):
        optimizers.append(FusedAdamW(module.parameters(), ema=average.parameters(), lr=0.01, max_grad_norm=0.5))
        give_gradients(module, 0)
        optimizers[-1].step()
    monkeypatch.setattr(optimizers[1]._tensors, "_grad_norm", ops.grad_norm)
    monkeypatch.setattr(optimizers[1]._tensors, "_adamw_ema", ops.adamw_ema_)
    for step in range(1, STEPS):
        calls = []
        for (module, _), optimizer in zip((straight, dispatched), optimizers, strict=True):
            give_gradients(module, step)
            # Also for autograd: a graph that saved a parameter must learn that it has changed.
            versions = [parameter._version for parameter in module.parameters()]
            with torch.profiler.profile() as profile:
                optimizer.step()
            calls.append({event.key for event in profile.key_averages() if event.key.startswith("ijepa_fast::")})
            assert all(p._version > v for p, v in zip(module.parameters(), versions, strict=True))
        assert calls == [set(), {"ijepa_fast::grad_norm", "ijepa_fast::adamw_ema_"}]
    for one, other in zip(straight, dispatched, strict=True):
        same(one, other, rtol=0, atol=0)


def test_clipping_equals_torch():
    ours, theirs = network(), network()
    optimizer = FusedAdamW(ours.parameters(), lr=0.01, weight_decay=0.0, max_grad_norm=0.5)
    expected = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(STEPS):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        expected.step()
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-12)
    same(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_rounded_masters(dtype):
    low, average = network(dtype), network(dtype)
    wide = network(dtype).float()
    wide_average = copy.deepcopy(wide)
    optimizer = FusedAdamW(low.parameters(), ema=average.parameters(), lr=1e-4, momentum=0.99)
    expected = FusedAdamW(wide.parameters(), ema=wide_average.parameters(), lr=1e-4, momentum=0.99)
    for step in range(STEPS):
        give_gradients(low, step)
        for a, b in zip(wide.parameters(), low.parameters(), strict=True):
            a.grad = b.grad.float()
        optimizer.step()
        expected.step()
    for parameter, reference in zip(low.parameters(), wide.parameters(), strict=True):
        assert optimizer.state[parameter]["master"].dtype == torch.float32
        torch.testing.assert_close(optimizer.state[parameter]["master"], reference.detach(), rtol=0, atol=0)
        torch.testing.assert_close(parameter, reference.to(dtype), rtol=0, atol=0)
    for twin, reference in zip(average.parameters(), wide_average.parameters(), strict=True):
        torch.testing.assert_close(twin, reference.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_change_nothing_and_are_counted(bad):
    module, average = network(), network()
    optimizer = FusedAdamW(module.parameters(), ema=average.parameters(), lr=0.1, momentum=0.5)
    give_gradients(module, 0)
    optimizer.step()
    before = copy.deepcopy((module, average, optimizer.state_dict()["state"]))
    give_gradients(module, 1)
    module[0].weight.grad[2, 3] = bad
    optimizer.step()
    same(module, before[0], rtol=0, atol=0)
    same(average, before[1], rtol=0, atol=0)
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(value, before[2][key][name], rtol=0, atol=0)
    assert int(optimizer.skipped) == 1


def test_blocked_steps_change_nothing():
    module = network()
    before = copy.deepcopy(module)
    optimizer = FusedAdamW(module.parameters(), lr=0.1)
    optimizer.blocked = torch.ones(())
    give_gradients(module, 0)
    optimizer.step()
    same(module, before, rtol=0, atol=0)
    assert int(optimizer.skipped) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_continues_to_the_bit(dtype):
    straight, resumed = network(dtype), network(dtype)
    optimizer = FusedAdamW(straight.parameters(), lr=0.01)
    for step in range(3):
        give_gradients(straight, step)
        optimizer.step()
    resumed.load_state_dict(straight.state_dict())
    other = FusedAdamW(resumed.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, STEPS):
        for module, taken in ((straight, optimizer), (resumed, other)):
            give_gradients(module, step)
            taken.step()
    same(straight, resumed, rtol=0, atol=0)


def test_added_groups_have_their_own_bias_correction():
    first, late = network(), network()
    optimizer = FusedAdamW(first.parameters(), lr=0.01, weight_decay=0.0)
    give_gradients(first, 0)
    optimizer.step()
    optimizer.add_param_group({"params": list(late.parameters()), "lr": 0.02})
    give_gradients(late, 1)
    before = copy.deepcopy(late)
    optimizer.step()
    # Adam's first step has length lr in every coordinate, whatever the gradient.
    for parameter, old in zip(late.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close((parameter - old).abs(), torch.full_like(old, 0.02), rtol=1e-5, atol=0)


def test_schedulers_and_parameters_without_gradient():
    module = network()
    optimizer = FusedAdamW(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = copy.deepcopy(module)
    give_gradients(module, 0)
    module[0].bias.grad = None
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    torch.testing.assert_close(module[0].bias, before[0].bias, rtol=0, atol=0)
    assert not torch.equal(module[0].weight, before[0].weight)


def test_grad_scaler_gives_the_unscaled_step():
    plain, scaled = network(torch.float32), network(torch.float32)
    first = FusedAdamW(plain.parameters(), lr=0.01)
    second = FusedAdamW(scaled.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        plain(x).square().mean().backward()
        first.step()
        first.zero_grad()
        scaler.scale(scaled(x).square().mean()).backward()
        scaler.step(second)
        scaler.update()
        second.zero_grad()
    same(plain, scaled, rtol=1e-5, atol=1e-7)
    scaler.scale(scaled(x).square().mean() * float("inf")).backward()
    before = copy.deepcopy(scaled)
    scaler.step(second)
    scaler.update()
    same(scaled, before, rtol=0, atol=0)
    assert scaler.get_scale() == 512.0


def test_what_the_scaler_found_stops_the_step():
    """Other optimizers of the same scaler, or other ranks, may have seen what is not in these gradients."""
    module = network()
    before = copy.deepcopy(module)
    optimizer = FusedAdamW(module.parameters(), lr=0.1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    give_gradients(module, 0)
    optimizer.step()
    same(module, before, rtol=0, atol=0)
    assert int(optimizer.skipped) == 1


def test_main_grad_takes_the_place_of_grad():
    plain, main = network(), network()
    first, second = FusedAdamW(plain.parameters(), lr=0.01), FusedAdamW(main.parameters(), lr=0.01)
    give_gradients(plain, 0)
    for parameter, other in zip(main.parameters(), plain.parameters(), strict=True):
        parameter.main_grad = other.grad.clone()
    first.step()
    second.step()
    same(plain, main, rtol=0, atol=0)


def test_four_groups_of_the_official_recipe():
    model = tiny_model()
    groups = parameter_groups(model)
    assert [g["name"] for g in groups] == ["encoder-decay", "predictor-decay", "encoder-nodecay", "predictor-nodecay"]
    names = {p: n for n, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            assert name.startswith("context_encoder." if "encoder" in group["name"] else "predictor.")
            assert group["decays"] == (parameter.ndim > 1)
    assert model.predictor.mask_token in set(groups[1]["params"])
    trained = {p for p in model.parameters() if p.requires_grad}
    assert {p for g in groups for p in g["params"]} == trained
    for group in (groups[0], groups[2]):
        for parameter, twin in zip(group["params"], group["ema"], strict=True):
            assert names[twin] == names[parameter].replace("context_encoder", "target_encoder")


@pytest.mark.parametrize("norm_is_a_layer", [False, True])
def test_layer_decay_scales_by_depth(norm_is_a_layer):
    model = tiny_model()
    groups = parameter_groups(model, layer_decay=0.5, norm_is_a_layer=norm_is_a_layer)
    names = {p: n for n, p in model.named_parameters()}
    scale = {names[p]: g["lr_scale"] for g in groups for p in g["params"]}
    depth, last = len(model.context_encoder.blocks), 0.5 if norm_is_a_layer else 1
    assert scale["context_encoder.norm.weight"] == 1
    assert scale["context_encoder.blocks.1.attn.qkv.weight"] == last
    assert scale["context_encoder.blocks.0.mlp.fc1.bias"] == 0.5 * last
    assert scale["context_encoder.patch_embed.proj.weight"] == 0.5**depth * last
    assert scale["predictor.mask_token"] == 1
    with pytest.raises(ValueError, match="layer_decay must lie in .*, got 1.5"):
        parameter_groups(model, layer_decay=1.5)


def test_ema_alone():
    source, target = network(torch.float32), nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    expected = [0.75 * t + 0.25 * s for t, s in zip(target.parameters(), source.parameters(), strict=True)]
    EMA(target, source).update(0.75)
    for parameter, value in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value.detach())
    with pytest.raises(ValueError, match="differ in parameters"):
        EMA(nn.Linear(5, 7, bias=False), nn.Linear(5, 7))
    with pytest.raises(ValueError, match=r"weight is \(7, 4\) in the target, \(7, 5\) here"):
        EMA(nn.Linear(4, 7), nn.Linear(5, 7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive or None, got 0.0"),
        ({"ema": []}, "0 EMA tensors were given for 4 parameters"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FusedAdamW(network().parameters(), **settings)


def test_flat_gradients_stay_where_they_are():
    ordinary, flat = network(torch.float32), network(torch.float32)
    for module in (ordinary, flat):
        module[0].weight.data = module[0].weight.data.bfloat16()
    first = FusedAdamW(ordinary.parameters(), lr=0.01)
    second = FusedAdamW(flat.parameters(), lr=0.01, flat_gradients=True)
    places = [p.grad.data_ptr() for p in flat.parameters()]
    for step in range(3):
        give_gradients(ordinary, step)
        for parameter, like in zip(flat.parameters(), ordinary.parameters(), strict=True):
            # As autograd does it: added in place.
            (parameter * like.grad).sum().backward()
        first.step()
        second.step()
        second.zero_grad(set_to_none=True)
        assert all(p.grad.eq(0).all() for p in flat.parameters())
    same(ordinary, flat, rtol=0, atol=0)
    flat[0].weight.grad = None
    second.zero_grad()
    assert [p.grad.data_ptr() for p in flat.parameters()] == places
    for buffer in second._flat_buffers:
        starts = [p - buffer.data_ptr() for p in places if 0 <= p - buffer.data_ptr() < buffer.nbytes]
        assert starts and all(start % 128 == 0 for start in starts)


def test_gradients_in_another_memory_order():
    plain, other = network(), network()
    first, second = FusedAdamW(plain.parameters(), lr=0.01), FusedAdamW(other.parameters(), lr=0.01)
    give_gradients(plain, 0)
    give_gradients(other, 0)
    for layer in (other[0], other[2]):
        layer.weight.grad = layer.weight.grad.T.contiguous().T
    first.step()
    second.step()
    same(plain, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_loaded_after_the_optimizer_was_made_count(dtype):
    module, average = network(dtype), network(dtype)
    optimizer = FusedAdamW(module.parameters(), ema=average.parameters(), lr=0.0, momentum=1.0)
    optimizer.state_dict()  # makes masters and wide averages
    for target in (module, average):
        target.load_state_dict({name: value + 1 for name, value in target.state_dict().items()})
    loaded = copy.deepcopy((module, average))
    give_gradients(module, 0)
    optimizer.step()
    same(module, loaded[0], rtol=0, atol=0)
    same(average, loaded[1], rtol=0, atol=0)


def test_state_is_complete_before_the_first_step():
    low, average = network(torch.bfloat16), network(torch.bfloat16)
    low[2].bias.requires_grad_(False)
    optimizer = FusedAdamW(low.parameters(), ema=average.parameters())
    states = optimizer.state_dict()["state"]
    assert set(states) == {0, 1, 2}
    for state in states.values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "master", "ema"}
        assert all(value.dtype == torch.float32 for value in state.values())


def test_state_of_torch_adamw_is_continued():
    ours, theirs = network(), network()
    expected = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(3):
        give_gradients(theirs, step)
        expected.step()
    ours.load_state_dict(theirs.state_dict())
    optimizer = FusedAdamW(ours.parameters())
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    for step in range(3, STEPS):
        for module, taken in ((ours, optimizer), (theirs, expected)):
            give_gradients(module, step)
            taken.step()
    same(ours, theirs, rtol=1e-12, atol=1e-14)


def test_schedulers_may_change_betas():
    ours, theirs = network(), network()
    optimizer, expected = FusedAdamW(ours.parameters(), lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS) for o in (optimizer, expected)]
    for step in range(STEPS):
        for module, taken, scheduler in zip((ours, theirs), (optimizer, expected), schedulers, strict=True):
            give_gradients(module, step)
            taken.step()
            scheduler.step()
    same(ours, theirs, rtol=1e-12, atol=1e-14)


def test_parameters_of_one_group_count_their_own_steps():
    ours, theirs = network(), network()
    optimizer, expected = FusedAdamW(ours.parameters(), lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for step in range(STEPS):
        for module, taken in ((ours, optimizer), (theirs, expected)):
            give_gradients(module, step)
            if step % 2:
                module[0].weight.grad = None
            taken.step()
    same(ours, theirs, rtol=1e-12, atol=1e-14)
    assert [int(optimizer.state[p]["step"]) for p in ours.parameters()] == [3, 6, 6, 6]


def test_settings_may_be_tensors():
    floats, tensors = network(), network()
    averages = [network(), network()]
    first = FusedAdamW(floats.parameters(), lr=0.01, ema=averages[0].parameters(), momentum=0.9)
    second = FusedAdamW(tensors.parameters(), lr=torch.tensor(0.01, dtype=torch.float64), ema=averages[1].parameters())
    second.momentum = torch.tensor(0.9, dtype=torch.float64)
    for module, taken in ((floats, first), (tensors, second)):
        give_gradients(module, 0)
        taken.step()
    same(floats, tensors, rtol=0, atol=0)
    same(*averages, rtol=0, atol=0)


def test_low_precision_average_does_not_lose_small_steps():
    source, target = nn.Linear(4, 3), nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.fill_(2.0)
        for parameter in target.bfloat16().parameters():
            parameter.fill_(1.0)
    average = EMA(target, source)
    for _ in range(700):  # each step is below half a unit in the last place of bfloat16
        average.update(0.999)
    for parameter in target.parameters():
        torch.testing.assert_close(
            parameter.float(), torch.full_like(parameter, 2 - 0.999**700).float(), rtol=4e-3, atol=0
        )


def test_a_refused_group_is_not_added():
    optimizer = FusedAdamW(network().parameters())
    with pytest.raises(ValueError, match="lr must not be negative, got -2"):
        optimizer.add_param_group({"params": network().parameters(), "lr": -2})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"on one device, got \['cpu', 'meta'\]"):
        optimizer.add_param_group({"params": network().to("meta").parameters()})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="must be torch.float32 or low precision, not torch.float64"):
        FusedAdamW(network(torch.float32).parameters(), ema=network().parameters())
