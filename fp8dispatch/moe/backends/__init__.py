"""The backends of expert matmuls: one file each, behind `contract`; `registry` knows them.

A file here declares and refuses and imports no torch; how it computes lies in `compute`.
"""
