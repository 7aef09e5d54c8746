"""Deployments: what Prefect starts by schedule, from its pages, or for `submit`.

One decision: each shipped recipe, and each of one's own that is deployed by its path, is a deployment of its own name,
and `pipeline` takes any recipe. All are the one flow of `flows.pipeline`, named by its module: a worker needs this
package installed, and no checkout. Beside them there is `promote`, which a person starts, and a `watch` for each recipe
whose data are watched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from flows.services import HEARTBEAT, HEARTBEAT_SECONDS, POOL, prefect_environment
from registry.core import read_text
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from registry.loading import find_recipe, load_recipe
from registry.recipes import RECIPES
from registry.run_form import recipe_form, stage_form
from tasks.servers import PREFECT, WORKER, address, read_servers
from tasks.versions import package_version

ANY = "pipeline"  # the deployment that takes any recipe; also the name of the flow
PROMOTE, WATCH = "promote", "watch"  # flows; the first is its own deployment's name too
FLOWS = (ANY, PROMOTE, WATCH)
WATCH_CRON = "0 * * * *"  # when data are watched and nobody says how often
ANY_DESCRIPTION = "Do what a recipe says and is not done yet: any recipe, by name, by path, or written out."


@contextmanager
def shared_api(home: Home) -> Iterator[str]:
    """Point Prefect to the server that deployments live on, within the body; import prefect only there.

    Yields:
        Its address.

    Raises:
        InputError: there is none.
    """
    url = os.environ.get("PREFECT_API_URL") or address(home, PREFECT)
    if not url:
        cure = "Start one with `llamatuner up`, or set PREFECT_API_URL."
        raise InputError(Problem("PREFECT_API_URL", "no Prefect server runs here, and none is set", cure))
    before = dict(os.environ)
    os.environ |= {} if "PREFECT_API_URL" in before else prefect_environment(home)
    os.environ["PREFECT_API_URL"] = url
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    try:
        yield url
    finally:
        os.environ.clear()
        os.environ.update(before)


def known_names() -> list[str]:
    """The names of all deployments."""
    return [*RECIPES, ANY, PROMOTE]


def require_names(names: Sequence[str]) -> None:
    """Refuse what is neither the name of a deployment nor a recipe of one's own, by its path.

    Raises:
        InputError: for all of them at once.
    """
    problems = []
    for name in names:
        if name in known_names():
            continue
        if not is_path(name):
            known = did_you_mean(name, known_names())
            problems.append(Problem(name, "no shipped recipe of that name to deploy", known))
            continue
        try:
            called = load_recipe(name).name
        except InputError as error:
            problems += error.problems
            continue
        if called in known_names():
            rule = f"the recipe is named {called}, as one that ships"
            problems.append(Problem(name, rule, "Give it another `name`: a deployment is found by it."))
    if problems:
        raise InputError(problems)


def is_path(name: str) -> bool:
    """Whether a recipe of one's own is meant."""
    return "/" in name or "." in name


