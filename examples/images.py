"""Images that the examples make themselves: stripes in random directions, so that nothing has to be downloaded."""

import torch


def striped_images(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """uint8 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    angle, phase = torch.rand(2, count, 1, 1, generator=generator) * torch.pi
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    stripes = torch.sin(0.9 * (x * angle.cos() + y * angle.sin()) + 2 * phase)
    colour = torch.rand(count, 3, 1, 1, generator=generator)
    return (127 + 100 * stripes[:, None] * colour).to(torch.uint8)
