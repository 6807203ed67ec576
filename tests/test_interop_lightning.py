"""Lightning: the module and the callback train in a plain Trainer on the CPU, and resume to the same bits."""

import copy
import logging
import warnings

import lightning as L
import pytest
import torch
from tiny_jepa import TINY, images, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ijepa_fast import IJEPA, JEPAModel, MaskConfig, MaskSampler, Predictor, VisionTransformer, parameter_groups
from ijepa_fast.interop.lightning import IJEPACallback, IJEPAModule, images_of
from ijepa_fast.optim import FusedAdamW
from ijepa_fast.optim.schedules import Schedules

BATCHES = 4
SETTINGS = {"config": {**TINY, "ema_momentum": 0.9}, "lr": 1e-2, "warmup": 0.25}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loader() -> DataLoader:
    return DataLoader(torch.cat([images(step) for step in range(BATCHES)]), batch_size=4)


def trainer(folder, epochs: int = 2, **settings) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, log_every_n_steps=1, **quiet | settings
    )


def module(config: dict = SETTINGS["config"]) -> IJEPAModule:
    torch.manual_seed(0)
    return IJEPAModule(**SETTINGS | {"config": config})


class TestModule:
    @pytest.mark.parametrize("per_image", [1, 3])
    def test_it_trains_as_the_plain_loop_does(self, tmp_path, per_image):
        config = SETTINGS["config"] | {"masks": {"per_image": per_image}}
        lit = module(config)
        fit = trainer(tmp_path)
        fit.fit(lit, loader(), loader())

        torch.manual_seed(0)
        model = JEPAModel(config, total_steps=2 * BATCHES)
        schedules = Schedules(2 * BATCHES, warmup_steps=2, lr=1e-2)
        optimizer = FusedAdamW(parameter_groups(model))
        for step in range(2 * BATCHES):
            for group in optimizer.param_groups:
                group["lr"] = schedules.lr_at(step)
                group["weight_decay"] = schedules.weight_decay_at(step) if group["decays"] else 0.0
            loss, metrics = model(images(step % BATCHES))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert same(lit.model.state_dict().values(), model.state_dict().values())
        logged = {
            name.removeprefix("train/"): value for name, value in fit.callback_metrics.items() if "train/" in name
        }
        assert logged.keys() == set(metrics) and all(float(logged[n]) == float(metrics[n].float()) for n in metrics)
        model.eval()
        validation = torch.stack([model(images(step))[0] for step in range(BATCHES)]).mean()
        torch.testing.assert_close(fit.callback_metrics["val/loss"], validation.detach())

    def test_one_update_per_step_with_accumulated_gradients(self, tmp_path):
        lit = module()
        trainer(tmp_path, accumulate_grad_batches=2).fit(lit, loader())
        assert int(lit.model.updates) == BATCHES and lit.model.calls == 2 * BATCHES
        assert lit.model.config.total_steps == BATCHES

    def test_the_momentum_follows_the_trainer_that_has_the_model(self, tmp_path):
        lit = module()
        for epochs in (1, 3):
            trainer(tmp_path, epochs).fit(lit, loader())
            assert lit.model.config.total_steps == epochs * BATCHES

    def test_options_of_the_step(self, tmp_path):
        torch.manual_seed(0)
        lit, plain = IJEPAModule(**SETTINGS, step={"activation_checkpointing": True}), module()
        for one in (lit, plain):
            trainer(tmp_path, 1).fit(one, loader())
        assert lit.model.context_encoder.activation_checkpointing
        assert same(lit.model.parameters(), plain.model.parameters())

    def test_predictions_are_features_of_the_target_encoder(self, tmp_path):
        lit = module()
        labelled = TensorDataset(torch.cat([images(step) for step in range(2)]), torch.arange(8))
        batches = trainer(tmp_path).predict(lit, DataLoader(labelled, batch_size=4))
        assert same(batches, [lit.model.target_encoder(images(step)) for step in range(2)])

    def test_a_resumed_run_ends_with_the_same_bits(self, tmp_path):
        whole = module()
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=BATCHES)
        trainer(tmp_path, callbacks=[checkpoint]).fit(whole, loader())
        (middle,) = tmp_path.glob(f"*step={BATCHES}.ckpt")
        torch.manual_seed(1)
        again = IJEPAModule(**SETTINGS)
        trainer(tmp_path).fit(again, loader(), ckpt_path=middle, weights_only=False)
        assert same(again.state_dict().values(), whole.state_dict().values())
        assert int(again.model.updates) == 2 * BATCHES

    def test_features_and_loading(self, tmp_path):
        lit = module()
        fit = trainer(tmp_path, epochs=1)
        fit.fit(lit, loader())
        fit.save_checkpoint(tmp_path / "end.ckpt")
        again = IJEPAModule.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=False)
        assert torch.equal(again(images()), lit.model.target_encoder(images()))

    def test_a_run_without_end_and_a_bad_warmup_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="the schedules need the length of the run"):
            trainer(tmp_path, epochs=-1).fit(module(), loader())
        with pytest.raises(ValueError, match=r"warmup is a share of all steps in \[0, 1\), got 1.5"):
            IJEPAModule(TINY, warmup=1.5)


