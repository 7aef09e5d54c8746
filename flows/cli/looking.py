"""Commands that look and start nothing: `plan`, `check`, `list`, `runs`, `env`."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

from rich.table import Table
from rich.text import Text

from flows.cli.output import people, print_json
from registry.benchmarks import BENCHMARKS, BenchmarkEntry
from registry.core import Registry
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from registry.templates import TemplateEntry

STYLES = {"cached": "dim", "shared": "dim", "run": "green", "resume": "cyan", "unknown": "yellow"}


def show_plan(name: str, overrides: list[str], as_json: bool, strict_versions: bool, show_launch: bool = False) -> None:
    """What each step would do, and why; of training, what it will take, and if asked how it is started."""
    from flows.estimates import memory_notes
    from flows.graph import build
    from flows.launching import launch_text
    from flows.planning import plan
    from registry.loading import load_recipe
    from tasks.artifacts import Store
    from tasks.sharing import tell

    console = people(as_json)
    recipe = load_recipe(name, overrides)
    home = Home.open()
    store = Store(home)
    lines = plan(build(recipe, home, strict_versions), store)
    tell(store, lambda text: console.print(Text(text, style="yellow")))
    counts = {state: sum(line.state == state for line in lines) for state in STYLES}
    table = Table(box=None, pad_edge=False)
    for column in ("step", "state", "why"):
        table.add_column(column, overflow="fold")
    for line in lines:
        state = Text(line.state, style=STYLES[line.state])
        table.add_row(Text(line.step.title), state, Text("; ".join(line.why)))
    console.print(table)
    console.print(Text(f"{recipe.name}: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)))
    for line in lines:
        if line.estimate:
            console.print(Text(f"{line.step.title}: {line.estimate.sentence()}"))
    notes = memory_notes(lines)
    for note in notes:
        console.print(Text(note, style="yellow"))
    trainings = [line for line in lines if show_launch and line.step.kind == "train"]
    launches = {line.step.title: launch_text(line, store) for line in trainings}
    for line in trainings:
        later = "" if line.key else " (its KEY is known when the steps before it are done)"
        console.print(Text(f"\n{line.step.title} is started with{later}", style="bold"))
        console.print(Text(launches[line.step.title]), soft_wrap=True, end="")
    if as_json:
        added = {title: {"launch": text} for title, text in launches.items()}
        steps = [line.as_json() | added.get(line.step.title, {}) for line in lines]
        print_json({"recipe": recipe.name, "steps": steps, "counts": counts, "notes": notes})


def check_recipe(name: str, overrides: list[str], as_json: bool) -> None:
    """Validate recipe, every row of its data, and this machine.

    Raises:
        InputError: everything found wrong.
    """
    from flows.graph import build
    from flows.planning import plan
    from flows.preflight import preflight
    from registry.loading import load_recipe
    from tasks.artifacts import Store
    from tasks.checking import count_usable
    from tasks.fetch import count_usable_rows, found_forms
    from tasks.preview import steps_behind
    from tasks.source_rows import source_list
    from tasks.steps import LocalFolder

    console = people(as_json)
    recipe = load_recipe(name, overrides)
    home = Home.open()
    pipeline = build(recipe, home)
    for note in preflight(pipeline, plan(pipeline, Store(home)), home):
        console.print(Text(note, style="yellow"))
    data = {}
    for step in pipeline.steps:
        if step.kind == "fetch" and not step.inputs:  # else its files are not here yet
            sources = source_list(step, {})
            for sentence in found_forms(step, sources, [source.form() for source in sources]):
                console.print(Text(sentence))
            usable, left_out = count_usable_rows(step)
            data[step.title] = {"rows": usable, "left_out": left_out}
            report = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            console.print(Text(f"{step.title}: {usable} rows" + (f", left out: {report}" if report else "")))
    for step in pipeline.steps:
        base = step.inputs["base"].source if step.kind == "tokenize" else None
        # else the model's template and tokenizer, or the rows, are not here yet
        if isinstance(base, LocalFolder) and not steps_behind(step)[0].inputs:
            data[step.title] = count_usable(step, base.path)
    for name, stage in pipeline.stages.items():
        batch, nodes = stage.settings.train, stage.trained.identity["train"].get("nnodes", 1)
        console.print(
            Text(
                f"{name}: {batch.per_device_train_batch_size} per device"
                f" x {batch.gradient_accumulation_steps} accumulation"
                f" x {batch.nproc_per_node} processes{f' x {nodes} machines' if nodes > 1 else ''}"
                f" = {batch.global_batch_size() * nodes} sequences per optimizer step"
            )
        )
    console.print(Text(f"{recipe.name}: good", style="green"))
    if as_json:
        print_json({"recipe": recipe.name, "valid": True, "data": data})


def registries() -> dict[str, Registry[Any]]:
    """Everything known by name."""
    from registry.data_registry import DATASETS
    from registry.models import MODELS
    from registry.recipes import RECIPES
    from registry.stages import METHODS, STAGES
    from registry.templates import TEMPLATES

    return {
        "models": MODELS,
        "datasets": DATASETS,
        "stages": STAGES,
        "methods": METHODS,
        "templates": TEMPLATES,
        "benchmarks": BENCHMARKS,
        "recipes": RECIPES,
    }


def list_registries(kind: str | None, as_json: bool) -> None:
    """Names and descriptions.

    Raises:
        InputError: no registry of that name.
    """
    found = registries()
    if kind is not None and kind not in found:
        raise InputError(Problem("list", f"{kind!r} cannot be listed", did_you_mean(kind, list(found))))
    shown = {name: entries for name, entries in found.items() if kind in (None, name)}
    described = {name: {key: _description(entry) for key, entry in entries.items()} for name, entries in shown.items()}
    console = people(as_json)
    for name, entries in described.items():
        console.print(Text(name, style="bold"))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(width=26)
        table.add_column()
        for key, description in entries.items():
            table.add_row(Text(f"  {key}"), Text(description))
        console.print(table)
    if as_json:
        print_json(described)


def _description(entry: Any) -> str:
    """The entry's own words; of a template its models and stop words too, of a benchmark its files; of a file, its
    first comment line."""
    if isinstance(entry, TemplateEntry | BenchmarkEntry):
        return entry.summary
    if hasattr(entry, "description"):
        return str(entry.description)
    first = entry.read_text(encoding="utf-8").splitlines()[0]
    return first.strip("{}#- ")


def list_runs(limit: int, as_json: bool) -> None:
    """Recent runs, newest first; one whose process is gone is shown as crashed."""
    from flows.run_records import records

    console = people(as_json)
    found = []
    for record in records(Home.default()):
        values = dict(record.values)
        if record.died():
            values["status"] = "crashed"
        found.append({key: value for key, value in values.items() if not key.startswith("pid")})
        if len(found) == limit:
            break
    for values in found:
        results = [
            f"{stage} {metric}={one['value'] if isinstance(one, dict) else one:.4g}"  # older ones: a number
            for stage, metrics in values.get("results", {}).items()
            for metric, one in metrics.items()
            if metric.startswith(("perplexity.", "reward_accuracy."))
        ]
        steps = values.get("steps", [])
        ran = sum(step["state"] == "ran" for step in steps)
        made = f"{ran} of {len(steps)} steps made"
        if "trials" in values:
            made = f"{values['trials']['done']} of {values['trials']['of']} trials done"
        console.print(Text(f"{values['id']}  {values['recipe']:<16} {values['status']:<10} {made}"))
        for result in results:
            console.print(Text(f"    {result}", style="dim"))
    if not found:
        console.print("no runs yet")
    if as_json:
        print_json({"runs": found})


def show_environment(as_json: bool) -> None:
    """What a bug report needs: versions, devices, memory, paths. No variable's value but our own paths."""
    import psutil

    from flows.services import without_credentials
    from registry.store_url import VARIABLE as STORE
    from tasks.devices import cuda_devices
    from tasks.servers import PREFECT, address
    from tasks.steps import RECORDED
    from tasks.tracking import tracking_uri
    from tasks.versions import git_commit, package_version

    home = Home.default()
    parent = next(path for path in [home.path, *home.path.parents] if path.exists())
    values: dict[str, Any] = {
        "llamatuner": package_version("llamatuner"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in (*RECORDED, "prefect", "mlflow", "pydantic", "datasets")},
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "memory_free_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "devices": [f"{d.name}, {d.memory_mib} MiB, compute capability {d.capability}" for d in cuda_devices()],
        "home": str(home.path),
        "home_free_gib": round(shutil.disk_usage(parent).free / 2**30, 1),
        "shared_store": without_credentials(os.environ.get(STORE) or "none"),
        "prefect_api": without_credentials(os.environ.get("PREFECT_API_URL") or address(home, PREFECT) or "embedded"),
        "mlflow_tracking": without_credentials(tracking_uri(home)),
    }
    console = people(as_json)
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {text}" for key, text in value.items())
        console.print(Text(f"{name:<16} {', '.join(value) or 'none' if isinstance(value, list) else value}"))
    if as_json:
        print_json(values)
