"""MLflow: one tree per pipeline run.

One decision: the flow process owns every run, opening and closing it, and forwards what programs report; programs never
import MLflow. So no run is left open by a killed program, a metric has one value per step also after a resume, and
trouble with the tracking server is said once and never fails or changes training. What MLflow cannot
be told is kept, and told later.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from registry.home import Home
from tasks.artifacts import Artifact
from tasks.locks import locked
from tasks.mlflow_entries import OPENED_TAG, TRACKING_URI, Connection, Entry, tell, unreachable
from tasks.mlflow_journal import WAITING, Journal, left_behind, named
from tasks.servers import MLFLOW, address

EXPERIMENT = "llamatuner"
RUN_TAG = "llamatuner.run"  # on every run of a tree: the id of the run record
LONGEST_PARAM = 500  # characters; the whole settings are kept as an artifact
FIRST_PAUSE, LONGEST_PAUSE = 15.0, 240.0  # seconds between attempts: a server that hangs takes long to ask


def tracking_uri(home: Home) -> str:
    """Where MLflow keeps runs: MLFLOW_TRACKING_URI, the server of `llamatuner up`, or SQLite under the home."""
    return os.environ.get(TRACKING_URI) or address(home, MLFLOW) or f"sqlite:///{home.mlflow / 'mlflow.db'}"


def is_tracked(home: Home) -> bool:
    """Whether there is anything of MLflow's to ask for; without it, asking would make a database."""
    return TRACKING_URI in os.environ or address(home, MLFLOW) is not None or (home.mlflow / "mlflow.db").exists()


