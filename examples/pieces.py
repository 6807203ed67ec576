"""Pieces of this package in a trainer that has a model of its own: masks, attention, AdamW and the moving average.

    python examples/pieces.py --steps 50

The model is a small network over patches in plain torch, which knows nothing of this package but one function.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from images import striped_images
from torch import nn

from ijepa_fast import EMA, FusedAdamW, MaskConfig, MaskSampler, Ragged, varlen_attention

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50)
arguments = parser.parse_args()

PATCH, WIDTH, HEADS = 4, 32, 2


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Linear(3 * PATCH**2, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, patches: torch.Tensor, tokens: Ragged) -> torch.Tensor:
        """Patches [B * 64, 48] and the ones to see -> [T, WIDTH]; sequences of any lengths, without padding."""
        rows = tokens.indices.long()
        x = self.embed(patches[rows]) + self.position(rows % 64)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(1)
        cu, longest = tokens.cu_seqlens, tokens.max_seqlen
        return x + self.out(varlen_attention(q, k, v, cu, cu, longest, longest).flatten(1))


torch.manual_seed(0)
encoder, head = Encoder(), nn.Linear(WIDTH, WIDTH)
target = copy.deepcopy(encoder).requires_grad_(False)
average = EMA(target, encoder)
optimizer = FusedAdamW([*encoder.parameters(), *head.parameters()], lr=1e-3, max_grad_norm=1.0)
sampler = MaskSampler(MaskConfig(min_keep=4), grid=(8, 8))
images = striped_images(256)

for step in range(arguments.steps):
    batch = images[torch.randint(len(images), (16,))]
    patches = F.unfold(batch / 127.5 - 1, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    masks = sampler.sample(16, seed=0, step=step)  # a function of (seed, step, image)
    context = masks.context
    pooled = torch.zeros(16, WIDTH).index_add(0, context.sequence_ids(), encoder(patches, context))
    prediction = head(pooled / context.lengths[:, None])
    with torch.no_grad():
        whole = target(patches, Ragged.full(16, 64)).unflatten(0, (16, 64)).mean(1)
    loss = F.smooth_l1_loss(prediction, F.layer_norm(whole, (WIDTH,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update(momentum=0.99)
    if step % 10 == 0 or step == arguments.steps - 1:
        print(f"step {step} loss {float(loss.detach()):.4f} gradient {float(optimizer.grad_norm):.3f}")
