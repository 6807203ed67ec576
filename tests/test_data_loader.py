import dataclasses
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from image_files import bad_files, encoded, smooth_image, write_folder
from PIL import Image

from ijepa_fast.data import BadFilesError, EvalLoader, ImageFolder, LoaderError, StopRequested, TrainLoader
from ijepa_fast.data.crops import eval_crop, random_resized_crop
from ijepa_fast.data.loader import REFILL_ATTEMPTS
from ijepa_fast.data.order import sample_indices
from ijepa_fast.data.workers import worker_count
from ijepa_fast.philox import Stream, below, random_words

SEED, SIDE, GLOBAL_BATCH = 2**33 + 7, 16, 8


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return ImageFolder(write_folder(tmp_path_factory.mktemp("good"), 27))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """27 good images and 8 bad files, without classes."""
    root = write_folder(tmp_path_factory.mktemp("mixed"), 27, classes=None)
    for name, data in bad_files().items():
        (root / name).write_bytes(data)
    return ImageFolder(root)


def load(source, **options):
    defaults = {"image_size": SIDE, "global_batch": GLOBAL_BATCH, "seed": SEED, "num_steps": 8, "max_bad_share": 0.5}
    return list(TrainLoader(source, **defaults | options))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, wanted in zip(batches, expected, strict=True):
        assert torch.equal(batch.indices, wanted.indices)
        assert torch.equal(batch.labels, wanted.labels)
        assert torch.equal(batch.images, wanted.images)
        assert list(batch.failures) == list(wanted.failures)


def test_batches_hold_the_crops_of_their_definition(good):
    for step, batch in enumerate(load(good)):
        assert batch.images.shape == (GLOBAL_BATCH, 3, SIDE, SIDE)
        assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.uint8, torch.int64, torch.int64)
        epoch, _, indices, _ = sample_indices(step, GLOBAL_BATCH, len(good), SEED)
        assert batch.indices.tolist() == indices.tolist()
        assert batch.labels.tolist() == good.labels[indices].tolist()
        for row, index in enumerate(indices.tolist()):
            with good.open(index) as image:
                crop = random_resized_crop(image, SIDE, seed=SEED, epoch=epoch, index=index)
            assert torch.equal(batch.images[row], crop)


@pytest.mark.parametrize("source_name", ["good", "mixed"])
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing(source_name, workers, request):
    source = request.getfixturevalue(source_name)
    assert_same(load(source, workers=workers), load(source))


