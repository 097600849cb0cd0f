"""Benchmarks of recipes run the recipes' own numbers."""

from __future__ import annotations

from pathlib import Path

import yaml

from retrodict.bench import infill_one

RECIPES = Path(__file__).parents[2] / "recipes"


def test_infill_one_is_its_recipe() -> None:
    recipe = yaml.safe_load((RECIPES / "infill_one.yaml").read_text(encoding="utf-8"))
    ours = {**infill_one.STORY, **infill_one.RECIPE}
    assert {k: float(v) if k == "lr" else v for k, v in recipe.items() if k in ours} == ours
