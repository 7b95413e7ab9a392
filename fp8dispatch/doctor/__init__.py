"""What this machine can run, what it would choose, and why: ``python -m fp8dispatch.doctor``.

`collect` asks the machine and fills a `report`, `render` turns it into text. Each part stands on
its own where another one is missing: without a GPU, without NVML, and without torch.
"""
