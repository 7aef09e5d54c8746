"""What clients ask of the model server, in OpenAI's form.

One decision: nothing is left out in silence. A field is used, or asks for nothing (`n: 1`), or is a label that changes
no answer; anything else is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.chat_settings import generation, joined
from registry.errors import InputError, Problem, did_you_mean, shown
from registry.evaluation_records import GenerationSettings

LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields about the client."""
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "store": (False,),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}
"""Field → the values that ask for nothing else than what is done; null does so everywhere."""
LENGTHS = ("max_completion_tokens", "max_tokens", "max_new_tokens")
OWN = (*("do_sample", "temperature", "top_p", "top_k"), *("num_beams", "repetition_penalty", "length_penalty", "seed"))
STOPS = 16  # OpenAI takes 4


class _Streaming(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(BaseModel):
    """Fields that are used; those of generation are validated by their own record."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: bool | None = None
    stream_options: _Streaming | None = None
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A request that is understood."""

    model: str
    messages: list[dict[str, Any]]
    settings: GenerationSettings
    stop: tuple[str, ...]
    tools: list[dict[str, Any]]
    stream: bool
    include_usage: bool


def read_request(body: bytes, defaults: Mapping[str, Any], seed: int) -> ChatRequest:
    """A request for an answer.

    Args:
        body: JSON.
        defaults: settings of generation where the request has none.
        seed: where neither has one.

    Raises:
        InputError: everything wrong with it, by the names of its fields.
    """
    try:
        read = _Body.model_validate_json(body)
    except ValidationError as error:
        raise InputError([_problem(item) for item in error.errors(include_url=False)]) from error
    extra = {name: value for name, value in (read.model_extra or {}).items() if value is not None}
    problems = [problem for name, value in extra.items() if (problem := _refused(name, value))]
    given = {name: extra[name] for name in OWN if name in extra}
    lengths = {extra[name] for name in LENGTHS if name in extra and isinstance(extra[name], int)}
    if len(lengths) > 1:
        problems.append(Problem(LENGTHS[0], "is not what max_tokens says", "Send one of them."))
    asked = [extra[name] for name in LENGTHS if name in extra]
    given |= {"max_new_tokens": asked[0]} if asked else {}
    stop = [read.stop] if isinstance(read.stop, str) else read.stop or []
    if len(stop) > STOPS or "" in stop:
        problems.append(Problem("stop", f"{shown(stop)} is not at most {STOPS} texts with a character or more"))
    if read.tool_choice not in (None, "auto", "none"):
        problems.append(Problem("tool_choice", f"{shown(read.tool_choice)} cannot be promised", "Use auto or none."))
    settings = None
    try:
        settings = generation({"seed": seed} | joined(defaults, given))
    except InputError as error:
        problems += error.problems
    if problems or settings is None:
        raise InputError(problems)
    tools = [] if read.tool_choice == "none" else read.tools or []
    usage = bool(read.stream_options and read.stream_options.include_usage)
    return ChatRequest(read.model, read.messages, settings, tuple(stop), tools, bool(read.stream), usage)


def _refused(name: str, value: Any) -> Problem | None:
    if name in (*OWN, *LENGTHS, *LABELS):
        return None
    if name in ASKS_NOTHING:
        known = ASKS_NOTHING[name]
        if any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in known):
            return None
        return Problem(name, f"{shown(value)} is not supported", f"Send {shown(known[0])}, or leave it out.")
    cure = did_you_mean(name, [*_Body.model_fields, *OWN, *LENGTHS, *ASKS_NOTHING])
    return Problem(name, "unknown field", cure)


def _problem(item: Any) -> Problem:
    place = ".".join(str(part) for part in item["loc"] if part not in ("str", "list[constrained-str]"))
    if item["type"] == "missing":
        return Problem(place, "is missing")
    if item["type"] == "json_invalid":
        return Problem("", f"the body is not JSON: {item['ctx']['error']}")
    return Problem(place, f"{shown(item['input'])}: {item['msg'].replace('Input should be', 'should be')}")
