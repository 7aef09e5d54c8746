"""What MLflow is told, as data: one entry for one thing, which can be kept in a file and told later.

One decision: told twice is told once. A run is found again by a tag of its own, a point of a metric has the time at
which it was made, and everything else is overwritten by the same. So what was told when a process or a server died is
simply told again.
"""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.locks import locked

TRACKING_URI = "MLFLOW_TRACKING_URI"  # of the environment
OPENED_TAG = "llamatuner.opened"  # by which a run is found again that MLflow may have been told of

GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # of a run: another server's; deleted by somebody

Entry = dict[str, Any]
"""`do`: one of `DONE_BY`; `run`: of which run; and what belongs to it. All of it is JSON."""


@dataclass(frozen=True)
class Connection:
    """Where entries go."""

    client: Any
    """MLflow's."""
    experiment: str
    """Id of the experiment of all runs."""
    locks: Path
    """Folder of the locks of this home."""


def tell(to: Connection, entry: Entry) -> Any:
    """Tell one entry; what MLflow answers: the id of an opened run, `name/version` of a registered model.

    Raises:
        Whatever MLflow does; see `unreachable`.
    """
    return DONE_BY[entry["do"]](to, entry)


def unreachable(error: Exception) -> bool:
    """Whether the same may be taken another time: MLflow or its disk is not there, or too busy to answer."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (408, 429)
    return isinstance(error, OperationalError | OSError) and not isinstance(error, FileNotFoundError)


def _open(to: Connection, entry: Entry) -> str:
    """A run; one that MLflow was told of before is found by its tag."""
    mark = entry["tags"][OPENED_TAG]
    found = to.client.search_runs([to.experiment], f"tags.`{OPENED_TAG}` = '{mark}'") if entry.get("again") else []
    if found:
        return str(found[0].info.run_id)
    labels = entry["tags"] | ({"mlflow.parentRunId": entry["parent"]} if entry["parent"] else {})
    run = to.client.create_run(to.experiment, start_time=entry["time"], run_name=entry["name"], tags=labels)
    return str(run.info.run_id)


def _reopen(to: Connection, entry: Entry) -> bool:
    """A run that was ended, once more; whether it is there."""
    from mlflow.exceptions import MlflowException

    try:
        to.client.update_run(entry["run"], status="RUNNING")
    except MlflowException as error:
        if error.error_code in GONE:
            return False
        raise
    return True


def _end(to: Connection, entry: Entry) -> None:
    to.client.set_terminated(entry["run"], entry["status"], entry["time"])


def _params(to: Connection, entry: Entry) -> None:
    from mlflow.entities import Param

    to.client.log_batch(entry["run"], params=[Param(name, value) for name, value in entry["values"].items()])


def _metrics(to: Connection, entry: Entry) -> None:
    from mlflow.entities import Metric

    points = [Metric(name, value, entry["time"], entry["step"]) for name, value in entry["values"].items()]
    to.client.log_batch(entry["run"], metrics=points)


def _tags(to: Connection, entry: Entry) -> None:
    from mlflow.entities import RunTag

    to.client.log_batch(entry["run"], tags=[RunTag(name, value) for name, value in entry["values"].items()])


def _dictionary(to: Connection, entry: Entry) -> None:
    to.client.log_dict(entry["run"], entry["value"], entry["file"])


def _file(to: Connection, entry: Entry) -> None:
    to.client.log_artifact(entry["run"], entry["path"], entry["folder"])


def _content(to: Connection, entry: Entry) -> None:
    path = PurePosixPath(entry["file"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).write_bytes(base64.b64decode(entry["base64"]))
        to.client.log_artifact(
            entry["run"], str(Path(folder) / path.name), str(path.parent) if path.parent.name else None
        )


def _inputs(to: Connection, entry: Entry) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    given = [
        DatasetInput(
            Dataset(name=name, digest=digest[:36], source_type="local", source=source),
            [InputTag("mlflow.data.context", entry["context"])],
        )
        for name, (source, digest) in entry["datasets"].items()
    ]
    to.client.log_inputs(entry["run"], given)


def _register(to: Connection, entry: Entry) -> str:
    """A version of a model, by reference; the version there already when this digest is registered."""
    with locked(to.locks / "mlflow-register.lock"):  # two runs with one model would register it twice
        version = _registered(to.client, entry["name"], entry["tags"]["llamatuner.digest"])
        if version is None:
            version = _new_version(to, entry)
    registered = f"{entry['name']}/{version}"
    _tags(to, {"run": entry["run"], "values": {"llamatuner.model": registered}})
    return registered


def _registered(client: Any, name: str, digest: str) -> str | None:
    """The version of a registered model with this digest; the model is made when it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        _create_registered_model(client, name)
    found = (v for v in client.search_model_versions(f"name='{name}'") if v.tags.get("llamatuner.digest") == digest)
    version = next(found, None)
    return None if version is None else str(version.version)


def _create_registered_model(client: Any, name: str) -> None:
    """Make a registered model, unless another machine just did."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _new_version(to: Connection, entry: Entry) -> str:
    import mlflow

    name, tags = entry["name"], entry["tags"]
    _set_tracking_uri(to.client.tracking_uri)
    logged = mlflow.create_external_model(
        name=name,
        source_run_id=entry["run"],
        experiment_id=to.experiment,
        params=entry["params"],
        tags=tags,
        model_type="causal-lm",
    )
    source = f"models:/{logged.model_id}"
    version = to.client.create_model_version(name, source, entry["run"], tags=tags, model_id=logged.model_id)
    return str(version.version)


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


DONE_BY: Mapping[str, Callable[[Connection, Entry], Any]] = {
    "open": _open,
    "reopen": _reopen,
    "end": _end,
    "params": _params,
    "metrics": _metrics,
    "tags": _tags,
    "dictionary": _dictionary,
    "file": _file,
    "content": _content,
    "inputs": _inputs,
    "register": _register,
}
