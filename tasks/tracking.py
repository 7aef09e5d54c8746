"""MLflow: one tree per pipeline run.

One decision: the flow process owns every run, opening and closing it, and forwards what programs report; programs never
import MLflow. So no run is left open by a killed program, a metric has one value per step also after a resume, and
trouble with the tracking server is said once and never fails or changes training.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from registry.home import Home
from tasks.artifacts import Artifact
from tasks.locks import locked
from tasks.servers import MLFLOW, address

EXPERIMENT = "llamatuner"
RUN_TAG = "llamatuner.run"  # on every run of a tree: the id of the run record
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # of a run: another server's; deleted by somebody
LONGEST_PARAM = 500  # characters; the whole settings are kept as an artifact
TRACKING_URI = "MLFLOW_TRACKING_URI"  # of the environment


def tracking_uri(home: Home) -> str:
    """Where MLflow keeps runs: MLFLOW_TRACKING_URI, the server of `llamatuner up`, or SQLite under the home."""
    return os.environ.get(TRACKING_URI) or address(home, MLFLOW) or f"sqlite:///{home.mlflow / 'mlflow.db'}"


def is_tracked(home: Home) -> bool:
    """Whether there is anything of MLflow's to ask for; without it, asking would make a database."""
    return TRACKING_URI in os.environ or address(home, MLFLOW) is not None or (home.mlflow / "mlflow.db").exists()


def open_experiment(home: Home) -> tuple[Any, str]:
    """A client, and the id of the experiment of all runs, made if it is not there."""
    uri = tracking_uri(home)
    # without a location, artifacts go to ./mlruns of whoever came first
    ours = uri.startswith("sqlite:") or uri == address(home, MLFLOW)
    location = (home.mlflow / "artifacts").as_uri() if ours else None
    if location:
        home.mlflow.mkdir(parents=True, exist_ok=True)
    # two processes that make one new database at once would fail
    with locked(home.locks / "mlflow-start.lock"):
        client = mlflow_client(home)
        found = client.get_experiment_by_name(EXPERIMENT)
        if found and uri.startswith("sqlite:") and found.artifact_location != location:
            follow_moved_home(home.mlflow / "mlflow.db", found.artifact_location, str(location))
        return client, found.experiment_id if found else client.create_experiment(EXPERIMENT, location)


