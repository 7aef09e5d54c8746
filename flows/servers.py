"""Starting and ending the servers of a home.

One decision: whoever starts or ends them holds one lock, and the record is written the moment a process exists. So two
`up` at once start one set, and whatever kills an `up` half way, `down` still knows what to end.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psutil

from flows.run_records import RunRecord, records, unclosed
from flows.services import BACKEND, HOST, MARK, SERVICES, Service, command
from registry.errors import InputError, Problem
from registry.home import Home
from tasks.locks import locked
from tasks.servers import MLFLOW, PREFECT, WORKER, Server, read_servers, write_servers

START_SECONDS = 180.0  # a new database took 8 to 14 s on two quiet cores, four times that on busy ones
TELL_SECONDS = 15.0  # between two lines while waiting
LAST_LINES = 15
Say = Callable[[str], None]


class NotHealthy(Exception):
    """A server ended or did not answer in time; the text holds the last lines of its log."""


@contextmanager
def changing(home: Home, say: Say) -> Iterator[dict[str, Server]]:
    """The servers of a home; nobody else starts or ends any within the body."""
    with locked(home.locks / "servers.lock", waiting=say):
        yield read_servers(home)


def log_file(home: Home, name: str) -> Path:
    """Where a server's output goes."""
    return home.logs / f"{name}.log"


def bring_up(home: Home, ports: dict[str, int | None], say: Say) -> dict[str, Server]:
    """Start what does not run, and wait until all answer.

    Args:
        home: whose databases and logs.
        ports: name → the port asked for; None for the one it had, or the usual one.
        say: told what happens.

    Returns:
        All servers by name.

    Raises:
        InputError: a port is taken, or another one than a running server's is asked for; nothing was started.
        NotHealthy: one did not come up; what this call started is ended again.
    """
    with changing(home, say) as servers:
        dead = {name: server for name, server in servers.items() if not server.alive()}
        chosen = {name: ports.get(name) or _port_before(servers, name) for name in SERVICES}
        _require_ports(servers, dead, ports, chosen)
        for name, server in dead.items():
            say(f"{name}: process {server.pid} has died; it is started again")
            end([server], 0)
        started: list[str] = []
        try:
            _start_missing(home, servers, chosen, started, say)
            _close_dead_runs(home, say)
        except BaseException:
            _end_named(home, servers, list(reversed(started)))
            raise
        return servers


def _close_dead_runs(home: Home, say: Say) -> None:
    """Close runs that died without a word: as long as Prefect calls them running, those behind them wait."""
    if any(unclosed(record) for record in records(home)):
        from flows.deploying import shared_api
        from flows.reconcile import reconcile

        with shared_api(home):
            reconcile(home, say)


def _port_before(servers: dict[str, Server], name: str) -> int | None:
    return servers[name].port if name in servers else SERVICES[name].port


def _require_ports(
    servers: dict[str, Server], dead: dict[str, Server], asked: dict[str, int | None], chosen: dict[str, int | None]
) -> None:
    problems = []
    leftovers = {process.pid for server in dead.values() for process in family(server)}
    for name, port in chosen.items():
        server, option = servers.get(name), f"--{name}-port"
        if port is None:
            continue
        if server and name not in dead:
            if asked.get(name) not in (None, server.port):
                cure = "End it with `llamatuner down` first."
                problems.append(Problem(option, f"{name} already runs on port {server.port}, not {port}", cure))
        elif not _is_free(port, leftovers):
            cure = f"Choose another one: `llamatuner up {option} {_free_port()}`, or end what listens there."
            problems.append(Problem(f"port {port}", f"another program listens there; {name} needs it", cure))
    if chosen[PREFECT] == chosen[MLFLOW]:
        problems.append(Problem("--mlflow-port", f"{chosen[MLFLOW]} is Prefect's port too", "Choose two ports."))
    if problems:
        raise InputError(problems)


