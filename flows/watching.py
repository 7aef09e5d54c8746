"""The flow `watch`: start a run of a recipe when its data are not those of the runs before.

One decision: the plan knows. A data step that is to do has other rows, or reads them differently, than any run before;
a repository on the hub, which the plan leaves as it was downloaded, is asked for its commit first. Whatever else is to
do, such as a training that failed, is no reason: it would be started again and again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.graph import DATA_STEPS, build
from flows.planning import plan
from flows.servers import live_runs
from flows.submitting import BAD_INPUT_MARK, order, start
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from tasks.artifacts import Artifact, Store, remove_folder
from tasks.download import SOURCE
from tasks.hub import hub_endpoint
from tasks.locks import try_lock
from tasks.sharing import brought, withdraw

ACTIVE = ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED"]
LONGEST_TAG = 120  # characters
ASK_SECONDS = 30.0


def _run_name() -> str:
    return Path(flow_run.get_parameters()["recipe"]).stem


@flow(name="watch", flow_run_name=_run_name, validate_parameters=True, persist_result=False)
def watch(recipe: str, overrides: list[str] = []) -> State[Any]:  # noqa: B006 - never changed
    """Start a run of a recipe when its data have changed.

    Args:
        recipe: Name of a shipped recipe, or path of a recipe's file on the machine that runs it.
        overrides: Settings in place of the recipe's, each as KEY=VALUE.
    """
    logger, home = get_run_logger(), Home.open()
    try:
        wanted = order(recipe, overrides)
        why = changed_data(recipe, overrides, home)
        if why is None:
            return Completed(message="The data are those of the last run.")
        logger.info("the data have changed: %s", why)
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(wanted.deployment)
            other = _active(client, deployment.id, wanted.parameters["recipe"])
            if other is not None:
                return Completed(message=f"{why}; run {other} is waiting or going on, and nothing was started.")
            run = start(client, wanted, home, [f"data changed: {why}"[:LONGEST_TAG]])
    except InputError as error:
        return Failed(message=f"{BAD_INPUT_MARK}{error}")
    return Completed(message=f"{why}; started run {run.id}.")


def changed_data(recipe: str, overrides: list[str], home: Home) -> str | None:
    """Why the data of a recipe have to be prepared, as the plan says it; None: they are there.

    Raises:
        InputError: the recipe is not valid.
        HfHubHTTPError, OSError: the hub cannot be asked.
    """
    store, pipeline = Store(home), build(load_recipe(recipe, overrides), home)
    lines = [line for line in plan(pipeline, store) if line.step.kind == "download" and line.key]
    # one that another machine made may be of a commit that is not the newest any more either
    downloads = [(line.step.identity, brought(store, line.step.kind, str(line.key))) for line in lines]
    moved = [_forget_if_moved(asked, artifact, store) for asked, artifact in downloads if artifact is not None]
    if any(moved):
        return "; ".join(filter(None, moved))
    kinds = [kind for kind in DATA_STEPS if kind != "model"]
    for line in plan(pipeline, store):
        if line.step.kind in kinds and line.state in ("run", "resume"):
            return f"{line.step.title}: {'; '.join(line.why)}"
    return None


def _forget_if_moved(asked: dict[str, Any], artifact: Artifact, store: Store) -> str | None:
    """Remove a download whose branch on the Hugging Face hub has moved on, so that it is downloaded anew; not while a
    run may read it. What is named by URL or on ModelScope is left as it is. Says what was removed, and why."""
    known = json.loads((artifact.path / SOURCE).read_text(encoding="utf-8")).get("commit")
    if asked["kind"] != "hub" or known is None or live_runs(store.home):
        return None
    from huggingface_hub import HfApi

    found = HfApi(endpoint=hub_endpoint()).repo_info(
        asked["address"], revision=asked["revision"] or "main", repo_type="dataset", timeout=ASK_SECONDS
    )
    with try_lock(store.lock_path(artifact.key)) as free:
        if found.sha == known or not free:
            return None
        withdraw(store, artifact)
        remove_folder(artifact.path)
    return f"{asked['address']} went from commit {known[:8]} to {str(found.sha)[:8]}"


def _active(client: Any, deployment: UUID, recipe: str) -> str | None:
    """The name of a run of the recipe that has not ended."""
    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ACTIVE}}}),
        deployment_filter=DeploymentFilter.model_validate({"id": {"any_": [deployment]}}),
    )
    # what only a schedule has put down comes at its time, which may be next week
    begun = [run for run in runs if not (run.auto_scheduled and run.state and run.state.is_scheduled())]
    return next((run.name for run in begun if run.parameters.get("recipe") == recipe), None)