class Tracker:
    """The MLflow side of one pipeline run.

    Args:
        home: where MLflow's own files go when no server is set.
        say: told once when tracking does not work.
    """

    def __init__(self, home: Home, say: Callable[[str], None]) -> None:
        self._home, self._say, self._lock = home, say, threading.RLock()
        self._client: Any = None
        self._experiment = ""
        self._dead = False
        self._steps: dict[str, int] = {}
        self._open: list[str] = []
        self.run_id: str | None = None

    def _try(self, action: Callable[[Any], Any]) -> Any:
        """Do something with the client; the first failure is said, and tracking ends there."""
        with self._lock:
            if self._dead:
                return None
            try:
                return action(self._connect())
            except Exception as error:  # noqa: BLE001 - whatever MLflow or its server raises must not end training
                self._dead = True
                first = next(iter(str(error).splitlines()), "")  # SQL statements and their parameters follow
                self._say(f"MLflow tracking stopped: {type(error).__name__}: {first}. The run itself goes on.")
                return None

    def _connect(self) -> Any:
        if self._client is None:
            self._client, self._experiment = open_experiment(self._home)
        return self._client

    def start(self, name: str, tags: Mapping[str, str], recipe: Mapping[str, Any], parent: str | None = None) -> None:
        """Open the pipeline's run, below another one or by itself, and keep its recipe."""
        self.run_id = self._open_run(name, dict(tags), parent)
        self.dictionary(self.run_id, recipe, "recipe.yaml")

    def go_on(self, run_id: str, tags: Mapping[str, str]) -> bool:
        """Open a run again that was ended; whether it is there."""

        def action(client: Any) -> bool:
            from mlflow.exceptions import MlflowException

            try:
                client.update_run(run_id, status="RUNNING")
            except MlflowException as error:
                if error.error_code in GONE:
                    return False
                raise
            self.run_id = run_id
            self._open.append(run_id)
            return True

        with self._lock:
            found = bool(self._try(action))
        if found:
            self.tags(run_id, tags)
        return found

    def open(self, name: str, parent: str | None, tags: Mapping[str, str]) -> str | None:
        """Open a child run; its id, or None when tracking does not work."""
        return self._open_run(name, dict(tags), parent)

    def _open_run(self, name: str, tags: dict[str, str], parent: str | None) -> str | None:
        def action(client: Any) -> str:
            labels = tags | ({"mlflow.parentRunId": parent} if parent else {})
            run: str = client.create_run(self._experiment, run_name=name, tags=labels).info.run_id
            self._open.append(run)
            return run

        with self._lock:
            found: str | None = self._try(action)
            return found

    def close(self, run_id: str | None, status: str) -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        if run_id in self._open:
            self._try(lambda client: client.set_terminated(run_id, status))
            self._open.remove(run_id)

    def close_all(self, status: str) -> None:
        """End whatever is open, children first."""
        for run_id in reversed(list(self._open)):
            self.close(run_id, status)

    def params(self, run_id: str | None, values: Mapping[str, Any]) -> None:
        """Short params, each once."""
        if run_id and values:
            from mlflow.entities import Param

            params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in values.items()]
            self._try(lambda client: client.log_batch(run_id, params=params))

    def metrics(self, run_id: str | None, values: Mapping[str, float], step: int = 0) -> None:
        """One point of each metric; a step already logged to this run is not logged again."""
        if run_id is None or step <= self._steps.get(run_id, -1):
            return
        self._steps[run_id] = step
        self._log(run_id, values, step)

    def results(self, run_id: str | None, values: Mapping[str, float]) -> None:
        """Final values, at step 0."""
        if run_id and values:
            self._log(run_id, values, 0)

    def _log(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._try(lambda client: client.log_batch(run_id, metrics=metrics))

    def tags(self, run_id: str | None, values: Mapping[str, str]) -> None:
        """Set tags."""
        if run_id and values:
            from mlflow.entities import RunTag

            labels = [RunTag(name, value) for name, value in values.items()]
            self._try(lambda client: client.log_batch(run_id, tags=labels))

    def dictionary(self, run_id: str | None, value: Mapping[str, Any], file: str) -> None:
        """Keep a mapping as a YAML or JSON artifact."""
        if run_id:
            self._try(lambda client: client.log_dict(run_id, dict(value), file))

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
        if run_id and path.is_file():
            self._try(lambda client: client.log_artifact(run_id, str(path), folder))

    def content(self, run_id: str | None, make: Callable[[], bytes], file: str) -> None:
        """Keep bytes, made only when somebody keeps them, as an artifact.

        Args:
            run_id: of the run; None when tracking does not work.
            make: gives the bytes.
            file: path of the artifact in the run, with or without folders.
        """
        if run_id is None or self._dead:
            return
        content, path = make(), PurePosixPath(file)  # here, so that a fault in it is not taken for one of MLflow
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / path.name).write_bytes(content)
            self.file(run_id, Path(folder) / path.name, str(path.parent) if path.parent.name else None)

    def inputs(self, run_id: str | None, datasets: Mapping[str, tuple[str, str]], context: str) -> None:
        """Data set name → (where it is from, digest), as inputs of a run."""
        if run_id is None:
            return

        def action(client: Any) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            entries = [
                DatasetInput(
                    Dataset(name=name, digest=digest[:36], source_type="local", source=source),
                    [InputTag("mlflow.data.context", context)],
                )
                for name, (source, digest) in datasets.items()
            ]
            client.log_inputs(run_id, entries)

        self._try(action)

    def register(self, run_id: str | None, name: str, model: Artifact, params: Mapping[str, Any]) -> str | None:
        """Register a model by reference: its folder and digest, no copy.

        Returns:
            `name/version`, the version there already when this digest is registered; None when tracking is down.
        """
        if run_id is None:
            return None

        def action(client: Any) -> str:
            import mlflow
            from mlflow.exceptions import MlflowException

            try:
                client.get_registered_model(name)
                for version in client.search_model_versions(f"name='{name}'"):
                    if version.tags.get("llamatuner.digest") == model.digest:
                        return f"{name}/{version.version}"
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                _create_registered_model(client, name)
            _set_tracking_uri(tracking_uri(self._home))
            tags = {
                "llamatuner.digest": model.digest,
                "llamatuner.key": model.key,
                "llamatuner.artifact": f"{model.step}/{model.path.name}",
            }
            logged = mlflow.create_external_model(
                name=name,
                source_run_id=run_id,
                experiment_id=self._experiment,
                params={k: str(v) for k, v in params.items()},
                tags=tags,
                model_type="causal-lm",
            )
            version = client.create_model_version(
                name, f"models:/{logged.model_id}", run_id, tags=tags, model_id=logged.model_id
            )
            return f"{name}/{version.version}"

        with locked(self._home.locks / "mlflow-register.lock"):  # two runs with one model would register it twice
            found: str | None = self._try(action)
        return found


def mlflow_client(home: Home) -> Any:
    """A client of the runs and the model registry that runs of this home use."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # what fails is raised, and said by us
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # which is for one JSON object
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(home)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _set_tracking_uri(uri: str) -> None:
    """Tell MLflow's functions where runs are kept, and leave the environment as it was: MLflow writes the address into
    it, where the next run of this process, whose home may be another, would take it for a server that somebody set."""
    import mlflow

    before = os.environ.get(TRACKING_URI)
    mlflow.set_tracking_uri(uri)
    if before is None:
        os.environ.pop(TRACKING_URI, None)
    else:
        os.environ[TRACKING_URI] = before


def _create_registered_model(client: Any, name: str) -> None:
    """Make a registered model, unless another machine just did."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


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
        status: FAILED or KILLED.
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
