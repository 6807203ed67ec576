"""JEPAModel: its configuration, its loss and metrics, and a target encoder that follows any optimizer by itself."""

import copy
import gc
import io
import itertools
import logging
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast import IJEPA, FusedAdamW, JEPAModel, Ragged, parameter_groups
from ijepa_fast.interop import jepa_model, optimizer_steps
from ijepa_fast.interop.jepa_config import JEPAConfig, nearest_heads
from ijepa_fast.interop.weights import WeightsError
from ijepa_fast.jepa import Objective
from ijepa_fast.schedules import Schedules
from ijepa_fast.vit import IMAGENET_MEAN, IMAGENET_STD, PREDICTOR_DEPTH, SIZES, sincos_positions

TINY = {
    "img_size": 24,
    "patch_size": 4,
    "encoder_dim": 16,
    "encoder_depth": 1,
    "predictor_dim": 8,
    "predictor_depth": 1,
    "ema_momentum": 0.9,
}
BATCH, PATCHES = 4, 36


def tiny(**settings) -> JEPAModel:
    torch.manual_seed(0)
    return JEPAModel(TINY, **settings)


def images(step: int = 0, count: int = BATCH) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(100 + step)
    )


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class TestConfiguration:
    def test_the_keys_of_the_description(self):
        keys = {
            "img_size": 224,
            "patch_size": 16,
            "encoder_dim": 768,
            "predictor_dim": 384,
            "mask_ratio": 0.75,
            "ema_momentum": 0.996,
        }
        with torch.device("meta"):  # the shapes without 200 million numbers
            model = JEPAModel(keys)
        assert len(model.context_encoder.blocks) == 12 and model.context_encoder.num_heads == 12
        assert len(model.predictor.predictor_blocks) == 6
        assert model.predictor.predictor_blocks[0].attn.num_heads == 12
        assert model.objective == Objective(loss="l2")
        assert model.sampler.config.context == "fixed" and model.sampler.max_context == 49
        assert model.sampler.config.min_keep == 10
        assert model.config == JEPAConfig().resolved()  # they are the defaults

    @pytest.mark.parametrize("size", SIZES)
    def test_depths_and_heads_follow_from_the_width(self, size):
        config = JEPAConfig.from_keys({"encoder_dim": SIZES[size]["embed_dim"]}).resolved()
        expected = {"mlp_ratio": 4.0} | SIZES[size]
        assert config.encoder_depth == expected["depth"] and config.encoder_heads == expected["num_heads"]
        assert config.predictor_depth == PREDICTOR_DEPTH[size] and config.predictor_heads == expected["num_heads"]
        assert config.mlp_ratio == expected["mlp_ratio"]

    def test_widths_between_those_of_the_paper(self):
        config = JEPAConfig(encoder_dim=512, predictor_dim=100).resolved()
        assert (config.encoder_depth, config.encoder_heads) == (12, 8)
        assert config.predictor_heads == 10  # divides 100; 8 does not
        assert nearest_heads(192, 3) == 3 and nearest_heads(6, 2) == 2

    def test_given_values_win(self):
        config = JEPAConfig(encoder_depth=3, encoder_heads=4, predictor_depth=2, predictor_heads=2).resolved()
        assert (config.encoder_depth, config.encoder_heads) == (3, 4)
        assert (config.predictor_depth, config.predictor_heads) == (2, 2)

    def test_keywords_win_over_the_dict(self):
        assert tiny(seed=5, encoder_dim=32).config.encoder_dim == 32

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"patchsize": 16}, "'patchsize' (did you mean 'patch_size'?)"),
            ({"embed_dim": 16, "zz": 1}, "'zz'"),
            ({"masks": {"num_target": 2}}, "'num_target' (did you mean 'num_targets'?)"),
            ({"ema_momentum": 1.5}, "ema_momentum must lie in [0, 1], got 1.5"),
            ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
            ({"encoder_dim": 0}, "encoder_dim must be at least 1, got 0"),
            ({"img_size": 30}, "30 x 30"),
            ({"mask_ratio": 1.5}, "mask_ratio must be between 0 and 1, got 1.5"),
            ({"loss": "l3"}, "'l3'"),
        ],
    )
    def test_what_is_wrong_is_said_at_once(self, keys, words):
        with pytest.raises(ValueError, match=re.escape(words)):
            JEPAModel(TINY | keys)

    def test_mask_settings(self):
        model = tiny(mask_ratio=None, masks={"num_targets": 2, "target_scale": [0.2, 0.3]})
        assert model.sampler.config.context == "exact"
        assert model.sampler.config.num_targets == 2 and model.sampler.config.target_scale == (0.2, 0.3)

    def test_other_channels(self):
        model = tiny(in_chans=1)
        assert model.context_encoder.patch_embed.mean == [0.5]
        loss, _ = model(images()[:, :1])
        assert loss.isfinite()


