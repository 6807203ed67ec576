"""Encoder and predictor by themselves: sizes, names, positions, ways to call, errors, precision.

What the whole objective computes is tested in test_jepa.py. Legend: B images, N patches, K patches of a mask, D width.
"""

import pytest
import torch
from dense_jepa import encode, encode_layers, patch_features, position_table, predict
from model_cases import HEADS, WIDTH, assert_equal, byte_images, float_images, make_encoder, make_predictor

from ijepa_fast.model import blocks
from ijepa_fast.model.predictor_layout import predictor_layout
from ijepa_fast.model.vit import Predictor, VisionTransformer
from ijepa_fast.ragged import Ragged

# Positions


@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 4)])
def test_position_tables_follow_the_definition(height, width):
    want = position_table(height, width, 12).float()
    encoder = VisionTransformer((4 * height, 4 * width), 4, embed_dim=12, depth=1, num_heads=1)
    predictor = Predictor((height, width), 12, predictor_embed_dim=12, depth=1, num_heads=1)
    for table in (encoder.pos_embed, predictor.predictor_pos_embed):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table[0], want, rtol=0, atol=1e-7)


def test_first_half_of_the_channels_is_the_column():
    table = VisionTransformer((12, 20), 4, embed_dim=8, depth=1, num_heads=1).pos_embed.view(3, 5, 8)
    assert table[:, :, :4].eq(table[:1, :, :4]).all() and not table[:, 1:, :4].eq(table[:, :1, :4]).all()
    assert table[:, :, 4:].eq(table[:, :1, 4:]).all() and not table[1:, :, 4:].eq(table[:1, :, 4:]).all()


