"""The published comparison of drafters: its table is what the program makes of its figures."""

from __future__ import annotations

import json
from pathlib import Path

from dspark_cli.bench.drafters import DRAFTERS, plot, table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_in_the_docs_is_made_from_the_figures_beside_it() -> None:
    made = table(json.loads((DOCS / "drafters.json").read_text()))
    assert made == (DOCS / "drafters.md").read_text()
    assert made in (DOCS / "training.md").read_text()


def test_the_plot_has_one_curve_a_drafter() -> None:
    drawn = plot(json.loads((DOCS / "drafters.json").read_text()))
    assert all(drawn.count(f">{kind}<") == 1 for kind in DRAFTERS)
