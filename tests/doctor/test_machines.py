"""What runs where, for the machines that people have: a table to review, line by line.

Each line is one machine and one recipe: the backend at M = 1, 16, 256 and 4096 for N=4096, K=7168.
The ragged N=4100, K=7000 is no multiple of 16, so only our own kernels take it. Libraries are those
of the gallery, where DeepGEMM is not installed. Each line names its source: an issue of
the library, its documentation, or a result file.
"""

from __future__ import annotations

import pytest

from fp8dispatch.doctor.collect import collect
from fp8dispatch.probes.gallery import NAMES

M = (1, 16, 256, 4096)
OURS = ("triton",) * 4
HOPPERS = ("gluon",) * 4  # ours for Hopper alone
CUBLAS = ("cublaslt",) * 4
PLAIN = ("eager",) * 4

TABLE: dict[tuple[str, str], tuple[str, str, str, str]] = {
    # A100: FBGEMM's kernels are SM90's, TorchAO is gated at SM89, torch's scaled_mm
    # needs 8.9. Triton has no fp8e4nv there, so our kernels decode the bytes and multiply in fp16.
    ("a100", "tensor"): OURS,
    ("a100", "row"): OURS,
    ("a100", "block 128x128"): OURS,
    ("a100", "block 1x128"): OURS,
    ("a100", "block 1x32"): OURS,
    # SM89: FBGEMM has no FP8 kernel (unsloth#3776), torch runs tensor, row since
    # pytorch#144348, and refuses blocks. Ours, then TorchAO, never FBGEMM.
    ("l40s", "tensor"): CUBLAS,
    ("l40s", "row"): CUBLAS,
    ("l40s", "block 128x128"): OURS,
    ("l40s", "block 1x128"): OURS,  # TorchAO has 128x128 blocks alone
    ("l40s", "block 1x32"): OURS,  # no library has it
    ("rtx-4090", "tensor"): CUBLAS,  # as L40S, the same chip
    ("rtx-4090", "row"): CUBLAS,
    ("rtx-4090", "block 128x128"): OURS,
    ("rtx-4090", "block 1x128"): OURS,
    ("rtx-4090", "block 1x32"): OURS,
    # SM90: measured on an H200 (bench/results/h200-routes.json), our Gluon kernels win at this
    # size with any M. They take no block narrower than 128x128.
    ("h100", "tensor"): HOPPERS,
    ("h100", "row"): HOPPERS,
    ("h100", "block 128x128"): HOPPERS,
    ("h100", "block 1x128"): CUBLAS,  # scaled_mm takes 1x128 x 1x128 from torch 2.10, CUDA 12.9
    ("h100", "block 1x32"): OURS,  # scaled_mm takes 32 only with E8M0 scales and SM100
    ("h200", "tensor"): HOPPERS,
    ("h200", "row"): HOPPERS,
    ("h200", "block 128x128"): HOPPERS,
    ("h200", "block 1x128"): CUBLAS,
    ("h200", "block 1x32"): OURS,
    # SM100: FBGEMM's block kernels return uncomputed (unsloth#3863), torch refuses
    # blocks (pytorch#166639) and runs row with CUTLASS. Section 5: torch_row, then mslk_row.
    ("b200", "tensor"): CUBLAS,
    ("b200", "row"): CUBLAS,
    ("b200", "block 128x128"): OURS,
    ("b200", "block 1x128"): OURS,
    ("b200", "block 1x32"): OURS,
    # SM103: the wheels' 100a code does not run there; torch as on B200 (2.11 has
    # sm_103 images).
    ("b300", "tensor"): CUBLAS,
    ("b300", "row"): CUBLAS,
    ("b300", "block 128x128"): OURS,
    ("b300", "block 1x128"): OURS,
    ("b300", "block 1x32"): OURS,
    # SM120: "cutlass cannot initialize" in FBGEMM (unsloth#3902); torch runs tensor,
    # row since pytorch#155991 (canary first: #192707), and refuses blocks.
    ("rtx-5090", "tensor"): CUBLAS,
    ("rtx-5090", "row"): CUBLAS,
    ("rtx-5090", "block 128x128"): OURS,
    ("rtx-5090", "block 1x128"): OURS,
    ("rtx-5090", "block 1x32"): OURS,
    ("rtx-pro-6000", "tensor"): CUBLAS,  # as RTX 5090, the same chip
    ("rtx-pro-6000", "row"): CUBLAS,
    ("rtx-pro-6000", "block 128x128"): OURS,
    ("rtx-pro-6000", "block 1x128"): OURS,
    ("rtx-pro-6000", "block 1x32"): OURS,
    # SM121: 120a code does not run on 12.1; torch has the row image from 2.11 on,
    # which is the gallery's torch; blocks refused.
    ("gb10", "tensor"): CUBLAS,
    ("gb10", "row"): CUBLAS,
    ("gb10", "block 128x128"): OURS,
    ("gb10", "block 1x128"): OURS,
    ("gb10", "block 1x32"): OURS,
    # gfx942: FBGEMM is not loaded on ROCm, TorchAO refuses blocks, torch wants
    # e4m3fnuz, and our kernels are not verified there: plain torch.
    ("mi300x", "tensor"): PLAIN,
    ("mi300x", "row"): PLAIN,
    ("mi300x", "block 128x128"): PLAIN,
    ("mi300x", "block 1x128"): PLAIN,
    ("mi300x", "block 1x32"): PLAIN,
    # No GPU: plain torch is the one path for any device.
    ("cpu", "tensor"): PLAIN,
    ("cpu", "row"): PLAIN,
    ("cpu", "block 128x128"): PLAIN,
    ("cpu", "block 1x128"): PLAIN,
    ("cpu", "block 1x32"): PLAIN,
}


