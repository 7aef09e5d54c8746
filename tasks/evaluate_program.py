"""The program that measures a model: perplexity on held-out shards, and answers to a few questions.

One decision: what is measured never depends on how: batch size, device and padding are runtime, so results of
different models and machines can be compared.

Run as `python -m tasks.evaluate_program SPEC.json`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tasks.program import Events, Spec, main

LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # JSON itself escapes the others


def work(spec: Spec, events: Events) -> None:
    """Load, score, answer, write.

    Writes `results.json` (`perplexity.<set>` → value, nll, tokens, rows; of a reward model `reward_accuracy.<set>` and
    `reward_margin.<set>`), `nll.<set>.jsonl` or `rewards.<set>.jsonl` (one line per row or pair), `answers.jsonl` (one
    line per question) and `report/timings.json` (seconds).

    Raises:
        ProgramError: `bad_setting` for packed shards, for an adapter of another base and for a data set without
            scored tokens, `not_finite` for a broken model.
        InputError: questions for a model without a usable chat template.
    """
    output, settings = Path(spec.output), spec.settings
    (output / "report").mkdir(parents=True, exist_ok=True)
    timings: dict[str, float] = {}
    clock = time.monotonic()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.monotonic()
        timings[name], clock = round(now - clock, 3), now

    events.emit("note", text="loading libraries")
    import torch  # noqa: F401 - the first import of it is what takes long

    from tasks.answers import Chat, answer_questions
    from tasks.rewards import reward_results, score_pairs
    from tasks.scoring import Shards, perplexity, score_rows

    lap("import")
    given = {name: settings.get(name) for name in ("template", "default_system", "enable_thinking")}
    chat = Chat.from_folder(tokenizer_folder(spec), **given) if settings["questions"] else None
    events.emit("note", text="loading the model")
    model = load(spec)
    lap("load")
    results: dict[str, Any] = {}
    for name, shape in zip(settings["sets"], settings["shapes"], strict=True):
        shards = Shards(Path(spec.inputs[f"set.{name}"]), shape)
        report = _reporter(
            events, "rows", spec.runtime.get("set_names", settings["sets"])[settings["sets"].index(name)]
        )
        batch_size = spec.runtime["per_device_eval_batch_size"]
        if settings["measure"] == "reward":
            pairs = score_pairs(model, shards, batch_size, report)
            results |= {f"{measure}.{name}": result for measure, result in reward_results(pairs).items()}
            rows = ({"row": row, "chosen": pair[0], "rejected": pair[1]} for row, pair in enumerate(pairs))
            write_lines(output / f"rewards.{name}.jsonl", rows)
        else:
            scores = score_rows(model, shards, batch_size, report)
            results[f"perplexity.{name}"] = perplexity(scores.values())
            rows = ({"row": row, "nll": score.nll, "tokens": score.tokens} for row, score in scores.items())
            write_lines(output / f"nll.{name}.jsonl", rows)
        lap(f"set.{name}")
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    if chat is not None:
        report = _reporter(events, "questions", "")
        answers = answer_questions(model, chat, settings["questions"], settings["max_new_tokens"], on_batch=report)
        write_lines(output / "answers.jsonl", (answer.record() for answer in answers))
        lap("answers")
    (output / "report" / "timings.json").write_text(json.dumps(timings, indent=1), encoding="utf-8")


def tokenizer_folder(spec: Spec) -> Path:
    """Where tokenizer and template are: with the adapter when it carries them, else with the model."""
    model = Path(spec.inputs["model"])
    adapter = Path(spec.inputs.get("adapter", model))
    return adapter if (adapter / "tokenizer.json").is_file() else model


def load(spec: Spec) -> Any:
    """The model, with its adapter when there is one, ready to be measured on the best device.

    Raises:
        ProgramError: `bad_setting` when the adapter was made on other base weights.
    """
    import torch

    from tasks.train.loading import load_base
    from tasks.train.lora import check_base

    adapter, changes = spec.inputs.get("adapter"), None
    if adapter and "base_digest" in spec.settings:
        changes = check_base(adapter, spec.settings["base_digest"])
    dtype = torch.bfloat16 if spec.settings["bf16"] else torch.float32
    model = load_base(spec.inputs["model"], dtype, spec.settings["measure"] == "reward", changes)
    if adapter:
        from tasks.train.adapters import load_adapter

        model = load_adapter(model, adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines. Characters that `str.splitlines` takes for the end of a line are escaped."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False)
            file.write(LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n")


def _reporter(events: Events, unit: str, name: str) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        events.emit("progress", step=done, total=total, unit=unit, set=name)

    return report


if __name__ == "__main__":
    main(work)