def keys_cubic(old, new):
    """[new, old] weights of cubic convolution (Keys 1981, a = -0.75) at half-pixel centres, borders repeated."""

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(int(centre // 1) - 1, int(centre // 1) + 3):
            weights[i, min(max(tap, 0), old - 1)] += kernel(centre - tap)
    return weights


def resized(table, grid, new_grid):
    """[1, N, D] -> [1, N', D], rows and columns one after the other."""
    table = table[0].double().unflatten(0, grid)
    rows, columns = keys_cubic(grid[0], new_grid[0]), keys_cubic(grid[1], new_grid[1])
    return torch.einsum("ih,jw,hwd->ijd", rows, columns, table).flatten(0, 1)[None]


@pytest.mark.parametrize("size", [(48, 36), (20, 32), (24, 24)])
def test_other_sizes_interpolate_the_positions(size):
    encoder = make_encoder((24, 32)).eval()
    images, grid = float_images(1, *size), (size[0] // 4, size[1] // 4)
    weights = encoder.state_dict() | {"pos_embed": resized(encoder.pos_embed, (6, 8), grid)}
    (want,) = encode(weights, images, [range(grid[0] * grid[1])], HEADS)
    # The table is interpolated in fp32.
    assert_equal(encoder(images)[0], want, rtol=1e-5)


def test_predictor_interpolates_its_positions_for_another_grid():
    predictor = make_predictor((6, 6))
    context, targets = Ragged.from_lists([[0, 9, 30]]), Ragged.from_lists([[31, 5]])
    features = float_images(1)[0, 0, :3, :WIDTH]
    layout = predictor_layout(context, targets, 1, 1)
    weights = predictor.state_dict()
    weights["predictor_pos_embed"] = resized(weights["predictor_pos_embed"], (6, 6), (4, 8))
    want = predict(weights, features, [0, 9, 30], [31, 5], 3)
    assert_equal(predictor(features, layout, grid=(4, 8)), want, rtol=1e-5)


def test_training_size_uses_the_table_as_it_is():
    encoder = make_encoder((16, 24))
    encoder.pos_embed.copy_(torch.randn(encoder.pos_embed.shape, generator=torch.Generator().manual_seed(3)).double())
    images = float_images(1, 16, 24)
    assert_equal(encoder(images)[0], encode(encoder.state_dict(), images, [range(24)], HEADS)[0])


# Ways to call the encoder


@pytest.mark.parametrize("patch_size", [4, 7])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_dense_forward_of_float_images(patch_size, grid):
    height, width = grid[0] * patch_size, grid[1] * patch_size
    encoder, images = make_encoder((height, width), patch_size), float_images(2, height, width)
    patches = [range(grid[0] * grid[1])] * 2
    assert_equal(encoder(images), torch.stack(encode(encoder.state_dict(), images, patches, HEADS)))


def test_patch_embedding_is_a_strided_convolution():
    encoder, images = make_encoder(20, 5), float_images(2, 20, 20)
    embedded = encoder.patch_embed(images, Ragged.full(2, 16).indices).unflatten(0, (2, 16))
    assert_equal(embedded + encoder.pos_embed, patch_features(encoder.state_dict(), images))


def test_without_qkv_bias():
    encoder = make_encoder(qkv_bias=False)
    assert "blocks.0.attn.qkv.bias" not in encoder.state_dict()
    images = float_images()
    assert_equal(encoder(images), torch.stack(encode(encoder.state_dict(), images, [range(36)] * 2, HEADS)))
    queries = Ragged.from_lists([[3, 1], [40]])
    assert_equal(encoder(images, queries=queries), encoder(images).flatten(0, 1)[queries.indices])


def test_bytes_are_normalised():
    encoder, images = make_encoder(), byte_images()
    assert_equal(encoder(images), torch.stack(encode(encoder.state_dict(), images, [range(36)] * 2, HEADS)))


def test_own_normalisation_and_channels():
    encoder = make_encoder(in_chans=2, mean=(0.5, 0.25), std=(0.1, 2.0))
    images = torch.randint(0, 256, (2, 2, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scaled = (images.double() / 255 - torch.tensor([[[0.5]], [[0.25]]])) / torch.tensor([[[0.1]], [[2.0]]])
    assert_equal(encoder(images), encoder(scaled), rtol=1e-6)


def test_float_images_of_other_dtypes_and_strides():
    encoder, images = make_encoder().float(), float_images().float()
    want = encoder(images)
    assert_equal(encoder(images.double()), want, rtol=1e-6)
    assert encoder(images.half()).dtype == torch.float32
    channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert_equal(encoder(channels_last), want, rtol=1e-6)


def test_official_masks_are_the_packed_sets_in_mask_major_order():
    encoder, images = make_encoder(), float_images(3)
    generator = torch.Generator().manual_seed(0)
    masks = [torch.stack([torch.randperm(36, generator=generator)[:7] for _ in range(3)]) for _ in range(2)]
    features = encoder(images, masks)
    assert features.shape == (6, 7, WIDTH)
    sets = [[b * 36 + n for n in masks[m][b].tolist()] for m in range(2) for b in range(3)]
    assert_equal(features, encoder(images, Ragged.from_lists(sets)).unflatten(0, (6, 7)))
    for m in range(2):
        assert_equal(
            features[3 * m : 3 * m + 3], torch.stack(encode(encoder.state_dict(), images, masks[m].tolist(), HEADS))
        )
    assert_equal(encoder(images, masks[1]), features[3:])


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("depth", [1, 2])
def test_queries_are_the_selected_rows_with_their_gradients(depth, padding):
    encoder, images = make_encoder(depth=depth), float_images(2)
    tokens = Ragged.from_lists([[3, 0, 35, 7], [36 + 1, 36 + 2, 36 + 3]]).padded(7 + padding)
    queries = Ragged.from_lists([[2, 2, 0], [5]]).padded(4 + padding)
    weights = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = list(encoder.parameters())

    wanted = encoder(images, tokens)[[2, 2, 0, 5]]
    want_grads = torch.autograd.grad((wanted * weights).sum(), parameters)
    got = encoder(images, tokens, queries)
    grads = torch.autograd.grad((got[:4] * weights).sum(), parameters)
    assert_equal(got[:4], wanted)
    assert got.shape == (4 + padding, WIDTH) and got[4:].eq(0).all()
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert_equal(grad, want_grad)


def test_intermediate_layers():
    encoder, images = make_encoder(depth=3), float_images(2)
    layers = encoder.intermediate_layers(images, n=3)
    for b in range(2):
        for layer, want in zip(layers, encode_layers(encoder.state_dict(), images[b], HEADS), strict=True):
            assert_equal(layer[b], want)
    torch.testing.assert_close(layers[-1], encoder(images), rtol=0, atol=0)
    (last,) = encoder.intermediate_layers(images, n=1)
    assert_equal(last, layers[-1])
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the depth 3, got {n}"):
            encoder.intermediate_layers(images, n=n)


@pytest.mark.parametrize("sets", [[[0, 7], [], [36 * 2]], [[], [], [36 * 2 + 35]]])
def test_images_without_tokens(sets):
    encoder, images = make_encoder(), float_images(3)
    features = encoder(images, Ragged.from_lists(sets))
    patches = [[token % 36 for token in tokens] for tokens in sets]
    assert_equal(features, torch.cat(encode(encoder.state_dict(), images, patches, HEADS)))


# Padding rows


def test_padding_rows_are_zero_and_change_nothing():
    encoder, images = make_encoder(), float_images(2)
    tokens = Ragged.from_lists([[3, 0, 35], [36 + 1, 36 + 2]])
    want, got = encoder(images, tokens), encoder(images, tokens.padded(8))
    assert_equal(got[:5], want)
    assert got[5:].eq(0).all()
    parameters = list(encoder.parameters())
    wanted = torch.autograd.grad(want.square().sum(), parameters)
    # Whatever comes back for padding rows, NaN included, goes nowhere.
    weights = torch.cat([2 * want.detach(), torch.full((3, WIDTH), torch.nan, dtype=torch.float64)])
    for grad, want_grad in zip(torch.autograd.grad(got, parameters, weights), wanted, strict=True):
        assert_equal(grad, want_grad)


def test_padding_rows_do_not_read_pixels():
    encoder, images = make_encoder(), float_images(2)
    tokens = Ragged.from_lists([[3, 7], [36 + 1]])
    images[0, :, :4, :4] = torch.nan
    features = [encoder(images, tokens), encoder(images, tokens.padded(6))[:3]]
    gradients = [torch.autograd.grad(x.square().sum(), list(encoder.parameters())) for x in features]
    assert gradients[0][0].isfinite().all()
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert_equal(got, want)


def test_predictor_padding_rows_are_zero_and_change_nothing():
    predictor = make_predictor()
    context, targets = Ragged.from_lists([[3, 0, 35], [36 + 1, 36 + 2]]), Ragged.from_lists([[5, 6], [36]])
    features = float_images(1)[0, 0, :5, :WIDTH].requires_grad_()
    leaves = [features, *predictor.parameters()]
    want = predictor(features, predictor_layout(context, targets, 1, 1))
    layout = predictor_layout(context.padded(8), targets.padded(4), 1, 1)
    got = predictor(torch.nn.functional.pad(features, (0, 0, 0, 3)), layout)
    assert_equal(got[:3], want)
    assert got.shape == (4, WIDTH) and got[3:].eq(0).all()
    wanted = torch.autograd.grad(want.square().sum(), leaves)
    weights = torch.cat([2 * want.detach(), torch.full((1, WIDTH), torch.nan, dtype=torch.float64)])
    for grad, want_grad in zip(torch.autograd.grad(got, leaves, weights), wanted, strict=True):
        assert_equal(grad, want_grad)


# Activation checkpointing


def test_activation_checkpointing_changes_no_gradient():
    encoder, images = make_encoder(), float_images(2)
    predictor = make_predictor()
    context, targets = Ragged.from_lists([[0, 1, 2], [40, 41]]), Ragged.from_lists([[5], [50, 51]])
    layout = predictor_layout(context, targets, 1, 1)
    results = []
    for checkpointing in (False, True):
        encoder.activation_checkpointing = predictor.activation_checkpointing = checkpointing
        out = predictor(encoder(images, context), layout)
        leaves = [*encoder.parameters(), *predictor.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_activation_checkpointing_recomputes_in_the_backward_only():
    encoder = make_encoder(activation_checkpointing=True)
    runs = []
    encoder.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    out = encoder(float_images(1))
    assert len(runs) == 1
    out.sum().backward()
    assert len(runs) == 2
    with torch.no_grad():
        encoder(float_images(1))
    assert len(runs) == 3


# Errors


ERRORS = [
    (lambda: VisionTransformer(224, 15), "224 x 224 px .* 15 px"),
    (lambda: VisionTransformer((224, 230), 16), "224 x 230 px .* 16 px"),
    (lambda: VisionTransformer(0, 16), "0 x 0 px"),
    (lambda: VisionTransformer(32, 0), "patch.* 0"),
    (lambda: VisionTransformer(32, 16, embed_dim=100, num_heads=3), "width 100 .* 3 heads"),
    (lambda: VisionTransformer(32, 16, embed_dim=100, num_heads=0), "width 100 .* 0 heads"),
    (lambda: VisionTransformer(32, 16, embed_dim=18, num_heads=3), "multiple of 4, got 18"),
    (lambda: VisionTransformer(32, 16, depth=0), "depth .* 0"),
    (lambda: VisionTransformer(32, 16, in_chans=1), "1 values"),
    (lambda: VisionTransformer(32, 16, std=(0.2, 0, 0.2)), "std must be positive"),
    (lambda: VisionTransformer(32, 16, embed_dim=12, num_heads=3, init="zeros"), "'zeros'"),
    (lambda: VisionTransformer(32, 16, attention="flash"), "'flash'"),
    (lambda: VisionTransformer(32, 16, embed_dim=12, num_heads=3, mlp_ratio=0), "mlp_ratio .* 0"),
    (lambda: Predictor((2, 2), 16, predictor_embed_dim=10, num_heads=5), "multiple of 4, got 10"),
    (lambda: Predictor((2, 2), 16, predictor_embed_dim=384, num_heads=7), "width 384 .* 7 heads"),
    (lambda: Predictor((2, 2), 16, depth=0), "depth .* 0"),
    (lambda: Predictor((2, 2), 16, attention="flash"), "'flash'"),
    (lambda: make_encoder()(torch.zeros(3, 24, 24)), r"\[3, 24, 24\]"),
    (lambda: make_encoder()(torch.zeros(1, 1, 24, 24)), r"\[1, 1, 24, 24\]"),
    (lambda: make_encoder()(torch.zeros(1, 3, 24, 26)), "24 x 26 px"),
    (lambda: make_encoder().intermediate_layers(torch.zeros(1, 1, 24, 24), n=1), r"\[1, 1, 24, 24\]"),
    (lambda: make_encoder()(torch.zeros(1, 3, 24, 24, dtype=torch.int64)), "torch.int64"),
    (lambda: make_encoder()(float_images(1), []), "empty list"),
    (lambda: make_encoder(patch_size=(16, 4)), r"one number for square patches, got \(16, 4\)"),
    (
        lambda: make_encoder()(float_images(1), [torch.zeros(1, k, dtype=torch.int64) for k in (2, 3)]),
        "same number of patches",
    ),
    (lambda: make_encoder()(float_images(2), [torch.zeros(1, 2, dtype=torch.int64)]), "images"),
    (lambda: make_encoder()(float_images(2), queries=Ragged.from_lists([[0], [1], [2]])), "3 .*2 |2 .*3 "),
]


@pytest.mark.parametrize(("make", "message"), ERRORS)
def test_errors_name_the_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cpu_mlps_in_parts_give_the_same(monkeypatch):
    """Rows of a long batch go through the MLP part by part, to stay in the cache."""
    encoder, images = make_encoder(), float_images(3)
    parts = []
    encoder.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, out: parts.append(len(out)))
    results = []
    for hidden in (1 << 21, 20 * 4 * WIDTH):
        monkeypatch.setattr(blocks, "CPU_HIDDEN", hidden)
        out = encoder(images)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(encoder.parameters()))))
    assert parts[0] == 3 * 36 and parts[1:] == [18] * 6
    for got, want in zip(*results, strict=True):
        assert_equal(got, want)


def test_the_gradient_of_a_whole_weight_is_no_slice():
    """A slice's gradient is written into zeros of the weight's size: once more memory traffic for every linear."""
    nodes, seen = [blocks.Linear(4, 8)(torch.zeros(2, 4)).grad_fn], set()
    while nodes:
        node = nodes.pop()
        seen.add(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert "torch::autograd::AccumulateGrad" in seen and not [name for name in seen if "Slice" in name]