@pytest.mark.parametrize("source_name", ["good", "mixed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_change_nothing(source_name, workers, request):
    source = request.getfixturevalue(source_name)
    parts = [load(source, rank=rank, world_size=2, workers=workers) for rank in range(2)]
    whole = load(source)
    for first, second, together in zip(*parts, whole, strict=True):
        assert len(first.indices) == len(second.indices) == GLOBAL_BATCH // 2
        for field in ("images", "labels", "indices"):
            assert torch.equal(torch.cat([getattr(first, field), getattr(second, field)]), getattr(together, field))


@pytest.mark.parametrize("source_name", ["good", "mixed"])
@pytest.mark.parametrize("start_step", [1, 3, 5])
def test_a_restart_changes_nothing(source_name, start_step, request):
    source = request.getfixturevalue(source_name)
    assert_same(load(source, start_step=start_step, num_steps=8 - start_step), load(source)[start_step:])


def test_iterating_again_starts_again(good):
    loader = TrainLoader(good, image_size=SIDE, global_batch=4, seed=0, start_step=2, num_steps=2)
    assert_same(list(loader), list(loader))


def test_the_runs_random_state_is_neither_read_nor_moved(good):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load(good, num_steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(load(good, num_steps=2), first)


def test_an_epoch_shows_every_image_once(good):
    loader = TrainLoader(good, image_size=SIDE, global_batch=9, seed=3, num_steps=6)
    assert loader.steps_per_epoch == 3
    indices = torch.cat([batch.indices for batch in loader])
    assert sorted(indices[:27].tolist()) == sorted(indices[27:].tolist()) == list(range(27))
    assert indices[:27].tolist() != indices[27:].tolist()


def test_endless_without_num_steps(good):
    batches = iter(TrainLoader(good, image_size=SIDE, global_batch=27, seed=3))
    for _ in range(5):
        assert len(next(batches).indices) == 27


def test_crop_options_reach_the_crops(good):
    whole = load(good, scale=(1.0, 1.0), ratio=(1.2, 1.2), num_steps=1)[0]  # the images are 48 x 40
    with good.open(int(whole.indices[0])) as image:
        expected = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert torch.equal(whole.images[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    flipped = load(good, scale=(1.0, 1.0), ratio=(1.2, 1.2), flip=1.0, num_steps=1)[0]
    assert torch.equal(flipped.images.flip(3), whole.images)
    assert load(good, image_size=(8, 24), num_steps=1)[0].images.shape == (GLOBAL_BATCH, 3, 8, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 28}, "27 images cannot fill one global batch of 28"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"world_size": 3}, "8 cannot be split evenly over 3 ranks"),
        ({"start_step": -1}, "start_step .* -1"),
        ({"max_bad_share": 1.5}, "max_bad_share .* 1.5"),
        ({"workers": -1}, "workers .* -1"),
        ({"workers": "many"}, "workers .* 'many'"),
        ({"timeout": 0}, "timeout must be .* got 0"),
        ({"prefetch": 0}, "prefetch .* 0"),
        ({"scale": (0.5, 0.1)}, r"scale .* \(0.5, 0.1\)"),
        ({"image_size": 0}, "image size .* 0"),
    ],
)
def test_impossible_settings_are_refused_at_construction(good, options, message):
    with pytest.raises(ValueError, match=message):
        TrainLoader(good, **{"image_size": SIDE, "global_batch": GLOBAL_BATCH, "seed": SEED} | options)


def test_bad_images_are_replaced_in_their_slots_by_counter(mixed):
    bad = {index for index in range(len(mixed)) if os.path.basename(mixed.path(index)) in bad_files()}
    replaced = 0
    for step, batch in enumerate(load(mixed)):
        epoch, first_slot, wanted, _ = sample_indices(step, GLOBAL_BATCH, len(mixed), SEED)
        failed = []
        for row, index in enumerate(wanted.tolist()):
            attempt = 0
            while index in bad:
                failed.append(index)
                attempt += 1
                word = random_words(SEED, Stream.REFILL, epoch, first_slot + row, attempt)[0]
                index = below(word, len(mixed))
            assert batch.indices[row] == index
            replaced += attempt > 0
            with mixed.open(index) as image:
                crop = random_resized_crop(image, SIDE, seed=SEED, epoch=epoch, index=index, view=attempt)
            assert torch.equal(batch.images[row], crop)
        assert [index for index, _ in batch.failures] == failed
        assert (batch.labels == -1).all()
    assert replaced >= len(bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_once_with_their_reason(mixed, workers, caplog):
    source = ImageFolder(mixed.root)  # nothing was said of it yet
    loader = TrainLoader(
        source,
        image_size=SIDE,
        global_batch=GLOBAL_BATCH,
        seed=SEED,
        workers=workers,
        num_steps=16,
        max_bad_share=0.5,
    )
    with caplog.at_level("WARNING", logger="ijepa_fast.data"):
        batches = list(loader)
    assert sum(len(batch.failures) for batch in batches) > len(bad_files())
    assert {os.path.basename(path) for path in loader.bad} == set(bad_files())
    reasons = {os.path.basename(path): reason for path, reason in loader.bad.items()}
    assert "floating-point" in reasons["float.tiff"]
    assert "truncated" in reasons["truncated.jpg"]
    assert "UnidentifiedImageError" in reasons["empty.jpg"]
    assert "UnidentifiedImageError" in reasons["ghost.jpg"]  # PostScript is not run
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(bad_files())
    for path, reason in loader.bad.items():
        assert f"skipped {path}: {reason}" in messages
    with caplog.at_level("WARNING", logger="ijepa_fast.data"):
        list(EvalLoader(source, SIDE, 8, workers=workers))
        list(loader)
        assert len(caplog.records) == len(messages)
        list(EvalLoader(ImageFolder(mixed.root), SIDE, 8))
    assert len(caplog.records) == 2 * len(messages)


def test_a_source_that_cannot_be_a_key_is_loaded_too(mixed):
    @dataclasses.dataclass
    class Own:
        images: ImageFolder
        labels = classes = None

        def __len__(self):
            return len(self.images)

        def open(self, index):
            return self.images.open(index)

        def describe(self, index):
            return self.images.describe(index)

    loader = EvalLoader(Own(mixed), SIDE, 8)
    assert sum(len(batch.indices) for batch in loader) == 27 and len(loader.bad) == len(bad_files())


def test_vanished_files_and_bombs_are_bad_files(tmp_path, monkeypatch):
    source = ImageFolder(write_folder(tmp_path, 10, size=(20, 20)))
    os.remove(source.path(3))
    with open(source.path(4), "wb") as file:
        file.write(encoded(smooth_image(30, 30)))
    with open(source.path(5), "wb") as file:
        file.write(encoded(smooth_image(40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    loader = TrainLoader(source, image_size=SIDE, global_batch=10, seed=0, num_steps=1, max_bad_share=0.3)
    (batch,) = loader
    assert not {3, 4, 5} & set(batch.indices.tolist())
    reasons = [loader.bad[source.describe(index)] for index in (3, 4, 5)]
    assert reasons[0].startswith("FileNotFoundError")
    assert "30x30 pixels are more than loader.max_pixels (600) allows" in reasons[1]
    assert "40x40 pixels" in reasons[2]


def test_too_large_a_share_ends_the_run_naming_count_and_examples(mixed):
    batches = iter(TrainLoader(mixed, image_size=SIDE, global_batch=GLOBAL_BATCH, seed=SEED, max_bad_share=0.1))
    with pytest.raises(BadFilesError, match=r"more than the allowed 10\.0% .*\d bad of \d+ seen, 35 in all") as caught:
        for _ in range(100):
            next(batches)
    assert sum(name in str(caught.value) for name in bad_files()) >= 4


def test_the_share_of_those_seen_counts_once_enough_were_seen(mixed):
    options = {"image_size": SIDE, "global_batch": 4, "seed": SEED, "max_bad_share": 0.2, "num_steps": 4}
    assert len(list(TrainLoader(mixed, **options))) == 4  # at most 16 of 35 seen, not yet 7 bad
    with pytest.raises(BadFilesError, match="more than the allowed 20"):
        list(TrainLoader(mixed, **options, min_seen=5))


def test_a_share_just_allowed_goes_on_for_ever(mixed):
    loader = TrainLoader(
        mixed, image_size=SIDE, global_batch=GLOBAL_BATCH, seed=SEED, max_bad_share=len(bad_files()) / len(mixed)
    )
    for step, _ in enumerate(loader):
        if step == 30:
            break
    assert len(loader.bad) == len(bad_files())


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_files_ends_the_run(tmp_path, workers):
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(b"not an image")
    source = ImageFolder(tmp_path)
    loader = TrainLoader(source, image_size=SIDE, global_batch=2, seed=0, workers=workers, max_bad_share=1.0)
    with pytest.raises(BadFilesError, match=f"no good image found for a slot in {REFILL_ATTEMPTS} random draws"):
        next(iter(loader))
    with pytest.raises(BadFilesError, match="no image can be decoded .6 bad of 6 seen"):
        list(EvalLoader(source, SIDE, 4, workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_in_order(good, workers):
    loader = EvalLoader(good, SIDE, 10, workers)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(27))
    assert torch.cat([batch.labels for batch in batches]).tolist() == good.labels.tolist()
    with good.open(11) as image:
        assert torch.equal(batches[1].images[1], eval_crop(image, SIDE))
    assert_same(list(loader), batches)


def test_evaluation_of_some_images(good):
    batches = list(EvalLoader(good, SIDE, 2, indices=[20, 3, 4], resize_ratio=1.0))
    assert [batch.indices.tolist() for batch in batches] == [[20, 3], [4]]
    with good.open(3) as image:
        assert torch.equal(batches[0].images[1], eval_crop(image, SIDE, resize_ratio=1.0))
    with pytest.raises(ValueError, match="within the 27 images, got 3 to 27"):
        EvalLoader(good, SIDE, 2, indices=[3, 27])
    with pytest.raises(ValueError, match="batch_size"):
        EvalLoader(good, SIDE, 0)
    with pytest.raises(ValueError, match="resize_ratio"):
        EvalLoader(good, SIDE, 2, resize_ratio=0.5)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_evaluation_drops_and_counts_bad_images(mixed, batch_size):
    loader = EvalLoader(mixed, SIDE, batch_size)
    batches = list(loader)
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert len(indices) == 27 and indices == sorted(indices)
    assert all(len(batch.images) == len(batch.labels) == len(batch.indices) > 0 for batch in batches)
    assert {os.path.basename(path) for path in loader.bad} == set(bad_files())


def start_one_worker(source):
    before = set(multiprocessing.active_children())
    batches = iter(TrainLoader(source, image_size=SIDE, global_batch=4, seed=0, workers=1, prefetch=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    return batches, worker


INTERRUPTS: list[int] = []
"""Signals that this process gets while it forks the next one; the hook below cannot be taken away again."""
os.register_at_fork(before=lambda: INTERRUPTS and os.kill(os.getpid(), INTERRUPTS.pop()))


def test_an_interrupt_while_workers_are_forked_is_not_lost(good):
    before, children = signal.getsignal(signal.SIGINT), set(multiprocessing.active_children())
    INTERRUPTS.append(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        load(good, workers=2)
    assert not INTERRUPTS and signal.getsignal(signal.SIGINT) is before
    for worker in set(multiprocessing.active_children()) - children:
        worker.join(timeout=10)
        assert not worker.is_alive()

    # A handler that takes the signal as a request is called once, and the batches come.
    calls = []
    signal.signal(signal.SIGINT, lambda *arguments: calls.append(arguments))
    INTERRUPTS.append(signal.SIGINT)
    try:
        assert_same(load(good, workers=2), load(good))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [number for number, _ in calls] == [signal.SIGINT]


def test_workers_are_started_outside_of_the_main_thread_too(good):
    with ThreadPoolExecutor(1) as pool:
        assert_same(pool.submit(load, good, workers=2).result(timeout=60), load(good))


def test_workers_outlive_the_signals_of_the_process_group_and_end_with_the_iterator(good):
    batches, worker = start_one_worker(good)
    for name in ("INT", "USR1", "TERM", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # not from the parent
    time.sleep(0.2)
    for _ in range(4):
        next(batches)
    assert worker.is_alive()
    batches.close()
    worker.join(timeout=10)
    assert not worker.is_alive()


def test_the_parent_can_end_a_worker(good):
    _batches, worker = start_one_worker(good)
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("ending", "exit_code"),
    [("sys.exit(3)", 3), pytest.param("os.kill(os.getpid(), 9)", -9, marks=pytest.mark.slow)],
)
def test_a_run_that_ends_in_mid_epoch_leaves_no_process_behind(good, ending, exit_code):
    script = f"""
import multiprocessing, os, sys
from ijepa_fast.data import ImageFolder, TrainLoader
batches = iter(TrainLoader(ImageFolder({str(good.root)!r}), image_size=16, global_batch=4, seed=0, workers=2))
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
{ending}
"""
    # The workers hold the other end of these pipes: run() returns when the last of them is gone.
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == exit_code, result.stderr
    assert len(result.stdout.split()) == 2


def test_labels_and_failures_travel_in_pickles(mixed):
    batch = load(mixed, num_steps=1)[0]
    copy = pickle.loads(pickle.dumps(batch))
    assert_same([copy], [batch])


class Stuck:
    """A source whose image number 9 never comes."""

    labels = classes = None
    fingerprint = "stuck"

    def __len__(self):
        return 64

    def open(self, index):
        if index == 9:
            time.sleep(600)
        return smooth_image(32, 32, index)

    def describe(self, index):
        return str(index)


def test_waiting_ends_at_the_time_limit_and_leaves_no_worker():
    before = set(multiprocessing.active_children())
    with pytest.raises(LoaderError, match=r"no batch came within . s \(the timeout is 2\): the 1 loader workers"):
        load(Stuck(), workers=1, timeout=2)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_is_heard_while_a_batch_is_awaited(workers, good):
    asked = []

    def stop():
        asked.append(time.monotonic())
        return asked[-1] > asked[0] + 2

    with pytest.raises(StopRequested):
        load(Stuck() if workers else good, workers=workers, num_steps=None, stop=stop)
    assert max(np.diff(asked)) < 10  # on a busy machine; a second otherwise


@pytest.mark.parametrize(
    ("number", "told", "wait"),
    # After a while it has a batch ready, which cannot be fetched from a dead worker.
    [(signal.SIGKILL, "memory runs out", 0), (signal.SIGKILL, "memory", 2), (signal.SIGBUS, "/dev/shm is full", 0)],
)
def test_a_worker_that_dies_is_named_with_its_reason_when_a_batch_is_awaited(good, number, told, wait):
    batches, worker = start_one_worker(good)
    time.sleep(wait)
    os.kill(worker.pid, number)
    worker.join()
    time.sleep(0.1)  # a handler of SIGCHLD would raise here, in the middle of a step
    with pytest.raises(LoaderError, match=f"a loader worker died: process {worker.pid} was .*{told}"):
        list(batches)


def test_workers_need_no_signals_that_windows_lacks(good, monkeypatch):
    for name in ("SIGUSR1", "SIGBUS", "sigwaitinfo"):
        monkeypatch.delattr(signal, name)
    assert_same(load(good, workers=1), load(good))


def test_full_shared_memory_is_named_with_the_remedy(good, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(LoaderError, match=r"^/dev/shm has no room for .*--shm-size.*fewer loader.workers.*device"):
        load(good, workers=1)


def test_as_many_workers_as_there_are_cores(monkeypatch, caplog):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [worker_count("auto", ranks) for ranks in (1, 2, 8, 24)] == [12, 6, 1, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count("auto", 24) == 3
    assert [worker_count(workers, 24) for workers in (0, 2, 3)] == [0, 2, 3] and not caplog.text
    with caplog.at_level("INFO"):
        assert worker_count(77, 24) == worker_count(77, 24) == 3
    assert caplog.text.count("loader.workers is 77, but there are 3 cores for each rank") == 1
