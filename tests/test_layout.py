"""predictor_layout against loops over Python lists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.ragged import PADDING, Ragged


@st.composite
def batches(draw):
    """Contexts and targets of a few images as lists of token indices, C, M, and padding rows of both."""
    images, contexts, targets = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    block = st.lists(st.integers(0, 99), max_size=4)

    def blocks(count):
        return draw(st.lists(block, min_size=count, max_size=count))

    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    return blocks(images * contexts), blocks(images * targets), contexts, targets, padding


def slow_layout(contexts, targets, num_contexts, num_targets):
    """Rows of the predictor in order, and where each comes from; lists without padding."""
    context_first = [sum(map(len, contexts[:s])) for s in range(len(contexts))]
    target_first = [sum(map(len, targets[:s])) for s in range(len(targets))]
    sequences, sources, predicted, target_rows = [], [], [], []
    copies = [[] for _ in range(sum(map(len, contexts)))]
    row = 0
    for image in range(len(contexts) // num_contexts):
        for c in range(image * num_contexts, (image + 1) * num_contexts):
            for m in range(image * num_targets, (image + 1) * num_targets):
                sequences.append(contexts[c] + targets[m])
                for place in range(len(contexts[c])):
                    sources.append(context_first[c] + place)
                    copies[context_first[c] + place].append(row)
                    row += 1
                predicted.append([])
                for place in range(len(targets[m])):
                    sources.append(PADDING)
                    predicted[-1].append(row)
                    target_rows.append(target_first[m] + place)
                    row += 1
    return sequences, sources, copies, predicted, target_rows


def padded(values, num_rows):
    return values + [PADDING] * (num_rows - len(values))


@given(batches(), st.sampled_from([None, 0, 5]))
def test_layout_is_that_of_slow_loops(batch, spare_rows):
    contexts, targets, num_contexts, num_targets, (context_padding, target_padding) = batch
    context, target = Ragged.from_lists(contexts), Ragged.from_lists(targets)
    context = context.padded(context.num_rows + context_padding)
    target = target.padded(target.num_rows + target_padding)
    sequences, sources, copies, predicted, target_rows = slow_layout(contexts, targets, num_contexts, num_targets)

    num_rows = num_targets * context.num_rows + num_contexts * target.num_rows
    requested = None
    if spare_rows is not None:
        requested = num_rows = len(sources) + spare_rows
    layout = predictor_layout(context, target, num_contexts, num_targets, requested)

    assert layout.tokens.to_lists() == sequences
    assert layout.tokens.indices.tolist() == padded(sum(sequences, []), num_rows)
    assert layout.tokens.max_seqlen >= max(map(len, sequences))
    assert layout.sources.tolist() == padded(sources, num_rows)
    assert layout.copies.tolist() == copies + [[PADDING] * num_targets] * context_padding
    predicted_rows = num_contexts * target.num_rows
    assert layout.predicted.to_lists() == predicted
    assert layout.predicted.indices.tolist() == padded(sum(predicted, []), predicted_rows)
    assert layout.predicted.max_seqlen >= max(map(len, predicted))
    assert layout.target_rows.tolist() == padded(target_rows, predicted_rows)
    tokens_of_targets = sum(targets, [])
    assert layout.target_tokens.tolist() == padded([tokens_of_targets[row] for row in target_rows], predicted_rows)
    for tensor in (layout.sources, layout.copies, layout.target_rows, layout.target_tokens):
        assert tensor.dtype == torch.int32


@pytest.mark.parametrize("uniform_context", [True, False])
@pytest.mark.parametrize("uniform_targets", [True, False])
def test_only_full_rectangles_are_promised_to_be_uniform(uniform_context, uniform_targets):
    def blocks(count, length, uniform):
        return Ragged.full(count, length) if uniform else Ragged.from_lists([[1] * (length - s) for s in range(count)])

    context, targets = blocks(2, 3, uniform_context), blocks(4, 5, uniform_targets)
    layout = predictor_layout(context, targets, 1, 2)
    assert layout.tokens.uniform == (uniform_context and uniform_targets)
    assert layout.predicted.uniform == uniform_targets
    assert not predictor_layout(context, targets, 1, 2, layout.tokens.num_rows + 1).tokens.uniform


@pytest.mark.parametrize(
    ("num_contexts", "num_targets"),
    [(2, 4), (4, 4), (1, 3), (1, 0), (0, 4)],
)
def test_blocks_that_do_not_make_up_images_are_rejected(num_contexts, num_targets):
    with pytest.raises(ValueError, match="3 context and 12 target"):
        predictor_layout(Ragged.full(3, 2), Ragged.full(12, 2), num_contexts, num_targets)
