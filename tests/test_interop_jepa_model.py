"""JEPAModel: its configuration, its loss and metrics, features, saving, and torch.compile."""

import copy
import io
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_jepa import BATCH, PATCHES, TINY, images, same, tiny, train, trained, weights
from torch import nn

from ijepa_fast import IJEPA, FusedAdamW, JEPAModel, Ragged, cast_weights, parameter_groups
from ijepa_fast.jepa_model.config import JEPAConfig, nearest_heads
from ijepa_fast.model.fused_blocks import FusedLayerNorm
from ijepa_fast.model.jepa import Objective
from ijepa_fast.model.vit import IMAGENET_MEAN, IMAGENET_STD, PREDICTOR_DEPTH, SIZES, sincos_positions
from ijepa_fast.optim.schedules import interpolate
from ijepa_fast.weights.reading import WeightsError, interpolate_positions


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
        assert config.mlp_ratio == expected["mlp_ratio"] and config.predictor_mlp_ratio == 4.0

    def test_widths_between_those_of_the_paper(self):
        config = JEPAConfig(encoder_dim=512, predictor_dim=100).resolved()
        assert (config.encoder_depth, config.encoder_heads) == (12, 8)
        assert config.predictor_heads == 10  # divides 100; 8 does not
        assert nearest_heads(192, 3) == 3 and nearest_heads(6, 2) == 2

    def test_given_values_win(self):
        config = JEPAConfig(encoder_depth=3, encoder_heads=4, predictor_depth=2, predictor_heads=2).resolved()
        assert (config.encoder_depth, config.encoder_heads) == (3, 4)
        assert (config.predictor_depth, config.predictor_heads) == (2, 2)
        assert JEPAConfig(mlp_ratio=2.0).resolved().predictor_mlp_ratio == 2.0
        model = JEPAModel(**TINY, mlp_ratio=2.0, predictor_mlp_ratio=3.0)
        hidden = [
            block.mlp.fc1.out_features for block in (model.context_encoder.blocks[0], *model.predictor.predictor_blocks)
        ]
        assert hidden[0] == 2 * model.config.encoder_dim and set(hidden[1:]) == {3 * model.config.predictor_dim}

    def test_keywords_win_over_the_dict(self):
        assert tiny(seed=5, encoder_dim=32).config.encoder_dim == 32

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            ({"patchsize": 16}, "'patchsize' (did you mean 'patch_size'?)"),
            ({"embed_dim": 16, "zz": 1}, "'zz'"),
            ({"masks": {"num_target": 2}}, "'num_target' (did you mean 'num_targets'?)"),
            ({"ema_momentum": 1.5}, "ema_momentum must lie in [0, 1], got 1.5"),
            ({"momentum_shape": "sine"}, "momentum_shape must be cosine or linear, got 'sine'"),
            ({"patch_size": (16, 4)}, "one number for square patches, got (16, 4)"),
            ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
            ({"encoder_dim": 0}, "encoder_dim must be at least 1, got 0"),
            ({"encoder_depth": 0}, "depth must be at least 1, got 0"),
            ({"predictor_heads": 0}, "width 8 cannot be split into 0 heads"),
            ({"mlp_ratio": 0}, "mlp_ratio leaves no hidden units at width 16: 0"),
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


