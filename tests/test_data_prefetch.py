"""Batches copied to the device beside the step before: right in every order of streams, and nothing else changes."""

import pytest
import torch
from fake_streams import DeferredSide, FakeGPU
from image_files import bad_files, write_folder

from ijepa_fast.data import BadFilesError, Batch, DevicePrefetcher, ImageFolder, TrainLoader
from ijepa_fast.side_stream import SideStream

CPU = torch.device("cpu")


def batches(count, rows=4):
    for number in range(count):
        images = torch.full((rows, 3, 2, 2), number, dtype=torch.uint8)
        yield Batch(images, torch.full((rows,), number), torch.arange(rows), (("name", "reason"),))


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPU(monkeypatch)


@pytest.mark.parametrize("seed", range(30))
def test_every_step_reads_its_own_images_in_any_order_of_the_streams(gpu, seed):
    read = []
    for number, batch in enumerate(DevicePrefetcher(batches(7), CPU, DeferredSide(gpu))):
        for _ in range(3):
            gpu.launch(lambda number=number, images=batch.images: read.append((number, images.unique().tolist())))
    gpu.finish(seed)
    assert read == [(number, [number]) for number in range(7) for _ in range(3)]


def test_a_copy_may_run_during_the_step_before_it(gpu):
    """While step 2 runs, the buffer of step 1 is left as it was in some orders, and filled for step 3 in others."""
    found = set()
    for seed in range(20):
        handed_out = []
        for batch in DevicePrefetcher(batches(4), CPU, DeferredSide(gpu)):
            handed_out.append(batch.images)
            if len(handed_out) == 3:
                gpu.launch(lambda other=handed_out[1]: found.add(int(other[0, 0, 0, 0])))
        gpu.finish(seed)
    assert found == {1, 3}


def test_two_buffers_serve_any_number_of_batches(gpu):
    places = [batch.images.data_ptr() for batch in DevicePrefetcher(batches(6), CPU, DeferredSide(gpu))]
    assert len(set(places)) == 2 and places[::2] == [places[0]] * 3


def test_batches_of_another_shape_get_new_buffers(gpu):
    def mixed():
        for rows in (4, 2, 2, 4):
            yield from batches(1, rows)

    shapes = [batch.images.shape[0] for batch in DevicePrefetcher(mixed(), CPU, DeferredSide(gpu))]
    gpu.finish(0)
    assert shapes == [4, 2, 2, 4]


def test_the_rest_of_a_batch_passes_through(gpu):
    (batch,) = DevicePrefetcher(batches(1), CPU, DeferredSide(gpu))
    (wanted,) = batches(1)
    assert torch.equal(batch.labels, wanted.labels) and torch.equal(batch.indices, wanted.indices)
    assert batch.failures == wanted.failures


def test_on_the_cpu_batches_are_handed_on_as_they_are():
    given = list(batches(3))
    assert all(a is b for a, b in zip(DevicePrefetcher(given, CPU), given, strict=True))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_nothing_is_taken_from_the_loader_before_its_step(gpu, on_gpu):
    """So a batch that cannot be loaded is an error at its own step, after all steps before it."""
    taken = []

    def failing():
        for number, batch in enumerate(batches(5)):
            taken.append(number)
            if number == 3:
                raise OSError("the disk is gone")
            yield batch

    prefetched = iter(DevicePrefetcher(failing(), CPU, DeferredSide(gpu) if on_gpu else None))
    for number in range(3):
        next(prefetched)
        assert taken == list(range(number + 1))
    with pytest.raises(OSError, match="the disk is gone"):
        next(prefetched)


def test_bad_files_are_counted_at_the_step_that_met_them(gpu, tmp_path):
    root = write_folder(tmp_path, 12, classes=None)
    for name, data in bad_files().items():
        (root / name).write_bytes(data)

    def counts(wrap, share):
        loader, found = (
            TrainLoader(ImageFolder(root), image_size=16, global_batch=4, seed=3, num_steps=5, max_bad_share=share),
            [],
        )
        try:
            for batch in wrap(loader):
                found.append((batch.indices.tolist(), dict(loader.bad)))
        except BadFilesError as error:
            found.append(str(error))
        return found

    for share in (0.5, 0.1):
        plain = counts(lambda loader: loader, share)
        assert plain == counts(lambda loader: DevicePrefetcher(loader, CPU, DeferredSide(gpu)), share)
        assert isinstance(plain[-1], str) == (share == 0.1) and len(plain) > 1


@pytest.mark.gpu
def test_images_on_a_gpu_are_those_of_the_loader():
    """Twenty batches, each read by slow work that is still running when the next ones are copied."""
    device = torch.device("cuda")
    weight = torch.randn(4096, 4096, device=device)
    given = [torch.randint(256, (64, 3, 224, 224), dtype=torch.uint8).pin_memory() for _ in range(20)]
    loader = (Batch(images, torch.zeros(64), torch.zeros(64)) for images in given)
    sums = []
    for batch in DevicePrefetcher(loader, device):
        for _ in range(5):
            weight = (weight @ weight).clamp(-1, 1)
        sums.append(batch.images.sum(dtype=torch.int64) + 0 * weight.sum().long())
    assert [int(value) for value in sums] == [int(images.sum(dtype=torch.int64)) for images in given]


@pytest.mark.gpu
def test_the_host_never_waits_for_a_copy():
    device = torch.device("cuda")
    given = [torch.zeros(64, 3, 224, 224, dtype=torch.uint8).pin_memory() for _ in range(6)]
    side = SideStream(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loader = (Batch(images, images[0], images[0]) for images in given)
        handed_out = sum(batch.images.is_cuda for batch in DevicePrefetcher(loader, device, side))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert handed_out == 6
