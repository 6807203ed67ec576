"""k-NN, linear probe, feature rank and the buffers they are fed from."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ijepa_fast.evaluate import (
    HealthBuffer,
    OnlineKNN,
    best_linear_probe,
    collect_features,
    colour_histogram,
    extract_features,
    feature_health,
    feature_std,
    knn_accuracy,
    knn_predict,
    linear_probe,
    pixel_features,
    pool_features,
    rank_me,
)
from ijepa_fast.evaluate.probe import ProbeSetting, _train, stratified_split
from ijepa_fast.evaluate.ring import RingBuffer
from ijepa_fast.vit import VisionTransformer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int, dim: int, classes: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian classes; the centres are those of every seed."""
    centres = torch.randn(classes, dim, generator=generator(99))
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, dim, generator=generator(seed)), labels


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


def knn_by_loops(bank, bank_labels, queries, k, temperature):
    """One query, one neighbour at a time, in fp64."""
    bank, queries = bank.double().numpy(), queries.double().numpy()
    predictions = []
    for query in queries:
        similarity = [query @ entry / np.linalg.norm(query) / np.linalg.norm(entry) for entry in bank]
        votes = {}
        for neighbour in sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]:
            label = int(bank_labels[neighbour])
            votes[label] = votes.get(label, 0) + math.exp(similarity[neighbour] / temperature)
        predictions.append(max(votes, key=votes.get))
    return predictions


class TestKNN:
    @pytest.mark.parametrize("k", [1, 3, 20, 500])
    @pytest.mark.parametrize("temperature", [0.07, 5.0])
    def test_it_agrees_with_loops(self, k, temperature):
        bank, labels = blobs(150, 6, 5, 3.0, seed=1)
        queries, _ = blobs(40, 6, 5, 3.0, seed=2)
        # Labels need not start at 0, lengths must not matter.
        labels = labels * 1000 + 7
        bank = bank * torch.rand(150, 1, generator=generator()).add(0.1)
        expected = knn_by_loops(bank, labels, queries, k, temperature)
        assert knn_predict(bank, labels, queries, k=k, temperature=temperature).tolist() == expected

    def test_chunks_change_nothing(self, monkeypatch):
        bank, labels = blobs(100, 6, 5, 3.0, seed=1)
        queries, _ = blobs(33, 6, 5, 3.0, seed=2)
        whole = knn_predict(bank, labels, queries)
        monkeypatch.setattr("ijepa_fast.evaluate.knn._SIMILARITIES_AT_ONCE", 700)
        assert knn_predict(bank, labels, queries).tolist() == whole.tolist()

    def test_accuracy_counts_and_leaves_out_what_has_no_label(self):
        bank, labels = blobs(100, 16, 5, 0.1, seed=1)
        queries, answers = blobs(50, 16, 5, 0.1, seed=2)
        assert knn_accuracy(bank, labels, queries, answers) == 1.0
        answers[:10] = (answers[:10] + 1) % 5
        assert knn_accuracy(bank, labels, queries, answers) == pytest.approx(0.8)
        answers[:10] = -1
        assert knn_accuracy(bank, labels, queries, answers) == 1.0
        poisoned = torch.cat([bank, queries]), torch.cat([labels, torch.full((50,), -1)])
        assert knn_accuracy(*poisoned, queries, answers) == 1.0

    def test_an_entry_with_the_querys_own_id_has_no_vote(self):
        bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        labels, query = torch.tensor([0, 1, 2]), torch.tensor([[1.0, 0.0]])
        ids = torch.tensor([4, 5, -1])

        def predict(query_id):
            query_ids = torch.tensor([query_id])
            return knn_predict(bank, labels, query, k=1, bank_ids=ids, query_ids=query_ids).item()

        assert [predict(4), predict(9), predict(-1)] == [1, 0, 0]

    def test_errors_name_the_value(self):
        x, y = blobs(20, 4, 2, 1.0, seed=1)
        with pytest.raises(ValueError, match="0 and 0.07"):
            knn_accuracy(x, y, x, y, k=0)
        with pytest.raises(ValueError, match="training data has no labelled image"):
            knn_accuracy(x, torch.full((20,), -1), x, y)
        with pytest.raises(ValueError, match=r"test features must be .* \[20, 4\] and \[19\]"):
            knn_accuracy(x, y, x, y[1:])
        with pytest.raises(ValueError, match="1 of 20 images are not finite"):
            knn_accuracy(x, y, x.index_fill(0, torch.tensor([3]), torch.nan), y)

    def test_online_accuracy_is_that_of_the_newest_entries_among_the_older(self):
        features, labels = blobs(90, 6, 5, 2.5, seed=1)
        online = OnlineKNN(6, capacity=60, queries=20, k=5)
        for rows in torch.arange(90).split(16):
            online.push(features[rows], labels[rows])
        expected = knn_accuracy(features[30:70], labels[30:70], features[70:], labels[70:], k=5)
        assert 0.2 < expected < 1
        assert online.accuracy() == pytest.approx(expected)

    def test_online_does_not_recognise_an_image_seen_in_an_earlier_epoch(self):
        # Labels are noise: only remembering the image itself can be better than chance.
        features = torch.randn(200, 16, generator=generator())
        labels = torch.randint(0, 10, (200,), generator=generator(1))
        with_ids, without = (OnlineKNN(16, capacity=400, queries=200, k=1) for _ in range(2))
        for _ in range(2):
            with_ids.push(features, labels, torch.arange(200))
            without.push(features, labels)
        assert without.accuracy() == 1.0
        assert with_ids.accuracy() < 0.3

    def test_online_without_labels_gives_none(self):
        online = OnlineKNN(4)
        assert online.accuracy() is None
        online.push(torch.randn(8, 4), torch.full((8,), -1))
        assert online.accuracy() is None
        online.push(torch.full((8, 4), torch.nan), torch.zeros(8, dtype=torch.int64))
        assert online.accuracy() is None
        online.push(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64))
        assert online.accuracy() == 1.0
        online.clear()
        assert online.accuracy() is None

    def test_online_bank_has_an_upper_bound(self):
        with pytest.raises(ValueError, match="50001"):
            OnlineKNN(4, capacity=50_001)


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
        heads = _train(x, y, [ProbeSetting(1.0, decay, 0.0)], num_classes=3, epochs=1500, batch_size=240, seed=0)
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
        with pytest.raises(ValueError, match="test data has no labelled image"):
            linear_probe(x, y, x, torch.full((20,), -1))

    def test_a_common_size_takes_seconds(self):
        train, labels = blobs(6000, 128, 8, 3.0, seed=1)
        started = time.process_time()
        linear_probe(train, labels, train[:1000], labels[:1000])
        # About 1 s on one core; the bound is for slow ones.
        assert time.process_time() - started < 15


