"""The target encoder on a second stream: forked and joined at the right moments, and the same training as without."""

import pytest
import torch
from fake_streams import FakeGPU
from torch.nn.parallel import DistributedDataParallel

from ijepa_fast.attention import dispatch
from ijepa_fast.attention.dispatch import Preference
from ijepa_fast.data import Batch, DevicePrefetcher
from ijepa_fast.model import jepa
from ijepa_fast.model.jepa import Objective
from ijepa_fast.side_stream import SideStream
from ijepa_fast.step.captured import CapturedStep
from tests.test_captured import Recorder, assert_same_weights
from tests.test_step_on_gpu import MODEL, make_step
from tests.test_step_on_gpu import images as gpu_images
from tests.tiny import MASKS, images, tiny_step
from tests.tiny import MODEL as TINY

STEPS = 20
NETWORKS = ("target_encoder", "context_encoder", "predictor")


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPU(monkeypatch)


def noting_step(gpu, done, monkeypatch, **settings):
    """A step that puts a note on the current stream wherever a network begins and ends, at the loss, and after the
    backward pass; each is appended to ``done`` when its stream comes to it."""

    def note(what):
        gpu.launch(lambda: done.append(what))

    step = tiny_step(**settings)
    step.model.target_stream = SideStream("cpu")
    for name in NETWORKS:
        network = getattr(step.model, name)
        network.register_forward_pre_hook(lambda *_, name=name: note(f"{name} begins"))
        network.register_forward_hook(lambda *_, name=name: note(f"{name} ends"))
    target_loss, add_wide = jepa.ops.target_loss, step._add_wide
    monkeypatch.setattr(jepa.ops, "target_loss", lambda *a: note("loss") or target_loss(*a))
    monkeypatch.setattr(step, "_add_wide", lambda: note("backward") or add_wide())
    return step


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_targets_are_made_between_fork_and_join_in_any_order_of_the_streams(gpu, monkeypatch, seed, accumulate):
    done = []
    step = noting_step(gpu, done, monkeypatch, accumulate=accumulate)
    for number in range(2):
        gpu.launch(lambda: done.append("images"))
        step(images(number), number)
    gpu.finish(seed)
    assert len(done) == 2 * (1 + 8 * accumulate)
    while done:
        if done[0] == "images":
            done.pop(0)
        # Whatever the order: all of a micro-batch before the next one, whose targets may take the memory of these.
        part, done = done[:8], done[8:]
        assert sorted(part[:6]) == sorted(f"{name} {what}" for name in NETWORKS for what in ("begins", "ends"))
        assert part[6:] == ["loss", "backward"]


def test_targets_are_made_beside_the_context_encoder(gpu, monkeypatch):
    """Before it in some orders of the streams, and after the predictor in others."""
    first, last = set(), set()
    for seed in range(20):
        done = []
        with monkeypatch.context() as patch:
            noting_step(gpu, done, patch)(images(0), 0)
        gpu.finish(seed)
        first.add(done[0])
        last.add(done[5])
    assert first == {"target_encoder begins", "context_encoder begins"}
    assert last == {"target_encoder ends", "predictor ends"}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("network", ["context_encoder", "predictor"])
