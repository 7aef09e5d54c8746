"""Deployments: what Prefect starts by schedule, from its pages, or for `submit`.

One decision: each shipped recipe is a deployment of its own name, and `pipeline` takes any recipe. All are the one flow
of `flows.pipeline`, named by its module: a worker needs this package installed, and no checkout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flows.services import POOL, prefect_environment
from registry.core import read_text
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from registry.loading import find_recipe
from registry.recipes import RECIPES
from registry.run_form import recipe_form, stage_form
from tasks.servers import PREFECT, WORKER, address, read_servers
from tasks.versions import package_version

ANY = "pipeline"  # the deployment that takes any recipe; also the name of the flow
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
    return [*RECIPES, ANY]


def require_names(names: Sequence[str]) -> None:
    """Refuse what is not the name of a deployment.

    Raises:
        InputError: for all of them at once.
    """
    cure = f"`llamatuner submit {{}}` runs any recipe through the deployment `{ANY}`."
    problems = []
    for name in names:
        if name not in known_names():
            known = did_you_mean(name, known_names())
            is_path = "/" in name or "." in name
            problems.append(
                Problem(name, "no shipped recipe of that name to deploy", cure.format(name) if is_path else known)
            )
    if problems:
        raise InputError(problems)


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


def register(names: Sequence[str], schedule: Any = None) -> list[dict[str, Any]]:
    """Write deployments to the server that Prefect is pointed to; one that is there is brought up to date.

    Args:
        names: of deployments.
        schedule: of the one, in place of any it has; None leaves schedules as they are.

    Returns:
        Of each its `name`, `id` and `schedules`.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        return [_register(client, name, schedule) for name in names]


def _register(client: Any, name: str, schedule: Any) -> dict[str, Any]:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import EntrypointType, RunnerDeployment
    from prefect.exceptions import ObjectNotFound
    from prefect.schedules import Schedule

    from flows.pipeline import pipeline

    try:
        before = client.read_deployment_by_name(f"{ANY}/{name}").schedules
    except ObjectNotFound:
        before = []
    kept = [
        DeploymentScheduleCreate(schedule=each.schedule, active=each.active, parameters=each.parameters, slug=each.slug)
        for each in before
    ]
    wanted = [Schedule(cron=schedule.cron, timezone=schedule.timezone)] if schedule else kept
    deployment = RunnerDeployment.from_flow(
        pipeline,
        name,
        schedules=wanted,  # a deployment that is there loses those that are not given again
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
        parameters={} if name == ANY else {"recipe": name},
        description=description_of(name),
        tags=["llamatuner"],
        version=package_version("llamatuner"),
        work_pool_name=POOL,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    fields = deployment._parameter_openapi_schema.properties
    fields.update(_form(name, fields))
    made = deployment.apply()
    found = client.read_deployment(made)
    schedules = [_schedule_json(each) for each in found.schedules]
    return {"name": f"{ANY}/{name}", "id": str(made), "schedules": schedules}


def _form(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that make Prefect's run form that of the recipe: typed, and checked by the server before a run starts."""
    settings = stage_form() if name == ANY else recipe_form(name)
    form = {"settings": fields["settings"] | settings | {"title": "settings"}}
    if name != ANY:  # the settings are those of one recipe
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
