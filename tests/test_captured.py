"""Steps replayed bucket by bucket. On the CPU recorded work stands in for a CUDA graph; on a GPU it is one.

What a graph records is a closure over tensors here: a step number, image tensor or bucket that leaks into it as a value
would be that of the capture in every replay, and the weights would come out different.
"""

import threading

import pytest
import torch

from ijepa_fast.data import DevicePrefetcher, TrainLoader
from ijepa_fast.data.rendered import RenderedTextures
from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.optim import FusedAdamW, parameter_groups
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.side_stream import SideStream
from ijepa_fast.step.captured import CapturedStep, bucket_rows
from ijepa_fast.step.train_step import TrainStep
from tests.test_step_on_gpu import MODEL, make_step
from tests.test_step_on_gpu import images as gpu_images
from tests.tiny import GRID, MASKS, images, tiny_model

STEPS = 20


def tensors(result):
    return *result.losses, result.grad_norm, result.pooled


class Recorder:
    """Graphs by recording the work; every replay writes into the result tensors of the first, as a graph does."""

    def __init__(self):
        self.eager, self.captured, self.replayed = 0, 0, []

    def run(self, work):
        self.eager += 1
        return work()

    def capture(self, work):
        number, result = self.captured, None
        self.captured += 1

        def replay():
            nonlocal result
            self.replayed.append(number)
            new = work()
            if result is None:
                result = new
            for old, value in zip(tensors(result), tensors(new), strict=True):
                old.copy_(value)
            return result

        return replay


def make(kind, masks=MASKS, round_rows=16, **settings):
    model = tiny_model()
    optimizer = FusedAdamW(parameter_groups(model), flat_gradients=True)
    sampler, schedules = MaskSampler(masks, GRID), Schedules(total_steps=STEPS, warmup_steps=2)
    return kind(model, optimizer, sampler, schedules, seed=0, round_rows=round_rows, **settings)


def assert_same_weights(a, b):
    for (name, value), other in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("masks", [MASKS, MaskConfig.official(8, min_keep=1)], ids=["exact", "official"])
def test_equals_the_eager_step(masks):
    graphs = Recorder()
    captured, eager = make(CapturedStep, masks, graphs=graphs), make(TrainStep, masks)
    for number in range(STEPS):
        got, want = captured(images(number), number), eager(images(number), number)
        assert torch.equal(torch.stack(got.losses), torch.stack(want.losses)) and got.tokens == want.tokens
        assert torch.equal(got.pooled, want.pooled) and torch.equal(got.grad_norm, want.grad_norm)
    assert_same_weights(captured, eager)
    assert graphs.captured > 1 and len(graphs.replayed) > graphs.captured
    assert graphs.eager + len(graphs.replayed) == STEPS