class Own(L.LightningModule):
    """Somebody's own I-JEPA."""

    def __init__(self, averaged: bool = False):
        super().__init__()
        torch.manual_seed(0)
        encoder = VisionTransformer(24, 4, embed_dim=16, depth=1, num_heads=2)
        predictor = Predictor(encoder.grid, 16, predictor_embed_dim=8, depth=1, num_heads=2)
        parts = IJEPA(encoder, predictor)
        self.context_encoder, self.target_encoder, self.predictor = encoder, parts.target_encoder, predictor
        self.target_encoder.requires_grad_(True)  # the callback freezes it
        self.averaged, self.seen = averaged, []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.masks)
        parts = IJEPA(self.context_encoder, self.predictor)
        parts.target_encoder = self.target_encoder
        return parts(batch, self.masks)[0].total

    def configure_optimizers(self):
        if self.averaged:
            return FusedAdamW(parameter_groups(self))
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


CALLBACK = {"masks": MaskConfig(min_keep=1), "seed": 3, "momentum": 0.9}


class TestCallback:
    @pytest.mark.parametrize(("accumulate", "per_image"), [(1, 1), (2, 1), (1, 3)])
    def test_masks_and_one_update_per_step(self, tmp_path, accumulate, per_image):
        masks = MaskConfig(min_keep=1, per_image=per_image)
        own, callback = Own(), IJEPACallback(**CALLBACK | {"masks": masks})
        sampler = MaskSampler(masks, (6, 6))
        steps = 2 * BATCHES // accumulate
        reference = copy.deepcopy(own.target_encoder)
        schedule = Schedules(steps, momentum=(0.9, 1.0))

        class Follow(L.Callback):
            updates = 0

            def on_train_batch_end(self, trainer, pl_module, *args):
                if trainer.global_step > self.updates:
                    momentum = schedule.momentum_at(self.updates)
                    with torch.no_grad():
                        for mine, theirs in zip(
                            reference.parameters(), pl_module.context_encoder.parameters(), strict=True
                        ):
                            mine.copy_(momentum * mine.double() + (1 - momentum) * theirs.double())
                    self.updates += 1

        trainer(tmp_path, callbacks=[callback, Follow()], accumulate_grad_batches=accumulate).fit(own, loader())
        for call, masks in enumerate(own.seen):
            expected = sampler.sample(4, seed=3, step=call)
            assert torch.equal(masks.context.indices, expected.context.indices)
            assert torch.equal(masks.targets.indices, expected.targets.indices)
        assert len(own.seen) == 2 * BATCHES and callback.updates == steps
        assert not any(p.requires_grad for p in own.target_encoder.parameters())
        for ours, theirs in zip(own.target_encoder.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-6, check_stride=False)

    def test_a_resumed_run_ends_with_the_same_bits(self, tmp_path):
        whole = Own()
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=BATCHES)
        trainer(tmp_path, callbacks=[checkpoint, IJEPACallback(**CALLBACK)]).fit(whole, loader())
        (middle,) = tmp_path.glob(f"*step={BATCHES}.ckpt")
        again, callback = Own(), IJEPACallback(**CALLBACK)
        trainer(tmp_path, callbacks=[callback]).fit(again, loader(), ckpt_path=middle, weights_only=False)
        assert same(again.state_dict().values(), whole.state_dict().values())
        assert callback.calls == callback.updates == 2 * BATCHES

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"target": "teacher"}, "Own has no module 'teacher'; its parts are context_encoder, target_encoder"),
            ({"target": "predictor"}, "modules differ in parameters"),
            ({"masks": MaskConfig(min_keep=30)}, "min_keep=30"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_training(self, tmp_path, settings, words):
        own = Own()
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path, callbacks=[IJEPACallback(**CALLBACK | settings)]).fit(own, loader())
        assert not own.seen

    def test_an_encoder_without_grid(self, tmp_path):
        own = Own()
        own.context_encoder, own.target_encoder = nn.Linear(1, 1), nn.Linear(1, 1)
        with pytest.raises(ValueError, match=r"has no attribute grid: give IJEPACallback\(grid="):
            trainer(tmp_path, callbacks=[IJEPACallback(**CALLBACK)]).fit(own, loader())

    def test_colours_are_those_of_the_encoders_channels(self):
        own, callback = Own(), IJEPACallback(masks=MaskConfig(min_keep=1, color_jitter=0.1))
        own.context_encoder = VisionTransformer(24, 4, 1, 16, depth=1, num_heads=2, mean=[0.5], std=[0.5])
        own.target_encoder = copy.deepcopy(own.context_encoder)
        callback.setup(None, own, "fit")
        assert callback._sampler.sample(2, seed=0, step=0).colors.shape == (2, 2, 1)

    def test_two_averages_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="a second time"):
            trainer(tmp_path, callbacks=[IJEPACallback(**CALLBACK)]).fit(Own(averaged=True), loader())

    def test_momentum_out_of_range(self):
        with pytest.raises(ValueError, match=r"final_momentum must lie in \[0, 1\], got 2"):
            IJEPACallback(final_momentum=2)


def test_batches_of_every_kind():
    tensor = images()

    class Batch:
        images = tensor

    for batch in (tensor, (tensor, 1), [tensor], {"pixel_values": tensor}, {"image": tensor, "label": 1}, Batch()):
        assert images_of(batch) is tensor
    with pytest.raises(ValueError, match="a batch must be images.*got a dict with picture$"):
        images_of({"picture": tensor})
