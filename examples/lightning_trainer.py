"""I-JEPA in a plain Lightning Trainer.

python examples/lightning_trainer.py --epochs 5
"""

import argparse

import lightning as L
from images import striped_images
from torch.utils.data import DataLoader

from ijepa_fast.interop.lightning import IJEPAModule

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--root", default="runs/lightning", help="folder of logs and checkpoints")
arguments = parser.parse_args()

L.seed_everything(0)
module = IJEPAModule(
    {"img_size": 32, "patch_size": 4, "encoder_dim": 64, "encoder_depth": 2, "predictor_dim": 32, "predictor_depth": 1},
    lr=1e-3,
)
loader = DataLoader(striped_images(256), batch_size=32, shuffle=True)
trainer = L.Trainer(
    max_epochs=arguments.epochs,
    accelerator="auto",
    devices=1,
    log_every_n_steps=4,
    default_root_dir=arguments.root,
    logger=L.pytorch.loggers.CSVLogger(arguments.root),
    enable_model_summary=False,
)
trainer.fit(module, loader, DataLoader(striped_images(64, seed=1), batch_size=32))
print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
print("features", list(module(striped_images(2)).shape), "updates of the target encoder", int(module.model.updates))
