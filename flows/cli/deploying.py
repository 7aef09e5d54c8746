"""`deploy` and `submit`."""

from __future__ import annotations

from typing import Any

from flows.cli.output import BAD_INPUT, DONE, FAILED, INTERRUPTED, people, print_json, say_error
from flows.deploying import known_names, register, require_names, schedule_of, shared_api
from flows.submitting import BAD_INPUT_MARK, follow, order, start
from registry.errors import InputError, Problem
from registry.home import Home


def deploy_recipes(names: list[str], everything: bool, cron: str | None, timezone: str | None, as_json: bool) -> int:
    """Register deployments; the exit code.

    Args:
        names: of deployments.
        everything: all there are.
        cron: the schedule of the one that is named.
        timezone: of the schedule.
        as_json: print one object for programs.
    """
    console, home = people(as_json), Home.default()
    _require_choice(names, everything, cron, timezone)
    with shared_api(home) as api:
        schedule = schedule_of(cron, timezone) if cron else None
        made = register(known_names() if everything else names, schedule)
    for each in made:
        console.print(f"{each['name']:<24} {_schedules(each)}".rstrip(), markup=False, soft_wrap=True)
    console.print(f"Prefect pages: {api.removesuffix('/api')}/deployments", markup=False, soft_wrap=True)
    if as_json:
        print_json({"status": "deployed", "deployments": made})
    return DONE


def _require_choice(names: list[str], everything: bool, cron: str | None, timezone: str | None) -> None:
    require_names(names)
    problems = []
    if bool(names) == everything:
        cure = f"One or more of {', '.join(known_names())}; or --all."
        problems.append(Problem("NAME", "give names, or --all, and not both", cure))
    if cron is not None and (everything or len(names) > 1):
        problems.append(Problem("--cron", "is the schedule of one deployment", "Give one NAME."))
    if timezone is not None and cron is None:
        problems.append(Problem("--timezone", "belongs to --cron", "Give both."))
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
