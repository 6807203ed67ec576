"""Scenes with known answers: one square on noise, whose class is the direction of its stripes.

Stripes are upright, level, both, or diagonal both ways: a mirror image has the same class. They have random phase and
no mean, so that neither colours nor single pixels give the class away. Background is mask value 0 and 6 m away; a
square of class c has mask value 1 + c and is 1 + c metres away.
"""

import functools
import json

import numpy as np
import torch
from PIL import Image

from ijepa_fast.model.vit import VisionTransformer

SIDE, CLASSES, FAR = 32, 4, 6.0
STEPS = 160
DIRECTIONS = ((0,), (90,), (0, 90), (45, 135))
BUILD = {"img_size": SIDE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


def scene(number: int, width: int = SIDE, height: int = SIDE):
    """(image uint8 [h, w, 3], mask uint8 [h, w], depth in metres float32 [h, w], box x0, y0, x1, y1, class)."""
    rng = np.random.default_rng(number)
    label, side = number % CLASSES, int(rng.integers(14, 23))
    x0, y0 = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(2 * np.pi / 5 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
        for angle in np.deg2rad(DIRECTIONS[label])
    ]
    stripes = sum(waves) / len(waves) ** 0.5
    inside = (x >= x0) & (x < x0 + side) & (y >= y0) & (y < y0 + side)
    grey = 128 + np.where(inside, 80 * stripes, 0)[..., None] + rng.normal(0, 25, (height, width, 3))
    mask = np.where(inside, 1 + label, 0).astype(np.uint8)
    depth = np.where(inside, 1.0 + label, FAR).astype(np.float32)
    return grey.clip(0, 255).astype(np.uint8), mask, depth, (x0, y0, x0 + side, y0 + side), label


@functools.cache
def trained_encoder() -> VisionTransformer:
    """An encoder that was taught the class of every patch."""
    torch.manual_seed(0)
    encoder = VisionTransformer(**BUILD)
    head = torch.nn.Linear(encoder.embed_dim, CLASSES + 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, STEPS)
    scenes = [scene(10_000 + i) for i in range(400)]
    images = torch.from_numpy(np.stack([s[0] for s in scenes])).permute(0, 3, 1, 2)
    centres = torch.from_numpy(np.stack([s[1][2::4, 2::4] for s in scenes])).flatten(1).long()
    for step in range(STEPS):
        rows = torch.randint(len(images), (16,), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(head(encoder(images[rows])).flatten(0, 1), centres[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.eval()


def write_classes(root, train: int, test: int):
    """Class folders in train/ and val/."""
    for split, first, count in (("train", 0, train), ("val", 5000, test)):
        for number in range(first, first + count):
            image, *_, label = scene(number)
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:05d}.png")
    return root


def write_dense(root, train: int, test: int, kind: str = "annotations", size=(SIDE, SIDE)):
    """images/ and annotations/ (or depth/), each with training/ and validation/, as ADE20K has them."""
    for split, first, count in (("training", 0, train), ("validation", 5000, test)):
        for folder in ("images", kind):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            image, mask, depth, _, _ = scene(number, *size)
            Image.fromarray(image).save(root / "images" / split / f"{number:05d}.png")
            if kind == "depth":
                depth = Image.fromarray((1000 * depth).astype(np.uint16))
                depth.save(root / kind / split / f"{number:05d}.png")
            else:
                Image.fromarray(mask).save(root / kind / split / f"{number:05d}.png")
    return root


def write_boxes(root, train: int, test: int, size=(SIDE, SIDE)):
    """train2017/ and val2017/ with annotations/instances_*.json, as COCO has them."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, first, count in (("train2017", 0, train), ("val2017", 5000, test)):
        (root / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for number in range(first, first + count):
            image, _, _, (x0, y0, x1, y1), label = scene(number, *size)
            name = f"{number:05d}.png"
            Image.fromarray(image).save(root / split / name)
            images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
            annotations.append(
                {
                    "id": number + 1,
                    "image_id": number,
                    "category_id": 10 + label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )
        categories = [{"id": 10 + label, "name": f"class{label}"} for label in range(CLASSES)]
        contents = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(contents))
    return root
