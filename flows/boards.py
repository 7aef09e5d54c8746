"""TensorBoard and Weights & Biases beside MLflow: the curve of every stage that trains, as it trains.

One decision: MLflow has everything, these have what they draw. What goes wrong with one of them is said once; it is
told nothing from there on, and the training does not notice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from flows.graph import Pipeline, StageSteps
from registry.home import Home
from tasks.steps import Step

PROJECT = "llamatuner"  # where wandb_project says nothing
OFFLINE = ("offline", "disabled", "dryrun")


class Board(Protocol):
    """One curve on one of them."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of an optimizer step."""

    def close(self, good: bool) -> None:
        """The stage is done, or is not going to be."""


class TensorBoard:
    """A file of events in a folder.

    Args:
        folder: of the stage in this run.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar for each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, good: bool) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run in a project; WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY and WANDB_BASE_URL of the environment hold.

    Args:
        folder: where it keeps its files.
        name: of the run, for people.
        project, group: what it belongs to.
        config: settings of the stage.
    """

    def __init__(self, folder: Path, name: str, project: str, group: str, config: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        # the program, its git state and the machine's load are not asked for, and could hold what nobody meant to send
        quiet = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, x_disable_stats=True, x_disable_meta=True
        )
        self._run = wandb.init(
            project=project,
            name=name,
            group=group,
            config=dict(config),
            dir=str(folder),
            reinit="create_new",  # stages can train side by side
            settings=quiet,
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One point for each."""
        self._run.log(dict(values), step=step)

    def close(self, good: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=0 if good else 1)


class Boards:
    """Those that a run's stages asked for with `report_to`.

    Args:
        pipeline: what runs.
        home: where their files lie.
        run: id of the run's record.
        say: told where the curves are, and what went wrong.
        config: a stage → its settings, as MLflow shows them.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        home: Home,
        run: str,
        say: Callable[[str], None],
        config: Callable[[StageSteps], dict[str, Any]],
    ) -> None:
        self._pipeline, self._home, self._run, self._say, self._config = pipeline, home, run, say, config
        self._lock = threading.RLock()
        self._open: dict[str, dict[str, Board]] = {}
        self._given_up: set[str] = set()

    def event(self, step: Step, event: Mapping[str, Any]) -> None:
        """Metrics of a training; the first ones of a stage open what it reports to."""
        stage = self._pipeline.stages.get(step.stage)
        if event["kind"] != "metrics" or step.kind != "train" or stage is None:
            return
        values = {k: v for k, v in event["values"].items() if isinstance(v, int | float)}
        for name in stage.settings.runtime.report_to:
            with self._lock:
                self._try(name, partial(self._tell, stage, name, event["step"], values))

    def ended(self, stage: str, good: bool) -> None:
        """A training ended, well or not."""
        with self._lock:
            for name, board in self._open.pop(stage, {}).items():
                self._try(name, partial(board.close, good))

    def close(self) -> None:
        """Close whatever is open."""
        for stage in list(self._open):
            self.ended(stage, False)

    def _tell(self, stage: StageSteps, name: str, step: int, values: Mapping[str, float]) -> None:
        boards = self._open.setdefault(stage.settings.name, {})
        if name not in boards:
            boards[name] = self._new(stage, name)
        boards[name].metrics(step, values)

    def _new(self, stage: StageSteps, name: str) -> Board:
        recipe, runtime, label = self._pipeline.recipe.name, stage.settings.runtime, stage.settings.name
        if name == "tensorboard":
            runs = self._home.path / "tensorboard" / recipe
            self._say(f"{label}: the curve is in TensorBoard: tensorboard --logdir {runs}")
            return TensorBoard(runs / self._run / label)
        folder, project = self._home.path / "wandb", runtime.wandb_project or PROJECT
        board = WeightsAndBiases(
            folder, runtime.wandb_run_name or f"{recipe} {label}", project, self._run, self._config(stage)
        )
        offline = os.environ.get("WANDB_MODE") in OFFLINE
        where = f"{folder}; `wandb sync` sends it" if offline else f"project {project}"
        self._say(f"{label}: the curve is in Weights & Biases: {where}")
        return board

    def _try(self, name: str, do: Callable[[], None]) -> None:
        if name in self._given_up:
            return
        try:
            do()
        except Exception as error:  # noqa: BLE001 - whatever a board's library raises, the training goes on
            self._given_up.add(name)
            self._say(f"{name} is told nothing more: {type(error).__name__}: {error}")


def wandb_may_send() -> bool:
    """Whether W&B is told to stay here, or knows whose account it is: without, it would ask at the terminal."""
    if os.environ.get("WANDB_MODE") in OFFLINE or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return file.is_file() and netrc(str(file)).authenticators(host) is not None
    except (NetrcParseError, OSError):
        return False
