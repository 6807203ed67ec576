"""The operators of the package. Each file defines its ops in plain torch and registers them with torch.

An op stands with its shape rule (fake) and its autograd formula. CUDA tensors take a kernel of ``ijepa_fast.kernels``,
attention on the CPU takes torch's fused kernel, and everything else runs the definition. It is at hand as
``ops.NAME.definition``, which every kernel is tested against.

Rows whose index is -1 are padding (see ``ragged.Ragged``); every op writes zeros there. Sums are accumulated in fp32
(fp64 for fp64 inputs).
"""

from ijepa_fast.ops.attention import (
    pack_sequences,
    pad_sequences,
    varlen_attention,
    varlen_attention_backward,
    varlen_self_attention,
    varlen_self_attention_backward,
)
from ijepa_fast.ops.layers import layer_norm, layer_norm_backward
from ijepa_fast.ops.loss import LOSS_KINDS, target_loss, target_loss_backward
from ijepa_fast.ops.optimizer import SETTINGS, adamw_ema_, ema_, grad_norm, pointer_tables
from ijepa_fast.ops.products import hidden_gradient, linear, linear_gelu, mlp, weight_gradient
from ijepa_fast.ops.quantize import FP8, quantize_fp8
from ijepa_fast.ops.registration import accumulation_dtype
from ijepa_fast.ops.tokens import (
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
    "linear",
    "linear_gelu",
    "mlp",
    "pack_sequences",
    "pad_sequences",
    "padded_patch_width",
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
