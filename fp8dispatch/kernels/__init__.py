"""Triton kernels and their thin launchers, and nothing else.

What belongs here: ``@triton.jit`` functions, and one Python function for each that picks a tile and
launches it on the device of its tensors, on the current stream, into outputs that the caller made.

What does not: validation of user input (done before), choice of a backend, policy, environment
variables, allocation of results. Importing a module of this package imports Triton, so only the
Triton backend and the Triton quantisers do it, and only when they are used; `requirements` and
`tile` are plain data, and import neither Triton nor torch.
"""
