"""The program that lets a model answer prompts anew, and compares its answers with those of the data set.

One decision: the answers are written down with everything that is known of each, so that every number can be looked
into; nothing is measured that is not in that file.

Run as `python -m tasks.generate_program SPEC.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.evaluate_program import load, optional_packages, reporter, write_lines
from tasks.measurements import write_results
from tasks.program import Events, Spec, Timings, main

SHOWN = ("exact_match", "token_f1", "rougeL")
"""Metrics that stand beside every answer."""


def work(spec: Spec, events: Events) -> None:
    """Load, answer, compare, write.

    Writes what `tasks.measurements` says (`tasks.generation.METRICS`), `answers.jsonl` (one line per row, in their
    order: `row`, its number in its file; `prompt`, `answer`, `reference`, `tokens`, `stopped`, and `SHOWN` where there
    is a reference) and `report/timings.json` (seconds).

    Raises:
        InputError: the model has no usable chat template.
    """
    output, settings = Path(spec.output), spec.settings
    (output / "report").mkdir(parents=True, exist_ok=True)
    timings = Timings()
    events.note("loading libraries")
    import torch  # noqa: F401 - the first import of it is what takes long

    from registry.evaluation_records import GenerationSettings
    from tasks.answers import Chat, answer_prompts, ended
    from tasks.sequences import TokenizedRows
    from tasks.text_metrics import measure_answers

    timings.lap("import")
    chat = Chat.from_folder(Path(spec.inputs["model"]), settings["template"])
    events.note("loading the model")
    model = load(spec)
    timings.lap("load")
    rows = TokenizedRows(Path(spec.inputs["set.0"]))
    prompts = [rows.piece(row, 0, int(length))[0].tolist() for row, length in enumerate(rows.lengths())]
    new = answer_prompts(
        model,
        prompts,
        chat.stops,
        chat.pad,
        GenerationSettings(**settings["generation"]),
        settings["per_device_eval_batch_size"],
        reporter(events, "answers", spec.runtime["set_names"][0]),
    )
    timings.lap("answers")
    events.note("comparing the answers")
    kept, stopped = zip(*(ended(ids, chat.stops) for ids in new), strict=True)
    answers = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]
    references = [rows.mark(row) for row in range(len(rows))]
    compared = measure_answers(answers, references, list(map(len, kept)), stopped)
    write_results(output, {f"{metric}.0": found for metric, found in compared.measures.items()})

    def lines() -> Iterator[dict[str, Any]]:
        for row, number in enumerate(rows.numbers().tolist()):
            yield {
                "row": number,
                "prompt": chat.tokenizer.decode(prompts[row], skip_special_tokens=False),
                "answer": answers[row],
                "reference": references[row],
                "tokens": len(kept[row]),
                "stopped": stopped[row],
            } | {name: compared.rows[row][name] for name in SHOWN if compared.rows[row]}

    write_lines(output / "answers.jsonl", lines())
    timings.lap("compare")
    timings.write(output)


if __name__ == "__main__":
    main(work, optional_packages)
