"""Routes from planted results of `linear`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from bench import routes
from tests.bench.results import CEILINGS, linear_row, result

if TYPE_CHECKING:
    import pytest

N, K = 4096, 7168


def test_the_fastest_takes_the_rows_that_it_wins() -> None:
    rows = [
        linear_row(m, N, K, {"automatic": 5.0, "gluon": ours, "cublaslt": theirs, "bf16": 1.0})
        for m, ours, theirs in ((16, 10.0, 20.0), (256, 10.0, 20.0), (4096, 200.0, 100.0))
    ]

    found = routes.routes_of(result("linear", [CEILINGS, *rows]), "evidence.json")

    assert [(one.get("m_min"), one.get("m_max"), one["order"]) for one in found] == [
        (None, 1024, ["gluon", "cublaslt"]),
        (1025, None, ["cublaslt", "gluon"]),
    ]
    assert {one["evidence"] for one in found} == {"evidence.json"}


def test_what_must_be_named_and_what_is_fast_alone_make_no_route() -> None:
    us = {"automatic": 5.0, "gluon": 10.0, "fbgemm_tile": 1.0, "weight_only": 1.0, "bf16": 1.0}
    exact = linear_row(16, N, K, us)
    fast = linear_row(4096, N, K, {"automatic": 5.0, "cublaslt": 1.0}, accuracy="fast")

    (route,) = routes.routes_of(result("linear", [exact, fast]), "evidence.json")

    assert route["order"] == ["gluon"]


def test_a_rehearsal_makes_no_routes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "ROUTES", tmp_path / "routes.json")
    row = linear_row(16, N, K, {"automatic": 5.0, "gluon": 10.0, "bf16": 1.0})
    content = result("linear", [row])
    path = tmp_path / "h200-linear.json"
    path.write_text(json.dumps({**content, "rehearsal": True}))
    assert routes.main([str(path), "--write"]) == 1
    assert not routes.ROUTES.exists()

    path.write_text(json.dumps(content))
    assert routes.main([str(path), "--write"]) == 0
    written = json.loads(routes.ROUTES.read_text())
    assert written["routes"][0]["evidence"] == "bench/results/h200-linear.json"
    assert routes.main([]) == 2
    assert "usage" in capsys.readouterr().out
