"""Experts: the two matmuls, their kernels, and the module over them."""
