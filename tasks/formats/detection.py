"""What form a row has, seen from its columns.

One decision: a form is found only where the columns leave no choice, for the shape that is wanted; otherwise nothing is
found, and the registry entry has to say it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tasks.formats.form import GIVES, MEDIA, OPTIONAL, Form
from tasks.formats.turns import ROLE_NAMES, is_transcript

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question", "query", "problem", "input")
QUERIES = ("input", "context")
RESPONSES = ("output", "response", "completion", "answer", "solution", "target")
SYSTEMS = ("system", "system_prompt")
LABELS = ("label", "kto_tag")
TEXTS = ("text", "content")
PAIRS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
RANKED = ("answers", "completions", "responses")
CHOICES = ("choices", "options", "choice0", "A", "B")
"""Columns of multiple choice: an answer beside them is a letter or a number, not something to say."""
ROLE_KEYS = {"role": "content", "from": "value"}

View = Callable[[Mapping[str, Any]], Form | None]


def detect(row: Mapping[str, Any], shape: str) -> Form | None:
    """The form of a source from one of its rows.

    Args:
        row: the first readable one; a row whose conversation is empty or null shows nothing.
        shape: the one wanted, where columns can be read in more than one way.

    Returns:
        A form that can give the shape, or None; `misfit` says then what is missing.
    """
    instances = row.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        inner = detect({**row, **instances[0], "instances": None}, shape)
        return inner and replace(inner, columns={**inner.columns, "instances": "instances"})
    for view in VIEWS[shape]:
        form = view(row)
        if form is not None and (form.holds, shape) in GIVES:
            return form
    return None


def _first(names: tuple[str, ...], row: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in row), None)


def _turn_keys(value: Any) -> tuple[str, str] | None:
    """The role and content keys of a list of turns, or of one turn."""
    turn = value[0] if isinstance(value, list) and value else value
    if not isinstance(turn, dict):
        return None
    role = next((key for key in ROLE_KEYS if key in turn), None)
    if role is None:
        return None
    return role, next((key for key in (ROLE_KEYS[role], "content", "value", "text") if key in turn), ROLE_KEYS[role])


def _turns_form(row: Mapping[str, Any], keys: tuple[str, str], ranking: bool, columns: dict[str, str]) -> Form:
    """A form with turns; a system text and tools may stand beside them."""
    formatting = "openai" if keys[0] == "role" else "sharegpt"
    tags = {} if ROLE_KEYS[keys[0]] == keys[1] else {"content_tag": keys[1]}
    columns = columns | _beside(row, ranking)
    return Form(formatting, ranking, columns, tags, _optional(columns, ("system", "tools")))


def _beside(row: Mapping[str, Any], ranking: bool) -> dict[str, str]:
    """Columns that mean something in every form: the label, the margin, pictures, a system text, tools."""
    found = {name: name for name in MEDIA if name in row}
    if ranking and isinstance(row.get("margin"), int | float):
        found["margin"] = "margin"
    label = next((name for name in LABELS if isinstance(row.get(name), bool)), None)
    if label is not None and not ranking:
        found["kto_tag"] = label
    system = _first(SYSTEMS, row)
    if system is not None:
        found["system"] = system
    return found | ({"tools": "tools"} if "tools" in row else {})


def _optional(columns: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """Columns that later rows may have, though this one lacks them."""
    return {name: OPTIONAL[name] for name in names if name not in columns and OPTIONAL[name] not in columns.values()}


def _conversation(row: Mapping[str, Any]) -> Form | None:
    """A list of turns, or a prompt that is one beside its answer."""
    for column in CONVERSATIONS:
        keys = _turn_keys(row.get(column))
        if keys and isinstance(row[column], list):
            return _turns_form(row, keys, False, {"messages": column})
    prompt = _first(PROMPTS, row)
    response = _first(RESPONSES, row)
    if prompt is None or not isinstance(row[prompt], list | str):
        return None
    keys = _turn_keys(row[prompt]) or (_turn_keys(row[response]) if response else None)
    if keys is None:
        return None
    return _turns_form(row, keys, False, {"prompt": prompt} | ({"response": response} if response else {}))


def _texts(row: Mapping[str, Any]) -> Form | None:
    """A column for the question, and one for the answer where there is one."""
    columns = _question(row)
    if columns is None or _first(CHOICES, row) is not None:
        return None
    response = next((name for name in RESPONSES if name in row and name not in columns.values()), None)
    if response is not None:
        columns["response"] = response
    prompt = row[columns["prompt"]]
    if is_transcript(prompt):
        return Form("transcript", False, {"prompt": columns["prompt"]} | ({"response": response} if response else {}))
    two = response == "output" and isinstance(row["output"], list) and len(row["output"]) == 2
    columns |= _beside(row, ranking=two)  # two outputs are a better and a worse one; lists elsewhere can be anything
    return Form("alpaca", two, columns, {}, _optional(columns, tuple(OPTIONAL)))


def _question(row: Mapping[str, Any]) -> dict[str, str] | None:
    """The columns of a question given as text: `prompt`, and `query` behind it."""
    prompt = _first(PROMPTS, row)
    if prompt is None or not isinstance(row[prompt], str | None):
        return None
    query = next((name for name in QUERIES if name in row and name != prompt), None)
    return {"prompt": prompt} | ({"query": query} if query else {})


def _pairs(row: Mapping[str, Any]) -> Form | None:
    for chosen, rejected in PAIRS:
        if chosen in row and rejected in row:
            return _chosen_and_rejected(row, {"chosen": chosen, "rejected": rejected})
    return _ranked(row)


def _chosen_and_rejected(row: Mapping[str, Any], columns: dict[str, str]) -> Form | None:
    chosen = row[columns["chosen"]]
    question, keys = _question(row), _turn_keys(chosen)
    if keys:
        turn = chosen[0] if isinstance(chosen, list) else chosen
        if turn.get(keys[0]) in ROLE_NAMES["assistant_tag"]:
            return _answers_to_turns(row, keys, columns)
        return _turns_form(row, keys, True, columns)  # whole conversations: the question is in them
    if not isinstance(chosen, str):
        return None
    asked = _answers_to_turns(row, None, columns)
    if asked is not None:
        return asked
    if question is None:
        return Form("transcript", True, columns) if is_transcript(chosen) else None
    if is_transcript(row[question["prompt"]]):
        return Form("transcript", True, {"prompt": question["prompt"]} | columns)
    columns = question | columns | _beside(row, ranking=True)
    return Form("alpaca", True, columns, {}, _optional(columns, tuple(OPTIONAL)))


def _answers_to_turns(row: Mapping[str, Any], keys: tuple[str, str] | None, columns: dict[str, str]) -> Form | None:
    """Answers to a conversation, or turns that answer a prompt column."""
    for name, candidates in (("messages", CONVERSATIONS), ("prompt", PROMPTS)):
        for column in candidates:
            value = row.get(column)
            found = _turn_keys(value) if isinstance(value, list) else keys if name == "prompt" else None
            if column in row and found:
                return _turns_form(row, found, True, {name: column} | columns)
    return None


def _ranked(row: Mapping[str, Any]) -> Form | None:
    """Several answers, each with a rank or a score."""
    question = _question(row)
    for column in RANKED:
        answers = row.get(column)
        if question is None or not isinstance(answers, list) or not answers or not isinstance(answers[0], dict):
            continue
        answer_tag = _first(("answer", "response", "text"), answers[0])
        value_tag = _first(("rank", "overall_score", "score"), answers[0])
        if answer_tag and value_tag:
            tags = {"answer_tag": answer_tag, ("rank_tag" if value_tag == "rank" else "score_tag"): value_tag}
            if is_transcript(row[question["prompt"]]):
                return Form("transcript", True, {"prompt": question["prompt"], "ranked": column}, tags)
            return Form("alpaca", True, question | {"ranked": column} | _beside(row, ranking=True), tags)
    return None


def _plain_text(row: Mapping[str, Any]) -> Form | None:
    column = next((name for name in TEXTS if isinstance(row.get(name), str)), None)
    return Form("text", False, {"text": column}) if column else None


VIEWS: dict[str, tuple[View, ...]] = {
    "text": (_plain_text,),
    "chat": (_pairs, _conversation, _texts),
    "preference": (_pairs, _texts),
    "labelled": (_conversation, _texts, _pairs),
    "prompt": (_pairs, _conversation, _texts),
}
"""Shape → the ways to look at a row, in the order they are tried."""