class TestHealth:
    def test_rank_of_known_spectra(self):
        assert rank_me(torch.eye(12)) == pytest.approx(12)
        assert rank_me(torch.eye(12)[:, :5]) == pytest.approx(5)
        assert rank_me(torch.eye(12)[:5]) == pytest.approx(5)
        line = torch.outer(torch.randn(50, generator=generator()), torch.randn(20, generator=generator(1)))
        assert rank_me(line) == pytest.approx(1)
        share = np.array([0.5, 0.25, 0.125, 0.125])
        u, _ = torch.linalg.qr(torch.randn(30, 4, generator=generator()))
        v, _ = torch.linalg.qr(torch.randn(9, 4, generator=generator(1)))
        features = u * torch.from_numpy(share).float() * 7 @ v.T
        assert rank_me(features) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)

    def test_rank_agrees_with_singular_values(self):
        for shape in ((100, 30), (30, 100)):
            x = torch.randn(*shape, generator=generator()) * torch.logspace(0, -3, shape[1]) + 0.5
            for centered in (False, True):
                s = torch.linalg.svdvals((x - x.mean(0) if centered else x).double())
                expected = torch.special.entr(s / s.sum()).sum().exp().item()
                assert rank_me(x, centered) == pytest.approx(expected, rel=1e-4)

    def test_rank_without_scale_and_with_an_offset(self):
        x = torch.randn(500, 16, generator=generator())
        assert rank_me(1e-6 * x) == pytest.approx(rank_me(x), rel=1e-4)
        assert rank_me(x + 1000) < 2 and rank_me(x + 1000, centered=True) == pytest.approx(rank_me(x, True), rel=1e-3)

    def test_collapse_shows(self):
        same = torch.randn(1, 32, generator=generator()).expand(100, 32)
        report = feature_health(same)
        assert report["rank"] == pytest.approx(1) and report["rank_centered"] == 0
        assert report["std"] == pytest.approx(0, abs=1e-6) and report["std_normalized"] == pytest.approx(0, abs=1e-6)
        healthy = feature_health(torch.randn(4000, 32, generator=generator()))
        assert healthy["rank"] > 31 and healthy["std_normalized"] == pytest.approx(1, abs=0.02)

    def test_std_is_the_mean_over_dimensions(self):
        x = torch.randn(400, 8, generator=generator()) * torch.arange(1.0, 9.0)
        assert feature_std(x) == pytest.approx(x.numpy().std(0).mean(), rel=1e-5)
        assert feature_std(3 * x, normalized=True) == pytest.approx(feature_std(x, normalized=True), rel=1e-5)

    def test_nothing_and_nan_give_nan_and_zeros_give_zero(self):
        assert math.isnan(rank_me(torch.zeros(0, 4))) and math.isnan(feature_std(torch.zeros(0, 4)))
        assert math.isnan(rank_me(torch.tensor([[1.0, torch.nan]])))
        assert rank_me(torch.zeros(5, 4)) == 0

    def test_the_buffer_reports_on_the_last_rows(self):
        buffer = HealthBuffer(6, capacity=50)
        assert buffer.report() == {}
        features = torch.randn(120, 6, generator=generator())
        for rows in features.split(32):
            buffer.push(rows.bfloat16())
        torch.testing.assert_close(buffer.features(), features[-50:].bfloat16().float())
        assert buffer.report() == feature_health(buffer.features())