class TestAccelerate:
    @pytest.mark.parametrize(
        "options", [{}, {"blocks": "fused"}, {"attention": "reference"}, {"activation_checkpointing": True}], ids=str
    )
    def test_it_trains_the_same(self, options):
        models = tiny(), tiny().accelerate(device="cpu", **options)
        losses = [train(model, torch.optim.SGD(model.parameters(), 0.1), range(2)) for model in models]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    def test_options_are_those_of_the_step(self):
        model = tiny(attention="reference").accelerate(device="cpu", precision="bf16", wide_residual=True)
        assert model.predictor.predictor_embed.weight.dtype == torch.bfloat16 and model.context_encoder.wide_residual
        assert model.context_encoder.blocks[0].attn.backend == "reference"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"block": "fused"}, "accelerate has no key 'block' (did you mean 'blocks'?)"),
            ({"blocks": "fast"}, "step.blocks must be one of auto, plain, compile"),
            ({"capture": True}, "capture needs a step that has the optimizer"),
            ({"activation_checkpointing": "auto"}, "activation_checkpointing must be true or false"),
            ({"fp8_targets": True}, "step.fp8_targets needs train.precision bf16, got fp32"),
            ({"precision": "float16"}, "precision must be one of fp32, bf16, fp16, got 'float16'"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, words):
        with pytest.raises(ValueError, match=re.escape(words)):
            tiny().accelerate(device="cpu", **options)

    def test_weights_of_other_types_and_a_second_call_are_refused(self):
        with pytest.raises(ValueError, match="weights must be fp32, bf16 or fp16, but these are torch.float64"):
            tiny().double().accelerate(device="cpu", precision="fp32")
        model = copy.deepcopy(tiny().accelerate(device="cpu", blocks="fused"))
        with pytest.raises(ValueError, match="accelerate was called before"):
            model.accelerate(device="cpu", blocks="plain")


