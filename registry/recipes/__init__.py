"""Recipes that ship with LLamaTuner, by name: the YAML files of this folder."""

from __future__ import annotations

from pathlib import Path

from registry.core import Registry

RECIPES: Registry[Path] = Registry(
    "recipe", lambda: [(path.stem, path) for path in sorted(Path(__file__).parent.glob("*.yaml"))]
)
