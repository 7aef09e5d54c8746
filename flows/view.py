"""What a person sees while a pipeline runs: a live display in a terminal, lines in a log.

One decision: everything goes to one stream, standard error with `--json`, so that standard output can hold one JSON
object; and the same events make both forms.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tasks.steps import Outcome, Step

LOG_SECONDS = 15.0  # between two progress lines of one step in a log


class View(Protocol):
    """What the run tells."""

    def say(self, text: str) -> None:
        """A sentence about the whole run."""

    def started(self, step: Step) -> None:
        """A step begins."""

    def event(self, step: Step, event: dict[str, Any]) -> None:
        """A `note`, `progress` or `metrics` event of a step."""

    def ended(self, step: Step, outcome: Outcome) -> None:
        """A step is done."""

    def failed(self, step: Step, error: BaseException) -> None:
        """A step failed or was stopped."""

    def close(self) -> None:
        """Nothing more will come."""


def numbers(event: dict[str, Any]) -> str:
    """Loss and speed of a progress event, or score and KL: `loss 1.234  210 tok/s`, `score 0.512  KL 1.20`."""
    parts = []
    if event.get("score") is not None:
        parts.append(f"score {event['score']:.3f}  KL {event['kl']:.2f}")
    elif event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)


DETAILS = {
    "grad_norm": "grad norm {:.3g}",
    "learning_rate": "lr {:.2g}",
    "trained_tokens_per_second": "{:,.0f} trained tok/s",
    "samples_per_second": "{:.3g} samples/s",
    "peak_memory_gib": "peak {:.2f} GiB",
    "mfu": "MFU {:.0%}",
}


def details(event: dict[str, Any]) -> str:
    """The other numbers of a progress event of training, as far as it has them.

    >>> details({"grad_norm": 0.5123, "learning_rate": 1e-4, "trained_tokens_per_second": 180.4, "mfu": 0.41})
    'grad norm 0.512  lr 0.0001  180 trained tok/s  MFU 41%'
    """
    return "  ".join(form.format(event[name]) for name, form in DETAILS.items() if event.get(name) is not None)


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(0.4), duration(75), duration(3700)
    ('0.4 s', '1 min 15 s', '1 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def done_line(step: Step, outcome: Outcome) -> str:
    """How a step ended, in one line."""
    if outcome.state == "cached":
        return f"{step.title:<34} cached   {outcome.artifact.path.name}"
    resumed = f", resumed from step {outcome.resumed_from}" if outcome.resumed_from else ""
    return f"{step.title:<34} done     {duration(outcome.seconds)}{resumed}"


class LogView:
    """Plain lines, for logs and pipes.

    Args:
        write: takes one line.
        notes: whether notes of steps are written.
    """

    def __init__(self, write: Callable[[str], None], notes: bool = True) -> None:
        self._notes = notes
        self._write, self._last, self._lock = write, dict[str, float](), threading.Lock()
        self._begun: dict[str, tuple[float, int]] = {}

    def say(self, text: str) -> None:
        self._write(text)

    def started(self, step: Step) -> None:
        self._write(f"{step.title:<34} started")

    def event(self, step: Step, event: dict[str, Any]) -> None:
        if event["kind"] == "note" and self._notes:
            self._write(f"{step.title}: {event['text']}")
        if event["kind"] != "progress" or not event.get("total"):
            return
        with self._lock:
            now = time.monotonic()
            begun, first = self._begun.setdefault(step.title, (now, event["step"]))
            if now - self._last.get(step.title, begun) < LOG_SECONDS:
                self._last.setdefault(step.title, begun)
                return
            self._last[step.title] = now
        done, total = event["step"], event["total"]
        rate = (done - first) / (now - begun)
        left = f"  ETA {duration((total - done) / rate)}" if rate > 0 else ""
        self._write(f"{step.title:<34} {done}/{total}  {numbers(event)}{left}")  # 80 columns; MLflow has the rest

    def ended(self, step: Step, outcome: Outcome) -> None:
        self._write(done_line(step, outcome))

    def failed(self, step: Step, error: BaseException) -> None:
        word = "failed" if isinstance(error, Exception) else "stopped"
        self._write(f"{step.title:<34} {word}")

    def close(self) -> None:
        self._last.clear()


class _Numbers(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("numbers", ""), style="cyan")


class _Bars(Progress):
    """Bars, and below them a line with the other numbers of each training."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields.get("details"):
                yield Text(f"  {task.fields['details']}", style="dim")


class TerminalView:
    """Bars for what runs now, a line for what is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bars: dict[str, TaskID] = {}
        self._progress = _Bars(
            TextColumn("{task.description:<26}", table_column=None),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[count]}"),
            _Numbers(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._progress.start()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def started(self, step: Step) -> None:
        with self._lock:
            self._bars[step.title] = self._progress.add_task(step.title, total=None, count="", numbers="")

    def event(self, step: Step, event: dict[str, Any]) -> None:
        bar = self._bars.get(step.title)
        if event["kind"] == "note":
            self._console.print(f"  {step.title}: {event['text']}", style="dim", highlight=False, markup=False)
        elif event["kind"] == "progress" and bar is not None:
            total = event.get("total") or None
            count = f"{event['step']}/{total}" if total else f"{event['step']}"
            more = details(event)
            self._progress.update(
                bar, completed=event["step"], total=total, count=count, numbers=numbers(event), details=more
            )

    def ended(self, step: Step, outcome: Outcome) -> None:
        self._remove(step)
        mark, style = ("=", "dim") if outcome.state == "cached" else ("+", "green")
        self._console.print(Text(f"{mark} {done_line(step, outcome)}", style=style))

    def failed(self, step: Step, error: BaseException) -> None:
        self._remove(step)
        word = "failed" if isinstance(error, Exception) else "stopped"
        self._console.print(Text(f"! {step.title:<34} {word}", style="red"))

    def _remove(self, step: Step) -> None:
        with self._lock:
            bar = self._bars.pop(step.title, None)
            if bar is not None:
                self._progress.remove_task(bar)

    def close(self) -> None:
        self._progress.stop()


class MadeView:
    """Tells what is made, and nothing of what is there already: for runs that share most of their steps.

    Args:
        view: is told.
    """

    def __init__(self, view: View) -> None:
        self._view, self._untold, self._lock = view, set[str](), threading.Lock()

    def say(self, text: str) -> None:
        self._view.say(text)

    def started(self, step: Step) -> None:
        with self._lock:
            self._untold.add(step.title)

    def _tell(self, step: Step) -> None:
        with self._lock:
            untold = step.title in self._untold
            self._untold.discard(step.title)
        if untold:
            self._view.started(step)

    def event(self, step: Step, event: dict[str, Any]) -> None:
        self._tell(step)
        self._view.event(step, event)

    def ended(self, step: Step, outcome: Outcome) -> None:
        if outcome.state == "cached" and step.title in self._untold:
            return
        self._tell(step)
        self._view.ended(step, outcome)

    def failed(self, step: Step, error: BaseException) -> None:
        self._tell(step)
        self._view.failed(step, error)

    def close(self) -> None:
        self._view.close()


def make_view(console: Console) -> View:
    """The live display where there is a terminal, lines elsewhere."""
    if console.is_terminal:
        return TerminalView(console)

    def write(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return LogView(write)