def test_streams_are_joined_when_a_network_fails(gpu, monkeypatch, seed, network):
    """Whoever catches an error (out of memory, say) frees the images, which the target encoder still reads."""
    done = []
    step = noting_step(gpu, done, monkeypatch)
    monkeypatch.setattr(getattr(step.model, network), "run_blocks", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        step(images(0), 0)
    gpu.launch(lambda: done.append("images are freed"))
    gpu.finish(seed)
    assert "target_encoder ends" in done and done[-1] == "images are freed"


def test_what_fails_on_the_side_stream_is_joined_too(gpu):
    done, side = [], SideStream("cpu")

    def work():
        gpu.launch(lambda: done.append("read"))
        raise MemoryError

    with pytest.raises(MemoryError), side.beside(work):
        pytest.fail("the block ran without the result")
    gpu.launch(lambda: done.append("freed"))
    gpu.finish(0)
    assert done == ["read", "freed"]


@pytest.mark.parametrize("objective", [Objective(), Objective(targets="average"), Objective(targets="pixels")])
@pytest.mark.parametrize("all_targets", [True, False])
def test_training_is_the_same(gpu, objective, all_targets):
    plain, overlapped = tiny_step(objective=objective), tiny_step(objective=objective)
    overlapped.model.target_stream = SideStream("cpu")
    for number in range(3):
        want, got = (step(images(number), number, all_targets=all_targets) for step in (plain, overlapped))
        assert torch.equal(torch.stack(got.losses), torch.stack(want.losses)) and torch.equal(got.pooled, want.pooled)
    assert_same_weights(overlapped, plain)


ON_BOTH = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
"""On the CPU with streams and graphs that are not, so that the tests are known to work before a GPU sees them."""


@pytest.fixture
def streams(device, monkeypatch):
    if device == "cpu":
        FakeGPU(monkeypatch)


def batches_of(count, device):
    for number in range(count):
        batch = gpu_images(number, "cpu") if device == "cuda" else images(number)
        yield Batch(batch.pin_memory() if device == "cuda" else batch, None, None)


def trained(
    device, captured=False, overlapped=False, prefetched=False, change=lambda step: None, all_targets=False, **settings
):
    """A step after some calls, and their losses."""
    settings = {"flat": True, "round_rows": 128} | settings
    settings |= {} if device == "cuda" else {"model": TINY, "masks": MASKS, "round_rows": 512}
    if captured:
        settings |= {"kind": CapturedStep, "graphs": None if device == "cuda" else Recorder()}
    step = make_step(device, **settings)
    if overlapped:
        step.model.target_stream = SideStream(device)
    change(step)
    batches = batches_of(STEPS if device == "cuda" else 4, device)
    if prefetched:
        batches = DevicePrefetcher(batches, torch.device(device), SideStream(device))
    losses = [
        step(batch.images.to(device), number, all_targets=all_targets).losses.total.clone()
        for number, batch in enumerate(batches)
    ]
    assert not captured or step._replays
    return step, torch.stack(losses)


def assert_same_training(one, other):
    assert torch.equal(one[1], other[1])
    assert_same_weights(one[0], other[0])


WAYS = ("captured", "overlapped", "prefetched")


@ON_BOTH
@pytest.mark.parametrize(
    "ways", [WAYS[:1], WAYS[1:2], WAYS[2:], WAYS[:2], WAYS[1:], WAYS[::2], WAYS], ids=lambda ways: " ".join(ways)
)
@pytest.mark.parametrize("all_targets", [True, False])
def test_every_way_of_training_gives_the_same_bits(streams, device, ways, all_targets):
    """Losses and weights of 20 steps: our kernels are deterministic, and so is cuBLAS with a workspace per stream."""
    eager = trained(device, all_targets=all_targets)
    assert_same_training(trained(device, all_targets=all_targets, **dict.fromkeys(ways, True)), eager)


def checkpointed(step):
    step.model.context_encoder.activation_checkpointing = step.model.predictor.activation_checkpointing = True


@ON_BOTH
@pytest.mark.parametrize(
    "settings",
    [{"accumulate": 2, "flat": False}, {"change": checkpointed}],
    ids=["accumulation", "activation checkpointing"],
)
def test_two_streams_train_the_same_with(streams, device, settings):
    assert_same_training(trained(device, overlapped=True, prefetched=True, **settings), trained(device, **settings))


@ON_BOTH
def test_two_streams_train_the_same_under_distributed_data_parallel(streams, device):
    def wrap(step):
        devices = [0] if device == "cuda" else None
        step.wrapped = DistributedDataParallel(step.model, device_ids=devices, broadcast_buffers=False)

    settings = {"flat": False, "change": wrap}
    backend = {"cuda": "nccl", "cpu": "gloo"}[device]
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        eager = trained(device, **settings)
        assert_same_training(trained(device, overlapped=True, prefetched=True, **settings), eager)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_the_host_never_waits_with_two_streams():
    step = make_step("cuda")
    step.model.target_stream = SideStream("cuda")
    batches = iter(DevicePrefetcher(list(batches_of(5, "cuda")), torch.device("cuda")))
    for number in range(2):  # kernels are compiled, tables and workspaces made
        step(next(batches).images, number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 5):
            result = step(next(batches).images, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(result.losses.total.isfinite()) and int(step.first_bad_step) == -1


@pytest.mark.gpu
def test_memory_does_not_grow_with_two_streams():
    """Freed memory is used again at once: nothing is held back as ``record_stream`` would."""
    step = make_step("cuda", round_rows=4096)
    step.model.target_stream = SideStream("cuda")
    for number, batch in enumerate(DevicePrefetcher(batches_of(40, "cuda"), torch.device("cuda"))):
        step(batch.images, number)
        if number == 3:
            reserved = torch.cuda.memory_reserved()
    assert torch.cuda.memory_reserved() == reserved


@ON_BOTH
def test_targets_by_another_attention_train_alike(device, monkeypatch):
    """Another kernel rounds the same targets otherwise; the bound is two units in the last place of bf16."""
    losses, small = [], {"model": MODEL} if device == "cuda" else {"model": TINY, "masks": MASKS}
    of_whole_images = Preference(("cudnn" if device == "cuda" else "sdpa",), device=device, uniform=True)
    for rows in (dispatch.PRIORITY, (of_whole_images, *dispatch.PRIORITY)):
        monkeypatch.setattr(dispatch, "PRIORITY", rows)
        step = make_step(device, **small)
        batches = enumerate(batches_of(3, device))
        losses.append(torch.stack([step(batch.images.to(device), n).losses.total for n, batch in batches]))
    torch.testing.assert_close(losses[1], losses[0], rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
