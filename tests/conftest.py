"""What every test runs under: memory that nobody wrote is NaN, and tests marked `gpu` need a CUDA device."""

import functools
import os

import hypothesis
import pytest
import torch
import torch.utils._device

# Shared machines stall for seconds: time is no failure. CI draws the same examples each time.
hypothesis.settings.register_profile("ijepa_fast", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("ijepa_fast")

# Without a GPU kernels run in Triton's interpreter, which is chosen when triton is imported: by the first test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny tensors gain nothing from threads, and on a busy machine the threads wait for one another.
torch.set_num_threads(1)

_UNINITIALIZED = {
    torch: ["empty", "empty_like", "empty_strided"],
    torch.Tensor: ["new_empty", "new_empty_strided"],
}


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """Uninitialised tensors made from Python hold NaN (integers: the largest value), so that a missed write shows.

    Not torch.use_deterministic_algorithms, which fills memory too: it would also make ops deterministic by itself and
    so hide what the tests for determinism look for.
    """

    def poisoned(make):
        @functools.wraps(make)
        def make_poisoned(*args, **kwargs):
            with torch.no_grad():
                return _poison(make(*args, **kwargs))

        return make_poisoned

    # torch looks its constructors up by identity, once, for `with torch.device(...)`: before they are replaced.
    torch.utils._device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in _UNINITIALIZED.items():
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def torch_draws_masks():
    """Whatever `make ext` built: test_extension.py tests the library, of the sources at hand, and loads no other."""
    from ijepa_fast import extension

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "library_path", lambda: None)
        yield


_deselected_gpu_tests = 0


def pytest_collection_modifyitems(config, items):
    global _deselected_gpu_tests
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        _deselected_gpu_tests = len(gpu)
        items[:] = [item for item in items if item not in gpu]
        config.hook.pytest_deselected(items=gpu)


def pytest_terminal_summary(terminalreporter):
    if _deselected_gpu_tests:
        terminalreporter.write_line(f"{_deselected_gpu_tests} tests marked gpu deselected: torch sees no CUDA device")
