"""Answers to many prompts: how tokens are chosen, and that batches and padding choose none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from registry.evaluation_records import GenerationSettings
from tasks.answers import answer_prompts, ended, write_answers
from tasks.train.loading import load_base
from tests.tiny import random_rows, tiny_model

END = 260
STOPS = frozenset({END})
PROMPTS = [row["input_ids"] for row in random_rows(11, seed=1, shortest=2, longest=40)]
SETTINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "sampled from few": {"do_sample": True, "top_k": 40, "top_p": 0.9, "seed": 3},
    "penalty": {"repetition_penalty": 1.3},
    "sampled with penalty": {"do_sample": True, "repetition_penalty": 1.3},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "beams with penalty": {"num_beams": 2, "repetition_penalty": 1.2},
}


def settings(**given: Any) -> GenerationSettings:
    return GenerationSettings(**{"max_new_tokens": 10, **given})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(str(tiny_model(tmp_path_factory.mktemp("model") / "tiny")), torch.float32).eval()


def logits_behind(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return found


def slow_answer(model: Any, prompt: list[int], most: int, penalty: float) -> list[int]:
    """Greedy with a penalty, one whole forward pass per token, no cache, no padding."""
    ids = list(prompt)
    while len(ids) - len(prompt) < most and not (len(ids) > len(prompt) and ids[-1] == END):
        logits = logits_behind(model, ids)
        for token in set(ids):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def whole(answers: list[list[int]], stops: frozenset[int] = STOPS) -> list[tuple[list[int], bool]]:
    return [ended(ids, stops) for ids in answers]


@pytest.mark.parametrize("kind", SETTINGS)
def test_answers_are_the_same_for_every_batch_size_and_order(model: Any, kind: str) -> None:
    how = settings(**SETTINGS[kind])
    one, four, eight = (whole(answer_prompts(model, PROMPTS, STOPS, END, how, size)) for size in (1, 4, 8))
    assert one == four == eight
    backwards = list(reversed(range(len(PROMPTS))))
    turned = write_answers(model, [PROMPTS[row] for row in backwards], STOPS, END, how, backwards)
    assert whole(turned)[::-1] == one
    assert len({tuple(ids) for ids, _ in one}) > 8


@pytest.mark.parametrize("penalty", [1.0, 1.3, 3.0])
def test_tokens_of_the_prompt_are_repeated_and_padding_is_not(model: Any, penalty: float) -> None:
    expected = [slow_answer(model, prompt, 10, penalty) for prompt in PROMPTS]
    (shortest,) = (row for row, prompt in enumerate(PROMPTS) if len(prompt) == min(map(len, PROMPTS)))
    pad = expected[shortest][0]  # were it penalised, this answer would begin in another way
    assert pad not in PROMPTS[shortest]
    found = answer_prompts(model, PROMPTS, STOPS, pad, settings(repetition_penalty=penalty), 11)
    assert whole(found) == whole(expected)


def test_beams_are_those_of_a_prompt_alone(model: Any) -> None:
    found = answer_prompts(model, PROMPTS, STOPS, END, settings(num_beams=4, length_penalty=2.0), 8)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        alone = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=10,
            num_beams=4,
            length_penalty=2.0,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
        )
        assert ended(ids, STOPS) == ended(alone[0, len(prompt) :].tolist(), STOPS)
    assert whole(found) != whole(answer_prompts(model, PROMPTS, STOPS, END, settings(), 8))


def test_a_length_penalty_chooses_between_short_and_long_beams(model: Any) -> None:
    free = answer_prompts(model, PROMPTS, frozenset(), 0, settings(), 8)
    stops = frozenset(
        Counter(token for ids in free for token in ids[1:]).most_common(12)[number][0] for number in (0, 3)
    )
    lengths = {}
    for penalty in (-5.0, 5.0):
        how = settings(num_beams=4, length_penalty=penalty)
        found = whole(answer_prompts(model, PROMPTS, stops, min(stops), how, 8), stops)
        lengths[penalty] = sum(len(ids) for ids, _ in found)
    assert lengths[-5.0] < lengths[5.0]


def test_tokens_are_drawn_as_often_as_transformers_says_they_are_likely(model: Any) -> None:
    how = settings(do_sample=True, temperature=0.8, top_k=6, top_p=0.9, max_new_tokens=2)
    prompt, count = PROMPTS[0], 4000

    def shares(ids: list[int]) -> torch.Tensor:
        scores, none = logits_behind(model, ids)[None], torch.zeros(1, 0, dtype=torch.int64)
        for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(6), TopPLogitsWarper(0.9)):
            scores = warper(none, scores)
        return scores.softmax(-1)[0]

    def check(counts: Counter[int], expected: torch.Tensor) -> None:
        total = counts.total()
        assert set(counts) <= set(expected.nonzero().flatten().tolist())
        for token, share in enumerate(expected.tolist()):
            assert counts[token] / total == pytest.approx(share, abs=4 * (share * (1 - share) / total) ** 0.5)

    drawn = answer_prompts(model, [prompt] * count, frozenset(), 0, how, 1000)
    first = Counter(ids[0] for ids in drawn)
    check(first, shares(prompt))
    ((likely, _),) = first.most_common(1)
    check(Counter(ids[1] for ids in drawn if ids[0] == likely), shares([*prompt, likely]))


def test_an_answer_is_drawn_from_its_seed_its_number_and_its_place_alone(model: Any) -> None:
    how = settings(do_sample=True)
    found = answer_prompts(model, PROMPTS, STOPS, END, how, 4)
    assert found == answer_prompts(model, PROMPTS, STOPS, END, how, 4)
    torch.manual_seed(5)
    assert write_answers(model, [PROMPTS[6]], STOPS, END, how, [6]) == [found[6]]
    assert write_answers(model, [PROMPTS[6]], STOPS, END, how, [7]) != [found[6]]
    assert write_answers(model, [PROMPTS[6]], STOPS, END, settings(do_sample=True, seed=43), [6]) != [found[6]]
    longer = write_answers(model, [PROMPTS[6]], STOPS, END, settings(do_sample=True, max_new_tokens=15), [6])
    assert longer[0][: len(found[6])] == found[6]
    same = answer_prompts(model, [PROMPTS[2]] * 6, STOPS, END, how, 6)
    assert len(set(map(tuple, same))) == 6


def test_settings_of_drawing_do_nothing_to_the_likeliest_answer(model: Any) -> None:
    greedy = answer_prompts(model, PROMPTS, STOPS, END, settings(), 4)
    given = settings(temperature=3.0, top_k=5, top_p=0.5, seed=7, length_penalty=9.0)
    assert answer_prompts(model, PROMPTS, STOPS, END, given, 4) == greedy
    almost = answer_prompts(model, PROMPTS, STOPS, END, settings(do_sample=True, temperature=1e-5), 4)
    assert almost == greedy


def test_an_answer_ends_before_its_first_terminator() -> None:
    assert ended([5, 6, 260, 7, 260], STOPS) == ([5, 6], True)
    assert ended([5, 6], STOPS) == ([5, 6], False)
    assert ended([260], STOPS) == ([], True)


def test_the_longest_prompts_come_first_and_progress_counts_answers(model: Any) -> None:
    said: list[tuple[int, int]] = []
    answer_prompts(model, PROMPTS, STOPS, END, settings(), 4, lambda done, total: said.append((done, total)))
    assert said == [(4, 11), (8, 11), (11, 11)]
