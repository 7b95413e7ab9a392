"""Measurements on a GPU. Each script writes one JSON file that a figure in the README links to.

Run them from the repository's root, for example ``python -m bench.gemm bench/results/gemm.json``.
"""