class TestLoss:
    def test_it_is_that_of_ijepa_with_the_masks_of_seed_and_call(self):
        model = tiny(seed=3)
        plain = IJEPA(model.context_encoder, copy.deepcopy(model.predictor), Objective(loss="l2"))
        for call in range(3):
            masks = model.sampler.sample(BATCH, seed=3, step=call)
            expected = plain(images(call), masks)[0].total
            assert torch.equal(model(images(call))[0], expected)
        assert model.calls == 3

    def test_given_masks_are_taken_and_no_call_is_counted(self):
        model = tiny()
        masks = model.sampler.sample(BATCH, seed=9, step=9)
        assert torch.equal(model(images(), masks)[0], model.losses(model.predict(images(), masks), masks)[0].total)
        assert model.calls == 0

    def test_evaluation_draws_the_same_masks_each_time_and_leaves_training_alone(self):
        model = tiny()
        model.eval()
        first, again = model(images())[0], model(images())[0]
        assert torch.equal(first, again) and model.calls == 0
        model.train()
        assert not torch.equal(first, model(images())[0])
        assert model.calls == 1

    def test_bytes_are_normalised_and_floats_are_taken_as_normalised(self):
        model = tiny().eval()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        floats = (images() / 255 - mean) / std
        torch.testing.assert_close(model(floats)[0], model(images())[0], rtol=1e-5, atol=0)

    def test_images_of_another_size_are_refused(self):
        with pytest.raises(ValueError, match="images of 28 x 24 px have 7 x 6 patches, but .* img_size=24, 6 x 6"):
            tiny()(torch.zeros(2, 3, 28, 24))

    def test_metrics_are_what_they_say(self):
        model = tiny(total_steps=10)
        # Targets whose features differ between images, or rank and spread would be those of the positions.
        nn.init.normal_(model.target_encoder.patch_embed.proj.weight)
        masks = model.sampler.sample(BATCH, seed=0, step=0)
        loss, metrics = model(images())
        assert set(metrics) == {"loss", "feature_std", "rank", "cosine_similarity", "tokens", "momentum"}
        assert len(metrics) == 6 and set(dict(metrics)) == set(metrics)
        assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
        assert metrics["loss"] == loss

        features = model.target_encoder(images()).detach().double()
        pooled = features.mean(1)
        torch.testing.assert_close(metrics["feature_std"].double(), pooled.std(0, correction=0).mean())
        share = torch.linalg.svdvals(pooled)
        share = share / share.sum()
        assert 1.5 < float(metrics["rank"]) < BATCH
        assert math.isclose(metrics["rank"], (-(share * share.log()).sum()).exp(), rel_tol=1e-4)

        values = model.predict(images(), masks).values.detach().double()
        targets = F.layer_norm(features, (16,), eps=1e-5).flatten(0, 1)[masks.targets.indices.long()]
        cosines = [float(v @ t / v.norm() / t.norm()) for v, t in zip(values, targets, strict=True)]
        assert math.isclose(metrics["cosine_similarity"], sum(cosines) / len(cosines), abs_tol=1e-5)
        lists = [*masks.context.to_lists(), *masks.targets.to_lists()]
        assert int(metrics["tokens"]) == sum(map(len, lists))
        assert float(metrics["momentum"]) == 0.9

    def test_padding_rows_do_not_count_in_the_similarity(self):
        model = tiny()
        masks = model.sampler.sample(BATCH, seed=0, step=0)
        rows = (masks.context.num_rows + 5, masks.targets.num_rows + 7)
        padded = model.sampler.sample(BATCH, seed=0, step=0, capacity=rows)
        ours, theirs = model(images(), padded)[1], model(images(), masks)[1]
        torch.testing.assert_close(ours["cosine_similarity"], theirs["cosine_similarity"])
        assert ours["tokens"] == theirs["tokens"]

    def test_a_regularised_loss_reports_its_terms(self):
        loss, metrics = tiny(variance_weight=2.0, covariance_weight=0.5)(images())
        total = metrics["prediction_loss"] + 2 * metrics["variance_loss"] + 0.5 * metrics["covariance_loss"]
        torch.testing.assert_close(loss.detach(), total)

    def test_autocast(self):
        model = tiny().eval()
        exact = model(images())[0]
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(images())
        # bf16 keeps 8 bits, and the error of a mean over thousands of values is far below that of one of them.
        assert abs(float((loss - exact).detach())) < 2**-8 * float(exact.detach()) and not torch.equal(loss, exact)
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


