"""The grids of the bench."""

from __future__ import annotations

from bench.shapes import DECODE, GRID, GRID_ROWS, MODEL_ROWS, MODELS, TINY, points


def test_twenty_weights_of_real_models_beside_the_grid() -> None:
    weights = {(weight.n, weight.k) for weight in MODELS}

    assert len(MODELS) == len(weights) == 20
    assert not weights & {(weight.n, weight.k) for weight in GRID}
    sources = " ".join(weight.source for weight in MODELS)
    for model in ("Llama-3-8B", "Llama-3-70B", "Qwen3", "DeepSeek-V3"):
        assert model in sources
    assert all(weight.name and weight.source for weight in (*GRID, *MODELS))


def test_some_are_ragged_in_n_and_some_in_k() -> None:
    assert any(weight.n % 128 for weight in MODELS)
    assert any(weight.k % 128 for weight in MODELS)
    assert all("ragged" in weight.name for weight in MODELS if weight.n % 128 or weight.k % 128)


def test_points_of_a_grid_lie_within_the_bounds() -> None:
    assert len(points("grid")) == len(GRID) * len(GRID_ROWS)
    assert len(points("all")) == len(points("grid")) + len(MODELS) * len(MODEL_ROWS)
    assert {m for m, _ in points("all", at_least=256)} == {256, 1024, 4096, 8192}
    assert {m for m, _ in points("grid", at_most=16)} == {1, 16}
    assert all(weight in TINY for _, weight in points("tiny"))


def test_the_five_weights_of_decode() -> None:
    sizes = [(weight.n, weight.k) for weight in DECODE]
    assert sizes == [(7168, 2048), (4096, 7168), (24576, 1536), (7168, 16384), (57344, 8192)]
