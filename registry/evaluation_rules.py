"""What is wrong with the settings of measuring, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from registry.errors import Problem
from registry.evaluation_records import GenerationSettings

NEEDS = {
    "temperature": "do_sample",
    "top_p": "do_sample",
    "top_k": "do_sample",
    "length_penalty": "num_beams",
}
"""Setting of generation → the one without which it has no effect."""
CURES = {"do_sample": "Set do_sample: true, or remove it.", "num_beams": "Set num_beams above 1, or remove it."}


def generation_problems(settings: GenerationSettings, where: Callable[[str], str]) -> list[Problem]:
    """Settings of generation that exclude each other, or have no effect.

    Args:
        settings: of generation.
        where: setting → its place in the recipe.
    """
    problems = []
    if settings.do_sample and settings.num_beams > 1:
        rule = f"num_beams {settings.num_beams} searches the most likely answer, do_sample draws one"
        problems.append(Problem(where("num_beams"), rule, "Remove one of them."))
    for name in sorted(without_effect(settings) & NEEDS.keys()):
        value = getattr(settings, name)
        if value != GenerationSettings.model_fields[name].default:
            rule = f"{value} has no effect without {NEEDS[name]}"
            problems.append(Problem(where(name), rule, CURES[NEEDS[name]]))
    return problems


def without_effect(settings: GenerationSettings) -> frozenset[str]:
    """Settings of generation that change no answer, as the others are; nothing is drawn without `do_sample`."""
    on = {"do_sample": settings.do_sample, "num_beams": settings.num_beams > 1}
    idle = frozenset(name for name, needed in NEEDS.items() if not on[needed])
    return idle if settings.do_sample else idle | {"seed"}


def generation_identity(settings: GenerationSettings) -> dict[str, Any]:
    """The settings of generation that change an answer."""
    return settings.model_dump(include=set(GenerationSettings.model_fields) - without_effect(settings))
