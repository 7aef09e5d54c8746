"""The program that measures a model: perplexity on held-out shards, and answers to a few questions.

One decision: what is measured never depends on how: batch size, device and padding are runtime, so results of
different models and machines can be compared.

Run as `python -m tasks.evaluate_program SPEC.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.jsonlines import json_line
from tasks.measurements import Measure, write_results
from tasks.program import Events, Spec, Timings, main

if TYPE_CHECKING:
    from tasks.scoring import RowScore, Shards

Report = Callable[[int, int], None]
"""Told what is done and what there is in all."""
QUANTISED = "quantised"
"""Setting: `quant_bit`, `quant_type` and `double_quantization` that the model is measured in."""


def work(spec: Spec, events: Events) -> None:
    """Load, score, answer, write.

    Writes what `tasks.measurements` says (`perplexity.<set>`, `bits_per_byte.<set>`, of pairs what `tasks.preferences`
    gives; of a reward model what `tasks.rewards` gives), `nll.<set>.jsonl` (one line per text; of pairs both, and
    `answer` says which) or `rewards.<set>.jsonl` (one line per text or pair), `answers.jsonl` (one line per question),
    `report/rewards.<set>.png` of a reward model where there are pairs and `report/timings.json` (seconds).

    Raises:
        ProgramError: `bad_setting` for packed shards, for an adapter of another base and for a data set without
            scored tokens, `not_finite` for a broken model.
        InputError: questions for a model without a usable chat template.
    """
    output, settings = Path(spec.output), spec.settings
    (output / "report").mkdir(parents=True, exist_ok=True)
    timings = Timings()
    events.note("loading libraries")
    import torch  # noqa: F401 - the first import of it is what takes long

    from registry.evaluation_records import GenerationSettings
    from tasks.answers import Chat, answer_questions
    from tasks.scoring import Shards

    timings.lap("import")
    given = {name: settings.get(name) for name in ("template", "default_system", "enable_thinking")}
    chat = Chat.from_folder(tokenizer_folder(spec), **given) if settings["questions"] else None
    events.note("loading the model")
    model = load(spec)
    timings.lap("load")
    results: dict[str, Measure] = {}
    for name, shape in zip(settings["sets"], settings["shapes"], strict=True):
        window = (settings["window"], settings["stride"]) if shape == "text" else None
        shards = Shards(Path(spec.inputs[f"set.{name}"]), shape, window)
        set_name = spec.runtime.get("set_names", settings["sets"])[settings["sets"].index(name)]
        report = reporter(events, "rows", set_name)
        measure = _rewards if settings["measure"] == "reward" else _perplexity
        found = measure(spec, model, shards, report, name)
        results |= {f"{metric}.{name}": result for metric, result in found.items()}
        timings.lap(f"set.{name}")
    write_results(output, results)
    if chat is not None:
        report = reporter(events, "questions", "")
        how = GenerationSettings(**settings["generation"])
        answers = answer_questions(model, chat, settings["questions"], how, on_batch=report)
        write_lines(output / "answers.jsonl", (answer.record() for answer in answers))
        timings.lap("answers")
    timings.write(output)


def _perplexity(spec: Spec, model: Any, shards: Shards, report: Report, name: str) -> dict[str, Measure]:
    """Metric → number of a language model on one data set; of pairs, what it makes of both answers."""
    from tasks.preferences import ANSWERS, preference_results
    from tasks.scoring import bits_per_byte, perplexity, score_rows
    from tasks.tokens import text_bytes_of_ids

    sizes, size = text_bytes_of_ids(tokenizer_folder(spec)), spec.runtime["per_device_eval_batch_size"]
    pairs = shards.shape == "preference"
    # preferred answers by themselves: in other batches their perplexity would have other last bits
    scores = score_rows(model, shards, size, (lambda done, total: report(done, 2 * total)) if pairs else report, sizes)
    others: dict[int, RowScore] = {}
    if pairs:
        given = range(1, len(shards), 2)
        others = score_rows(model, shards, size, lambda done, total: report(total + done, 2 * total), sizes, given)
    rows = (
        {
            **dict(zip(("row", "start"), shards.place(text), strict=True)),
            **({"answer": ANSWERS[text % 2]} if pairs else {}),
            **asdict(score),
        }
        for text, score in sorted((scores | others).items())
    )
    write_lines(Path(spec.output) / f"nll.{name}.jsonl", rows)
    counted = shards.rows if shards.shape == "text" else len(scores)
    found = {"perplexity": perplexity(scores.values(), counted)}
    if any(score.bytes for score in scores.values()):
        found["bits_per_byte"] = bits_per_byte([*scores.values()], counted)
    if pairs:
        found |= preference_results([*zip(scores.values(), others.values(), strict=True)])
    return found


def _rewards(spec: Spec, model: Any, shards: Shards, report: Report, name: str) -> dict[str, Measure]:
    """Metric → number of a reward model on one data set: of pairs, or of answers that nothing is compared with."""
    from tasks.reward_picture import draw_rewards
    from tasks.rewards import paired, reward_results, score_results, score_texts

    output = Path(spec.output)
    texts = score_texts(model, shards, spec.runtime["per_device_eval_batch_size"], report)
    if shards.shape != "preference":
        write_lines(output / f"rewards.{name}.jsonl", ({"row": row, **t._asdict()} for row, t in enumerate(texts)))
        return score_results(texts)
    pairs = paired(texts)
    rows = (
        {"row": row, "chosen": chosen.score, "rejected": rejected.score}
        | {"chosen_tokens": chosen.tokens, "rejected_tokens": rejected.tokens}
        for row, (chosen, rejected) in enumerate(pairs)
    )
    write_lines(output / f"rewards.{name}.jsonl", rows)
    results = reward_results(pairs)
    (output / "report" / f"rewards.{name}.png").write_bytes(
        draw_rewards({metric: found.result for metric, found in results.items()})
    )
    return results


def tokenizer_folder(spec: Spec) -> Path:
    """Where tokenizer and template are: with the adapter when it carries them, else with the model."""
    model = Path(spec.inputs["model"])
    adapter = Path(spec.inputs.get("adapter", model))
    return adapter if (adapter / "tokenizer.json").is_file() else model


def load(spec: Spec) -> Any:
    """The model, with its adapter when there is one, ready to be measured on the best device.

    Raises:
        ProgramError: `bad_setting` when the adapter was made on other base weights.
        InputError: scores are wanted, and the model gives none.
    """
    import torch

    from tasks.rewards import require_reward_model
    from tasks.train.loading import load_base, quantisation
    from tasks.train.lora import check_base

    scores = spec.settings.get("measure") == "reward"
    adapter, changes = spec.inputs.get("adapter"), None
    if scores and not adapter:
        require_reward_model(Path(spec.inputs["model"]), spec.inputs["model"])
    if adapter and "base_digest" in spec.settings:
        changes = check_base(adapter, spec.settings["base_digest"])
    dtype = torch.bfloat16 if spec.settings["bf16"] else torch.float32
    how = quantisation(spec.settings[QUANTISED] | {"bf16": spec.settings["bf16"]}) if QUANTISED in spec.settings else {}
    model = load_base(spec.inputs["model"], dtype, scores, changes, **how)
    if adapter:
        from tasks.train.adapters import load_adapter

        model = load_adapter(model, adapter)
    if not getattr(model, "is_quantized", False):  # such weights lie where they were quantised
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def optional_packages(spec: Spec) -> set[str]:
    """Which of `tasks.program.OPTIONAL` measuring needs: for weights that are quantised, or are to be."""
    saved = json.loads((Path(spec.inputs["model"]) / "config.json").read_text(encoding="utf-8"))
    return {"bitsandbytes"} if QUANTISED in spec.settings or "quantization_config" in saved else set()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(map(json_line, rows))


def reporter(events: Events, unit: str, name: str) -> Report:
    """Tells of progress on a data set, by its name, or on something else without one."""

    def report(done: int, total: int) -> None:
        events.emit("progress", step=done, total=total, unit=unit, set=name)

    return report


if __name__ == "__main__":
    main(work, optional_packages)