@pytest.mark.parametrize("name", NAMES)
def test_what_each_machine_would_choose(name: str) -> None:
    (device,) = collect(machine=name).devices

    chosen: dict[tuple[str, str], dict[int, str | None]] = {}
    for choice in device.routes:
        if choice.n == 4096:
            chosen.setdefault((name, choice.recipe), {})[choice.m] = choice.backend
    assert chosen == {
        key: dict(zip(M, backends, strict=True))
        for key, backends in TABLE.items()
        if key[0] == name
    }


@pytest.mark.parametrize("name", NAMES)
def test_only_our_own_kernels_and_plain_torch_take_ragged_sizes(name: str) -> None:
    (device,) = collect(machine=name).devices

    ragged = {choice.backend for choice in device.routes if choice.n == 4100}
    assert ragged == {"eager" if name in ("mi300x", "cpu") else "triton"}


def test_every_machine_is_in_the_table() -> None:
    assert tuple(dict.fromkeys(name for name, _ in TABLE)) == NAMES


# Section 4: what must never be chosen, whatever else changes.
@pytest.mark.parametrize("name", ["l40s", "rtx-4090", "b300", "rtx-5090", "rtx-pro-6000", "gb10"])
def test_fbgemm_and_mslk_refuse_where_their_kernels_do_not_run(name: str) -> None:
    report = collect(machine=name)

    refusing = {one.name: one.refusals for one in report.devices[0].backends}
    for library in ("fbgemm", "mslk"):
        assert "capability" in [reason.code for reason in refusing[library]]
    assert report.exit_code == 0, "a refusal that is to be expected is healthy"


def test_block_recipes_of_fbgemm_are_refused_on_b200() -> None:
    (device,) = collect(machine="b200").devices

    for backend in device.backends:
        if backend.name in ("fbgemm", "mslk"):
            verdicts = {one.recipe: one.verdict for one in backend.recipes}
            assert verdicts["block 128x128"] == "refused", backend
            assert verdicts["row"] == "untested", backend
