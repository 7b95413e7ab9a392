"""The tests: `oracle` is the truth they compare with, `matrix` the cases shared with the bench.

A file of tests stands for the module of its name; `kernels` and `gpu` hold what runs kernels.
"""
