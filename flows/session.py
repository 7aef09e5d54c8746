"""One run of a pipeline in this process: what is done, what failed, and who is told.

One decision: everything a run needs beside Prefect is here and works without it; the flow only asks `make` for
one step after the other, from threads.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from flows.boards import Boards
from flows.graph import Pipeline, gated
from flows.mlflow_tree import MlflowTree, Nested
from flows.model_events import tell_decided, tell_registered
from flows.run_records import RunRecord
from flows.server_locks import across_machines
from flows.view import View
from registry.errors import InputError
from registry.gates import condition
from registry.home import Home
from tasks.artifacts import Store
from tasks.digests import DigestMemory
from tasks.launch import ProgramFailed
from tasks.locks import Interrupted, check_stop
from tasks.measurements import read_results
from tasks.program import classify
from tasks.sharing import update
from tasks.steps import Outcome, Step, do
from tasks.tracking import Tracker

CONCURRENT_STEPS = 4  # light steps side by side; those that need a device wait for one (tasks.slots)
TRAINING_RESULTS = ("train_loss", "steps", "trained_tokens", "rewards/accuracies", "rewards/margins", "score", "kl")


class Session:
    """The state of one run.

    Args:
        pipeline: what to do.
        home: where.
        view: who is told.
        stop: set to end the run.
        nested: where it stands in MLflow, of a run that belongs to another.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        home: Home,
        view: View,
        stop: threading.Event | None = None,
        nested: Nested | None = None,
    ) -> None:
        self.pipeline, self.home, self.view = pipeline, home, view
        self.store, self.memory = Store(home, across_machines()), DigestMemory(home.digests)
        self._wanted = pipeline.results()
        self.stop = stop or threading.Event()
        self.outcomes: dict[str, Outcome] = {}
        self.failed: dict[str, BaseException] = {}
        self.by_title = {step.title: step for step in pipeline.steps}
        self.tracker = Tracker(home, view.say)
        self.tree = MlflowTree(pipeline, self.tracker, nested)
        self.record = RunRecord.start(home, pipeline.recipe.name)
        self.boards = Boards(pipeline, home, self.record.values["id"], view.say, self.tree.settings)
        self._write(self.record.update, measured=_measured_json(pipeline))
        self._lock = threading.Lock()
        self._light = threading.Semaphore(CONCURRENT_STEPS)
        self.gate: dict[str, Any] | None = None
        """What the recipe's gate came to, see `flows.promotion.promote`; None: there is none, or it was not decided."""

    def make(self, title: str, also: Callable[[Step, dict[str, Any]], None]) -> Outcome:
        """Do one step and tell everyone.

        Args:
            title: the step.
            also: gets the step's events too (Prefect's progress bar).

        Raises:
            Interrupted: the run was asked to stop before the step began.
            What the step raises; it is remembered first.
        """
        step = self.by_title[title]
        with nullcontext() if step.devices or step.cluster else self._light:
            check_stop(self.stop)
            return self._make(step, also)

    def _make(self, step: Step, also: Callable[[Step, dict[str, Any]], None]) -> Outcome:
        title = step.title

        def emit(event: dict[str, Any]) -> None:
            self.view.event(step, event)
            self.tree.event(step, event)
            self.boards.event(step, event)
            also(step, event)

        self.view.started(step)
        try:
            outcome = do(step, self.store, self.memory, self.stop, emit, title in self._wanted)
        except BaseException as error:
            if step.kind == "train":
                self.boards.ended(step.stage, False)
            with self._lock:
                self.failed[title] = error
            self.view.failed(step, error)
            raise
        if step.kind == "train":
            self.boards.ended(step.stage, True)
        with self._lock:
            self.failed.pop(title, None)
            self.outcomes[title] = outcome
            added = self.tree.ended(step, outcome)
            if added:
                update(self.store, self.store.annotate(outcome.artifact, **added))
            self._write(self.record.update, steps=self.steps_json())
        self.view.ended(step, outcome)
        return outcome

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Within the body, the run is stopped when the recipe's time for it is over."""
        minutes = self.pipeline.recipe.run.timeout_minutes
        if minutes is None:
            yield
            return
        timer = threading.Timer(minutes * 60, self._time_out, [minutes])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _time_out(self, minutes: float) -> None:
        if self.stop.is_set():
            return
        text = f"the run took more than its {minutes:g} minutes (timeout_minutes) and was stopped"
        self.failed["run"] = TimeoutError(f"{text}; what is finished and the last checkpoint are kept")
        self.stop.set()
        self.view.say(text)

    @property
    def timed_out(self) -> bool:
        """Whether it was stopped because its time was over."""
        return "run" in self.failed

    def status(self) -> str:
        """`completed`, `failed` or `cancelled`."""
        if len(self.outcomes) == len(self.pipeline.steps):
            return "completed"
        return "cancelled" if self.stop.is_set() and not self.timed_out else "failed"

    def errors(self) -> dict[str, BaseException]:
        """Step → what went wrong in it, interruptions aside; the first one first."""
        return {title: error for title, error in self.failed.items() if not isinstance(error, Interrupted)}

    def error_text(self) -> str | None:
        """What to tell the person, each cause once; a full disk is named with its cure, whoever ran into it."""
        where: dict[str, list[str]] = {}
        for title, error in self.errors().items():
            where.setdefault(_told(error), []).append(title)
        if len(where) == 1:
            return next(iter(where))
        return "\n".join(f"{', '.join(titles)}: {text}" for text, titles in where.items()) or None

    def not_run(self) -> dict[str, list[str]]:
        """Step that cannot run → the failed steps whose results it needs, directly or through others."""
        errors, causes = self.errors(), dict[str, list[str]]()
        for step in self.pipeline.steps:  # inputs come first
            needed = [wanted.source.title for wanted in step.inputs.values() if isinstance(wanted.source, Step)]
            found = {cause for title in needed for cause in ([title] if title in errors else causes.get(title, []))}
            if found and step.title not in self.outcomes and step.title not in self.failed:
                causes[step.title] = sorted(found)
        return causes

    def failures(self) -> list[str]:
        """For each step that failed one line that names it and the steps that did not run because of it."""
        waiting = self.not_run()
        lines = []
        for title in self.errors():
            if title not in self.by_title:  # of the run as a whole
                continue
            behind = [other for other, causes in waiting.items() if title in causes]
            lines.append(f"{title} failed" + (f"; not run because of it: {', '.join(behind)}" if behind else ""))
        return lines

    def steps_json(self) -> list[dict[str, Any]]:
        """The steps reached, as `run --json` gives them, and those that cannot be reached any more."""
        lines, waiting = [], self.not_run()
        empty = {"key": None, "digest": None, "artifact": None, "seconds": None, "resumed_from": None}
        for step in self.pipeline.steps:
            name, outcome = {"stage": step.stage, "step": step.name}, self.outcomes.get(step.title)
            if outcome:
                lines.append(outcome_json(step, outcome))
            elif step.title in self.failed:
                error = self.failed[step.title]
                told = {} if isinstance(error, Interrupted) else {"error": _told(error)}
                lines.append(name | {"state": "failed"} | empty | told)
            elif step.title in waiting:
                lines.append(name | {"state": "not_run"} | empty | {"because": waiting[step.title]})
        return lines

    def results(self) -> Results:
        """What is done so far came to."""
        return results_of(self.pipeline, {title: outcome.artifact for title, outcome in self.outcomes.items()})

    def finish(self) -> str:
        """Close the record and the MLflow tree; the status."""
        status = self.status()
        if status == "completed":
            self.failed.pop("run", None)  # its time was over when nothing was left to do
        self.boards.close()
        self.tree.end({"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}[status], self.results())
        ending: dict[str, Any] = {"steps": self.steps_json(), "results": self.results(), "error": self.error_text()}
        ending["mlflow_run_id"] = self.tracker.root
        if self.tracker.left_open:
            ending["left_open"] = True  # for the next run
        self._write(self.record.end, status=status, **ending)
        for version in self.tree.registered:
            tell_registered(version, self.record.values, self.home, self.view.say)
        if status == "completed":
            self._decide()
        return status

    def _decide(self) -> None:
        """Decide on the model, where the recipe has a gate; whatever comes of it, the run is done."""
        conditions = [condition(text) for text in self.pipeline.recipe.evaluation.gate]
        label = gated(self.pipeline)
        if not conditions or label is None:
            return
        from flows.comparison import find_side
        from flows.promotion import promote

        try:
            side = find_side(f"{self.record.values['id']}:{label}", self.home)
            self.gate = promote(side, conditions, self.home)
            self._write(self.record.update, gate=self.gate)
        except Exception as error:  # noqa: BLE001 - the registry may be another machine's, and the run is done
            self.view.say(f"the gate was not decided: {error}")
            return
        tell_decided(self.gate, self.home, self.view.say)

    def _write(self, change: Callable[..., None], **fields: Any) -> None:
        """Write the run record; a full disk leaves it as it was, and the next run closes it."""
        try:
            change(**fields)
        except OSError as error:
            self.view.say(f"the run record could not be written: {error}")


def _measured_json(pipeline: Pipeline) -> dict[str, Any]:
    """Who is measured, by which steps, on which data sets, and what the numbers are compared with."""
    return {
        label: {"before": each.before, "steps": {step.title: step.runtime["set_names"] for step in each.steps}}
        for label, each in pipeline.measured.items()
    }


def _told(error: BaseException) -> str:
    if isinstance(error, InputError | ProgramFailed):
        return str(error)
    kind, text = classify(error)
    return text if kind == "disk_full" else str(error)


def outcome_json(step: Step, outcome: Outcome) -> dict[str, Any]:
    """One finished step as `run --json` gives it."""
    return {
        "stage": step.stage,
        "step": step.name,
        "state": outcome.state,
        "key": outcome.artifact.key,
        "digest": outcome.artifact.digest,
        "artifact": str(outcome.artifact.path),
        "seconds": round(outcome.seconds, 3),
        "resumed_from": outcome.resumed_from,
    }


Results = dict[str, dict[str, dict[str, Any]]]
"""Stage → metric → `value`, and of what was measured on rows also `low` and `high` (95 %), `rows` and what else there
is."""


def results_of(pipeline: Pipeline, artifacts: dict[str, Any]) -> Results:
    """What finished artifacts, by step title, came to."""
    results: Results = {}
    for label, each in pipeline.measured.items():
        for step in each.steps:
            if step.title in artifacts:
                found = read_results(artifacts[step.title].path, step.runtime["set_names"])
                results.setdefault(label, {}).update(found)
    for name, stage_steps in pipeline.stages.items():
        artifact = artifacts.get(stage_steps.trained.title)
        if artifact:
            counts = artifact.manifest["counts"]
            wanted = {f"train.{key}": {"value": counts[key]} for key in TRAINING_RESULTS if key in counts}
            results.setdefault(name, {}).update(wanted)
    return results


@contextmanager
def holding_signals() -> Iterator[None]:
    """Within the body, SIGINT and SIGTERM wait for its end: a library makes something else of an interrupted import.

    In the main thread only; elsewhere the body runs without.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])


@contextmanager
def stopping(stop: threading.Event, say: Callable[[str], None]) -> Iterator[None]:
    """Within the body, SIGINT and SIGTERM ask the run to stop; a second one is obeyed at once.

    Handlers can be set in the main thread only; elsewhere the body runs without.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say(f"stopping after {signal.Signals(number).name}; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
