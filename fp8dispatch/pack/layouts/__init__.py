"""On-disk formats of FP8 checkpoints: one file per format behind `contract.Layout`.

Plain data and pure functions, no file is opened here: `catalog` lists the formats, `reading` turns
a configuration and tensor headers into modules, `loadability` says where a result will load.
"""
