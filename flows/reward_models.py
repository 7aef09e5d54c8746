"""Which reward model scores the answers of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flows.named_models import NamedModel, find_model
from registry.errors import InputError, Problem
from registry.home import Home
from registry.stage_settings import StageSettings
from tasks.rewards import require_reward_model
from tasks.steps import Input, LocalFolder

if TYPE_CHECKING:
    from flows.graph import StageSteps

WHERE = "evaluation.reward_model"


def find_reward_model(asked: str, recipe: str, stages: Mapping[str, StageSteps], home: Home) -> NamedModel:
    """The reward model of a name, and how it reads conversations: as its stage did, where one is known.

    Args:
        asked: a stage of the recipe, else as `flows.named_models.find_model`.
        recipe: name of the recipe.
        stages: its stages.
        home: where runs, artifacts and models are.

    Raises:
        InputError: there is none, or it gives no score.
    """
    if asked in stages:
        steps = stages[asked]
        require_rm_stage(steps.settings, WHERE)
        reading = reading_of(steps.settings) | {"bf16": bool(steps.settings.train.bf16)}
        return NamedModel(Input(steps.model), f"{recipe}-{asked}", None, reading)
    try:
        found = find_model(asked, home, where=WHERE)
    except InputError as error:
        known = [name for name, each in stages.items() if each.settings.train.stage == "rm"]
        more = f" Stages of kind rm: {', '.join(known)}." if known else ""
        raise InputError([Problem(each.where, each.rule, each.cure + more) for each in error.problems]) from error
    if isinstance(found.model.source, LocalFolder):
        require_reward_model(found.model.source.path, WHERE)
    return found


def reading_of(settings: StageSettings) -> dict[str, Any]:
    """How the reward model of a stage reads conversations."""
    kept = {name: getattr(settings.data, name) for name in ("default_system", "enable_thinking", "control_tokens")}
    return {"template": settings.template, **kept}


def require_rm_stage(settings: StageSettings, where: str) -> None:
    """Refuse a stage that makes no reward model.

    Args:
        settings: of the stage.
        where: what named it.

    Raises:
        InputError: it is of another kind.
    """
    if settings.train.stage != "rm":
        rule = f"stage {settings.name} is of kind {settings.train.stage}, and makes no reward model"
        raise InputError(Problem(where, rule, "Name a stage with stage: rm."))
