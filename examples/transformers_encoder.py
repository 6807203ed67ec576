"""An encoder trained here, in Hugging Face transformers: as a folder, with our attention, and on packed token sets.

python examples/transformers_encoder.py --folder hf_encoder
"""

import argparse

import torch
from images import striped_images
from transformers import AutoImageProcessor, AutoModel

from ijepa_fast import JEPAModel, Ragged
from ijepa_fast.interop.huggingface import from_huggingface, save_huggingface

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", default="hf_encoder")
arguments = parser.parse_args()

torch.manual_seed(0)
sizes = {"img_size": 32, "patch_size": 4, "encoder_dim": 32, "encoder_depth": 2, "predictor_dim": 16}
encoder = JEPAModel(sizes, predictor_depth=1).target_encoder  # train it first: examples/plain_loop.py

save_huggingface(encoder, arguments.folder)
model = AutoModel.from_pretrained(arguments.folder, attn_implementation="ijepa_fast").eval()
processor = AutoImageProcessor.from_pretrained(arguments.folder)

images = striped_images(4)
pixels = processor(list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    theirs = model(pixels).last_hidden_state
    print("largest difference of features:", float((theirs - encoder(images)).abs().max()))

    # Of image 0 the first row of patches, of image 1 two patches: no padding, no work for patches that are not there.
    tokens = Ragged.from_lists([list(range(8)), [64 + 10, 64 + 20]])
    back = from_huggingface(model)  # a model, the folder, or a name on the hub
    print("features of a packed set:", list(back(pixels[:2], tokens).shape))
    print("back from transformers:", float((back(images) - encoder(images)).abs().max()))
