"""Small fp64 models, images and masks, and comparisons with the dense model of dense_jepa.py.

Legend: B images, N patches per image.
"""

from dataclasses import replace

import torch
from dense_jepa import DenseJEPA, covariance_term, randomize_, variance_term

from ijepa_fast.masks.sampler import MaskConfig, MaskSampler
from ijepa_fast.model.jepa import IJEPA, Losses
from ijepa_fast.model.vit import Predictor, VisionTransformer

WIDTH, PREDICTOR_WIDTH, HEADS = 24, 12, 3
RTOL = 1e-10


def make_encoder(img_size=24, patch_size=4, seed=0, **options):
    options = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS} | options
    encoder = VisionTransformer(img_size, patch_size, **options).double()
    randomize_(encoder, seed)
    return encoder


def make_predictor(grid=(6, 6), seed=1, **options):
    options = {"predictor_embed_dim": PREDICTOR_WIDTH, "depth": 2, "num_heads": HEADS} | options
    predictor = Predictor(grid, WIDTH, **options).double()
    randomize_(predictor, seed)
    return predictor


def float_images(batch=2, height=24, width=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def byte_images(batch=2, height=24, width=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def make_model(grid, objective=None, patch_size=4, **options):
    """Context encoder, target encoder and predictor with different, large weights, in fp64."""
    img_size = (grid[0] * patch_size, grid[1] * patch_size)
    options = {"depth": 2, "num_heads": HEADS} | options
    encoder = VisionTransformer(img_size, patch_size, embed_dim=WIDTH, **options)
    model = IJEPA(encoder, Predictor(grid, WIDTH, PREDICTOR_WIDTH, **options), objective).double()
    for seed, network in enumerate((model.context_encoder, model.target_encoder, model.predictor)):
        randomize_(network, seed)
    return model


def make_images(batch, grid, patch_size=4, dtype=torch.float64):
    sides = grid[0] * patch_size, grid[1] * patch_size
    return byte_images(batch, *sides) if dtype == torch.uint8 else float_images(batch, *sides)


def make_masks(grid, batch, padding=0, **config):
    return pad(MaskSampler(MaskConfig(min_keep=2, **config), grid).sample(batch, seed=0, step=3), padding)


def pad(masks, padding):
    """With ``padding`` more rows of context, and twice as many of targets."""
    context, targets = masks.context, masks.targets
    context, targets = context.padded(context.num_rows + padding), targets.padded(targets.num_rows + 2 * padding)
    return replace(masks, context=context, targets=targets, tokens=None)


def patches_per_image(masks, grid):
    """Contexts and targets as [mask][block] lists of patch numbers, the masks of an image one after another."""
    num_patches = grid[0] * grid[1]

    def split(ragged, per_mask):
        blocks = []
        for s, tokens in enumerate(ragged.to_lists()):
            assert all(token // num_patches == s // per_mask // masks.per_image for token in tokens)
            blocks.append([token % num_patches for token in tokens])
        return [blocks[s : s + per_mask] for s in range(0, len(blocks), per_mask)]

    return split(masks.context, masks.num_contexts), split(masks.targets, masks.num_targets)


def make_oracle(model):
    objective = model.objective
    states = [network.state_dict() for network in (model.context_encoder, model.target_encoder, model.predictor)]
    return DenseJEPA(*states, HEADS, objective.loss, objective.normalize_targets)


def oracle_losses(oracle, objective, images, contexts, targets, per_image=1):
    """With several masks per image: of each image as often as it has masks; regularised for each number of mask."""
    images = images.repeat_interleave(per_image, 0)
    prediction = oracle.prediction_loss(images, contexts, targets)
    variance = covariance = invariance = torch.zeros_like(prediction)
    if objective.regularised:
        pooled = [oracle.pooled_context(images, contexts)[k::per_image] for k in range(per_image)]
        variance = sum(variance_term(p, 1.0, 1e-4) for p in pooled) / per_image
        covariance = sum(map(covariance_term, pooled)) / per_image
    total = objective.prediction_weight * prediction
    if objective.invariance_weight:
        pairs = [(a - b).square().mean() for i, a in enumerate(pooled) for b in pooled[:i]]
        invariance = sum(pairs) / len(pairs)
    total = total + objective.variance_weight * variance + objective.covariance_weight * covariance
    total = total + objective.invariance_weight * invariance
    return Losses(total, prediction, variance, covariance, invariance)


def gradients(model, loss):
    """Of every trained parameter, as DenseJEPA names them."""
    names = {"encoder": model.context_encoder, "predictor": model.predictor}
    leaves = {f"{prefix}.{name}": p for prefix, network in names.items() for name, p in network.named_parameters()}
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def assert_equal(got, want, rtol=RTOL):
    """Largest difference within ``rtol`` of the largest value."""
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=rtol * float(want.detach().abs().max()))


def assert_same_gradients(got, want):
    """As ``assert_equal``. Gradients that are zero in exact arithmetic are rounding noise: 1e-14 of the largest."""
    assert got.keys() == want.keys()
    noise = 1e-14 * max(float(value.abs().max()) for value in want.values())
    for name in want:
        atol = RTOL * float(want[name].abs().max()) + noise
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_equals_oracle(model, images, masks, grid, **options):
    """Losses and the gradient of every parameter."""
    contexts, targets = patches_per_image(masks, grid)
    oracle = make_oracle(model)
    want = oracle_losses(oracle, model.objective, images, contexts, targets, masks.per_image)
    got, _ = model(images, masks, **options)
    for name in Losses._fields:
        assert_equal(getattr(got, name), getattr(want, name))
    assert_same_gradients(gradients(model, got.total), oracle.gradients(want.total))
