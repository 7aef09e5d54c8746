"""Which answer of a pair a language model prefers, by likelihood, and which one it has come to prefer.

One decision: a pair counts as right when the preferred answer's number is strictly higher, as in `tasks.rewards` and in
what training logs. What a model has come to prefer needs two models and neither of them loaded: both were measured on
the same pairs, and what they gave to every answer is in their measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from registry.stage_settings import StageSettings
from tasks.jsonlines import read_json_lines
from tasks.measurements import Measure, write_results
from tasks.program import ProgramError
from tasks.rewards import pair_accuracy
from tasks.scoring import RowScore
from tasks.shards import shape_of
from tasks.steps import Input, Step, Work
from tasks.training import BASE_FILES, SHARD_FILES

VERSION = 1
ANSWERS = CHOSEN, REJECTED = "chosen", "rejected"
METRICS = ("implicit_reward_accuracy",)


class PairNll(NamedTuple):
    """What a model gives to the answers of a pair: sums of negative log-likelihoods, in nats."""

    chosen: float
    rejected: float


def preference_results(pairs: Sequence[tuple[RowScore, RowScore]]) -> dict[str, Measure]:
    """How often a model finds the preferred answer the more likely one, whole and by length.

    Log-likelihoods −4 of 2 tokens and −5 of 5: the first answer is the more likely one, and by token (−2 and −1) it is
    the other.

    >>> found = preference_results([(RowScore(4.0, 2), RowScore(5.0, 5)), (RowScore(3.0, 3), RowScore(3.0, 3))])
    >>> {name: (measure.result["value"], measure.result["ties"]) for name, measure in found.items()}
    {'preference_accuracy': (0.5, 1), 'preference_accuracy_norm': (0.0, 1)}

    Args:
        pairs: the preferred answer and the other one.

    Raises:
        ProgramError: `bad_setting` for an answer without a scored token, `not_finite` for a likelihood that is none.
    """
    answers = [answer for pair in pairs for answer in pair]
    if not all(answer.tokens for answer in answers):
        raise ProgramError("bad_setting", "an answer of a pair has no scored token; there is nothing to compare.")
    if not all(math.isfinite(answer.nll) for answer in answers):
        raise ProgramError("not_finite", "the likelihood of an answer is not a number: the model is broken.")
    return {
        "preference_accuracy": pair_accuracy([(-chosen.nll, -rejected.nll) for chosen, rejected in pairs]),
        "preference_accuracy_norm": pair_accuracy(
            [(-chosen.nll / chosen.tokens, -rejected.nll / rejected.tokens) for chosen, rejected in pairs]
        ),
    }


def implicit_reward_accuracy(model: Sequence[PairNll], reference: Sequence[PairNll]) -> Measure:
    """How often the preferred answer has the higher implicit reward, β log π(answer) / π_ref(answer) with β above 0.

    A model that gives −4 and −3 is right where its reference gave −6 and −4: it moved by 2 and by 1.

    >>> implicit_reward_accuracy([PairNll(4.0, 3.0)], [PairNll(6.0, 4.0)]).result["value"]
    1.0

    Source: Rafailov et al. 2023, arXiv:2305.18290, section 4.
    """
    return pair_accuracy(
        [
            (before.chosen - after.chosen, before.rejected - after.rejected)
            for after, before in zip(model, reference, strict=True)
        ]
    )


def starts_at_reference(settings: StageSettings) -> bool:
    """Whether the model that a stage starts from is the reference that it was trained against."""
    train, model = settings.train, settings.model
    if train.stage != "dpo" or train.pref_loss == "simpo":
        return False
    other = train.ref_model is not None and train.ref_model != model.model
    continued = model.adapter_name_or_path is not None and not train.create_new_adapter
    return not other and not continued


def implicit_reward_step(
    stage: str, name: str, label: str, model: Input, after: Step, before: Step, set_names: Sequence[str]
) -> Step | None:
    """The step that compares a model with its reference on pairs; None where both were measured on none.

    Args:
        stage, name: where it stands in the plan.
        label: the model's name for people.
        model: its weights, which are not loaded.
        after, before: what measured it, and what measured the reference, see `tasks.evaluation`.
        set_names: present names of the data sets of `after`, in their order.
    """
    sets: dict[int, Step] = {}
    for number in range(len(set_names)):
        found = after.inputs[f"set.{number}"].source
        other = before.inputs.get(f"set.{number}")
        if isinstance(found, Step) and other is not None and other.source is found and shape_of(found) == "preference":
            sets[number] = found
    if not sets:
        return None
    measured = {"after": after, "before": before}
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label=label,
        identity={"sets": list(sets)},
        inputs={
            "model": Input(model.source, BASE_FILES),
            **{f"set.{place}": Input(each, SHARD_FILES) for place, each in enumerate(sets.values())},
            **{side: Input(each, tuple(f"nll.{number}.jsonl" for number in sets)) for side, each in measured.items()},
        },
        run="tasks.preferences:implicit_reward",
        runtime={"set_names": [set_names[number] for number in sets], "metrics": METRICS},
    )


def implicit_reward(work: Work) -> dict[str, Any]:
    """Compare what two models gave to the same pairs."""
    found, rows = {}, 0
    for place, number in enumerate(work.identity["sets"]):
        after, before = (_pairs(work.inputs[side] / f"nll.{number}.jsonl") for side in ("after", "before"))
        found[f"{METRICS[0]}.{place}"] = implicit_reward_accuracy(after, before)
        rows += len(after)
    write_results(work.output, found)
    return {"rows": rows}


def _pairs(path: Path) -> list[PairNll]:
    lines = read_json_lines(path)
    parts = ([line["nll"] for line in lines if line["answer"] == answer] for answer in ANSWERS)
    return [PairNll(*pair) for pair in zip(*parts, strict=True)]