class TestFeatures:
    def test_bool_and_index_masks_agree(self):
        model = tiny().eval()
        visible = torch.rand(BATCH, PATCHES, generator=torch.Generator().manual_seed(1)) < 0.4
        visible[2] = False  # an image of which nothing is seen
        features = model.context_encoder(images(), mask=visible)
        assert features.shape == (BATCH, PATCHES, 16) and not features[~visible].any()
        packed = Ragged.from_lists([(b * PATCHES + row.nonzero().flatten()).tolist() for b, row in enumerate(visible)])
        torch.testing.assert_close(features[visible], model.context_encoder(images(), packed))
        one = visible[:1].nonzero()[:, 1][None]
        torch.testing.assert_close(features[0][visible[0]], model.context_encoder(images()[:1], mask=one)[0])

    def test_no_mask_and_a_mask_of_everything(self):
        model = tiny()
        whole = model.context_encoder(images())
        assert whole.shape == (BATCH, PATCHES, 16)
        torch.testing.assert_close(whole, model.context_encoder(images(), torch.ones(BATCH, PATCHES, dtype=torch.bool)))
        torch.testing.assert_close(whole, model.target_encoder(images()))  # it starts as a copy

    def test_gradients_flow_through_a_bool_mask(self):
        model = tiny()
        visible = torch.zeros(BATCH, PATCHES, dtype=torch.bool)
        visible[:, :5] = True
        model.context_encoder(images(), visible).square().sum().backward()
        assert model.context_encoder.patch_embed.proj.weight.grad.any()

    def test_a_mask_of_another_shape_is_refused(self):
        with pytest.raises(ValueError, match=r"a bool mask must be \[4, 36\], got \[4, 35\]"):
            tiny().context_encoder(images(), torch.ones(BATCH, 35, dtype=torch.bool))


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


def trained(model: JEPAModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


OPTIMIZERS = {
    "sgd": lambda model: [torch.optim.SGD(model.parameters(), 0.1)],
    "adamw foreach": lambda model: [torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)],
    "adamw fused": lambda model: [torch.optim.AdamW(model.parameters(), 1e-2, fused=True)],
    "ours": lambda model: [FusedAdamW(model.parameters(), 1e-2)],
    "ours with ema": lambda model: [FusedAdamW(parameter_groups(model), 1e-2, momentum=0.1)],
    "two": halves,
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


def train(model: JEPAModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(images(step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()


class TestSaving:
    def test_a_saved_run_continues_to_the_same_bits(self, tmp_path):
        model = tiny(total_steps=6, masks={"num_targets": 2}, mask_ratio=None)
        optimizer = torch.optim.AdamW(trained(model), 1e-2)
        train(model, optimizer, range(3))
        model.save(tmp_path / "model.safetensors")
        state = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, range(3, 6))

        again = JEPAModel.load(tmp_path / "model.safetensors")
        assert again.config == model.config and again.calls == 3 and int(again.updates) == 3
        optimizer = torch.optim.AdamW(trained(again), 1e-2)
        optimizer.load_state_dict(state)
        train(again, optimizer, range(3, 6))
        assert same(again.state_dict().values(), model.state_dict().values())
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    def test_a_copy_trains_by_itself(self):
        model = tiny()
        train(model, torch.optim.SGD(model.parameters(), 0.1), range(1))
        before = weights(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            train(other, torch.optim.SGD(other.parameters(), 0.1), range(1, 3))
            assert int(other.updates) == 3 and other.calls == 3
            assert int(model.updates) == 1 and model.calls == 1 and same(model.parameters(), before)

    def test_other_files_are_refused(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(WeightsError, match="was not written by JEPAModel.save"):
            JEPAModel.load(tmp_path / "other.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"no")
        with pytest.raises(WeightsError, match="damaged"):
            JEPAModel.load(tmp_path / "broken.safetensors")

    def test_the_state_dict_has_the_names_of_ijepa(self):
        model = tiny()
        plain = IJEPA(model.context_encoder, model.predictor)
        assert set(model.state_dict()) == {*plain.state_dict(), "updates", "_extra_state"}
        assert torch.equal(model.state_dict()["target_encoder.pos_embed"][0], sincos_positions(16, (6, 6)))


class TestCompile:
    @pytest.mark.slow
    @pytest.mark.parametrize("fullgraph", [False, True])
    def test_training_compiled_and_eager_agree(self, fullgraph):
        torch.compiler.reset()
        model, eager = tiny(), tiny()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, eager)]
        for step in range(3):
            losses = [m(images(step))[0] for m in (compiled, eager)]
            torch.testing.assert_close(*losses)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert int(model.updates) == 3 and model.calls == 3
        for ours, theirs in zip(compiled.target_encoder.parameters(), eager.target_encoder.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.slow
    def test_networks_and_loss_are_one_graph_for_all_masks(self):
        from torch._dynamo.testing import CompileCounter

        torch.compiler.reset()
        counter = CompileCounter()
        compiled = torch.compile(tiny(), backend=counter)
        for step in range(5):
            compiled(images(step))
        assert counter.frame_count == 2  # the second has a number of target tokens that is a variable

    @pytest.mark.slow
    def test_a_compiled_optimizer_step_is_noticed(self):
        torch.compiler.reset()
        model = tiny()
        optimizer = torch.optim.SGD(trained(model), 0.1)
        step = torch.compile(optimizer.step, backend="eager")
        for number in range(2):
            model(images(number))[0].backward()
            step()
            assert int(model.updates) == number + 1


def rank_main(rank: int, store: str, queue) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(tiny())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        loss, _ = model(images(step)[rank * 2 : rank * 2 + 2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    queue.put((rank, {name: value.numpy() for name, value in model.module.state_dict().items()}))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one_process_with_twice_the_images(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=rank_main, args=(rank, str(tmp_path / "store"), queue)) for rank in range(2)]
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