class TestFusedBlocks:
    @pytest.mark.parametrize("copied", [False, True])
    def test_they_train_the_same(self, copied):
        plain, fused = tiny(), tiny()
        fused.load_state_dict(plain.state_dict())
        fused.fuse_blocks()
        if copied:
            fused = copy.deepcopy(fused)
        networks = (fused.context_encoder.norm, fused.target_encoder.norm, fused.predictor.predictor_norm)
        assert all(isinstance(norm, FusedLayerNorm) for norm in networks)
        losses = [train(m, FusedAdamW(parameter_groups(m), lr=1e-3), range(3)) for m in (plain, fused)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert fused.state_dict().keys() == plain.state_dict().keys()

    def test_with_cast_weights_the_optimizer_keeps_masters(self):
        model = tiny()
        cast_weights(model, torch.bfloat16)
        model.fuse_blocks()
        optimizer = FusedAdamW(parameter_groups(model), lr=1e-3)
        train(model, optimizer, range(1))
        weight = model.context_encoder.blocks[0].mlp.fc1.weight
        master = optimizer.state[weight]["master"]
        assert weight.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), weight) and not torch.equal(master, weight.float())

    def test_targets_can_stay_plain(self):
        model = tiny()
        model.fuse_blocks(targets=False)
        fused = [isinstance(network.norm, FusedLayerNorm) for network in (model.context_encoder, model.target_encoder)]
        assert fused == [True, False]


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

    @pytest.mark.parametrize(("scale", "warned"), [(255, True), (1, True), (-2, False), ("mean 0", False)])
    def test_floats_that_are_not_normalised_are_told_once(self, scale, warned, caplog):
        model = tiny(mean=[0] * 3, std=[1] * 3) if scale == "mean 0" else tiny()
        floats = images() / 255 * (1 if scale == "mean 0" else scale)
        for _ in range(2):
            model(floats)
        assert len(caplog.records) == warned
        assert not warned or "float images are taken as normalised, but these lie between 0 and" in caplog.text

    @pytest.mark.parametrize("shape", ["cosine", "linear"])
    def test_the_momentum_has_the_shape_of_the_schedule(self, shape):
        model = tiny(total_steps=4, **({} if shape == "cosine" else {"momentum_shape": shape}))
        for step in range(6):
            model.updates.fill_(step)
            assert math.isclose(model.momentum(), interpolate(shape, 0.9, 1.0, step / 4))

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

    def test_the_loss_is_the_same_in_rounded_rows(self, monkeypatch):
        """Away from the CPU rows are rounded up."""
        model = tiny().eval()
        exact, sample = model(images())[0], model.sampler.sample
        monkeypatch.setattr(model.sampler, "sample", lambda *where, **call: sample(*where, **call, round_rows=128))
        assert model.draw_masks(images()).context.num_rows % 128 == 0
        torch.testing.assert_close(model(images())[0], exact)

    def test_a_regularised_loss_reports_its_terms(self):
        weights = {"variance_weight": 2.0, "covariance_weight": 0.5, "invariance_weight": 3.0}
        loss, metrics = tiny(**weights, masks={"per_image": 2})(images())
        total = metrics["prediction_loss"] + 2 * metrics["variance_loss"] + 0.5 * metrics["covariance_loss"]
        total = total + 3 * metrics["invariance_loss"]
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
        model.update_target()
        before = weights(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            train(other, torch.optim.SGD(other.parameters(), 0.1), range(1, 3))
            other.update_target()
            assert int(other.updates) == 3 and other.calls == 3
            assert int(model.updates) == 1 and model.calls == 1 and same(model.parameters(), before)

    def test_a_model_compiled_in_place_is_copied_uncompiled(self):
        model = tiny()
        model.compile(backend="aot_eager")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            train(other, torch.optim.SGD(other.parameters(), 0.1), range(1))
            other.update_target()
            assert int(other.updates) == 1 and int(model.updates) == 0

    def test_a_state_dict_that_does_not_fit_changes_nothing(self):
        model, other = tiny(), tiny()
        before, state = weights(model), {name: value + 1 for name, value in other.state_dict().items()}
        del state["predictor.mask_token"]
        with pytest.raises(WeightsError, match="1 missing: predictor.mask_token"):
            model.load_state_dict(state)
        with pytest.raises(WeightsError, match="the model has width 16|of another shape"):
            model.load_state_dict(tiny(encoder_dim=32).state_dict())
        assert same(model.parameters(), before) and model.calls == 0

    def test_weights_for_images_of_another_size_are_interpolated(self):
        small, large = tiny(), tiny(img_size=48)
        with pytest.raises(WeightsError, match="trained on 36 patches per image and the model is built for 144"):
            large.load_state_dict(small.state_dict())
        large.load_state_dict(interpolate_positions(small.state_dict(), large.context_encoder.grid))
        larger_images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
        torch.testing.assert_close(large.target_encoder(larger_images), small.target_encoder(larger_images))

    def test_other_files_are_refused(self, tmp_path):
        from safetensors.torch import save_file

        for metadata, message in (
            (None, "was not written by ijepa_fast"),
            ({"ijepa_fast": "{"}, "'ijepa_fast' are not JSON"),
            ({"ijepa_fast": "[1]"}, "do not say format, config"),
            ({"ijepa_fast": '{"format": 1}'}, "do not say config"),
            ({"ijepa_fast": '{"format": "x", "config": {}}'}, "was not written by JEPAModel.save: its format is 'x'"),
        ):
            save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", metadata)
            with pytest.raises(WeightsError, match=message):
                JEPAModel.load(tmp_path / "other.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"no")
        with pytest.raises(WeightsError, match="damaged"):
            JEPAModel.load(tmp_path / "broken.safetensors")

    def test_training_needs_no_optional_package(self):
        absent = ["safetensors", "PIL", "yaml", "transformers", "lightning", "matplotlib"]
        code = f"import sys; sys.modules.update(dict.fromkeys({absent})); from ijepa_fast import JEPAModel; JEPAModel"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

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
        model.update_target()
        assert int(model.updates) == 3 and model.calls == 3
        for ours, theirs in zip(compiled.target_encoder.parameters(), eager.target_encoder.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.slow
    def test_the_number_of_images_may_change(self):
        torch.compiler.reset()
        model, eager = tiny(), tiny()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step, count in enumerate((4, 3, 5)):
            torch.testing.assert_close(*(m(images(step, count))[0] for m in (compiled, eager)))

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
            model.update_target()
            assert int(model.updates) == number + 1
