"""`up`, `down`, `status` and `logs`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from flows.cli.output import DONE, FAILED, people, print_json, say_error
from flows.servers import NotHealthy, bring_down, bring_up, last_lines, live_runs, log_file
from flows.services import BUSY, SERVICES, ask, page
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from tasks.servers import PREFECT, Server, read_servers

UP, PARTLY, DOWN = "up", "partly", "down"
FOLLOW_SECONDS = 0.3


def start_servers(ports: dict[str, int | None], as_json: bool) -> int:
    """Start what does not run and say where it is; the exit code."""
    import os

    console, home = people(as_json), Home.open()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    try:
        servers = bring_up(home, ports, say)
    except NotHealthy as error:
        say_error(str(error))
        if as_json:
            print_json({"status": "failed", "error": str(error)})
        return FAILED
    for name, server in servers.items():
        if server.url:
            console.print(f"{SERVICES[name].title} pages: {page(server)}", markup=False, soft_wrap=True)
    console.print(f"For prefect's own commands: export PREFECT_API_URL={servers[PREFECT].url}", soft_wrap=True)
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        if os.environ.get(name):
            console.print(f"{name} is set: commands of this shell use that server, not this one", style="yellow")
    if as_json:
        print_json({"status": UP, "servers": {name: _server_json(home, name, servers[name]) for name in servers}})
    return DONE


def end_servers(as_json: bool) -> int:
    """End what `up` started; the exit code."""
    console, home = people(as_json), Home.default()
    ended = bring_down(home, lambda text: console.print(text, markup=False, soft_wrap=True))
    console.print(f"ended: {', '.join(ended)}" if ended else "nothing was running")
    if as_json:
        print_json({"status": DOWN, "ended": ended})
    return DONE


def show_status(as_json: bool) -> int:
    """Say what runs, since when, where, and whether it answers; the exit code, 0 if all of it does."""
    console, home = people(as_json), Home.default()
    servers, lines = read_servers(home), {}
    api = servers[PREFECT].url if PREFECT in servers else None
    for name, service in SERVICES.items():
        server = servers.get(name)
        state = "down"
        if server is not None:
            state = "dead"
            if server.alive():
                state = "healthy" if service.healthy(server, api) else "not answering"
        lines[name] = {"state": state} | (_server_json(home, name, server) if server else {})
        where = f"{page(server) or 'process ' + str(server.pid)}, since {_since(server)}" if server else ""
        if state == "dead":
            where = f"process {server.pid if server else ''} has died; `llamatuner up` starts it again"
        console.print(f"{name:<8} {state:<14} {where}".rstrip(), markup=False, soft_wrap=True)
    healthy = [name for name, line in lines.items() if line["state"] == "healthy"]
    running, trouble = _flow_runs(str(api)) if PREFECT in healthy else ([], None)
    if trouble:
        say_error(trouble)
    for run in running:
        console.print(f"running  {run['name']:<14} flow run {run['id']}, since {run['since']}", markup=False)
    runs = [{key: record.values[key] for key in ("id", "recipe", "started", "pid")} for record in live_runs(home)]
    status = UP if len(healthy) == len(lines) else DOWN if all(x["state"] == "down" for x in lines.values()) else PARTLY
    if as_json:
        answer = {"status": status, "servers": lines, "flow_runs": running, "runs": runs}
        print_json(answer | ({"error": trouble} if trouble else {}))
    return DONE if status == UP and not trouble else FAILED


def _server_json(home: Home, name: str, server: Server) -> dict[str, Any]:
    return {
        "pid": server.pid,
        "since": _since(server),
        "port": server.port,
        "url": server.url,
        "log": str(log_file(home, name)),
    }


def _since(server: Server) -> str:
    return datetime.fromtimestamp(server.started, UTC).isoformat(timespec="seconds")


def _flow_runs(api: str) -> tuple[list[dict[str, str]], str | None]:
    """What Prefect calls running, of this home and of others that use the server; and why that is not known, if so."""
    states = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "CANCELLING", "PENDING"]}}}}
    try:
        found = ask(f"{api}/flow_runs/filter", states | {"sort": "EXPECTED_START_TIME_DESC"})
    except OSError as error:
        busy = isinstance(error, HTTPError) and error.code == BUSY
        why = "its database is locked by others" if busy else str(error)
        return [], f"Prefect's server does not say what runs: {why}. Try again in a moment."
    return [
        {"id": run["id"], "name": run["name"], "state": run["state_name"], "since": run["start_time"] or "not yet"}
        for run in found
    ], None


def show_logs(name: str | None, follow: bool, count: int) -> int:
    """Print the end of the servers' logs, and what is added to them; the exit code.

    Raises:
        InputError: no server of that name.
    """
    if name is not None and name not in SERVICES:
        raise InputError(Problem("logs", f"no server {name!r}", did_you_mean(name, list(SERVICES))))
    home, names = Home.default(), [name] if name else list(SERVICES)
    paths = {each: log_file(home, each) for each in names}
    if not any(path.exists() for path in paths.values()):
        raise InputError(Problem(str(home.logs), "there is no log", "`llamatuner up` starts the servers."))
    shown, at = "", {each: path.stat().st_size if path.exists() else 0 for each, path in paths.items()}
    for each, path in paths.items():
        shown = _print_lines(each, last_lines(path, count), shown, names)
    try:
        while follow:
            time.sleep(FOLLOW_SECONDS)
            for each, path in paths.items():
                lines, at[each] = _added(path, at[each])
                shown = _print_lines(each, lines, shown, names)
    except KeyboardInterrupt:
        return DONE
    return DONE


def _print_lines(name: str, lines: list[str], shown: str, names: list[str]) -> str:
    """Print lines of one log, under its name where several are shown; whose lines were printed last."""
    if not lines:
        return shown
    if len(names) > 1 and name != shown:
        print(f"==> {name} <==")
    print("\n".join(lines), flush=True)
    return name


def _added(path: Path, position: int) -> tuple[list[str], int]:
    """Whole lines behind a position in bytes, and the position behind them."""
    if not path.exists():
        return [], 0
    with open(path, "rb") as file:
        file.seek(position)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return whole.decode(errors="replace").splitlines(), position + len(whole)