def _is_free(port: int, leftovers: set[int]) -> bool:
    """Whether a server can listen there; what a killed server of ours left is ended before."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not matter
        try:
            probe.bind((HOST, port))
        except OSError:
            return any(_listens(pid, port) for pid in leftovers)
    return True


def _listens(pid: int, port: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _start_missing(
    home: Home, servers: dict[str, Server], chosen: dict[str, int | None], started: list[str], say: Say
) -> None:
    """Start the two servers side by side, then the worker, which needs the first."""
    missing = [name for name in SERVICES if name not in servers or not servers[name].alive()]
    prefect_url = SERVICES[PREFECT].url(chosen[PREFECT])

    def start(name: str) -> None:
        if name in missing:
            say(f"{name}: starting; its log is {log_file(home, name)}")
            servers[name] = _start(home, SERVICES[name], chosen[name], prefect_url)
            started.append(name)
            write_servers(home, servers)

    with locked(home.locks / "prefect-start.lock", waiting=say):  # two migrations of one new database would fail
        start(PREFECT)
        if MLFLOW in missing:
            _prepare_mlflow(home)
            if not servers[PREFECT].alive():  # said at once, and not after the other one has started
                wait_healthy(home, SERVICES[PREFECT], servers[PREFECT], prefect_url, say)
            start(MLFLOW)
        for name in (PREFECT, MLFLOW):
            wait_healthy(home, SERVICES[name], servers[name], prefect_url, say)
    start(WORKER)
    wait_healthy(home, SERVICES[WORKER], servers[WORKER], prefect_url, say)


def _prepare_mlflow(home: Home) -> None:
    """Make the database, or make one whose home was moved point to where its artifacts are now."""
    home.mlflow.mkdir(parents=True, exist_ok=True)
    if not os.environ.get(BACKEND) and not os.environ.get("MLFLOW_TRACKING_URI"):
        from tasks.tracking import open_experiment

        open_experiment(home)


def _start(home: Home, service: Service, port: int | None, api: str | None) -> Server:
    home.logs.mkdir(parents=True, exist_ok=True)
    mark = uuid4().hex
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_KEY"}  # of another server
    with open(log_file(home, service.name), "ab") as log:
        process = subprocess.Popen(
            command(service, port),
            cwd=home.path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | service.environment(home, api) | {MARK: mark, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # it outlives the terminal
        )
    return Server(process.pid, psutil.Process(process.pid).create_time(), mark, port, service.url(port))


def wait_healthy(home: Home, service: Service, server: Server, api: str | None, say: Say) -> None:
    """Wait until a server answers.

    Raises:
        NotHealthy: it ended, or START_SECONDS passed.
    """
    begun = told = time.monotonic()
    while not service.healthy(server, api):
        now = time.monotonic()
        if not server.alive():
            raise NotHealthy(_why(home, service, "ended before it answered"))
        if now - begun > START_SECONDS:
            raise NotHealthy(_why(home, service, f"did not answer within {START_SECONDS:g} s"))
        if now - told > TELL_SECONDS:
            say(f"{service.name}: not there yet after {now - begun:.0f} s of at most {START_SECONDS:.0f}")
            told = now
        time.sleep(0.2)
    where = f" at {server.url}" if server.url else ""
    say(f"{service.name}: running{where}, process {server.pid}")


def _why(home: Home, service: Service, what: str) -> str:
    path = log_file(home, service.name)
    lines = last_lines(path, LAST_LINES)
    return "\n".join([f"{service.title} {what}. The end of {path}:", *(f"  {line}" for line in lines)])


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a text file; nothing if it is not there."""
    if not path.exists() or count < 1:
        return []
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 400 * count - 4000))  # bytes; longer lines are cut
        return file.read().decode(errors="replace").splitlines()[-count:]


def bring_down(home: Home, say: Say) -> list[str]:
    """End the servers of a home and all they started: the worker with its runs first, while Prefect can hear of it.

    Returns:
        Names of those that ran.

    Raises:
        InputError: a run that somebody else started uses them.
    """
    with changing(home, say) as servers:
        ran = [name for name in servers if servers[name].alive()]
        _require_no_guests(home, servers)
        if WORKER in servers:
            _stop_flow_runs(servers[WORKER], say)
        _end_named(home, servers, [WORKER, PREFECT, MLFLOW])
        return ran


def _end_named(home: Home, servers: dict[str, Server], names: list[str]) -> None:
    for name in names:
        if name in servers:
            end([servers.pop(name)], SERVICES[name].stop_seconds)
            write_servers(home, servers)


def _require_no_guests(home: Home, servers: dict[str, Server]) -> None:
    """Runs that were started by hand need the servers to the end."""
    prefect = servers.get(PREFECT)
    if prefect is None or not prefect.alive():
        return
    worker = {process.pid for process in family(servers[WORKER])} if WORKER in servers else set()
    problems = [
        Problem(
            f"run {record.values['id']}",
            f"process {record.values['pid']} runs {record.values['recipe']} and reports to these servers",
            "Wait for its end, or stop it with Ctrl-C; the next run goes on where it was.",
        )
        for record in live_runs(home)
        if record.values.get("prefect_api") == prefect.url and record.values["pid"] not in worker
    ]
    if problems:
        raise InputError(problems)


def live_runs(home: Home) -> list[RunRecord]:
    """The runs of this home that are going on, newest first."""
    return [record for record in records(home) if record.values["status"] == "running" and not record.died()]


def _stop_flow_runs(worker: Server, say: Say) -> None:
    """Have runs save what they have and end, while the worker that reads their output is there."""
    told: set[int] = set()
    deadline = time.monotonic() + SERVICES[WORKER].stop_seconds
    while (runs := _flow_runs(worker)) and time.monotonic() < deadline:
        for process in runs:
            if process.pid not in told:
                say(f"worker: a run is told to stop, process {process.pid}; its checkpoints are kept")
                _signal(process, signal.SIGTERM)
                told.add(process.pid)
        time.sleep(0.2)


def _flow_runs(worker: Server) -> list[psutil.Process]:
    """The processes of flow runs that a worker started."""
    try:
        children = psutil.Process(worker.pid).children() if worker.alive() else []
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def family(server: Server) -> list[psutil.Process]:
    """The process of a server, if it runs, and all it started that is alive, whoever is their parent by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == server.mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # another user's, or just ended
            continue
    return found


def end(servers: list[Server], grace: float) -> None:
    """SIGTERM to servers that run, SIGKILL to what is left of them and of their children.

    Args:
        servers: also dead ones, whose children may be left.
        grace: seconds from the one signal to the other.
    """
    for server in servers:
        deadline = time.monotonic() + grace
        for process in family(server):
            if process.pid == server.pid:
                _signal(process, signal.SIGTERM)
        while family(server) and time.monotonic() < deadline:
            time.sleep(0.2)
        while left := family(server):
            for process in left:
                _signal(process, signal.SIGKILL)
            time.sleep(0.05)


def _signal(process: psutil.Process, number: int) -> None:
    """Signal a process; psutil refuses when its id is somebody else's by now."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
