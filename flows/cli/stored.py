"""`artifacts`: ls, show, why, verify, gc."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from flows.cli.output import DONE, FAILED, people, print_json
from flows.run_records import RUNNING, records
from registry.errors import InputError, Problem
from registry.home import Home
from registry.store_url import store_url
from tasks.artifacts import Artifact, Store, damage, remove_folder
from tasks.chunks import forget, remove_unused
from tasks.explain import differences
from tasks.launchers.choice import end_left
from tasks.locks import try_lock


def _find(key: str, store: Store) -> Artifact:
    """The artifact whose key begins so, or whose folder has that name.

    Raises:
        InputError: none, or several.
    """
    found = [a for a in store.all() if a.key.startswith(key) or a.path.name == key or f"{a.step}/{a.path.name}" == key]
    if len(found) != 1:
        rule = f"{len(found)} artifacts begin with {key!r}" if found else f"no artifact begins with {key!r}"
        raise InputError(Problem("artifacts", rule, "See `llamatuner artifacts ls`."))
    return found[0]


def _line(artifact: Artifact) -> dict[str, Any]:
    return {
        "key": artifact.key,
        "digest": artifact.digest,
        "step": artifact.step,
        "name": artifact.path.name,
        "path": str(artifact.path),
        "size": artifact.size,
        "created": artifact.manifest["created"],
        "state": damage(artifact) or "whole",
    }


def list_artifacts(as_json: bool) -> None:
    """All artifacts, newest first."""
    console = people(as_json)
    lines = [_line(artifact) for artifact in Store(Home.default()).all()]
    for line in lines:
        state = "" if line["state"] == "whole" else f"  damaged: {line['state']}"
        text = f"{line['created'][:16]}  {line['step']:<9} {line['size'] / 1e6:>9.1f} MB  {line['name']}{state}"
        console.print(Text(text, style="red" if state else ""), soft_wrap=True)
    if not lines:
        console.print("no artifacts yet")
    _say_of_shared(console, "has artifacts of its own, which are not listed")
    if as_json:
        print_json({"artifacts": lines})


def show_artifact(key: str, as_json: bool) -> None:
    """The manifest of one artifact."""
    import json

    artifact = _find(key, Store(Home.default()))
    console = people(as_json)
    console.print(Text(str(artifact.path), style="bold"), soft_wrap=True)
    console.print(json.dumps(artifact.manifest, ensure_ascii=False, indent=2), markup=False, soft_wrap=True)
    if as_json:
        print_json(artifact.manifest | {"path": str(artifact.path)})


def explain_artifact(key: str, as_json: bool) -> None:
    """What made this artifact differ from the nearest other one of its step."""
    store = Store(Home.default())
    artifact = _find(key, store)
    others = [other for other in store.all() if other.step == artifact.step and other.key != artifact.key]
    label = artifact.manifest["label"]
    found = [
        (len(lines), other.manifest["label"] != label, lines, other)
        for other in others
        for lines in [_differ(other, artifact)]
    ]
    console = people(as_json)
    if not found:
        console.print(Text(f"{artifact.step}/{artifact.path.name}: the only one of its step"))
        answer: dict[str, Any] = {"key": artifact.key, "nearest": None, "why": []}
    else:
        _, _, lines, other = min(found, key=lambda item: item[:2])  # of equally near ones that of the same data
        console.print(Text(f"{artifact.step}/{artifact.path.name} differs from {other.path.name} in"))
        for line in lines:
            console.print(Text(f"  {line}"))
        answer = {"key": artifact.key, "nearest": other.key, "why": lines}
    if as_json:
        print_json(answer)


def _differ(before: Artifact, after: Artifact) -> list[str]:
    """Settings, inputs, step version, packages, as far as they differ."""
    old, new = before.manifest, after.manifest
    inputs = [
        f"input {name} changed"
        for name in sorted(old["inputs"].keys() | new["inputs"].keys())
        if old["inputs"].get(name, {}).get("digest") != new["inputs"].get(name, {}).get("digest")
    ]
    other = [f"package {line}" for line in differences(old["packages"], new["packages"])]
    if old["step_version"] != new["step_version"]:
        other.append(f"step version {old['step_version']} → {new['step_version']}")
    return differences(old["identity"], new["identity"]) + inputs + other


def verify_artifacts(key: str | None, as_json: bool) -> int:
    """Read every file; 1 when something is damaged."""
    store = Store(Home.default())
    wanted = [_find(key, store)] if key else list(store.all())
    console = people(as_json)
    results = []
    for artifact in wanted:
        reason = damage(artifact, deep=True)
        if reason:
            forget(store.home, artifact.path)  # so that it is not made again of the same bytes
        results.append({"key": artifact.key, "path": str(artifact.path), "damage": reason})
        text = Text(f"{artifact.step}/{artifact.path.name}: {reason or 'whole'}", style="red" if reason else "")
        console.print(text, soft_wrap=True)
    damaged = sum(result["damage"] is not None for result in results)
    console.print(Text(f"{len(results)} checked, {damaged} damaged"))
    _say_of_shared(console, "was not read; what comes from there is checked when it comes")
    if as_json:
        print_json({"artifacts": results, "damaged": damaged})
    return FAILED if damaged else DONE


def collect_garbage(keep_runs: int, dry_run: bool, as_json: bool) -> None:
    """Remove what no kept run refers to: artifacts, unfinished work, damaged folders, chunks of data steps.

    Runs whose model was ever promoted are kept.

    What a running step holds the lock of is left alone, and nothing is removed while a run is going on that may
    be about to use it.

    Raises:
        InputError: a run of this home is going on.
    """
    home = Home.default()
    store = Store(home)
    kept: set[str] = set()
    seen: dict[str, int] = {}
    for record in records(home):
        if record.values["status"] == RUNNING and not record.died():
            rule = f"run {record.values['id']} is going on"
            raise InputError(Problem("artifacts gc", rule, "Wait for it, or stop it, then run gc again."))
        number, keys = seen.get(record.values["recipe"], 0), {step["key"] for step in record.values.get("steps", [])}
        keys |= set(record.values.get("kept", ()))  # a sweep's best trial
        if number < keep_runs and keys:
            seen[record.values["recipe"]] = number + 1
            kept |= keys
        elif record.values.get("promoted"):  # others may use it by its alias, now or after a way back
            kept |= keys
    freed, removed = 0, []
    going: list[Path] = []
    for artifact in list(store.all()):
        if artifact.key in kept:
            continue
        with try_lock(store.lock_path(artifact.key)) as held:
            if not held:
                continue
            removed.append(f"artifacts/{artifact.step}/{artifact.path.name}")
            freed += _own_bytes(artifact.path)
            going.append(artifact.path)
            if not dry_run:
                remove_folder(artifact.path)
    for folder in (home.work, home.damaged):
        for path in sorted(folder.glob("*")):
            removed.append(f"{folder.name}/{path.name}")
            freed += _own_bytes(path)
            going.append(path)
            if not dry_run:
                end_left(path)  # a job of a cluster would go on writing there
                remove_folder(path)
    chunks, size = remove_unused(home, going if dry_run else (), dry_run)
    console = people(as_json)
    for name in removed:
        console.print(Text(f"{'would remove' if dry_run else 'removed'} {name}"), soft_wrap=True)
    console.print(Text(f"{len(removed)} folders, {chunks} chunks, {(freed + size) / 1e6:,.1f} MB"))
    _say_of_shared(console, "is left alone")
    if as_json:
        print_json({"removed": removed, "chunks": chunks, "bytes": freed + size, "dry_run": dry_run})


def _say_of_shared(console: Console, what: str) -> None:
    """What a command that looks at this home does about the shared store, where there is one."""
    url = store_url()
    if url:
        console.print(Text(f"the shared store {url} {what}", style="dim"), soft_wrap=True)


def _own_bytes(folder: Path) -> int:
    """Bytes of the files that are in no other folder: chunks that several share go with the last."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum(file.st_size for file in found if file.st_nlink == 1)
