"""Quantisers: numbers into FP8 data and scales, and back.

`activation` holds what happens in every call, `weight` what happens once per weight, `eager` the
plain torch arithmetic of both (it defines the numbers). The Triton kernels that do the same on a
GPU live in `fp8dispatch.kernels`.
"""