def schedule_of(cron: str, timezone: str | None) -> Any:
    """Prefect's schedule.

    Args:
        cron: minute, hour, day of month, month, day of week.
        timezone: in which they are read; UTC when not given.

    Raises:
        InputError: either is not one.
    """
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    problems = []
    try:
        ZoneInfo(timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        problems.append(Problem("--timezone", f"{timezone!r} is no time zone", "Such as Europe/Berlin."))
    try:
        schedule = CronSchedule(cron=cron)
    except ValidationError:
        fields = "Five fields: minute, hour, day of month, month, day of week; '0 3 * * *' is each night at 3."
        problems.append(Problem("--cron", f"{cron!r} is no schedule", fields))
    if problems:
        raise InputError(problems)
    return schedule.model_copy(update={"timezone": timezone or "UTC"})


def description_of(name: str) -> str:
    """What a deployment does: of a recipe, the comment its file begins with."""
    if name == ANY:
        return ANY_DESCRIPTION
    lines = []
    for line in read_text(find_recipe(name)).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def register(
    names: Sequence[str], schedule: Any = None, watched: bool = False, notify: str | None = None
) -> list[dict[str, Any]]:
    """Write deployments and automations to the server that Prefect is pointed to; what is there is brought up to date.

    Args:
        names: of deployments; with `watched` recipes, by name or path.
        schedule: of the one, in place of any it has; None leaves schedules as they are.
        watched: start runs of the recipes when their data change; the schedule is when to look.
        notify: block that is told of what goes wrong and of promotions, see `flows.automations.notifications`.

    Returns:
        Of each its `name`, `id` and `schedules`.

    Raises:
        InputError: a recipe that is not valid, a block that is not there.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    from flows.automations import dead_runs, install, measuring, notifications

    with get_client(sync_client=True) as client:
        told = notifications(client, notify, FLOWS) if notify else []
        watches = [_watch(name) for name in names] if watched else []
        try:
            client.read_work_pool(POOL)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        deployed = [ANY if watched and name not in known_names() else name for name in names]
        made = [_register(client, name, None if watched else schedule) for name in dict.fromkeys(deployed)]
        made += [_apply(client, *watch, schedule, schedule_of(WATCH_CRON, None)) for watch in watches]
        measured = [measuring(UUID(each["id"])) for each in made if each["name"] == f"{ANY}/{ANY}"]
        install(client, [dead_runs(FLOWS, heartbeat_seconds()), *measured, *told])
    return made


def heartbeat_seconds() -> int:
    """Seconds between two signs of life of a run."""
    return int(os.environ.get(HEARTBEAT, HEARTBEAT_SECONDS))


def _register(client: Any, name: str, schedule: Any) -> dict[str, Any]:
    if name == PROMOTE:
        from flows.promoting import promote_model

        return _apply(client, promote_model, name, {}, str(promote_model.description), schedule)
    from flows.pipeline import pipeline

    parameters = {} if name == ANY else {"recipe": str(find_recipe(name).absolute()) if is_path(name) else name}
    called = load_recipe(name).name if is_path(name) else name
    return _apply(client, pipeline, called, parameters, description_of(name), schedule)


def _watch(recipe: str) -> tuple[Any, str, dict[str, Any], str]:
    """The deployment that watches the data of a recipe: flow, name, parameters, description.

    Raises:
        InputError: it is not valid.
    """
    from flows.submitting import order
    from flows.watching import watch

    given = order(recipe, []).parameters["recipe"]
    about = f"Start a run of {recipe} when its data are others than those of its last run."
    return watch, load_recipe(recipe).name, {"recipe": given}, about


def _apply(
    client: Any, flow: Any, name: str, parameters: dict[str, Any], about: str, schedule: Any, usual: Any = None
) -> dict[str, Any]:
    """Write one deployment.

    Args:
        client: of the server.
        flow, name, parameters, about: of the deployment.
        schedule: in place of those it has.
        usual: when there is none, neither here nor there.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import EntrypointType, RunnerDeployment
    from prefect.exceptions import ObjectNotFound
    from prefect.schedules import Schedule

    try:
        before = client.read_deployment_by_name(f"{flow.name}/{name}").schedules
    except ObjectNotFound:
        before = []
    kept = [
        DeploymentScheduleCreate(schedule=each.schedule, active=each.active, parameters=each.parameters, slug=each.slug)
        for each in before
    ]
    chosen = schedule or (None if kept else usual)
    wanted = [Schedule(cron=chosen.cron, timezone=chosen.timezone)] if chosen else kept
    deployment = RunnerDeployment.from_flow(
        flow,
        name,
        schedules=wanted,  # a deployment that is there loses those that are not given again
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        parameters=parameters,
        description=about,
        tags=["llamatuner"],
        version=package_version("llamatuner"),
        work_pool_name=POOL,
        job_variables={"env": {HEARTBEAT: str(heartbeat_seconds())}},  # what the automation for dead runs waits for
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    if flow.name == ANY:
        fields = deployment._parameter_openapi_schema.properties
        fields.update(_form(parameters.get("recipe"), fields))
    found = client.read_deployment(deployment.apply())
    schedules = [_schedule_json(each) for each in found.schedules]
    return {"name": f"{flow.name}/{name}", "id": str(found.id), "schedules": schedules}


def _form(name: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that make Prefect's run form that of the recipe: typed, and checked by the server before a run starts.

    Args:
        name: of the recipe, or its path; None: any.
        fields: of the form as the flow's function has them.
    """
    settings = recipe_form(name) if name else stage_form()
    form = {"settings": fields["settings"] | settings | {"title": "settings"}}
    if name:  # the settings are those of one recipe
        recipe = {key: value for key, value in fields["recipe"].items() if key != "anyOf"}
        form["recipe"] = recipe | {"type": "string", "enum": [name], "default": name}
    return form


def _schedule_json(each: Any) -> dict[str, Any]:
    shown = each.schedule.model_dump(mode="json", exclude_none=True)
    return {"active": each.active} | {
        key: shown[key] for key in ("cron", "interval", "rrule", "timezone") if key in shown
    }


def require_worker(client: Any, home: Home) -> None:
    """Refuse to queue a run that nobody will do.

    Raises:
        InputError: no worker of the pool is alive, or the pool is not there.
    """
    from prefect.exceptions import ObjectNotFound

    from flows.services import worker_name

    try:
        online = {each.name for each in client.read_workers_for_work_pool(POOL) if each.status == "ONLINE"}
    except ObjectNotFound:
        online = set()
    ours = read_servers(home).get(WORKER)
    if ours is not None and not ours.alive():
        online -= {worker_name()}  # Prefect takes a while to notice
    if not online:
        cure = f"Start one with `llamatuner up`, or with `prefect worker start --pool {POOL} --type process`."
        raise InputError(Problem(f"work pool {POOL}", "no worker is alive that would do the run", cure))
