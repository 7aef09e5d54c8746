"""Better and worse answers of a row, in every form they come in, as pairs.

One decision: a pair is a question and two answers to it. Whole conversations are cut where they part, and a row whose
conversations part at a question is no pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tasks.formats.fields import Row, answer_reader, missing, prompt_reader
from tasks.formats.form import Form
from tasks.formats.turns import Message
from tasks.reading import BadRow

Pair = tuple[list[Message], list[Message], list[Message]]
"""Question, better answer, worse answer."""
Values = tuple[tuple[str, Any], list[tuple[str, Any]]]
"""The better answer and the worse ones as they stand in the row, each with its name."""


def pairs_reader(form: Form) -> Callable[[Row], list[Pair] | BadRow]:
    """The pairs of a row: as many as it has worse answers."""
    read_values, read_answer, read_prompt = values_reader(form), answer_reader(form), prompt_reader(form)

    def convert(row: Row) -> list[Pair] | BadRow:
        values = read_values(row)
        if isinstance(values, BadRow):
            return values
        (name, value), others = values
        prompt = read_prompt(row) if read_prompt else []
        if isinstance(prompt, BadRow):
            return prompt
        better = read_answer(value, name)
        if isinstance(better, BadRow):
            return better
        pairs = []
        for other, text in others:
            worse = read_answer(text, other)
            pair = worse if isinstance(worse, BadRow) else _pair(prompt, (name, better), (other, worse))
            if isinstance(pair, BadRow):
                return pair
            pairs.append(pair)
        return pairs

    return convert


def chosen_reader(form: Form) -> Callable[[Row], list[Message] | BadRow]:
    """The question with its better answer, whatever the worse ones are."""
    read_values, read_answer, read_prompt = values_reader(form), answer_reader(form), prompt_reader(form)

    def convert(row: Row) -> list[Message] | BadRow:
        values = read_values(row)
        if isinstance(values, BadRow):
            return values
        name, value = values[0]
        prompt = read_prompt(row) if read_prompt else []
        if isinstance(prompt, BadRow):
            return prompt
        better = read_answer(value, name)
        return better if isinstance(better, BadRow) else whole(prompt, better, name)

    return convert


def whole(prompt: list[Message], answer: list[Message], name: str) -> list[Message] | BadRow:
    """A question and an answer as one conversation; an answer that is a whole conversation is it already."""
    if answer[0]["role"] != "assistant":
        return answer
    if not prompt:
        return BadRow("bad_turn_order", f"{name!r} starts with the assistant, and no column holds the question")
    before = prompt[-1]["role"]
    if before not in ("user", "tool") or prompt[0]["role"] == "assistant":
        return BadRow("bad_turn_order", f"{name!r} is an answer, but the prompt before it ends with {before}")
    return prompt + answer


def _pair(prompt: list[Message], better: tuple[str, list[Message]], worse: tuple[str, list[Message]]) -> Pair | BadRow:
    if better[1] == worse[1]:
        return BadRow("tie", f"{better[0]!r} and {worse[0]!r} are the same answer")
    one, two = whole(prompt, better[1], better[0]), whole(prompt, worse[1], worse[0])
    if isinstance(one, BadRow):
        return one
    if isinstance(two, BadRow):
        return two
    if better[1][0]["role"] == worse[1][0]["role"] == "assistant":
        return prompt, better[1], worse[1]
    return _parted(one, two, f"{better[0]!r} and {worse[0]!r}")


def _parted(one: list[Message], two: list[Message], names: str) -> Pair | BadRow:
    """Two conversations that begin alike, cut before the first answer that differs, or whose tool results differ."""
    if one == two:
        return BadRow("tie", f"{names} are the same answer")
    cut = 0
    for mine, other in zip(one, two, strict=False):
        if mine != other:
            break
        cut += 1
    if cut == min(len(one), len(two)):
        return BadRow("different_prompts", f"{names}: one conversation is the beginning of the other")
    roles = {one[cut]["role"], two[cut]["role"]}
    if cut == 0 or not roles <= {"assistant", "tool"}:
        return BadRow("different_prompts", f"{names} answer different questions: they part at message {cut}")
    if roles != {"assistant"}:
        cut = max(index for index in range(cut) if one[index]["role"] == "assistant")
    return one[:cut], one[cut:], two[cut:]


def values_reader(form: Form) -> Callable[[Row], Values | BadRow]:
    """The answers of a row as they stand in it, the best one first."""
    if "ranked" in form.columns:
        return _ranked(form)
    if "chosen" in form.columns:
        return _chosen_and_rejected(form.columns["chosen"], form.columns["rejected"])
    column = form.columns["response"]

    def convert(row: Row) -> Values | BadRow:
        if column not in row:
            return missing(column, row)
        answers = row[column]
        if not isinstance(answers, list) or len(answers) != 2:
            return BadRow("wrong_type", f"{column!r} is not a list of two answers, the better one first")
        return (f"{column}[0]", answers[0]), [(f"{column}[1]", answers[1])]

    return convert


def _chosen_and_rejected(chosen: str, rejected: str) -> Callable[[Row], Values | BadRow]:
    def convert(row: Row) -> Values | BadRow:
        if chosen not in row:
            return missing(chosen, row)
        if rejected not in row:
            return missing(rejected, row)
        value = row[rejected]
        if isinstance(value, list) and not isinstance(next(iter(value), None), dict):  # several, not one conversation
            if not value:
                return BadRow("no_answer", f"{rejected!r} is an empty list")
            return (chosen, row[chosen]), [(f"{rejected}[{index}]", text) for index, text in enumerate(value)]
        return (chosen, row[chosen]), [(rejected, value)]

    return convert


def _ranked(form: Form) -> Callable[[Row], Values | BadRow]:
    """Answers with a rank (1 is best) or a score (most is best): the first of the best against each worse one."""
    column, answer_tag = form.columns["ranked"], form.tags.get("answer_tag", "answer")
    value_tag = form.tags.get("score_tag", form.tags.get("rank_tag", "rank"))
    sign = 1 if "score_tag" in form.tags else -1

    def convert(row: Row) -> Values | BadRow:
        if column not in row:
            return missing(column, row)
        answers = row[column]
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            return BadRow("wrong_type", f"{column!r} is not a list of answers with {value_tag!r}")
        if len(answers) < 2:
            return BadRow("no_answer", f"{column!r} holds {len(answers)} answers: a pair needs two")
        ranked = []
        for index, answer in enumerate(answers):
            value = answer.get(value_tag)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                return BadRow("wrong_type", f"{column}[{index}].{value_tag} is {value!r}, not a number")
            ranked.append((sign * value, f"{column}[{index}].{answer_tag}", answer.get(answer_tag)))
        best = max(ranked, key=lambda answer: answer[0])
        worse = [(name, text) for value, name, text in ranked if value < best[0] and text != best[2]]
        if not worse:
            return BadRow("tie", f"no answer in {column!r} is worse than the best one")
        return best[1:], worse

    return convert
