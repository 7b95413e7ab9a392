"""Whole checkpoints into FP8 and back on a CPU, and packed checkpoints into modules that run.

`scheme` says how one weight is quantised, `layouts/` how a file format stores that; the rest reads
and writes files.
"""