def open_experiment(home: Home, uri: str | None = None) -> tuple[Any, str]:
    """A client, and the id of the experiment of all runs, made if it is not there.

    Args:
        home: of the runs.
        uri: of the server; that of `tracking_uri` by default.
    """
    uri = uri or tracking_uri(home)
    # without a location, artifacts go to ./mlruns of whoever came first
    ours = uri.startswith("sqlite:") or uri == address(home, MLFLOW)
    location = (home.mlflow / "artifacts").as_uri() if ours else None
    if location:
        home.mlflow.mkdir(parents=True, exist_ok=True)
    # two processes that make one new database at once would fail
    with locked(home.locks / "mlflow-start.lock"):
        client = mlflow_client(home, uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        if found and uri.startswith("sqlite:") and found.artifact_location != location:
            follow_moved_home(home.mlflow / "mlflow.db", found.artifact_location, str(location))
        return client, found.experiment_id if found else client.create_experiment(EXPERIMENT, location)


class Tracker:
    """The MLflow side of one pipeline run.

    Args:
        home: where MLflow's own files go when no server is set.
        say: told when MLflow cannot be reached, and when it has everything again.
    """

    def __init__(self, home: Home, say: Callable[[str], None]) -> None:
        self._home, self._say, self._lock = home, say, threading.RLock()
        self._connection: Connection | None = None
        self._journal: Journal | None = None
        self._next_attempt, self._pause = 0.0, FIRST_PAUSE
        self._ids: dict[str, str] = {}
        self._dead = False
        self.left_open = False
        """MLflow may call runs running that are not: their end could be neither told nor kept."""
        self._steps: dict[str, int] = {}
        self._open: list[str] = []
        self.run_id: str | None = None

    def _tell(self, do: str, run_id: str | None, **values: Any) -> Any:
        """Tell MLflow one thing, or keep it for when that can be done; what MLflow answers, None when it does not."""
        if run_id is None:
            return None
        with self._lock:
            if self._dead:
                return None
            entry = named({"do": do, "run": run_id, **values}, self._ids)
            if self._journal is None:
                try:
                    return tell(self._connect(), entry)
                except Exception as error:  # noqa: BLE001 - whatever MLflow or its server raises must not end training
                    if not unreachable(error):
                        return self._refused(entry, error)
                    self._begin_journal(error)
            self._keep(entry)
            if time.monotonic() >= self._next_attempt:
                self._deliver()
            return None

    def _connect(self) -> Connection:
        if self._connection is None:
            client, experiment = open_experiment(self._home)
            self._connection = Connection(client, experiment, self._home.locks)
        return self._connection

    def _refused(self, entry: Entry, error: Exception) -> None:
        self._say(f"MLflow does not take {entry['do']} of a run: {_first_line(error)}. The run itself goes on.")
        self._dead = entry["do"] == "open"  # nothing can be said of a run that is not there
        self.left_open = self.left_open or self._dead or entry["do"] == "end"

    def _begin_journal(self, error: Exception) -> None:
        self._say(f"MLflow cannot be reached: {_first_line(error)}. The run goes on; MLflow is told later.")
        self._next_attempt = time.monotonic() + self._pause
        try:
            self._journal = Journal.begin(self._home, os.environ.get(TRACKING_URI))
        except OSError as fault:
            self._give_up(fault)

    def _keep(self, entry: Entry) -> None:
        try:
            if self._journal is not None:
                self._journal.add(entry)
        except OSError as fault:
            self._give_up(fault)

    def _give_up(self, fault: OSError) -> None:
        self._dead = self.left_open = True
        self._say(f"what MLflow is to be told cannot be kept either: {fault}. The run itself goes on.")

    def _deliver(self) -> None:
        """Tell what waits; when that does not work, the next attempt is later."""
        if self._journal is None or self._dead:
            return
        self._connection = None  # its server may have come back at another address
        try:
            self._ids |= self._journal.deliver(self._connect(), self._refused)
        except Exception:  # noqa: BLE001 - it was said when it began
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._next_attempt = time.monotonic() + self._pause
            return
        self._journal, self._pause = None, FIRST_PAUSE
        self._say("MLflow can be reached again and has been told everything")

    def known_id(self, run_id: str | None) -> str | None:
        """The id under which MLflow has a run; None as long as it has not heard of it."""
        found = self._ids.get(run_id or "", run_id)
        return None if found is None or found.startswith(WAITING) else found

    @property
    def root(self) -> str | None:
        """The pipeline's run, as `known_id` has it."""
        return self.known_id(self.run_id)

    def start(self, name: str, tags: Mapping[str, str], recipe: Mapping[str, Any], parent: str | None = None) -> None:
        """Open the pipeline's run, below another one or by itself, and keep its recipe."""
        self.run_id = self.open(name, parent, tags)
        self.dictionary(self.run_id, recipe, "recipe.yaml")

    def go_on(self, run_id: str, tags: Mapping[str, str]) -> bool:
        """Open a run again that was ended; False where MLflow does not have it any more."""
        with self._lock:
            if self._tell("reopen", run_id) is False:
                return False
            self.run_id = run_id
            self._open.append(run_id)
        self.tags(run_id, tags)
        return True

    def open(self, name: str, parent: str | None, tags: Mapping[str, str]) -> str | None:
        """Open a run, below another one or not; its id, a passing one as long as MLflow cannot be reached."""
        mark = uuid4().hex
        labels = {**tags, OPENED_TAG: mark}
        with self._lock:
            found = self._tell("open", WAITING + mark, name=name, parent=parent, tags=labels, time=_now())
            if self._dead:
                return None
            run_id = str(found or self._ids.get(WAITING + mark) or WAITING + mark)
            self._open.append(run_id)
            return run_id

    def close(self, run_id: str | None, status: str) -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        if run_id in self._open:
            self._tell("end", run_id, status=status, time=_now())
            self._open.remove(run_id)

    def close_all(self, status: str) -> None:
        """End whatever is open, children first; what MLflow cannot be told is left to the next run."""
        for run_id in reversed(list(self._open)):
            self.close(run_id, status)
        with self._lock:
            self._deliver()
            if self._journal is not None and not self._dead:
                self._journal.leave()
                self._say("MLflow still cannot be reached; the next run, or `llamatuner doctor`, tells it the rest")

    def params(self, run_id: str | None, values: Mapping[str, Any]) -> None:
        """Short params, each once."""
        if values:
            self._tell("params", run_id, values={name: str(value)[:LONGEST_PARAM] for name, value in values.items()})

    def metrics(self, run_id: str | None, values: Mapping[str, float], step: int = 0) -> None:
        """One point of each metric; a step already logged to this run is not logged again."""
        if run_id is None or step <= self._steps.get(run_id, -1):
            return
        self._steps[run_id] = step
        self._log(run_id, values, step)

    def results(self, run_id: str | None, values: Mapping[str, float]) -> None:
        """Final values, at step 0."""
        if values:
            self._log(run_id, values, 0)

    def _log(self, run_id: str | None, values: Mapping[str, float], step: int) -> None:
        self._tell("metrics", run_id, values={k: float(v) for k, v in values.items()}, step=step, time=_now())

    def tags(self, run_id: str | None, values: Mapping[str, str]) -> None:
        """Set tags."""
        if values:
            self._tell("tags", run_id, values=dict(values))

    def dictionary(self, run_id: str | None, value: Mapping[str, Any], file: str) -> None:
        """Keep a mapping as a YAML or JSON artifact."""
        self._tell("dictionary", run_id, value=dict(value), file=file)

    def table(self, run_id: str | None, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        """Keep rows as a table that MLflow's pages show, in place of one of that name."""
        if run_id is None or not rows:
            return
        columns = list(rows[0])
        # the form of `mlflow.log_table`, which needs pandas
        self.dictionary(run_id, {"columns": columns, "data": [[row[name] for name in columns] for row in rows]}, file)
        self.tags(run_id, {"mlflow.loggedArtifacts": json.dumps([{"path": file, "type": "table"}])})

    def file(self, run_id: str | None, path: Path, folder: str | None = None) -> None:
        """Keep a file as an artifact."""
        if path.is_file():
            self._tell("file", run_id, path=str(path), folder=folder)

    def content(self, run_id: str | None, make: Callable[[], bytes], file: str) -> None:
        """Keep bytes, made only when somebody keeps them, as an artifact.

        Args:
            run_id: of the run; None when tracking does not work.
            make: gives the bytes.
            file: path of the artifact in the run, with or without folders.
        """
        if run_id is not None and not self._dead:
            self._tell("content", run_id, file=file, base64=base64.b64encode(make()).decode())

    def inputs(self, run_id: str | None, datasets: Mapping[str, tuple[str, str]], context: str) -> None:
        """Data set name → (where it is from, digest), as inputs of a run."""
        self._tell("inputs", run_id, datasets={name: list(each) for name, each in datasets.items()}, context=context)

    def register(self, run_id: str | None, name: str, model: Artifact, params: Mapping[str, Any]) -> str | None:
        """Register a model by reference: its folder and digest, no copy; its run gets the tag `llamatuner.model`.

        Returns:
            `name/version`; None as long as MLflow cannot be reached.
        """
        tags = {
            "llamatuner.digest": model.digest,
            "llamatuner.key": model.key,
            "llamatuner.artifact": f"{model.step}/{model.path.name}",
        }
        found: str | None = self._tell(
            "register", run_id, name=name, tags=tags, params={k: str(v) for k, v in params.items()}
        )
        return found


def tell_what_waits(home: Home, say: Callable[[str], None]) -> bool:
    """Tell MLflow what ended runs could not; whether nothing waits any more.

    Args:
        home: of the runs.
        say: told what came of it.
    """
    for journal in left_behind(home):
        try:
            client, experiment = open_experiment(home, journal.uri)

            def refused(entry: Entry, error: Exception) -> None:
                say(f"MLflow does not take {entry['do']} of an earlier run: {_first_line(error)}")

            journal.deliver(Connection(client, experiment, home.locks), refused)
            say("MLflow has been told what an earlier run could not tell it")
        except Exception as error:  # noqa: BLE001 - another run's leftovers must not stop this one; what failed is said
            say(f"what MLflow is to be told of an earlier run still waits: {_first_line(error)}")
            return False
    return True


def _first_line(error: Exception) -> str:
    """SQL statements and their parameters follow it."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def mlflow_client(home: Home, uri: str | None = None) -> Any:
    """A client of the runs and the model registry that runs of this home use, or those of another server."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # what fails is raised, and said by us
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # which is for one JSON object
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow.tracking import MlflowClient

    uri = uri or tracking_uri(home)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def follow_moved_home(database: Path, before: str, after: str) -> None:
    """Point an embedded MLflow database to where its artifacts are now.

    MLflow stores absolute addresses and has no command to change them; without this a moved home would go on writing to
    its old place.
    """
    with sqlite3.connect(database, timeout=30) as connection:
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("logged_models", "artifact_location"),
        ):
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (after, len(before) + 1, len(before), before),
            )
    connection.close()


def end_dead_run(home: Home, record_id: str, status: str) -> None:
    """Close what is open of a run whose process died without a word.

    Args:
        home: where MLflow's own files are when no server is set.
        record_id: of the run record; found by tag, since a process can die before it wrote down any id of MLflow's.
        status: FINISHED, FAILED or KILLED.
    """
    if not is_tracked(home):
        return
    client = mlflow_client(home)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return
    open_runs = f"tags.`{RUN_TAG}` = '{record_id}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment.experiment_id], open_runs):
        client.set_terminated(run.info.run_id, status)
