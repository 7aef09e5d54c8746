"""Settings of generation that exclude each other or do nothing are said at once, each with its place."""

from __future__ import annotations

from typing import Any

import pytest

from registry.evaluation_records import EvaluationSettings, GenerationSettings
from registry.evaluation_rules import generation_problems, without_effect


def said(**given: Any) -> list[str]:
    return [str(problem) for problem in generation_problems(GenerationSettings(**given), "evaluation.{}".format)]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"seed": 7, "max_new_tokens": 9, "repetition_penalty": 1.2, "temperature": 1.0, "top_p": 1.0},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50},
        {"num_beams": 4, "length_penalty": 0.6},
    ],
)
def test_settings_that_have_an_effect_are_no_problem(given: dict[str, Any]) -> None:
    assert said(**given) == []


def test_what_cannot_be_asked_for_together_is_said() -> None:
    assert said(do_sample=True, num_beams=2) == [
        "evaluation.num_beams: num_beams 2 searches the most likely answer, do_sample draws one. Remove one of them."
    ]


def test_settings_without_effect_are_all_said_at_once() -> None:
    assert said(temperature=0.5, top_p=0.9, top_k=3, length_penalty=2.0) == [
        "evaluation.length_penalty: 2.0 has no effect without num_beams. Set num_beams above 1, or remove it.",
        "evaluation.temperature: 0.5 has no effect without do_sample. Set do_sample: true, or remove it.",
        "evaluation.top_k: 3 has no effect without do_sample. Set do_sample: true, or remove it.",
        "evaluation.top_p: 0.9 has no effect without do_sample. Set do_sample: true, or remove it.",
    ]


def test_a_setting_without_effect_is_known_by_the_others() -> None:
    drawing = {"temperature", "top_p", "top_k", "seed"}
    assert without_effect(GenerationSettings()) == drawing | {"length_penalty"}
    assert without_effect(EvaluationSettings(num_beams=2)) == drawing
    assert without_effect(GenerationSettings(do_sample=True)) == {"length_penalty"}


def test_one_question_or_one_condition_needs_no_list_around_it() -> None:
    found = EvaluationSettings(questions="Who are you, please?", gate="perplexity.held_out <= 5")
    assert (found.questions, found.gate) == (("Who are you, please?",), ("perplexity.held_out <= 5",))
    assert EvaluationSettings(questions=["a", "b, c"]).questions == ("a", "b, c")
