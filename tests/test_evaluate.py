"""Features of frozen encoders and the linear probe on them."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from gaussian_classes import blobs, generator
from torch import nn

from ijepa_fast.evaluate import (
    best_linear_probe,
    collect_features,
    colour_histogram,
    extract_features,
    linear_probe,
    pixel_features,
    pool_features,
)
from ijepa_fast.evaluate.probe import ProbeSetting, _train, fit_linear_probe, stratified_split
from ijepa_fast.model.vit import VisionTransformer


class FourBlocks(nn.Module):
    """An encoder whose features can be told by hand: block i scales the mean colour of every patch by i."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)

    def intermediate_layers(self, images, n=4):
        patches = torch.nn.functional.avg_pool2d(images.float(), 4).flatten(2).transpose(1, 2)
        return [self.dropout(patches * i * self.weight) for i in range(5 - n, 5)]

    def forward(self, images):
        return self.intermediate_layers(images)[-1]


class TestFeatures:
    images = torch.randint(0, 256, (10, 3, 8, 12), dtype=torch.uint8, generator=generator())
    labels = torch.arange(10)

    def batches(self):
        return [(self.images[i : i + 4], self.labels[i : i + 4]) for i in range(0, 10, 4)]

    def test_pooling_ignores_the_order_of_patches_and_sums_in_fp32(self):
        x = torch.randn(3, 2000, 5, generator=generator())
        torch.testing.assert_close(pool_features(x), pool_features(x[:, torch.randperm(2000)]))
        pooled = pool_features([x.bfloat16(), 2 * x.bfloat16()])
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled[:, :5], x.bfloat16().double().mean(1).float(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(pooled[:, 5:], 2 * pooled[:, :5])

    def test_features_are_the_average_over_patches_in_the_order_of_the_images(self):
        features, labels = extract_features(FourBlocks(), self.batches())
        torch.testing.assert_close(features, 4 * self.images.float().mean((2, 3)))
        assert features.dtype == torch.float32 and labels.tolist() == self.labels.tolist()

    def test_last_four_layers_are_concatenated_and_end_with_the_last(self):
        last, _ = extract_features(FourBlocks(), self.batches())
        last4, _ = extract_features(FourBlocks(), self.batches(), layers="last4")
        assert last4.shape == (10, 12)
        torch.testing.assert_close(last4[:, -3:], last)
        torch.testing.assert_close(last4[:, :3] * 4, last)

    def test_the_size_of_batches_does_not_matter(self):
        whole, _ = extract_features(FourBlocks(), [(self.images, self.labels)])
        torch.testing.assert_close(extract_features(FourBlocks(), self.batches())[0], whole)

    def test_every_module_gets_its_mode_back_even_after_an_error(self):
        encoder = FourBlocks().train()
        encoder.dropout.eval()
        extract_features(encoder, self.batches())
        assert encoder.training and not encoder.dropout.training
        with pytest.raises(IndexError):
            extract_features(encoder, [torch.zeros(1)])
        assert encoder.training and not encoder.dropout.training

    def test_batches_may_be_objects_pairs_or_images_without_labels(self):
        encoder = FourBlocks()
        whole = SimpleNamespace(images=self.images, labels=self.labels, indices=self.labels)
        expected, _ = extract_features(encoder, self.batches())
        for batch in (whole, (self.images, self.labels, "more"), (self.images, self.labels.numpy())):
            features, labels = extract_features(encoder, [batch])
            torch.testing.assert_close(features, expected)
            assert labels.tolist() == self.labels.tolist()
        for batch in (self.images, (self.images, None)):
            assert extract_features(encoder, [batch])[1].tolist() == [-1] * 10

    def test_features_and_encoder_can_be_trained_on_afterwards(self):
        encoder = FourBlocks()
        features, _ = extract_features(encoder, self.batches())
        assert not features.requires_grad
        nn.Linear(3, 2)(features).sum().backward()
        encoder(self.images).sum().backward()
        assert encoder.weight.grad is not None

    def test_autocast_computes_in_the_asked_dtype(self):
        encoder = nn.Sequential(nn.Flatten(2), nn.Linear(96, 4))
        seen = []
        encoder.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        features, _ = extract_features(encoder, [self.images.float()], amp_dtype=torch.bfloat16)
        assert seen == [torch.bfloat16] and features.dtype == torch.float32

    def test_the_real_encoder_gives_both_kinds(self):
        torch.manual_seed(0)
        encoder = VisionTransformer((8, 12), patch_size=4, embed_dim=16, depth=5, num_heads=2)
        last, _ = extract_features(encoder, self.batches())
        last4, _ = extract_features(encoder, self.batches(), layers="last4")
        assert last4.shape == (10, 64)
        torch.testing.assert_close(last4[:, -16:], last, atol=1e-5, rtol=1e-4)

    def test_errors_name_the_value(self):
        with pytest.raises(ValueError, match="'first'"):
            extract_features(FourBlocks(), self.batches(), layers="first")
        with pytest.raises(ValueError, match="empty"):
            extract_features(FourBlocks(), [])

    def test_pixels_are_flattened_and_averaged_down_to_the_largest_side(self):
        pixels = pixel_features(self.images, max_side=12)
        torch.testing.assert_close(pixels, self.images.flatten(1) / 255)
        assert pixel_features(self.images, max_side=6).shape == (10, 3 * 4 * 6)
        torch.testing.assert_close(pixel_features(self.images, 6).mean(1), pixels.mean(1))

    def test_colour_histogram_counts_colours_and_nothing_else(self):
        histogram = colour_histogram(self.images, bins=4)
        assert histogram.shape == (10, 64)
        torch.testing.assert_close(histogram.square().sum(1), torch.ones(10))
        shuffled = self.images.flatten(2)[:, :, torch.randperm(96)].view_as(self.images)
        torch.testing.assert_close(colour_histogram(shuffled, bins=4), histogram)
        torch.testing.assert_close(colour_histogram(self.images / 255, bins=4), histogram)
        # One image, one pixel after the other.
        expected = torch.zeros(4, 4, 4)
        for blue_green_red in self.images[0].flatten(1).T.flip(1).tolist():
            expected[tuple(value // 64 for value in blue_green_red)] += 1 / 96
        torch.testing.assert_close(histogram[0].square(), expected.flatten())

    def test_colour_histogram_of_pure_colours(self):
        images = torch.zeros(2, 3, 2, 2)
        images[1] = 1
        histogram = colour_histogram(images, bins=2)
        assert histogram.argmax(1).tolist() == [0, 7] and histogram.sum().item() == 2
        with pytest.raises(ValueError, match="-1"):
            colour_histogram(images - 1)
        with pytest.raises(ValueError, match="300"):
            colour_histogram(images, bins=300)

    def test_collect_features_takes_any_function(self):
        features, labels = collect_features(pixel_features, self.batches())
        assert features.shape == (10, 288) and labels.shape == (10,)


class TestProbe:
    def test_separable_classes_are_learned_and_noise_is_not(self):
        train, labels = blobs(600, 32, 8, 0.3, seed=1)
        test, answers = blobs(400, 32, 8, 0.3, seed=2)
        assert linear_probe(train, labels, test, answers).accuracy > 0.995
        noise = torch.randn(1000, 32, generator=generator())
        result = linear_probe(noise[:600], labels, noise[600:], answers)
        # Chance is 1/8; 4 standard deviations of 400 draws.
        assert abs(result.accuracy - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 400)

    def test_it_reaches_the_optimum_on_ill_conditioned_features(self):
        # All information lies in the direction with the least variance, 1/10,000 of the largest.
        hidden = torch.randn(2000, 20, generator=generator())
        labels = (hidden[:, -1] > 0).long()
        axes, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator(1)))
        x = hidden * torch.logspace(0, -2, 20) @ axes
        assert linear_probe(x[:1500], labels[:1500], x[1500:], labels[1500:]).accuracy > 0.97

    def test_weight_decay_is_the_l2_penalty_of_the_standardised_weights(self):
        x, y = blobs(240, 5, 3, 2.0, seed=1)
        x = x * torch.tensor([1, 10, 0.1, 1, 3.0]) + 5
        decay = 0.05
        setting = [ProbeSetting(1.0, decay, 0.0)]
        heads = _train(x, y, torch.arange(240), setting, num_classes=3, epochs=1500, batch_size=240, seed=0)
        z = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0)).float()
        weight, bias = torch.zeros(5, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def objective():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(z @ weight + bias, y) + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)
        logits = (x - heads.mean) @ heads.weight + heads.bias
        torch.testing.assert_close(logits.softmax(1), (z @ weight + bias).softmax(1).detach(), atol=2e-3, rtol=0)

    def test_affine_changes_of_the_features_change_nothing(self):
        train, labels = blobs(300, 10, 4, 2.0, seed=1)
        test, answers = blobs(200, 10, 4, 2.0, seed=2)
        plain = linear_probe(train, labels, test, answers)
        scale = torch.logspace(-2, 2, 10)
        moved = linear_probe(train * scale + 3, labels, test * scale + 3, answers)
        assert moved.accuracy == pytest.approx(plain.accuracy, abs=0.011)
        assert 0.4 < plain.accuracy < 0.99

    def test_features_taken_in_parts_give_the_same_classifier(self, monkeypatch):
        train, labels = blobs(300, 10, 4, 2.0, seed=1)
        test, answers = blobs(200, 10, 4, 2.0, seed=2)
        whole = fit_linear_probe(train, labels)
        monkeypatch.setattr("ijepa_fast.evaluate.probe._VALUES_AT_ONCE", 700)
        parts = fit_linear_probe(train, labels)
        torch.testing.assert_close(parts.heads.weight.abs(), whole.heads.weight.abs(), atol=1e-3, rtol=1e-3)
        assert parts.accuracy(test, answers) == pytest.approx(whole.accuracy(test, answers), abs=0.005)
        assert torch.equal(whole.predict(test), whole.predict(test.double()))

    def test_test_images_do_not_touch_the_choice(self):
        train, labels = blobs(200, 12, 4, 3.0, seed=1)
        test, answers = blobs(100, 12, 4, 3.0, seed=2)
        honest = linear_probe(train, labels, test, answers)
        poisoned = linear_probe(train, labels, -test, (answers + 1) % 4)
        assert poisoned.grid == honest.grid
        for name in ("learning_rate", "weight_decay", "validation_accuracy", "train_accuracy"):
            assert getattr(poisoned, name) == getattr(honest, name)
        assert poisoned.accuracy != honest.accuracy

    def test_the_choice_is_the_best_of_the_grid_on_held_out_images(self):
        train, labels = blobs(200, 40, 4, 4.0, seed=1)
        test, answers = blobs(100, 40, 4, 4.0, seed=2)
        result = linear_probe(train, labels, test, answers, learning_rates=(0.1, 1.0), weight_decays=(0, 1e-2, 1.0))
        assert [(s.learning_rate, s.weight_decay) for s in result.grid] == [
            (rate, decay) for rate in (0.1, 1.0) for decay in (0, 1e-2, 1.0)
        ]
        assert result.validation_accuracy == max(s.validation_accuracy for s in result.grid)
        assert len({s.validation_accuracy for s in result.grid}) > 1
        chosen = [s for s in result.grid if s.validation_accuracy == result.validation_accuracy]
        assert (result.learning_rate, result.weight_decay) in [(s.learning_rate, s.weight_decay) for s in chosen]

    def test_settings_trained_together_are_those_trained_alone(self):
        train, labels = blobs(200, 12, 4, 3.0, seed=1)
        test, answers = blobs(100, 12, 4, 3.0, seed=2)
        together = linear_probe(train, labels, test, answers)
        for setting in together.grid[::7]:
            one = {"learning_rates": [setting.learning_rate], "weight_decays": [setting.weight_decay]}
            alone = linear_probe(train, labels, test, answers, **one)
            assert alone.validation_accuracy == pytest.approx(setting.validation_accuracy, abs=0.026)

    def test_it_is_a_function_of_data_and_seed(self):
        train, labels = blobs(200, 12, 4, 3.0, seed=1)
        test, answers = blobs(100, 12, 4, 3.0, seed=2)
        first = linear_probe(train, labels, test, answers, seed=5)
        torch.manual_seed(123)
        assert linear_probe(train, labels, test, answers, seed=5) == first
        assert linear_probe(train, labels, test, answers, seed=6).grid != first.grid

    def test_rows_without_label_are_dropped_and_labels_may_be_any_integers(self):
        train, labels = blobs(200, 12, 4, 3.0, seed=1)
        test, answers = blobs(100, 12, 4, 3.0, seed=2)
        expected = linear_probe(train, labels, test, answers)
        junk = torch.full((30, 12), 1e3)
        none = torch.full((30,), -1)
        renamed = torch.tensor([3, 1000, 77777, 10**12])
        result = linear_probe(
            torch.cat([train, junk]),
            torch.cat([renamed[labels], none]),
            torch.cat([test, junk]),
            torch.cat([renamed[answers], none]),
        )
        assert result == expected

    def test_a_class_that_training_lacks_counts_as_an_error(self):
        train, labels = blobs(100, 12, 4, 0.1, seed=1)
        test, answers = blobs(100, 12, 4, 0.1, seed=2)
        for stranger in (4, -7, 10**9):
            answers[:25] = stranger
            assert linear_probe(train, labels, test, answers).accuracy == 0.75

    def test_few_images_and_rare_classes(self):
        train, labels = blobs(40, 200, 8, 0.2, seed=1)
        test, answers = blobs(80, 200, 8, 0.2, seed=2)
        assert linear_probe(train, labels, test, answers).accuracy == 1.0
        # Two images of each class, then one class with a single one.
        assert linear_probe(train[:16], labels[:16], test, answers).accuracy == 1.0
        assert linear_probe(train[:15], labels[:15], test, answers).accuracy == 1.0
        with pytest.raises(ValueError, match="8 images of 8 classes"):
            linear_probe(train[:8], labels[:8], test, answers)
        one = linear_probe(train[:8], labels[:8], test, answers, learning_rates=[1.0], weight_decays=[1e-3])
        assert one.accuracy == 1.0 and math.isnan(one.validation_accuracy)

    def test_constant_features_do_no_harm(self):
        train, labels = blobs(200, 12, 4, 0.1, seed=1)
        test, answers = blobs(100, 12, 4, 0.1, seed=2)
        train[:, :3], test[:, :3] = 1234.567, 1e6
        assert linear_probe(train, labels, test, answers).accuracy == 1.0
        collapsed = linear_probe(torch.full((200, 6), 0.3), labels, torch.full((100, 6), 0.3), answers)
        assert collapsed.accuracy == 0.25

    def test_the_better_feature_set_is_chosen_without_the_test_images(self):
        train, labels = blobs(200, 12, 4, 0.3, seed=1)
        test, answers = blobs(100, 12, 4, 0.3, seed=2)
        noise = torch.randn(300, 12, generator=generator())
        # The test half of "noise" is perfect: choosing by it would be a mistake.
        sets = {"noise": (noise[:200], test), "good": (train, noise[200:])}
        name, result = best_linear_probe(sets, labels, answers)
        assert name == "good" and result == linear_probe(train, labels, noise[200:], answers)

    def test_split_holds_out_a_share_of_every_class(self):
        targets = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])[torch.randperm(63, generator=generator())]
        held_out = stratified_split(targets, 0.2, seed=0)
        assert [int(held_out[targets == c].sum()) for c in range(4)] == [10, 2, 1, 0]
        assert not torch.equal(held_out, stratified_split(targets, 0.2, seed=1))
        assert [int(stratified_split(targets, 0.99, 0)[targets == c].sum()) for c in range(4)] == [49, 9, 1, 0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"learning_rates": []}, r"learning_rates .* \[\]"),
            ({"learning_rates": [0.0]}, r"\[0.0\]"),
            ({"weight_decays": [-1.0]}, r"\[-1.0\]"),
            ({"epochs": 0}, "0 and 256"),
            ({"validation_share": 1.0}, "1.0"),
        ],
    )
    def test_errors_name_the_value(self, options, message):
        x, y = blobs(20, 4, 2, 1.0, seed=1)
        with pytest.raises(ValueError, match=message):
            linear_probe(x, y, x, y, **options)

    def test_broken_features_are_refused(self):
        x, y = blobs(20, 4, 2, 1.0, seed=1)
        with pytest.raises(ValueError, match="training features of 20 of 20 images are not finite"):
            linear_probe(x * torch.nan, y, x, y)
        with pytest.raises(ValueError, match="have 4 dimensions, test features 3"):
            linear_probe(x, y, x[:, :3], y)
        with pytest.raises(ValueError, match="test data has no labelled image"):
            linear_probe(x, y, x, torch.full((20,), -1))

    def test_a_common_size_takes_seconds(self):
        train, labels = blobs(6000, 128, 8, 3.0, seed=1)
        started = time.process_time()
        linear_probe(train, labels, train[:1000], labels[:1000])
        # About 1 s on one core; the bound is for slow ones.
        assert time.process_time() - started < 15
