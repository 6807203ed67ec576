"""What is watched while training: k-NN, feature rank and the buffers they are fed from."""

import math

import numpy as np
import pytest
import torch
from gaussian_classes import blobs, generator

from ijepa_fast.evaluate import (
    HealthBuffer,
    OnlineKNN,
    feature_health,
    feature_std,
    knn_accuracy,
    knn_predict,
    linear_probe,
    rank_me,
)
from ijepa_fast.evaluate.ring_buffer import RingBuffer


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
        # Nor that of the parts of the bank, at least k entries each.
        monkeypatch.setattr("ijepa_fast.evaluate.knn._BANK_AT_ONCE", 1)
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
