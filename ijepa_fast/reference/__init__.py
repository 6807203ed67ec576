"""Plain torch definition of every op. Kernels are tested against these, and CPU tensors run them.

Rows whose index is -1 are padding (see ``ragged.Ragged``); every op writes zeros there. Sums are accumulated in
fp32 (fp64 for fp64 inputs).
"""

from ijepa_fast.reference.attention import (
    pack_sequences,
    pad_sequences,
    varlen_attention,
    varlen_attention_backward,
    varlen_self_attention,
    varlen_self_attention_backward,
)
from ijepa_fast.reference.layers import (
    layer_norm,
    layer_norm_backward,
)
from ijepa_fast.reference.linear import (
    hidden_gradient,
    linear_gelu,
    weight_gradient,
)
from ijepa_fast.reference.loss import (
    LOSS_KINDS,
    target_loss,
    target_loss_backward,
)
from ijepa_fast.reference.optimizer import (
    SETTINGS,
    adamw_ema_,
    ema_,
    grad_norm,
)
from ijepa_fast.reference.precision import accumulation_dtype
from ijepa_fast.reference.quantize import FP8, quantize_fp8
from ijepa_fast.reference.tokens import (
    gather_add,
    gather_add_backward,
    gather_patches,
    padded_patch_width,
    predictor_tokens,
    predictor_tokens_backward,
)

__all__ = [
    "FP8",
    "LOSS_KINDS",
    "SETTINGS",
    "accumulation_dtype",
    "adamw_ema_",
    "ema_",
    "gather_add",
    "gather_add_backward",
    "gather_patches",
    "grad_norm",
    "hidden_gradient",
    "layer_norm",
    "layer_norm_backward",
    "linear_gelu",
    "pack_sequences",
    "pad_sequences",
    "padded_patch_width",
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
