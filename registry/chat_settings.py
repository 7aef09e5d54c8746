"""Settings of a chat: how a model is read and held, and how it writes its answers.

One decision: both have the names they have in a recipe, and are validated by the same records; only that an answer may
be longer, and that a temperature by itself is taken for the wish to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry.errors import InputError, Problem, did_you_mean
from registry.evaluation_records import GenerationSettings
from registry.evaluation_rules import generation_problems
from registry.loading import override
from registry.old_configs import translate
from registry.recipe import Evaluated
from registry.stage_settings import read_record, read_stage

MAX_NEW_TOKENS = 1024
"""Longest answer where nothing is said; an answer that is looked at in an evaluation may be shorter."""
READING = (
    *("template", "default_system", "enable_thinking", "control_tokens", "model_revision", "bf16"),
    *("quant_bit", "quant_type", "double_quantization"),
)
"""Settings of how a model is read and held."""
DRAWING = ("temperature", "top_p", "top_k")
WRITING = tuple(GenerationSettings.model_fields)
"""Settings of how answers are written."""


@dataclass(frozen=True)
class ChatSettings:
    """What is said about a chat."""

    generation: Mapping[str, Any]
    """Those settings of generation that are given."""
    model: Evaluated
    """How the model is read and held; its name is filled in for each model."""
    notes: tuple[str, ...] = ()
    """What was read differently from how it was written."""


def as_drawn(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of generation with `do_sample` as they mean it: drawn when a setting of drawing is given, and the most
    likely token at temperature 0.

    >>> as_drawn({"temperature": 0.7}), as_drawn({"temperature": 0, "top_p": 0.9})
    ({'temperature': 0.7, 'do_sample': True}, {'do_sample': False})
    """
    found = dict(given)
    if found.get("temperature") == 0 and not found.get("do_sample"):
        return {name: value for name, value in found.items() if name not in DRAWING} | {"do_sample": False}
    if "do_sample" not in found and any(found.get(name) is not None for name in DRAWING):
        found["do_sample"] = True
    return found


def joined(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, over defaults; the settings of drawing go where nothing is drawn.

    >>> joined({"temperature": 0.7, "do_sample": True, "seed": 1}, {"temperature": 0})
    {'seed': 1, 'do_sample': False}
    """
    own = as_drawn(given)
    found = {**defaults, **own}
    return found if found.get("do_sample") else {k: v for k, v in found.items() if k not in DRAWING or k in own}


def generation(given: Mapping[str, Any]) -> GenerationSettings:
    """Settings of generation, validated.

    Args:
        given: from `joined`.

    Raises:
        InputError: everything that is wrong with them.
    """
    problems: list[Problem] = []
    unknown = [name for name in given if name not in WRITING]
    problems += [Problem(name, "unknown key", did_you_mean(name, WRITING)) for name in unknown]
    known = {"max_new_tokens": MAX_NEW_TOKENS} | {k: v for k, v in given.items() if k in WRITING}
    found: GenerationSettings | None = read_record(GenerationSettings, known, lambda key: key, problems)
    if found is not None:
        problems += generation_problems(found, lambda key: key)
    if problems or found is None:
        raise InputError(problems)
    return found


def read_chat(overrides: Sequence[str], raw: Mapping[str, Any] | None = None) -> ChatSettings:
    """Validate what is said about a chat.

    Args:
        overrides: `key=value` each.
        raw: a config, in the words of this project or of LLaMA-Factory.

    Raises:
        InputError: everything that is wrong, at once.
    """
    given = override(dict(raw or {}), overrides)
    found = translate({key: value for key, value in given.items() if key not in WRITING}, lambda key: key)
    problems, settings = list(found.problems), found.settings
    written = as_drawn({key: value for key, value in given.items() if key in WRITING})
    try:
        generation(written)
    except InputError as error:
        problems += error.problems
    for key in settings:
        if key not in READING:
            cure = did_you_mean(str(key), [*READING, *WRITING])
            problems.append(Problem(found.origins.get(key, key), "is no setting of a chat", cure))
    kept = {key: value for key, value in settings.items() if key in READING}
    stage, _ = read_stage("chat", kept | {"model_name_or_path": "-"}, lambda key: key, None, problems, trains=False)
    if problems:
        raise InputError(list(dict.fromkeys(problems)), "chat" if len(problems) > 1 else "")
    assert stage is not None
    return ChatSettings(written, Evaluated("", stage, frozenset(kept)), tuple(found.notes(lambda key: key)))
