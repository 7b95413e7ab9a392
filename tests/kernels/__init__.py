"""Tests of single kernels: on a GPU where there is one, else in Triton's interpreter.

`compile_targets` compiles the kernels for GPUs that are not here.
"""
