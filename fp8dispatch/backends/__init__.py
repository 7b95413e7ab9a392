"""One file per backend: a library or our own kernels, behind the contract in `contract`.

A backend says what it needs as data, refuses with sentences, and computes. It reads no
environment, chooses nothing and imports its library only inside the methods that compute.
CONTRIBUTING.md tells how to add one.
"""
