"""`deploy` and `submit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flows.cli.output import BAD_INPUT, DONE, FAILED, INTERRUPTED, people, print_json, say_error
from flows.deploying import known_names, register, require_names, schedule_of, shared_api
from flows.submitting import BAD_INPUT_MARK, follow, order, start
from registry.errors import InputError, Problem
from registry.home import Home


@dataclass(frozen=True)
class Wish:
    """What is to be deployed."""

    names: list[str]
    """Of deployments; with `watched` recipes, by name or path."""
    everything: bool
    """All there are."""
    cron: str | None
    """The schedule of the one that is named."""
    timezone: str | None
    """Of the schedule."""
    watched: bool
    """Start runs when data change; the schedule is when to look."""
    notify: str | None
    """Block that is told."""


def deploy_recipes(wish: Wish, as_json: bool) -> int:
    """Register deployments; the exit code."""
    console, home = people(as_json), Home.default()
    _require_choice(wish)
    with shared_api(home) as api:
        schedule = schedule_of(wish.cron, wish.timezone) if wish.cron else None
        made = register(known_names() if wish.everything else wish.names, schedule, wish.watched, wish.notify)
    for each in made:
        console.print(f"{each['name']:<24} {_schedules(each)}".rstrip(), markup=False, soft_wrap=True)
    if wish.notify:
        console.print(f"{wish.notify} is told of runs that fail, gates and promotions", markup=False, soft_wrap=True)
    console.print(f"Prefect pages: {api.removesuffix('/api')}/deployments", markup=False, soft_wrap=True)
    if as_json:
        print_json({"status": "deployed", "deployments": made})
    return DONE


def _require_choice(wish: Wish) -> None:
    if not wish.watched:  # else they are recipes, and found as such
        require_names(wish.names)
    problems = []
    if bool(wish.names) == wish.everything:
        cure = f"One or more of {', '.join(known_names())}; or --all."
        problems.append(Problem("NAME", "give names, or --all, and not both", cure))
    if wish.cron is not None and (wish.everything or len(wish.names) > 1):
        problems.append(Problem("--cron", "is the schedule of one deployment", "Give one NAME."))
    if wish.timezone is not None and wish.cron is None:
        problems.append(Problem("--timezone", "belongs to --cron", "Give both."))
    if wish.watched and wish.everything:
        problems.append(Problem("--on-data-change", "is for recipes that are named", "Give one NAME or more."))
    if problems:
        raise InputError(problems)


def _schedules(made: dict[str, Any]) -> str:
    texts = []
    for each in made["schedules"]:
        when = each.get("cron") or each.get("rrule") or f"every {each.get('interval')} s"
        texts.append(f"{when} {each.get('timezone', 'UTC')}" + ("" if each["active"] else " (paused)"))
    return "; ".join(texts)


def submit_recipe(recipe: str, overrides: list[str], following: bool, as_json: bool) -> int:
    """Have a worker do a recipe; the exit code, as that of `run`.

    Args:
        recipe: name, or path of a file that the worker can read.
        overrides: of its settings.
        following: tell its log until it ends.
        as_json: print one object for programs.
    """
    console, home = people(as_json), Home.default()
    wanted = order(recipe, overrides)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with shared_api(home) as api:
        from httpx import HTTPError
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            run = start(client, wanted, home)
            answer = {"flow_run_id": str(run.id), "deployment": wanted.deployment, "url": _page(api, run.id)}
            say(f"{wanted.deployment}: flow run {run.id}, {answer['url']}")
            cancel = f"PREFECT_API_URL={api} prefect flow-run cancel {run.id}"
            if not following:
                say(f"To cancel it: {cancel}")
                return _told(answer | {"status": "submitted", "message": None}, DONE, as_json)
            try:
                state = follow(client, run.id, say)
            except KeyboardInterrupt:
                say(f"no longer followed; the run goes on. To cancel it: {cancel}")
                return _told(answer | {"status": "submitted", "message": None}, INTERRUPTED, as_json)
            except HTTPError as error:
                lost = (
                    f"Prefect's server is gone ({type(error).__name__}), so the run is no longer followed; it may go on"
                )
                say_error(f"{lost}. Start the server again with `llamatuner up`; `llamatuner status` shows runs.")
                return _told(answer | {"status": "submitted", "message": lost}, INTERRUPTED, as_json)
    code = _exit_code(state)
    if code in (FAILED, BAD_INPUT):
        say_error(str(state.message))
    else:
        say(str(state.message))
    return _told(answer | {"status": state.name.lower(), "message": state.message}, code, as_json)


def _page(api: str, flow_run_id: Any) -> str:
    return f"{api.removesuffix('/api')}/runs/flow-run/{flow_run_id}"


def _exit_code(state: Any) -> int:
    if state.is_completed():
        return DONE
    if state.is_cancelled():
        return INTERRUPTED
    return BAD_INPUT if str(state.message).startswith(BAD_INPUT_MARK) else FAILED


def _told(answer: dict[str, Any], code: int, as_json: bool) -> int:
    if as_json:
        print_json(answer)
    return code
