"""win_rate: answers that were written anew + a reward model → their scores, and how often they beat others.

One decision: a reward model reads what people and models said, not what a tokenizer made of it. Messages come from the
fetched rows, the answer is put behind them, and the reward model's own template and tokenizer do the rest, as with the
pairs that it was trained on; so models with different tokenizers can be compared by one reward model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy

from tasks.fingerprint import fingerprint
from tasks.measurements import DOCUMENTS, Measure, mean
from tasks.steps import Input, Step, Work, behind
from tasks.train.given import REWARD_MODEL
from tasks.training import BASE_FILES, DEFAULT_READING, keep_log, rows_of_prompts

VERSION = 1
ANSWER, REFERENCE, BASE = "answer", "reference", "base"
SCORE, WIN_RATES = "reward_score", {REFERENCE: "win_rate_reference", BASE: "win_rate_base"}
ANSWER_FILES = ("answers.jsonl",)


class ScoredRow(NamedTuple):
    """A prompt that was answered."""

    file: int
    row: int
    """Its number in that file."""
    scores: Mapping[str, float]
    """By `answer`, `reference`, `base`: those that the reward model can read."""
    left_out: Mapping[str, str] = {}
    """Why it cannot read the others that there are."""


def win_rate_step(
    stage: str,
    name: str,
    label: str,
    model: Input,
    generated: Step,
    base: Step | None,
    set_name: str,
    reward_model: Input,
    reading: Mapping[str, Any],
    per_device_eval_batch_size: int,
) -> Step:
    """The step that scores the answers of a model.

    Args:
        stage, name: where it stands in the plan.
        label: the model's name for people.
        model: its weights, which are not loaded.
        generated: the step that wrote its answers.
        base: the same of the model that it is compared with.
        set_name: present name of the data set.
        reward_model: the weights.
        reading: it reads conversations; what is not in it is as in `DEFAULT_READING`.
        per_device_eval_batch_size: texts that go through it together.
    """
    prompts = generated.inputs["set.0"].source
    assert isinstance(prompts, Step)
    inputs = {
        "model": Input(model.source, BASE_FILES),
        "set.0": Input(prompts),
        "answers": Input(generated, ANSWER_FILES),
    }
    inputs |= {"rows": rows_of_prompts(prompts)}
    if base is not None:
        inputs |= {"base_prompts": Input(behind(base, "set.0")), "base_answers": Input(base, ANSWER_FILES)}
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label=label,
        identity=DEFAULT_READING | {"bf16": False} | dict(reading),
        inputs=inputs | {REWARD_MODEL: Input(reward_model.source, BASE_FILES)},
        run="tasks.win_rate:win_rate",
        runtime={
            "per_device_eval_batch_size": per_device_eval_batch_size,
            "set_names": [set_name],
            "metrics": (SCORE, *(rate for other, rate in WIN_RATES.items() if other != BASE or base is not None)),
        },
        packages=("jinja2", "tokenizers"),
        devices=1,
    )


def win_rate(work: Work) -> dict[str, Any]:
    """Launch the program that scores."""
    spec = work.spec()
    digests = work.digests | {"reading": fingerprint(work.identity)}
    work.run("tasks.win_rate_program", replace(spec, runtime=spec.runtime | {"digests": digests}))
    keep_log(work)
    return {}


def win_rate_results(rows: Sequence[ScoredRow], digests: Mapping[str, str]) -> dict[str, Measure]:
    """What the scores of a data set's answers say.

    >>> scores = [{"answer": 2.0, "reference": 1.0}, {"answer": 0.5, "reference": 0.5}, {"answer": 0.0}]
    >>> rows = [ScoredRow(0, number, each) for number, each in enumerate(scores)]
    >>> found = win_rate_results(rows, {"rows": "a", "reward_model": "b", "reading": "c"})
    >>> found["reward_score"].result["value"], found["win_rate_reference"].result["value"]
    (0.8333333333333334, 0.75)

    Args:
        rows: at least one of them with a score of the answer.
        digests: of the inputs, and of how the reward model reads (`reading`). Numbers of two models belong together
            where it read answers to the same rows of both, and for `win_rate_base` where those were compared with the
            same answers.

    Returns:
        `reward_score` (mean, with `lowest` and `highest`); `win_rate_reference` and `win_rate_base`, the share of
        answers with a higher score than the other answer to their prompt, where ties count half, with `won`, `ties` and
        `lost`; one without rows is left out. `left_out` of each: answers that are there, and in no number.
    """
    results: dict[str, Measure] = {}
    answered = [row for row in rows if ANSWER in row.scores]
    own = numpy.array([row.scores[ANSWER] for row in answered])
    more = {"lowest": float(own.min()), "highest": float(own.max()), "left_out": len(rows) - len(answered)}
    results[SCORE] = mean(own, **more, **_documents(answered, digests))
    for other, name in WIN_RATES.items():
        there = [row for row in rows if other in row.scores or other in row.left_out]
        both = [row for row in there if {ANSWER, other} <= row.scores.keys()]
        if not both:
            continue
        away = numpy.array([row.scores[ANSWER] - row.scores[other] for row in both])
        counts = {"won": int((away > 0).sum()), "ties": int((away == 0).sum()), "lost": int((away < 0).sum())}
        against = ("base_answers",) if other == BASE else ()
        documents = _documents(both, digests, *against)
        results[name] = mean((numpy.sign(away) + 1) / 2, **counts, left_out=len(there) - len(both), **documents)
    return results


def _documents(rows: Sequence[ScoredRow], digests: Mapping[str, str], *more: str) -> dict[str, str]:
    """The digest by which numbers of two models are known to belong together, row by row."""
    places = [[row.file, row.row] for row in rows]
    return {
        DOCUMENTS: fingerprint(
            {"places": places} | {name: digests[name] for name in ("rows", REWARD_MODEL, "reading", *more)}
        )
    }
