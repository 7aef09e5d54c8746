"""From what lm-eval returns to what every measurement leaves: numbers with drawn values, and a line for each question.

One decision: a value is lm-eval's own, digit for digit; only its interval is ours, drawn from the values of the single
questions that lm-eval hands back. A number whose interval cannot be drawn is left out, and it is said.

Legend: r questions, n draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from tasks.fingerprint import fingerprint
from tasks.intervals import DRAWS, SEED, Array, drawn_ratios, drawn_sums
from tasks.measurements import DOCUMENTS, Measure, measure
from tasks.program import ProgramError

NAMES = {"acc": "accuracy", "acc_norm": "accuracy_norm"}
PLAIN = ("none",)
"""Filters that are no part of a metric's name."""
SLOW = ("bleu", "chrf", "chrf++", "ter")
"""Made from all answers together, in 0.1 to 1 ms for each: minutes to hours for as many draws as an interval has."""
MOST = 500
"""Questions of which a number is drawn again by calling lm-eval's own function for each draw."""


@dataclass(frozen=True)
class Asked:
    """Everything lm-eval said about one benchmark."""

    results: Mapping[str, Any]
    """What `lm_eval.simple_evaluate` returned."""
    tasks: Mapping[str, Any]
    """Task name → lm-eval's task."""
    group: Any = None
    """lm-eval's group, where they are one."""

    @property
    def name(self) -> str:
        """Of the group, or the one task."""
        return str(self.group.name if self.group else next(iter(self.tasks)))

    @property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Task name → a sample for each question and filter, in their order."""
        return {name: self.results["samples"][name] for name in self.tasks}

    def metrics(self) -> dict[tuple[str, str], float]:
        """(metric, filter) → lm-eval's value of the whole."""
        found = self.results["results"][self.name]
        keys = [key for key in found if "," in key and "_stderr," not in key]
        return {(key.rpartition(",")[0], key.rpartition(",")[2]): found[key] for key in keys}

    def names(self) -> dict[tuple[str, str], str]:
        """(metric, filter) → its name in results.

        `acc` is `accuracy`; a filter is named only where a metric has several, `exact_match_strict` for `strict-match`.
        """
        metrics = list(self.metrics())
        return {
            (metric, kind): metric_name(metric, kind, sum(other == metric for other, _ in metrics))
            for metric, kind in metrics
        }


def metric_name(metric: str, kind: str, filters: int) -> str:
    """The name of a metric in results.

    >>> metric_name("acc", "none", 1), metric_name("exact_match", "strict-match", 2)
    ('accuracy', 'exact_match_strict')

    Args:
        metric, kind: metric and filter as lm-eval names them.
        filters: how many the metric has.
    """
    ending = "" if filters == 1 or kind in PLAIN else f"_{kind.removesuffix('-match')}"
    return re.sub(r"[^\w+]", "_", f"{NAMES.get(metric, metric)}{ending}")


def measures(asked: Asked, identity: Mapping[str, Any], note: Callable[[str], None]) -> dict[str, Measure]:
    """Name → number, of all metrics.

    Args:
        asked: what lm-eval said.
        identity: of the step.
        note: told what is left out.
    """
    more = {
        DOCUMENTS: documents_digest(asked, identity),
        "task_version": asked.results["versions"].get(asked.name),
        "num_fewshot": asked.results["n-shot"].get(asked.name),
    }
    found: dict[str, Measure] = {}
    for (metric, kind), given in asked.names().items():
        items = {task: values_of(samples, metric, kind) for task, samples in asked.samples.items()}
        pooled = [value for values in items.values() for value in values]
        drawn = _drawn(asked, metric, pooled)
        if drawn is None:
            note(f"{given} is left out: its interval cannot be drawn in reasonable time, see docs/evaluation.md")
            continue
        subjects = {"subjects": _subjects(asked, metric, kind, items)} if asked.group else {}
        value = float(asked.metrics()[metric, kind])
        found[given] = measure(value, drawn, len(pooled), **more, **subjects)
    return found


