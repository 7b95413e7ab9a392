"""Tests that need a GPU: every backend against the oracle, large tensors, several devices.

They carry the marker `gpu` and are skipped elsewhere, with the reason.
"""
