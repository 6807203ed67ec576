"""Networks in shards (FSDP2): each rank holds a part of every weight, gradient, moment and average.

A block's weights are gathered just before the block runs, while the block before it still computes, and freed after it.
The target encoder is sharded like the context encoder, so its average is taken shard by shard, without communication.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ijepa_fast.model.jepa import IJEPA

if TYPE_CHECKING:  # importing these takes seconds, which only runs in shards should spend
    from torch.distributed.device_mesh import DeviceMesh


def shard_mesh(ranks: int, shards: int, device: str) -> DeviceMesh:
    """Ranks in groups of ``shards`` neighbours: each group holds all weights, one shard a rank.

    Raises:
        ValueError: groups of this size cannot be made.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if shards < 1 or ranks % shards:
        raise ValueError(f"train.shards {shards} does not divide the {ranks} ranks of the run")
    if shards == ranks:
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (ranks // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard(model: IJEPA, mesh: DeviceMesh, dtype: torch.dtype, reduce_dtype: torch.dtype | None = None) -> None:
    """Divide the networks among the ranks of ``mesh``, in place; they move to its devices block by block.

    Args:
        model: the networks in full precision, which the shards keep: they are the masters of the optimizer.
        dtype: what weights are gathered and multiplied in.
        reduce_dtype: what gradients are summed over ranks in; by default fp32, or fp64 where the weights are.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    reduce_dtype = reduce_dtype or next(model.parameters()).dtype
    # Sums between blocks may be wider than the weights, so inputs are not cast.
    policy = MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)
    # In the order in which they run.
    networks = (
        (model.target_encoder, model.target_encoder.blocks),
        (model.context_encoder, model.context_encoder.blocks),
        (model.predictor, model.predictor.predictor_blocks),
    )
    if (projector := model.predictor.projector) is not None:  # it keeps its precision, as in ``cast_weights``
        fully_shard(projector, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype))
    for network, blocks in networks:
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh, mp_policy=policy)
        # Forward: what runs next is gathered while a block computes. Backward: the same from the end.
        forward = (network, *blocks)
        for now, after in pairwise(forward):
            now.set_modules_to_forward_prefetch([after])
        for now, after in pairwise((network, *reversed(blocks))):
            now.set_modules_to_backward_prefetch([after])
    for (_, blocks), (network, _) in pairwise(networks):
        blocks[-1].set_modules_to_forward_prefetch([network])
    # One root for the three: they share streams, and end a backward pass together.
    fully_shard(model, mesh=mesh, mp_policy=policy)


def fill(model: IJEPA, whole: dict[str, Tensor]) -> None:
    """Give the shards of networks the values that the first rank has; all ranks must come here.

    Args:
        whole: ``state_dict`` of the first rank's networks, from before ``shard``. Those of others may be on the device
            "meta" until now.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    parameter = next(model.parameters())
    if parameter.is_meta:
        model.to_empty(device=parameter.device_mesh.device_type)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the weights of networks are divided among ranks."""
    return hasattr(next(model.parameters()), "to_local")
