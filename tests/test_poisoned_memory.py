"""The NaN poison of conftest.py reaches every way to make an uninitialised tensor from Python."""

import pytest
import torch

MAKERS = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 5, dtype=dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (5, 1), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype).new_empty(3, 5),
    "new_empty_strided": lambda dtype: torch.zeros(1, dtype=dtype).new_empty_strided((3, 5), (5, 1)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_uninitialized_memory_is_poisoned(make):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert make(dtype).isnan().all()
    assert (make(torch.int32) == torch.iinfo(torch.int32).max).all()
    assert make(torch.bool).all()


def test_requires_grad_meta_and_fake_tensors_still_work():
    leaf = torch.empty(4, requires_grad=True)
    assert leaf.is_leaf and leaf.requires_grad
    assert torch.empty(4, device="meta").shape == (4,)
    with torch._subclasses.FakeTensorMode():
        assert torch.empty(4).new_empty(2).shape == (2,)


def test_poison_does_not_break_the_graph():
    def unwritten(x):
        out = torch.empty_like(x)
        out[:2] = x[:2]
        return out

    out = torch.compile(unwritten, fullgraph=True, backend="aot_eager")(torch.ones(4))
    assert out[:2].eq(1).all() and out[2:].isnan().all()
