"""The loop of the official training script with the parts of this package, under the official names.

    python examples/official_trainer.py --steps 50

To run an unmodified checkout of the official code instead: ijepa-fast accelerate-official PATH/TO/ijepa -- ARGS
(docs/official.md). The masks are dense lists [B, K], as everything there expects; JEPAModel takes ragged ones.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from images import striped_images
from torch.utils.data import DataLoader

from ijepa_fast import EMA
from ijepa_fast.interop.official import MaskCollator, apply_masks, init_opt, save_checkpoint
from ijepa_fast.interop.official import VisionTransformer as Encoder
from ijepa_fast.interop.official import VisionTransformerPredictor as Predictor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--save", help="checkpoint to write, which the official code resumes from")
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
# init_model(device, 14, "vit_huge", 224, pred_depth=12) makes those of the paper; these are small ones.
encoder = Encoder(img_size=[32], patch_size=4, embed_dim=32, depth=2, num_heads=2).to(device)
predictor = Predictor(num_patches=64, embed_dim=32, predictor_embed_dim=16, depth=1, num_heads=2).to(device)
target_encoder = copy.deepcopy(encoder).requires_grad_(False)
average = EMA(target_encoder, encoder)

collator = MaskCollator(
    (32, 32), 4, enc_mask_scale=(0.85, 1.0), pred_mask_scale=(0.15, 0.2), aspect_ratio=(0.75, 1.5), npred=4, min_keep=4
)
loader = DataLoader(striped_images(256), batch_size=32, shuffle=True, collate_fn=collator)
epochs = -(-arguments.steps // len(loader))
optimizer, scaler, schedule, wd_schedule = init_opt(
    encoder, predictor, len(loader), start_lr=2e-4, ref_lr=1e-3, warmup=1, num_epochs=max(epochs, 2)
)

step = 0
for _ in range(epochs):
    for images, masks_enc, masks_pred in loader:
        if step == arguments.steps:
            break
        lr = schedule.step()
        wd_schedule.step()
        images = images.to(device)
        masks_enc, masks_pred = ([mask.to(device) for mask in masks] for masks in (masks_enc, masks_pred))
        with torch.no_grad():
            whole = F.layer_norm(target_encoder(images), (32,))
            targets = apply_masks(whole, masks_pred)
        predictions = predictor(encoder(images, masks_enc), masks_enc, masks_pred)
        loss = F.smooth_l1_loss(predictions, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.996 + 0.004 * step / (epochs * len(loader)))
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step} loss {float(loss.detach()):.4f} lr {lr:.2e} context patches {masks_enc[0].shape[1]}")
        step += 1

if arguments.save:
    save_checkpoint(
        arguments.save,
        encoder,
        predictor,
        target_encoder,
        optimizer,
        scaler,
        epoch=epochs,
        loss=float(loss.detach()),
        batch_size=32,
        world_size=1,
        lr=lr,
    )
