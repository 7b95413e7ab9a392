"""Calibration: what the inputs of linear layers look like, and the scales that follow from it.

`observe` watches a model, `magnitudes` is what it keeps of a tensor, `stats` the file it ends in.
`methods` and `scales` turn statistics into scales, `saturation` says which layers a static scale
would harm, `delayed` follows the magnitudes while a model runs. `text`, `checkpoint`, `run` and
`command` are ``fp8dispatch calibrate``.
"""
