"""Triton kernels, one file per op. Import them as ``ijepa_fast.kernels``, never as top-level ``kernels``."""
