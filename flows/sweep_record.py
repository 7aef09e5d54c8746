"""A sweep where teams look: a run of MLflow above those of its trials, and a table on Prefect's pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from flows.run_records import RunRecord
from flows.sweep_plan import SweepPlan
from flows.sweep_results import SweepResults, as_json
from flows.sweep_study import Study
from flows.sweeping import SWEEP_TAG, number_text, short_names, short_value
from registry.home import Home
from tasks.tracking import RUN_TAG, Tracker

PARENT = "mlflow_run_id"


class SweepRun:
    """The sweep's run in MLflow: opened again by every command that goes on with the sweep.

    Args:
        home: whose MLflow it is, where no other is named.
        say: told when tracking does not work.
    """

    def __init__(self, home: Home, say: Callable[[str], None]) -> None:
        self._tracker = Tracker(home, say)

    def begin(self, plan: SweepPlan, study: Study, record: RunRecord) -> str | None:
        """Open it; its id, None where tracking does not work."""
        known = study.kept(PARENT)
        tags = {RUN_TAG: record.values["id"], SWEEP_TAG: plan.name}  # so that a dead sweep's run is ended by the next
        if known is None or not self._tracker.go_on(known, tags):
            self._tracker.start(f"sweep {plan.name}", tags, plan.raw)
            settings = plan.sweep.settings.model_dump(mode="json", exclude_none=True)
            self._tracker.dictionary(self._tracker.run_id, settings, "sweep.yaml")
            params = {key: value for key, value in settings.items() if key != "parameters"}
            self._tracker.params(self._tracker.run_id, params | {"direction": plan.target.direction})
            study.keep(**{PARENT: self._tracker.root})
        return self._tracker.root

    def end(self, plan: SweepPlan, results: SweepResults, pictures: Mapping[str, bytes], status: str) -> None:
        """Keep what it came to, and close it as FINISHED, FAILED or KILLED."""
        run_id = self._tracker.run_id
        self._tracker.dictionary(run_id, as_json(plan, results), "sweep.json")
        for name, content in pictures.items():
            self._tracker.content(run_id, lambda content=content: content, name)  # type: ignore[misc]
        if results.best is not None and results.best.value is not None:
            self._tracker.results(run_id, {plan.target.metric: results.best.value})
            self._tracker.tags(run_id, {"llamatuner.best_trial": str(results.best.number)})
        self._tracker.close_all(status)


def sweep_page(plan: SweepPlan, results: SweepResults) -> None:
    """The trials as a table on Prefect's pages; inside `flows.prefect_server.prefect_api` only.

    By the client: what Prefect has for flows warns outside one, and sends events that nobody waits for here.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactCreate

    names = short_names(list(plan.sweep.space))
    rows = []
    for trial in results.trials:
        own: dict[str, Any] = {"trial": trial.number}
        own |= {names[key]: short_value(value) for key, value in trial.values.items()}
        number = number_text({"value": trial.value, **trial.outcome}) if trial.value is not None else ""
        rows.append(own | {plan.target.metric: number, "state": trial.state, "run": trial.outcome.get("run", "")})
    best = f"; trial {results.best.number} is the best" if results.best else ""
    key = re.sub(r"[^a-z0-9]+", "-", f"sweep-{plan.name}".lower()).strip("-")
    with get_client(sync_client=True) as client:
        client.create_artifact(
            ArtifactCreate(key=key, type="table", data=json.dumps(rows), description=f"Sweep {plan.name}{best}")
        )