def values_of(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> list[Any]:
    """What a metric is of each question, in their order; questions that have no value of it are not there."""
    return [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample["metrics"]]


def documents_digest(asked: Asked, identity: Mapping[str, Any]) -> str:
    """Digest of all that was asked, whatever model was asked: equal digests belong to paired questions.

    Not of the prompts: with a chat template they are each model's own.
    """
    asked_for = ("benchmark", "definition", "num_fewshot", "apply_chat_template", "seed")
    questions = [
        [name, sample["doc_hash"], sample["target_hash"]] for name, rows in asked.samples.items() for sample in rows
    ]
    shots = [asked.results["n-shot"][name] for name in asked.tasks]
    return fingerprint({**{key: identity.get(key) for key in asked_for}, "shots": shots, "questions": questions})


def _subjects(asked: Asked, metric: str, kind: str, items: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    results = asked.results["results"]
    return {
        results[task]["alias"]: {"value": float(results[task][f"{metric},{kind}"]), "rows": len(values)}
        for task, values in items.items()
        if f"{metric},{kind}" in results[task]
    }


def _drawn(asked: Asked, metric: str, items: Sequence[Any]) -> Array | None:
    """Values of a metric for questions that are drawn again, [n]; None when that would take too long."""
    from lm_eval.api.metrics import mean
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    aggregations = [task.aggregation().get(metric, mean) for task in asked.tasks.values()]
    if asked.group:
        weighted = [one.weight_by_size for one in asked.group.aggregate_metric_list if one.metric == metric]
        if any(function is not mean for function in aggregations) or not all(weighted):
            return None  # a mean over subjects is no number of the questions
    names = {id(AGGREGATION_REGISTRY[name]): name for name in AGGREGATION_REGISTRY}
    name = names.get(id(aggregations[0]), "")
    if name in RATIOS and not (name in OF_TWO and not numpy.isin(numpy.asarray(items), (0, 1)).all()):
        return RATIOS[name](items)
    return None if name in SLOW or len(items) > MOST else drawn_again(items, aggregations[0])


def drawn_again(items: Sequence[Any], function: Callable[[list[Any]], float]) -> Array:
    """A function of items that are drawn with replacement, as many as there are, [n]."""
    random, count = numpy.random.default_rng([SEED, len(items)]), len(items)
    draws = (random.integers(0, count, count) for _ in range(DRAWS))
    return numpy.array([function([items[index] for index in draw]) for draw in draws], numpy.float64)


def _mean(items: Sequence[Any]) -> Array:
    return drawn_ratios(numpy.asarray(items, numpy.float64), numpy.ones(len(items)))


def _nanmean(items: Sequence[Any]) -> Array:
    values = numpy.asarray(items, numpy.float64)
    return drawn_ratios(numpy.nan_to_num(values), (~numpy.isnan(values)).astype(numpy.float64))


def _weighted(items: Sequence[Any]) -> Array:
    pairs = numpy.asarray(items, numpy.float64)
    return drawn_ratios(pairs[:, 0], pairs[:, 1])


def _brier(items: Sequence[Any]) -> Array:
    squares = [
        sum((float(probability) - (place == gold)) ** 2 for place, probability in enumerate(probabilities))
        for gold, probabilities in items
    ]
    return _mean(squares)


def _outcomes(items: Sequence[Any]) -> Array:
    """[n, 4] hits, false alarms, misses and right refusals of drawn pairs (gold, predicted) of 0 and 1."""
    gold, said = numpy.asarray(items, numpy.float64).T
    return drawn_sums(numpy.stack([gold * said, (1 - gold) * said, gold * (1 - said), (1 - gold) * (1 - said)], axis=1))


def _f1(items: Sequence[Any]) -> Array:
    hits, alarms, misses, _ = _outcomes(items).T
    below = 2 * hits + alarms + misses
    return numpy.divide(2 * hits, below, out=numpy.zeros(len(below)), where=below != 0)


def _mcc(items: Sequence[Any]) -> Array:
    hits, alarms, misses, refusals = _outcomes(items).T
    below = numpy.sqrt((hits + alarms) * (hits + misses) * (refusals + alarms) * (refusals + misses))
    return numpy.divide(hits * refusals - alarms * misses, below, out=numpy.zeros(len(below)), where=below != 0)


RATIOS: dict[str, Callable[[Sequence[Any]], Array]] = {
    "mean": _mean,
    "nanmean": _nanmean,
    "perplexity": lambda items: numpy.exp(-_mean(items)),
    "weighted_perplexity": lambda items: numpy.exp(-_weighted(items)),
    "bits_per_byte": lambda items: -_weighted(items) / numpy.log(2),
    "brier_score": _brier,
    "f1": _f1,
    "matthews_corrcoef": _mcc,
}
"""lm-eval's name of an aggregation → its values for drawn questions, all at once."""
OF_TWO = ("f1", "matthews_corrcoef")
"""Of them, those that are so for two classes only."""


def require_finite(asked: Asked) -> None:
    """Refuse log-likelihoods that are no numbers: which choice is the likeliest then says nothing.

    Raises:
        ProgramError: `not_finite`.
    """
    for task, samples in asked.samples.items():
        for sample in samples:
            said = [answer if isinstance(answer, float) else answer[0] for [answer, *_] in sample["resps"]]
            if any(isinstance(number, float) and math.isnan(number) for number in said):
                rule = f"{task}, question {sample['doc_id']}: the log-likelihood is not a number"
                raise ProgramError("not_finite", f"{rule}. The weights are broken; measure an earlier model.")


def sample_lines(asked: Asked) -> Iterator[dict[str, Any]]:
    """A line for each question: what was asked, what the model said, what it was worth."""
    names = asked.names()
    for task, samples in asked.samples.items():
        by_question: dict[Any, list[dict[str, Any]]] = {}
        for sample in samples:
            by_question.setdefault(sample["doc_id"], []).append(sample)
        for number, same in by_question.items():
            yield {"task": task, "document": number, **_asked(same[0]), **_said(same)} | {
                given: _plain(sample[metric])
                for (metric, kind), given in names.items()
                for sample in same
                if sample["filter"] == kind and metric in sample["metrics"]
            }


def _asked(sample: Mapping[str, Any]) -> dict[str, Any]:
    prompts = [arguments[0] for arguments in sample["arguments"]]
    same = len(set(prompts)) == 1
    found: dict[str, Any] = {"prompt": prompts[0]} if same else {"prompts": prompts}
    if all(len(arguments) > 1 and isinstance(arguments[1], str) for arguments in sample["arguments"]):
        found["choices"] = [arguments[1] for arguments in sample["arguments"]]
    return found | {"target": _plain(sample["target"])}


def _said(same: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The model's answer, or the log-likelihood of each choice."""
    first = [answers[0] for answers in same[0]["resps"]]
    if isinstance(first[0], str):
        found: dict[str, Any] = {"answer": first[0]}
        if len(same) > 1:
            found["filtered"] = {sample["filter"]: _plain(sample["filtered_resps"][0]) for sample in same}
        return found
    return {"loglikelihoods": [_plain(one[0] if isinstance(one, tuple | list) else one) for one in first]}


def _plain(value: Any) -> Any:
    """A value of lm-eval's as JSON data."""
    if isinstance(value, numpy.ndarray | numpy.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)
