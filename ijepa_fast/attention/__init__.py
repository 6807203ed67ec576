"""Variable-length attention: which backend runs (``dispatch``), what each needs (``backends``), padding rows."""

from ijepa_fast.attention.backends import BackendUnavailable
from ijepa_fast.attention.dispatch import BACKENDS, PRIORITY, Preference, varlen_attention, varlen_self_attention

__all__ = [
    "BACKENDS",
    "PRIORITY",
    "BackendUnavailable",
    "Preference",
    "varlen_attention",
    "varlen_self_attention",
]
