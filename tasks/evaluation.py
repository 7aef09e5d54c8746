"""evaluate: a model + held-out shards + questions → perplexities and sample answers.

One decision: data sets are known to the step by position only, so that renaming a data set measures nothing again;
their names are put back when results are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from registry.evaluation_records import EvaluationSettings
from registry.evaluation_rules import generation_identity
from registry.stage_settings import StageSettings
from registry.stages import STAGES
from tasks.jsonlines import read_json_lines
from tasks.shards import shape_of
from tasks.steps import Input, Step, Work
from tasks.training import BASE_FILES, SHARD_FILES, keep_log

# of each measure, so that what is not changed is not measured again
VERSIONS = {
    "perplexity": 3,  # texts whole, in windows; bits per byte; drawn values are kept
    "reward": 4,  # drawn values are kept
}

LIKELIHOOD_METRICS = ("perplexity", "bits_per_byte")
PREFERENCE_METRICS = ("preference_accuracy", "preference_accuracy_norm")
"""Beside these, what measuring a language model on pairs gives."""
LENGTH_ENDINGS = ("", "_chosen_shorter", "_similar_length", "_chosen_longer")
REWARD_METRICS = (
    *(f"{metric}{ending}" for metric in ("reward_accuracy", "reward_margin") for ending in LENGTH_ENDINGS),
    *("longer_is_better_accuracy", "reward_calibration_error", "reward_score"),
)
"""What measuring a reward model gives; those of a kind of pairs only where there are some."""


def evaluate_step(
    stage: str,
    name: str,
    label: str,
    model: Input,
    sets: dict[str, Step],
    evaluation: EvaluationSettings,
    settings: StageSettings,
) -> Step:
    """The step that measures a model.

    Args:
        stage, name: where it stands in the plan.
        label: its name for people.
        model: the weights.
        sets: data set name → its tokenize step.
        evaluation: questions and answer length.
        settings: of the stage the sets belong to: template, bf16, batch size.
    """
    inputs = {f"set.{index}": Input(step, SHARD_FILES) for index, step in enumerate(sets.values())}
    kind = STAGES[settings.train.stage]
    measure = "perplexity" if kind.makes_text else "reward"
    shapes = [shape_of(step) for step in sets.values()]
    longest = settings.data.cutoff_len
    windows = {"window": longest, "stride": evaluation.stride or longest - 1} if "text" in shapes else {}
    questions = evaluation.questions if kind.makes_text else ()
    data = settings.data
    answers = {
        "generation": generation_identity(evaluation),
        "template": settings.template,
        "default_system": data.default_system,
        "enable_thinking": data.enable_thinking,
    }
    metrics = REWARD_METRICS if measure == "reward" else LIKELIHOOD_METRICS
    pairs = measure == "perplexity" and "preference" in shapes
    return Step(
        stage=stage,
        name=name,
        version=VERSIONS[measure],
        label=label,
        identity={
            "questions": list(questions),
            "shapes": shapes,
            **windows,
            "measure": measure,
            "bf16": settings.train.bf16,
            "sets": [str(index) for index in range(len(sets))],
            **(answers if questions else {}),
            **({"pairs": "both answers"} if pairs else {}),
        },
        inputs={"model": Input(model.source, BASE_FILES), **inputs},
        run="tasks.evaluation:evaluate",
        runtime={
            "per_device_eval_batch_size": settings.runtime.per_device_eval_batch_size,
            "set_names": list(sets),
            "metrics": metrics + (PREFERENCE_METRICS if pairs else ()),
        },
        devices=1,
    )


def evaluate(work: Work) -> dict[str, Any]:
    """Launch the evaluation program."""
    work.run("tasks.evaluate_program")
    keep_log(work)
    return {}


def reward_pictures(artifact: Path, set_names: list[str]) -> dict[str, Path]:
    """Data set by its present name → the picture of a reward model's scores, where there is one."""
    pictures = {name: artifact / "report" / f"rewards.{number}.png" for number, name in enumerate(set_names)}
    return {name: path for name, path in pictures.items() if path.is_file()}


def read_answers(artifact: Path) -> list[dict[str, Any]]:
    """Sample answers: question, answer, stopped, tokens."""
    path = artifact / "answers.jsonl"
    return read_json_lines(path) if path.exists() else []
