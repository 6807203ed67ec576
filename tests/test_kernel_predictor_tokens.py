"""predictor_tokens kernels in Triton's interpreter against the fp64 reference, forward and backward."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_testing import (
    INTERPRETED_DTYPES,
    LastProgram,
    allocate_huge_outputs,
    assert_close_to_reference,
    huge,
    interpreted,
    largest,
    rows_beyond_int32,
)

from ijepa_fast import ops
from ijepa_fast.kernels import predictor_tokens as kernels
from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.ragged import Ragged

pytestmark = pytest.mark.interpreter


def draw_case(context: list[int], targets: list[int], width: int, padding: int, seed: int):
    """Arguments of the op for images with these context lengths, each with the same target blocks."""
    generator = torch.Generator().manual_seed(seed)
    patches = max(context + targets, default=0) + 1

    def tokens(image: int, count: int) -> list[int]:
        return (image * patches + torch.randperm(patches, generator=generator)[:count]).tolist()

    contexts = Ragged.from_lists([tokens(b, count) for b, count in enumerate(context)])
    blocks = Ragged.from_lists([tokens(b, count) for b in range(len(context)) for count in targets])
    contexts, blocks = contexts.padded(contexts.num_rows + padding), blocks.padded(blocks.num_rows + padding)
    layout = predictor_layout(contexts, blocks, 1, len(targets))
    values = torch.randn(contexts.num_rows + 1 + patches, width, generator=generator)
    context, mask_token, positions = values.split([contexts.num_rows, 1, patches])
    return context, mask_token[0], positions, layout.tokens.indices, layout.sources, layout.copies


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=3)
cases = st.builds(draw_case, lengths, lengths, st.integers(1, 150), st.integers(0, 5), st.integers(0, 2**31))
EXAMPLES = [
    draw_case([0], [0], 8, 0, 0),
    draw_case([1], [1], 1, 0, 0),
    draw_case([9, 0, 7], [4, 0, 5, 6], 64, 3, 0),
    draw_case([0], [1], 1, 0, 0),  # nothing but mask tokens
]


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_forward(dtype, case):
    assert_close_to_reference(kernels.predictor_tokens, ops.predictor_tokens.definition, case, dtype)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@interpreted
@given(cases)
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_backward(dtype, case):
    _, mask_token, _, *rows = case
    grad = torch.randn(rows[0].shape[0], mask_token.shape[0], generator=torch.Generator().manual_seed(0))
    assert_close_to_reference(
        kernels.predictor_tokens_backward,
        ops.predictor_tokens_backward.definition,
        [grad, *rows],
        dtype,
        magnitudes=[largest(sums) for sums in ops.predictor_tokens_backward.definition(grad.abs(), *rows)],
    )


def test_gradient_of_padding_rows_is_ignored():
    _, _, _, indices, sources, copies = EXAMPLES[2]
    grad = torch.randn(indices.shape[0], 64)
    expected = ops.predictor_tokens_backward.definition(grad, indices, sources, copies)
    grad[indices < 0] = float("nan")
    actual = kernels.predictor_tokens_backward(grad, indices, sources, copies)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


def test_mixed_precision_rounds_to_the_dtype_of_the_context():
    context, *rest = EXAMPLES[2]
    out = kernels.predictor_tokens(context.half(), *rest)
    assert torch.equal(out, ops.predictor_tokens.definition(context.half(), *rest))


def test_non_contiguous_inputs():
    context, mask_token, positions, *rows = EXAMPLES[2]
    turned = [x.T.contiguous().T for x in (context, positions)]
    out = kernels.predictor_tokens(turned[0], mask_token, turned[1], *rows)
    assert torch.equal(out, kernels.predictor_tokens(context, mask_token, positions, *rows))


def test_offsets_beyond_int32(monkeypatch):
    rows, width = rows_beyond_int32(2048), 2048
    context = huge(rows, width, torch.float16)
    context[-1] = torch.arange(width)
    indices = torch.zeros(rows, dtype=torch.int32)
    sources = torch.full((rows,), rows - 1, dtype=torch.int32)
    allocate_huge_outputs(monkeypatch)
    for name in ("predictor_tokens_kernel", "sum_copies_kernel", "sum_mask_tokens_kernel"):
        monkeypatch.setattr(kernels, name, LastProgram(getattr(kernels, name), monkeypatch))
    out = kernels.predictor_tokens(
        context, torch.zeros(width), torch.ones(1, width), indices, sources, sources[:, None]
    )
    assert torch.equal(out[-1, -64:], context[-1, -64:] + 1)

    monkeypatch.setattr(kernels, "sum_rows", lambda partials: [partials[:, 0]])
    sources = torch.full((rows,), -1, dtype=torch.int32)
    copies = torch.full((rows, 2), rows - 1, dtype=torch.int32)
    grad_context, partials = kernels.predictor_tokens_backward(context, indices, sources, copies)
    assert torch.equal(grad_context[-1, -64:], 2 * context[-1, -64:])
    assert torch.equal(partials[-1, -64:], context[-1, -64:].float())


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(4, 8, dtype=torch.int8), "context must be bfloat16, .* got torch.int8"),
        (1, torch.zeros(7), r"context has width 8, mask_token \[7\]"),
        (2, torch.zeros(2, 7), r"positions \[2, 7\]"),
        (3, torch.zeros(4), "indices must be int32, got torch.float32"),
        (4, torch.zeros(5, dtype=torch.int32), "4 indices, but 5 sources"),
        (5, torch.zeros(4, 2, dtype=torch.int32, device="meta"), "on one device, got .* copies on meta"),
    ],
)
def test_unsupported_arguments_raise(position, value, message):
    rows = torch.zeros(4, dtype=torch.int32)
    arguments = [torch.zeros(4, 8), torch.zeros(8), torch.zeros(2, 8), rows, rows, rows[:, None]]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        kernels.predictor_tokens(*arguments)
