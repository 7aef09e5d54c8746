"""The pipeline flow: order, concurrency, retries and what Prefect's pages show.

One decision: one flow, one task per step, and the store is the only cache. A task whose artifact is there ends in a
Completed state named `Cached`, with Prefect's own result cache switched off: two caches would be two truths.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run, task_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.graph import build
from flows.pages import Pages, end_without_traceback, outlive_reader
from flows.planning import plan
from flows.prefect_pages import ProgressPage, plan_page, preview_page, results_page, samples_page, step_page
from flows.preflight import preflight, require_rows
from flows.reconcile import reconcile, tag_flow_run
from flows.runner import give_up_server, leave, server_is_gone
from flows.services import without_credentials
from flows.session import Session, stopping
from flows.submitting import BAD_INPUT_MARK
from flows.view import LogView
from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from registry.recipe import Recipe
from tasks.launch import ProgramFailed
from tasks.locks import Interrupted
from tasks.steps import Step

SESSION: ContextVar[Session | None] = ContextVar("llamatuner_session", default=None)
PAGES: ContextVar[Pages] = ContextVar("llamatuner_pages")
NO_SERVER = "Prefect's server died, and no step begins without one. What was finished is kept."
RETRY_SECONDS = (1.0, 10.0)  # before the second and the third attempt; waited for here, where a stop request is heard
THREADS = sys.maxsize  # one per step: Prefect lets a task wait for its inputs in a thread of the pool


def _worth_retrying(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Again only for what can go better: a killed program, a lost port. Never for bad input, NaN or a full disk."""
    try:
        state.result()
    except ProgramFailed as error:
        return error.retried
    except BaseException:  # noqa: BLE001 - any other failure is final
        return False
    return False


@task(
    task_run_name="{title}",
    retries=len(RETRY_SECONDS),
    retry_condition_fn=_worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def make_step(title: str) -> State[Any]:
    """Do one step of the current session."""
    session = SESSION.get()
    if session is None:
        raise RuntimeError("make_step runs inside the pipeline flow only")
    logger, pages = get_run_logger(), PAGES.get()
    progress = ProgressPage(title, flow_run.get_id())

    def on_event(step: Step, event: dict[str, Any]) -> None:
        if event["kind"] == "note":
            logger.info("%s: %s", title, event["text"])
        if event["kind"] == "samples":
            pages.write(samples_page, title, event)
        if progress.wanted(event):
            pages.write(progress.show, event)

    attempt = task_run.run_count
    if attempt > 1:
        session.view.say(f"{title}: attempt {attempt} of {len(RETRY_SECONDS) + 1}")
        logger.info("attempt %d", attempt)
        session.stop.wait(RETRY_SECONDS[attempt - 2])
    try:
        outcome = session.make(title, on_event)
    except Interrupted:
        return Cancelled(message="The run was asked to stop; what is finished is kept.")
    artifact = outcome.artifact
    if artifact.here:
        pages.write(step_page, session.by_title[title], artifact)
    reference = {"artifact": f"{artifact.step}/{artifact.path.name}", "key": artifact.key, "digest": artifact.digest}
    if outcome.state == "cached":
        return Completed(name="Cached", message=f"{reference['artifact']} is there", data=reference)
    return Completed(message=f"made {reference['artifact']}", data=reference)


def _run_name() -> str:
    """The recipe's name."""
    given = flow_run.get_parameters()
    recipe = given["recipe"] or given["settings"]
    return str(recipe.get("name") or "recipe") if isinstance(recipe, dict) else Path(recipe).stem


@flow(
    name="pipeline",
    flow_run_name=_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=THREADS),  # type: ignore[arg-type]
    validate_parameters=True,
    persist_result=False,
)
def pipeline(
    recipe: str | dict[str, Any] = "",
    settings: dict[str, Any] = {},  # noqa: B006 - never changed, and `or None` would be a second choice in Prefect's form
    overrides: list[str] = [],  # noqa: B006
    data_only: bool = False,
) -> State[Any]:
    """Do what a recipe says and is not done yet.

    Args:
        recipe: Name of a shipped recipe, path of a recipe's file on the machine that runs it, or the recipe itself.
        settings: Settings in place of the recipe's, in its own form; without a recipe they are one.
        overrides: Settings in place of the recipe's, each as KEY=VALUE: stages.sft.learning_rate=1e-4; KEY= takes
            one out of the recipe.
        data_only: Stop after the data steps: fetch, render, tokenize.
    """
    session = SESSION.get()
    by_prefect = session is None
    if session is None:  # a deployment or its UI
        logger = get_run_logger()
        try:
            session = _open(load_recipe(recipe or None, overrides, settings), data_only, logger.info)
        except InputError as error:
            logger.error(str(error))
            return Failed(message=f"{BAD_INPUT_MARK}{error}")
        SESSION.set(session)
        tag_flow_run(session.record, str(flow_run.get_id()))
        outlive_reader()
        end_without_traceback()
    pages = Pages(session.view.say)
    PAGES.set(pages)
    with stopping(session.stop, session.view.say):
        try:
            with session.timed():
                _run(session)
        finally:
            gone = server_is_gone(str(PREFECT_API_URL.value() or ""), session.stop)
            if gone:
                give_up_server(session.record, session.view.say)
                if len(session.outcomes) < len(session.pipeline.steps):
                    session.failed.setdefault("prefect", ConnectionError(NO_SERVER))
            status = session.finish()
            session.view.close()
            if by_prefect:
                leave(0 if status == "completed" else 1)
        if not gone:
            pages.write(results_page, session)
        pages.finish()
    if status == "completed":
        made = sum(outcome.state == "ran" for outcome in session.outcomes.values())
        return Completed(message=f"{made} steps made, {len(session.outcomes) - made} cached")
    if status == "cancelled":
        return Cancelled(message="stopped; finished steps and checkpoints are kept")
    return Failed(message="\n".join([str(session.error_text()), *session.failures()]))


def _open(recipe: Recipe, data_only: bool, write: Any) -> Session:
    home = Home.open()
    built = build(recipe, home)
    built = built.data_only() if data_only else built
    lines = plan(built, _store(home))
    view = LogView(write, notes=False)  # the tasks log them
    for note in preflight(built, lines, home):
        view.say(note)
    require_rows(lines)
    return Session(built, home, view)


def _store(home: Home) -> Any:
    from tasks.artifacts import Store

    return Store(home)


def _run(session: Session) -> None:
    """Submit every step; each begins as soon as its inputs are there."""
    session.record.update(
        flow_run_id=str(flow_run.get_id()), prefect_api=without_credentials(str(PREFECT_API_URL.value()))
    )
    reconcile(session.home, session.view.say)
    PAGES.get().write(plan_page, plan(session.pipeline, session.store))
    session.tree.begin(session.record.values["id"])
    session.record.update(mlflow_run_id=session.tracker.root)
    futures: dict[str, Any] = {}
    for step in session.pipeline.steps:
        needed = [wanted.source for wanted in step.inputs.values() if isinstance(wanted.source, Step)]
        futures[step.title] = make_step.submit(
            step.title, return_state=False, wait_for=[futures[source.title] for source in needed]
        )
    for future in futures.values():
        future.wait()
    for stage in session.pipeline.stages.values():
        rendered = session.outcomes.get(stage.rendered.title)
        if rendered and rendered.artifact.here:
            PAGES.get().write(preview_page, stage, rendered.artifact)
