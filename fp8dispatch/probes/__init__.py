"""Questions to the machine: what is installed, and what a device is.

A probe reads and reports; it decides nothing. Answers are plain data (`fp8dispatch.machine`).
Package facts come from metadata, so that no library is imported to find out whether it is there.
"""