def test_one_graph_per_bucket_captured_when_met_again():
    graphs = Recorder()
    step = make(CapturedStep, graphs=graphs)
    met, expected = {}, []
    for number in range(STEPS):
        counts = step.sampler.counts(8, seed=0, step=number)
        bucket = tuple(-(-rows // 16) for rows in counts)
        met[bucket] = met.get(bucket, 0) + 1
        expected.append(bucket)
        step(images(number), number)
    assert graphs.eager == len(met)
    assert graphs.captured == sum(times > 1 for times in met.values())
    assert len(graphs.replayed) == STEPS - len(met)
    # Which graph a step took: that of its bucket, numbered in the order of their second meetings.
    order = [bucket for i, bucket in enumerate(expected) if expected[:i].count(bucket) == 1]
    taken = [order.index(bucket) for i, bucket in enumerate(expected) if bucket in expected[:i]]
    assert graphs.replayed == taken


def test_graphs_of_a_replaced_optimizer_state_are_dropped():
    """``load_state_dict`` makes new tensors; a graph would go on with the old ones, whose memory may be anything's."""
    graphs = Recorder()
    captured, eager = make(CapturedStep, round_rows=512, graphs=graphs), make(TrainStep, round_rows=512)
    for number in range(8):
        if number == 4:
            for step in (captured, eager):
                state = step.optimizer.state_dict()
                for moments in state["state"].values():
                    moments["exp_avg"].zero_()
                step.optimizer.load_state_dict(state)
        captured(images(number), number), eager(images(number), number)
    assert (graphs.eager, graphs.captured, graphs.replayed) == (2, 2, [0, 0, 0, 1, 1, 1])
    assert_same_weights(captured, eager)


def test_all_targets_has_graphs_of_its_own():
    graphs = Recorder()
    captured, eager = make(CapturedStep, round_rows=512, graphs=graphs), make(TrainStep, round_rows=512)
    for number in range(8):
        every = number % 2 == 0
        got, want = (step(images(number), number, all_targets=every) for step in (captured, eager))
        assert torch.equal(got.pooled, want.pooled)
    assert (graphs.eager, graphs.captured, graphs.replayed) == (2, 2, [0, 1, 0, 1, 0, 1])
    assert_same_weights(captured, eager)


def test_further_buckets_run_eagerly():
    graphs = Recorder()
    captured, eager = make(CapturedStep, graphs=graphs, most_graphs=1), make(TrainStep)
    for number in range(STEPS):
        captured(images(number), number)
        eager(images(number), number)
    assert graphs.captured == 1 and graphs.eager > 10
    assert_same_weights(captured, eager)


def test_a_bad_loss_is_noted_with_its_own_step():
    graphs = Recorder()
    step = make(CapturedStep, round_rows=512, graphs=graphs)
    for number in range(4):
        step(images(number), number)
    assert len(graphs.replayed) == 3 and int(step.first_bad_step) == -1
    with torch.no_grad():
        step.model.predictor.predictor_proj.bias[0] = float("nan")
    before = {name: value.clone() for name, value in step.model.named_parameters()}
    step(images(4), 4)
    step(images(5), 5)
    assert int(step.first_bad_step) == 4
    for name, value in step.model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_buckets_waste_little():
    assert bucket_rows(8, 36) == 128
    rows = bucket_rows(128, 256)
    assert rows % 128 == 0 and rows / 2 < 0.02 * 128 * 117.9


def test_what_a_graph_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="one micro-batch"):
        make(CapturedStep, graphs=Recorder(), accumulate=2)
    model = tiny_model()
    optimizer = FusedAdamW(parameter_groups(model))
    schedules = Schedules(total_steps=STEPS, warmup_steps=2)
    with pytest.raises(ValueError, match="flat_gradients=True"):
        CapturedStep(model, optimizer, MaskSampler(MASKS, GRID), schedules, seed=0, graphs=Recorder())
    with pytest.raises(ValueError, match="need a GPU, but the model is on cpu"):
        make(CapturedStep)
    step = make(CapturedStep, graphs=Recorder())
    step(images(0), 0)
    with pytest.raises(ValueError, match=r"like the first, torch.uint8 \[8, 3, 24, 24\], got torch.uint8 \[4, 3"):
        step(images(1, count=4), 1)


@pytest.mark.gpu
def test_captured_equals_eager_on_a_gpu():
    """Weights after 20 steps, to the bit: our kernels are deterministic, and so is cuBLAS on one stream."""
    eager, captured = (make_step("cuda", kind=kind, flat=True, round_rows=128) for kind in (TrainStep, CapturedStep))
    for number in range(STEPS):
        batch = gpu_images(number, "cuda")
        want = eager(batch, number).losses.total.clone()
        assert torch.equal(captured(batch, number).losses.total, want), number
    assert_same_weights(captured, eager)
    assert captured._replays and MODEL.img_size == 96


@pytest.mark.gpu
@pytest.mark.parametrize("overlapped", [False, True])
def test_captures_beside_threads_that_pin_memory(overlapped):
    """A loader's thread pins the next batches while a step is captured, and one more thread pins new memory all the
    time; neither breaks a capture, nor gets into one."""

    def loader(**settings):
        images = RenderedTextures("train", 64)
        return TrainLoader(images, image_size=96, global_batch=8, seed=0, num_steps=STEPS, **settings)

    eager, captured = (make_step("cuda", kind=kind, flat=True, round_rows=128) for kind in (TrainStep, CapturedStep))
    if overlapped:
        captured.model.target_stream = SideStream("cuda")
    for number, batch in enumerate(loader()):
        eager(batch.images.cuda(), number)

    stop, kept, errors = threading.Event(), [], []

    def pin():
        try:
            while not stop.is_set():
                memory = torch.zeros(1 << 16, dtype=torch.uint8).pin_memory()
                if len(kept) < 2000:  # so that it is asked of the driver, not taken from what was freed
                    kept.append(memory)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        batches = DevicePrefetcher(loader(workers=2, pin_memory=True), torch.device("cuda"))
        for number, batch in enumerate(batches):
            captured(batch.images, number)
    finally:
        stop.set()
        thread.join()
    assert not errors and len(kept) > 10 and captured._replays
    assert_same_weights(captured, eager)


@pytest.mark.gpu
def test_a_replay_waits_for_nothing():
    step = make_step("cuda", kind=CapturedStep, flat=True, round_rows=4096)
    batches = [gpu_images(number, "cuda") for number in range(6)]
    for number in range(3):
        step(batches[number], number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            result = step(batches[number], number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(result.losses.total.isfinite())
