"""I-JEPA in a training loop of your own: any torch optimizer, autocast, and a target encoder that follows by itself.

python examples/plain_loop.py --steps 200
"""

import argparse

import torch
from images import striped_images

from ijepa_fast import JEPAModel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--save", help="safetensors file to write at the end")
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = JEPAModel(
    {
        "img_size": 32,
        "patch_size": 4,
        "encoder_dim": 64,  # 768 is the ViT-B of the paper; depth and heads follow from it
        "encoder_depth": 2,
        "predictor_dim": 32,
        "predictor_depth": 1,
        "mask_ratio": 0.75,
        "ema_momentum": 0.99,
        "total_steps": arguments.steps,
        "variance_weight": 1.0,  # few images collapse without it
        "covariance_weight": 0.04,
    }
).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
images = striped_images(256).to(device)

for step in range(arguments.steps):
    batch = images[torch.randint(len(images), (16,), device=device)]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss, metrics = model(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()  # nothing else: the target encoder follows
    if step % 20 == 0 or step == arguments.steps - 1:
        print(step, metrics)

features = model.target_encoder(images[:4])  # [4, 64, 64]: images, patches, width
visible = torch.rand(4, 64, device=device) < 0.5
partial = model.context_encoder(images[:4], mask=visible)  # zeros where nothing was seen
print("features", list(features.shape), "of half of the patches", list(partial[visible].shape))
if arguments.save:
    model.save(arguments.save)
    print("JEPAModel.load reads", arguments.save)
