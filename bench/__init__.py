"""Measurements. ``python -m bench --list`` names the suites; each writes one JSON file.

A figure in the README comes from such a file in ``bench/results``, and `bench.figures` checks that
it does. The rooms: `timing` (the loop, and all that touches CUDA), `shapes`, `arms` (what is timed,
checked first), `session` (points, budget, results), `environment` (the machine), one module for
each suite, and `plot`, `routes`, `figures`, `targets` over the results.
"""
