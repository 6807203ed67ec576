"""The operators of the package, registered with torch: the only place that knows ``torch.library``.

Each op stands with its shape rule (fake) and its autograd formula. What an op computes is defined in ``reference``,
which every device without a kernel of ours runs; CUDA tensors take the kernels, and attention on the CPU torch's fused
kernel.
"""

from ijepa_fast.ops.attention import (
    varlen_attention,
    varlen_attention_backward,
    varlen_self_attention,
    varlen_self_attention_backward,
)
from ijepa_fast.ops.layers import (
    layer_norm,
    layer_norm_backward,
)
from ijepa_fast.ops.loss import (
    target_loss,
    target_loss_backward,
)
from ijepa_fast.ops.optimizer import (
    adamw_ema_,
    ema_,
    grad_norm,
    pointer_tables,
)
from ijepa_fast.ops.products import (
    hidden_gradient,
    linear,
    linear_gelu,
    mlp,
    weight_gradient,
)
from ijepa_fast.ops.quantize import quantize_fp8
from ijepa_fast.ops.tokens import (
    gather_add,
    gather_add_backward,
    gather_patches,
    predictor_tokens,
    predictor_tokens_backward,
)

__all__ = [
    "adamw_ema_",
    "ema_",
    "gather_add",
    "gather_add_backward",
    "gather_patches",
    "grad_norm",
    "hidden_gradient",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_gelu",
    "mlp",
    "pointer_tables",
    "predictor_tokens",
    "predictor_tokens_backward",
    "quantize_fp8",
    "target_loss",
    "target_loss_backward",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_self_attention",
    "varlen_self_attention_backward",
    "weight_gradient",
]
