"""generate: a model + prompts → its answers, compared with those that the data set has.

One decision: what a draw, a search or a terminator depends on is in the key, and nothing else: a setting without effect
changes none. The data set is known by position only, as in `tasks.evaluation`.
"""

from __future__ import annotations

from typing import Any

from registry.errors import InputError, Problem
from registry.evaluation_records import EvaluationSettings
from registry.evaluation_rules import generation_identity
from tasks.sequences import TokenizedRows
from tasks.steps import Input, Step, Work
from tasks.training import BASE_FILES, SHARD_FILES, keep_log

VERSION = 1

METRICS = (
    *("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1"),
    *("answer_tokens", "stop_rate"),
)
"""What comparing answers gives."""


def generate_step(
    stage: str,
    name: str,
    label: str,
    model: Input,
    prompts: Step,
    set_name: str,
    evaluation: EvaluationSettings,
    *,
    template: str | None,
    bf16: bool,
    per_device_eval_batch_size: int,
) -> Step:
    """The step that lets a model answer a data set anew.

    Args:
        stage, name: where it stands in the plan.
        label: its name for people.
        model: the weights.
        prompts: the tokenize step of the data set, in shape `prompt`: every row is a conversation up to its last
            answer, and has that answer as its mark.
        set_name: present name of the data set.
        evaluation: how answers are written.
        template: Jinja text of the chat template, None for the model's own. Prompts are rendered already; it says what
            ends an answer.
        bf16: compute in bfloat16.
        per_device_eval_batch_size: prompts that go through the model together.
    """
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label=label,
        identity={
            "generation": generation_identity(evaluation),
            "template": template,
            "bf16": bf16,
            # in bfloat16 another batch can tip a choice between two nearly equal tokens, and the answer goes on from it
            "per_device_eval_batch_size": per_device_eval_batch_size,
        },
        inputs={"model": Input(model.source, BASE_FILES), "set.0": Input(prompts, SHARD_FILES)},
        run="tasks.generation:generate",
        runtime={"set_names": [set_name], "metrics": METRICS},
        packages=("rouge-score", "sacrebleu"),
        devices=1,
    )


def generate(work: Work) -> dict[str, Any]:
    """Launch the program that answers and compares.

    Raises:
        InputError: no row has an answer to compare with.
    """
    rows = TokenizedRows(work.inputs["set.0"])
    compared = sum(rows.mark(row) is not None for row in range(len(rows)))
    if not compared:
        (name,) = work.step.runtime["set_names"]
        rule = f"{name}: none of {len(rows)} rows has an answer to compare with"
        cure = (
            "A conversation has to end with a message of the assistant; a question needs a column output, response, "
            "completion, answer, solution or target, or one that the data set's `columns` name response."
        )
        raise InputError(Problem("evaluation.generate", rule, cure))
    if compared < len(rows):
        work.note(f"{compared} of {len(rows)} rows have an answer to compare with")
    work.run("tasks.generate_program")
    keep_log(work)
    return {"rows": len(rows), "rows_compared": compared}
