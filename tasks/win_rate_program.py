"""The program that lets a reward model score answers.

One decision: every answer to a prompt (the model's, the data set's, the other model's) is read in the same way, and
equal texts are scored once. So equal answers tie exactly, whatever batches they would have come into.

Run as `python -m tasks.win_rate_program SPEC.json`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.evaluate_program import reporter, write_lines
from tasks.jsonlines import read_json_lines
from tasks.measurements import write_results
from tasks.program import Events, ProgramError, Spec, Timings, main
from tasks.reading import BadRow
from tasks.rewards import ScoredText, require_reward_model, score_texts
from tasks.scored_answers import AnswerReader, Given, TokenizedTexts, load_reward_model, read_prompts
from tasks.sequences import TokenizedRows
from tasks.train.given import REWARD_MODEL
from tasks.win_rate import ANSWER, BASE, REFERENCE, WIN_RATES, ScoredRow, win_rate_results

NAMES = (ANSWER, *WIN_RATES)
WHAT = {ANSWER: "answer", REFERENCE: "reference", BASE: "base answer"}
Place = tuple[int, int]
"""Number of a file, and of a row in its file: the data set is one."""


def work(spec: Spec, events: Events) -> None:
    """Read, load, score, write.

    Writes what `tasks.measurements` says (`tasks.win_rate.win_rate_results`), `rewards.jsonl` (one line per answered
    prompt, in their order: `row`, `file`, the scores `answer`, `reference`, `base`, null where there is none, and
    `left_out`: name of an answer → why it was not scored) and `report/timings.json` (seconds).

    Raises:
        ProgramError: `bad_setting` when no answer can be scored, `not_finite` for a broken model.
        InputError: the model gives no score, or has no usable chat template.
    """
    output, folder, timings = Path(spec.output), Path(spec.inputs[REWARD_MODEL]), Timings()
    (output / "report").mkdir(parents=True, exist_ok=True)
    require_reward_model(folder, "evaluation.reward_model")
    given = list(_given({name: Path(path) for name, path in spec.inputs.items()}))
    prompts = {(file, row): prompt for (_, file, row), prompt in read_prompts(Path(spec.inputs["rows"])).items()}
    texts, refused, lost = AnswerReader(folder, spec.settings).read(given, prompts)
    timings.lap("read")
    for note in _notes(given, refused, lost, "base_answers" in spec.inputs):
        events.note(note)
    places: dict[Place, None] = dict.fromkeys(each.place for each in given)
    if not any((place, ANSWER) in texts for place in places):
        reasons = dict(Counter(bad.reason for (_, name), bad in refused.items() if name == ANSWER))
        raise ProgramError("bad_setting", f"the reward model can read none of {len(places)} answers: {reasons}")
    events.note("loading the reward model")
    model = load_reward_model(folder, spec.settings["bf16"])
    timings.lap("load")
    distinct = list(dict.fromkeys(texts.values()))
    report = reporter(events, "answers", spec.runtime["set_names"][0])
    scored = score_texts(model, TokenizedTexts(distinct), spec.runtime["per_device_eval_batch_size"], report)
    _require_finite(scored)
    scores = dict(zip(distinct, (text.score for text in scored), strict=True))
    rows = [
        ScoredRow(
            *place,
            {name: scores[texts[place, name]] for name in NAMES if (place, name) in texts},
            {name: _reason(refused[place, name]) for name in NAMES if (place, name) in refused},
        )
        for place in places
    ]
    results = win_rate_results(rows, spec.runtime["digests"])
    write_results(output, {f"{metric}.0": found for metric, found in results.items()})
    write_lines(
        output / "rewards.jsonl",
        (
            {"row": row.row, "file": row.file, **{name: row.scores.get(name) for name in NAMES}}
            | {"left_out": dict(row.left_out)}
            for row in rows
        ),
    )
    timings.lap("score")
    timings.write(output)


def _given(inputs: dict[str, Path]) -> Iterator[Given]:
    """Every answer to the prompts that the model answered."""
    lines = _answers(inputs["set.0"], inputs["answers"])
    others = _answers(inputs["base_prompts"], inputs["base_answers"]) if "base_answers" in inputs else {}
    for place, line in lines.items():
        yield Given(place, ANSWER, line["answer"])
        if line["reference"] is not None:
            yield Given(place, REFERENCE, line["reference"])
        if place in others:
            yield Given(place, BASE, others[place]["answer"])


def _answers(prompts: Path, generated: Path) -> dict[Place, dict[str, Any]]:
    """The lines of `answers.jsonl` by the places of their prompts."""
    rows = TokenizedRows(prompts)
    places = zip(rows.files().tolist(), rows.numbers().tolist(), strict=True)
    return dict(zip(places, read_json_lines(generated / "answers.jsonl"), strict=True))


def _notes(
    given: Sequence[Given], refused: dict[tuple[Place, str], BadRow], lost: Counter[str], base: bool
) -> Iterator[str]:
    """What is not scored, or not whole."""
    counts = Counter(each.name for each in given)
    for name in NAMES if base else (ANSWER, REFERENCE):
        reasons = Counter(bad.reason for (_, of), bad in refused.items() if of == name)
        if reasons:
            told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            yield f"left out {reasons.total()} of {counts[name]} {WHAT[name]}s: {told}"
        if counts[name] < counts[ANSWER]:
            yield f"{counts[ANSWER] - counts[name]} of {counts[ANSWER]} prompts have no {WHAT[name]}"
    for role, count in sorted(lost.items()):
        what = f"the {role}" if role in ("tools", "reasoning") else f"a {role} message"
        yield f"the reward model's template drops {what} of {count} of {len(given)} answers"


def _reason(bad: BadRow) -> str:
    return f"{bad.reason}: {bad.detail}"


def _require_finite(scored: Sequence[ScoredText]) -> None:
    if not all(math.isfinite(text.score) for text in scored):
        raise ProgramError("not_finite", "a score is not a number: the reward model is broken.")


if __name__ == "__main__":
    main(work)