class TestRing:
    def ring(self, capacity):
        return RingBuffer(capacity, {"x": ((2,), torch.float32), "y": ((), torch.int64)})

    def push(self, ring, start, stop):
        y = torch.arange(start, stop)
        ring.push(x=torch.stack([y, -y], 1).float(), y=y)

    @pytest.mark.parametrize("sizes", [[3], [3, 4], [3, 4, 1], [5, 5, 5], [8, 8], [20], [3, 20, 2], [1] * 30, [0, 4]])
    def test_it_holds_the_last_rows_oldest_first(self, sizes):
        ring, pushed = self.ring(8), 0
        for size in sizes:
            self.push(ring, pushed, pushed + size)
            pushed += size
        rows = ring.rows()
        assert rows["y"].tolist() == list(range(max(0, pushed - 8), pushed))
        torch.testing.assert_close(rows["x"], torch.stack([rows["y"], -rows["y"]], 1).float())

    def test_what_it_returns_does_not_change_later(self):
        ring = self.ring(8)
        self.push(ring, 0, 5)
        rows = ring.rows()
        self.push(ring, 5, 15)
        assert rows["y"].tolist() == [0, 1, 2, 3, 4]

    def test_pushing_reads_nothing_back(self):
        # A meta tensor has no values to read, as a tensor on a busy device has none yet.
        ring = RingBuffer(8, {"x": ((2,), torch.float32)}, device="meta")
        ring.push(x=torch.zeros(5, 2, device="meta"))
        ring.push(x=torch.zeros(50, 2, device="meta"))

    def test_clear(self):
        ring = self.ring(8)
        self.push(ring, 0, 20)
        ring.clear()
        assert ring.rows()["y"].tolist() == []
        self.push(ring, 3, 5)
        assert ring.rows()["y"].tolist() == [3, 4]

    def test_errors_name_the_value(self):
        with pytest.raises(ValueError, match="0"):
            self.ring(0)
        with pytest.raises(ValueError, match="got \\['x'\\]"):
            self.ring(8).push(x=torch.zeros(1, 2))
        with pytest.raises(ValueError, match=r"rows of y must have the shape \[3\], got \[2\]"):
            self.ring(8).push(x=torch.zeros(3, 2), y=torch.zeros(2, dtype=torch.int64))


@pytest.mark.gpu
def test_pushing_does_not_wait_for_the_gpu_and_can_be_captured():
    bank, health = OnlineKNN(16, capacity=64, device="cuda"), HealthBuffer(16, capacity=64, device="cuda")
    features, labels = (x.cuda() for x in blobs(48, 16, 4, 0.1, seed=1))
    bank.push(features, labels)
    health.push(features)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bank.push(features, labels)
        health.push(features)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.replay()
        bank.push(features, labels)
        health.push(features)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = torch.cat([features, features, features])[-64:]
    torch.testing.assert_close(health.features(), expected)
    assert bank.accuracy() == 1.0


@pytest.mark.gpu
def test_gpu_results_are_those_of_the_cpu_and_repeatable():
    train, labels = blobs(3000, 64, 8, 3.0, seed=1)
    test, answers = blobs(1000, 64, 8, 3.0, seed=2)
    arguments = [x.cuda() for x in (train, labels, test, answers)]
    probe = linear_probe(*arguments)
    assert probe == linear_probe(*arguments)
    assert probe.accuracy == pytest.approx(linear_probe(train, labels, test, answers).accuracy, abs=0.01)
    assert knn_accuracy(*arguments) == pytest.approx(knn_accuracy(train, labels, test, answers), abs=0.003)
    assert rank_me(train.cuda()) == pytest.approx(rank_me(train), rel=1e-5)
