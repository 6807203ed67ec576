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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of labelled images: 20 in train/, 10 in test/."""
    from tests.image_files import write_folder  # Pillow may be missing where only tests of a GPU run

    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", 20)
    write_folder(root / "test", 10)
    return root


@pytest.fixture(scope="session", autouse=True)
def torch_draws_masks():
    """Whatever `make ext` built: test_extension.py tests the library, of the sources at hand, and loads no other."""
    from ijepa_fast.masks import extension

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "library_path", lambda: None)
        yield


_deselected: dict[str, list[pytest.Item]] = {}


def pytest_configure(config):
    # Triton reads this when it is imported, by the first test module. Tests marked `gpu` need kernels compiled.
    if not torch.cuda.is_available() or "not gpu" in config.option.markexpr:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "torch sees no CUDA device"
    if os.environ.get("TRITON_INTERPRET") != "1":
        reasons["interpreter"] = "this run compiles kernels for the GPU; run them with -m 'not gpu'"
    for marker, reason in reasons.items():
        chosen = [item for item in items if item.get_closest_marker(marker)]
        if chosen:
            _deselected[f"marked {marker} deselected: {reason}"] = chosen
            items[:] = [item for item in items if item not in chosen]
            config.hook.pytest_deselected(items=chosen)


def pytest_terminal_summary(terminalreporter):
    for words, items in _deselected.items():
        terminalreporter.write_line(f"{len(items)} tests {words}")
