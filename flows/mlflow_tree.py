"""What of a pipeline goes where in MLflow: pipeline run → stage run → evaluation run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.graph import Pipeline, StageSteps
from flows.measuring import Measured
from tasks.evaluation import reward_pictures
from tasks.jsonlines import read_json_lines
from tasks.measurements import KINDS, read_results
from tasks.number_picture import draw_results
from tasks.statistics import STATISTICS, statistics_picture
from tasks.steps import Outcome, Step
from tasks.tracking import RUN_TAG, Tracker
from tasks.training_estimate import MEASURED

KEY_TAG = "llamatuner.key"
NO_CURVE = ("step", "tokens", "trained_tokens", *MEASURED)  # of a step's line
SAMPLES = "samples.json"
COMPUTED_TAG = "llamatuner.computed_by"


@dataclass(frozen=True)
class Nested:
    """Where the run of a pipeline stands that belongs to another run."""

    parent: str | None
    """Id of that run in MLflow; None when tracking does not work."""
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    """In which it differs from the others."""


class MlflowTree:
    """Turns what happens in a run into MLflow's terms.

    Args:
        pipeline: the steps.
        tracker: the connection.
        nested: where it stands; None: by itself.
    """

    def __init__(self, pipeline: Pipeline, tracker: Tracker, nested: Nested | None = None) -> None:
        self._pipeline, self._tracker, self._nested = pipeline, tracker, nested
        self.stage_runs: dict[str, str | None] = {}
        self._tags: dict[str, str] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self.registered: list[str] = []
        """Versions of models that this run made, as `name/version`."""

    def begin(self, record_id: str) -> None:
        """Open the pipeline run, named like its record or as it is nested, and one run per stage, with settings."""
        recipe, nested = self._pipeline.recipe, self._nested
        self._tags = {RUN_TAG: record_id}
        own = self._tags | {"llamatuner.recipe": recipe.name} | dict(nested.tags if nested else {})
        self._tracker.start(nested.name if nested else record_id, own, recipe.raw, nested.parent if nested else None)
        self._tracker.params(self._tracker.run_id, nested.params if nested else {})
        for name, stage in self._pipeline.stages.items():
            run_id = self._tracker.open(name, self._tracker.run_id, self._tags)
            self.stage_runs[name] = run_id
            params = self.settings(stage)
            self._tracker.params(run_id, params)
            # on the run of the whole as well: there MLflow's own page compares two runs
            self._tracker.params(self._tracker.run_id, {f"{name}/{key}": value for key, value in params.items()})

    @staticmethod
    def settings(stage: StageSteps) -> dict[str, Any]:
        """What people compare of a stage: model, data and training."""
        settings = stage.settings
        data = settings.data.model_dump(include={"cutoff_len", "packing", "template", "overlong", "mask_history"})
        return settings.train.identity() | data | settings.model.model_dump(exclude_none=True)

    def event(self, step: Step, event: dict[str, Any]) -> None:
        """Metrics of training, one point per optimizer step, and answers that were drawn."""
        if event["kind"] == "metrics" and step.kind == "train":
            values = {k: v for k, v in event["values"].items() if isinstance(v, int | float)}
            self._tracker.metrics(self.stage_runs.get(step.stage), values, event["step"])
        if event["kind"] == "samples":
            rows = self._samples.setdefault(step.stage, [])
            rows += event["rows"]
            self._tracker.table(self.stage_runs.get(step.stage), rows, SAMPLES)

    def ended(self, step: Step, outcome: Outcome) -> dict[str, Any]:
        """A step is done: log what it made. Returns fields to add to the artifact's manifest."""
        self._outcomes[step.title] = outcome
        stage = self._pipeline.stages.get(step.stage)
        run_id = self.stage_runs.get(step.stage)
        if step.kind in KINDS:
            return self._measured(step, outcome)
        if stage is None:
            return {}
        if step is stage.tokenized or step in stage.held_out.sets.values():
            self._data(stage, step, outcome)
        if step is stage.trained:
            self._trained(run_id, outcome)
        if step is stage.model:
            self._model(step, run_id, outcome)
        return self._computed_by(run_id, outcome)

    def _computed_by(self, run_id: str | None, outcome: Outcome) -> dict[str, Any]:
        """For the manifest: the run in which it was made."""
        known = self._tracker.known_id(run_id)
        return {"mlflow_run_id": known} if known and outcome.state == "ran" else {}

    def _data(self, stage: StageSteps, step: Step, outcome: Outcome) -> None:
        held_out = step is not stage.tokenized
        context = "evaluation" if held_out else "training"
        names = {v.title: k for k, v in stage.held_out.sets.items()}
        name = names[step.title] if held_out else ", ".join(s.name for s in stage.settings.sources)
        source = json.dumps({"files": step.runtime["files"], "artifact": f"tokenize/{outcome.artifact.path.name}"})
        run_id, artifact = self.stage_runs[step.stage], outcome.artifact
        self._tracker.inputs(run_id, {name: (source, artifact.digest)}, context)
        if not artifact.here:  # the run that made it has kept the pictures
            return
        folder = f"tokenize/{_file_name(list(names).index(step.title), name)}" if held_out else "tokenize"
        self._tracker.file(run_id, artifact.path / STATISTICS, folder)
        self._tracker.content(run_id, lambda: statistics_picture(step, artifact), f"{folder}/statistics.png")

    def _trained(self, run_id: str | None, outcome: Outcome) -> None:
        artifact = outcome.artifact
        self._tracker.results(run_id, {f"train.{k}": v for k, v in _numbers(artifact.manifest["counts"]).items()})
        if outcome.state == "cached":
            self._history(run_id, outcome)
            self._link(run_id, outcome)
        self._tracker.tags(run_id, {KEY_TAG: artifact.key})
        for file in ("report/loss.png", "report/scores.png", "report/metrics.jsonl", "manifest.json"):
            self._tracker.file(run_id, artifact.path / file, "train")
        samples = artifact.path / "report" / "samples.jsonl"
        if samples.is_file():  # those of earlier attempts, or of the run that computed it, as well
            self._tracker.table(run_id, read_json_lines(samples), SAMPLES)

    def _history(self, run_id: str | None, outcome: Outcome) -> None:
        """A cached training shows its curve in the new tree as well."""
        path = outcome.artifact.path / "report" / "metrics.jsonl"
        for point in read_json_lines(path) if path.exists() else []:
            values = {k: v for k, v in _numbers(point).items() if k not in NO_CURVE}
            self._tracker.metrics(run_id, values, point["step"])

    def _link(self, run_id: str | None, outcome: Outcome) -> None:
        known = outcome.artifact.manifest.get("mlflow_run_id")  # none where MLflow could not be reached
        self._tracker.tags(run_id, {COMPUTED_TAG: known} if known else {})

    def _model(self, step: Step, run_id: str | None, outcome: Outcome) -> None:
        name = f"{self._pipeline.recipe.name}-{step.stage}"
        registered = self._tracker.register(run_id, name, outcome.artifact, {"stage": step.stage})
        self._tracker.file(run_id, outcome.artifact.path / "manifest.json", "model")
        if registered and outcome.state == "ran":
            self.registered.append(registered)

    def _measured(self, step: Step, outcome: Outcome) -> dict[str, Any]:
        """A run for every measurement, below that of its stage, which has the numbers as well."""
        label = next(label for label, each in self._pipeline.measured.items() if step in each.steps)
        measured = self.stage_runs.get(label)
        name = f"{label} evaluation" if step.kind == "evaluate" else f"{label} {step.name}"
        run_id = self._tracker.open(name, measured or self._tracker.run_id, self._tags)
        results = read_results(outcome.artifact.path, step.runtime["set_names"])
        values = {name: result["value"] for name, result in results.items()}
        ends = {f"{name}.{end}": each[end] for name, each in results.items() for end in ("low", "high") if end in each}
        self._tracker.results(run_id, values | ends)
        if measured:
            self._tracker.results(measured, values)
        if outcome.state == "cached":
            self._link(run_id, outcome)
        for file in ("results.json", "answers.jsonl", "rewards.jsonl", "samples.jsonl", "manifest.json"):
            self._tracker.file(run_id, outcome.artifact.path / file)
        pictures = reward_pictures(outcome.artifact.path, step.runtime["set_names"])
        for number, (name, path) in enumerate(pictures.items()):
            self._tracker.content(run_id, path.read_bytes, f"rewards/{_file_name(number, name)}.png")
        self._tracker.close(run_id, "FINISHED")
        return self._computed_by(run_id, outcome)

    def end(self, status: str, results: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Close the tree as FINISHED, FAILED or KILLED; the pipeline run shows every stage's results.

        A stage that is done is FINISHED, however the others ended.
        """
        flat = {
            f"{stage}/{name}": found["value"] for stage, values in results.items() for name, found in values.items()
        }
        self._tracker.results(self._tracker.run_id, flat)
        picture = draw_results(results)
        if picture is not None:
            self._tracker.content(self._tracker.run_id, lambda: picture, "results.png")
        for name, stage in self._pipeline.stages.items():
            measured = self._pipeline.measured.get(name, Measured(())).steps
            if all(step.title in self._outcomes for step in (stage.model, *measured)):
                self._tracker.close(self.stage_runs.get(name), "FINISHED")
        self._tracker.close_all(status)


def _file_name(number: int, name: str) -> str:
    """A data set's name, which may be a path; the number keeps two apart that are the same without odd characters."""
    return f"{number}-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}"


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
