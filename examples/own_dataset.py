"""A folder of images of your own: decoded, cropped and normalised here, and resumed where the last start ended.

    python examples/own_dataset.py PATH/TO/IMAGES --steps 1000 --save encoder.safetensors

Order, crops and masks are functions of seed and step, so a run that is started again with the file it saved goes on
as if it had not been interrupted (the optimizer's state lies beside it).
"""

import argparse
from pathlib import Path

import torch

from ijepa_fast import FusedAdamW, JEPAModel, parameter_groups
from ijepa_fast.data import ImageFolder, TrainLoader
from ijepa_fast.optim.schedules import Schedules

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", help="folder of images, nested or not")
parser.add_argument("--steps", type=int, default=1000, help="length of the whole run")
parser.add_argument("--stop-after", type=int, help="end this start after so many steps of the run")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--size", type=int, default=32, help="side of the crops in pixels")
parser.add_argument("--save", type=Path, default=Path("own_dataset.safetensors"))
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
optimizer_file = arguments.save.with_suffix(".optimizer.pt")
if arguments.save.exists():
    model = JEPAModel.load(arguments.save)
else:
    torch.manual_seed(0)
    sizes = {"encoder_dim": 64, "encoder_depth": 3, "predictor_dim": 32, "predictor_depth": 2}
    regularised = {"variance_weight": 1.0, "covariance_weight": 0.04}  # small data sets collapse without
    shape = {"img_size": arguments.size, "patch_size": 4}
    model = JEPAModel(sizes | shape | regularised, total_steps=arguments.steps, mask_ratio=None)
model.to(device)
# The groups hold the target encoder's parameters too: the optimizer averages into them in the same pass.
optimizer = FusedAdamW(parameter_groups(model))
if optimizer_file.exists():
    optimizer.load_state_dict(torch.load(optimizer_file, weights_only=True))

start, end = model.calls, min(arguments.stop_after or arguments.steps, arguments.steps)
schedules = Schedules(arguments.steps, warmup_steps=arguments.steps // 10)
loader = TrainLoader(
    ImageFolder(arguments.images),
    image_size=arguments.size,
    global_batch=arguments.batch_size,
    seed=0,
    start_step=start,
    num_steps=end - start,
)
for step, batch in enumerate(loader, start):
    for group in optimizer.param_groups:
        group["lr"] = schedules.lr_at(step)
        group["weight_decay"] = schedules.weight_decay_at(step) if group["decays"] else 0.0
    loss, metrics = model(batch.images.to(device, non_blocking=True))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == end - 1:
        print(step, metrics)

model.save(arguments.save)
torch.save(optimizer.state_dict(), optimizer_file)
print(f"{model.calls} of {arguments.steps} steps are in {arguments.save}")
