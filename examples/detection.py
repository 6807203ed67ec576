"""Mask R-CNN on the feature pyramid of a pretrained encoder, trained and scored on images with COCO-format boxes.

    python examples/detection.py runs/mine --data coco --epochs 25 --out detector.pt

DATA holds train2017/, val2017/, annotations/instances_train2017.json and annotations/instances_val2017.json, as COCO
does, or the same with train and val. All of the network is trained, with AdamW and layer-wise decay in the encoder;
--freeze keeps the encoder as it is. Needs torchvision and faster-coco-eval: pip install -e '.[detection]'.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster, mask
from PIL import Image

from ijepa_fast import FusedAdamW
from ijepa_fast.downstream.encoders import load_any
from ijepa_fast.downstream.finetune import layer_groups
from ijepa_fast.downstream.pyramid import mask_rcnn
from ijepa_fast.run.files import write_whole


class CocoSplit(torch.utils.data.Dataset):
    """Images [3, h, w] in [0, 1] and torchvision's targets, of one split."""

    def __init__(self, root: Path, split: str):
        name = next((n for n in (f"{split}2017", split) if (root / n).is_dir()), None)
        if name is None:
            raise SystemExit(f"{root} has neither {split}2017/ nor {split}/")
        self.folder = root / name
        self.coco = COCO(str(root / "annotations" / f"instances_{name}.json"))
        self.images = sorted(self.coco.getImgIds())
        self.categories = sorted(self.coco.getCatIds())
        if not self.images or not self.categories:
            raise SystemExit(
                f"{self.folder}: its annotations name {len(self.images)} images of {len(self.categories)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        about = self.coco.loadImgs(self.images[index])[0]
        with Image.open(self.folder / about["file_name"]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
        found = [a for a in self.coco.loadAnns(self.coco.getAnnIds(about["id"])) if not a.get("iscrowd")]
        found = [a for a in found if a["bbox"][2] >= 1 and a["bbox"][3] >= 1]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [torch.from_numpy(self.coco.annToMask(a).astype(np.uint8)) for a in found]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([1 + self.categories.index(a["category_id"]) for a in found], dtype=torch.int64),
            "masks": torch.stack(masks) if masks else torch.zeros(0, *pixels.shape[1:], dtype=torch.uint8),
        }
        if torch.rand(()) < 0.5 and self.folder.name.startswith("train"):
            pixels, target["masks"] = pixels.flip(-1), target["masks"].flip(-1)
            boxes[:, [0, 2]] = pixels.shape[-1] - boxes[:, [2, 0]]
        return pixels, target


def average_precision(model, split: CocoSplit, device: torch.device) -> dict[str, float]:
    """AP and AP50 of boxes and masks."""
    model.eval()
    found = []
    for index, image_id in enumerate(split.images):
        with torch.no_grad():
            (result,) = model([split[index][0].to(device)])
        boxes = result["boxes"].cpu()
        boxes[:, 2:] -= boxes[:, :2]
        for box, label, score, outline in zip(
            boxes.tolist(),
            result["labels"].tolist(),
            result["scores"].tolist(),
            result["masks"].cpu() > 0.5,
            strict=True,
        ):
            rle = mask.encode(np.asfortranarray(outline[0].numpy().astype(np.uint8)))
            category = split.categories[label - 1]
            found.append(
                {"image_id": image_id, "category_id": category, "bbox": box, "score": score, "segmentation": rle}
            )
    if not found:
        return dict.fromkeys(("box AP", "box AP50", "mask AP", "mask AP50"), 0.0)
    figures = {}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        scored = COCOeval_faster(split.coco, split.coco.loadRes(found), kind, print_function=lambda *_: None)
        scored.run()
        figures |= {f"{name} AP": scored.stats_as_dict["AP_all"], f"{name} AP50": scored.stats_as_dict["AP_50"]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="run, checkpoint, or weights of another library, as ijepa-fast evaluate takes")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--layer-decay", type=float, default=0.8)
    parser.add_argument("--size", type=int, default=1024, help="shorter side of the images in pixels")
    parser.add_argument("--channels", type=int, default=256, help="of the feature pyramid")
    parser.add_argument("--rois", type=int, default=512, help="boxes of each image that the heads are trained on")
    parser.add_argument("--freeze", action="store_true", help="train pyramid and heads alone")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="file for the weights, written after every epoch and continued from")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = CocoSplit(arguments.data, "train"), CocoSplit(arguments.data, "val")
    if strangers := set(test.categories) - set(train.categories):
        raise SystemExit(f"test boxes are of categories that no training image has: {sorted(strangers)}")
    test.categories = train.categories  # a class of the detector is a place in this list
    encoder = load_any(arguments.weights).encoder.requires_grad_(not arguments.freeze)
    classes = 1 + len(train.categories)
    model = mask_rcnn(
        encoder, classes, arguments.size, out_channels=arguments.channels, box_batch_size_per_image=arguments.rois
    ).to(device)
    optimizer = FusedAdamW(layer_groups(model, encoder, arguments.layer_decay, 0.1), lr=arguments.lr, max_grad_norm=1.0)
    batches = torch.utils.data.DataLoader(
        train, arguments.batch_size, shuffle=True, collate_fn=lambda rows: tuple(zip(*rows, strict=True)),
        num_workers=arguments.workers, drop_last=len(train) >= arguments.batch_size,
    )  # fmt: skip
    total, done = arguments.epochs * len(batches), 0
    if arguments.out and arguments.out.exists():
        state = torch.load(arguments.out, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["epochs"]
    for epoch in range(done, arguments.epochs):
        model.train()
        losses = 0.0
        for number, (images, targets) in enumerate(batches, start=epoch * len(batches)):
            rate = min(1.0, (number + 1) / (0.05 * total + 1)) * 0.5 * (1 + math.cos(math.pi * number / total))
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * rate
            on_device = [{name: value.to(device) for name, value in target.items()} for target in targets]
            loss = sum(model([image.to(device) for image in images], on_device).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += float(loss.detach())
        print(f"epoch {epoch + 1} of {arguments.epochs}: loss {losses / len(batches):.3f}", flush=True)
        if arguments.out:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
            write_whole(arguments.out, partial(torch.save, state))
    for name, value in average_precision(model, test, device).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
