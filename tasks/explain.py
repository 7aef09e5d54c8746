"""Why a step is not a hit: field by field, against the nearest artifact made before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tasks.artifacts import Artifact
from tasks.steps import Ready

ABSENT = object()
DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")  # of which the beginning is enough to tell two apart
LONGEST_VALUE = 60  # characters; templates and lists are cut in the middle of a sentence


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings, also in lists, as dotted paths.

    >>> flatten({"a": {"b": 1}, "c": [2], "d": [{"e": 3}]})
    {'a.b': 1, 'c': [2], 'd.0.e': 3}
    """
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for name, item in value.items():
            flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: value}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What changed, one line a field: `cutoff_len 1024 → 2048`."""
    old, new = flatten(before), flatten(after)
    lines = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name, ABSENT), new.get(name, ABSENT)
        if was != now or type(was) is not type(now):
            lines.append(f"{name} {_short(was)} → {_short(now)}")
    return lines


def _short(value: Any) -> str:
    text = "unset" if value is ABSENT else DIGEST.sub(r"\1…", str(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def nearest(ready: Ready, label: str, artifacts: Iterable[Artifact]) -> tuple[Artifact, list[str]] | None:
    """The artifact of the same step that differs in the fewest fields, and those fields.

    Args:
        ready: the step looked for.
        label: its name; of equally near artifacts one of the same name is taken, then the newest.
        artifacts: candidates, newest first.
    """
    best: tuple[tuple[int, bool], Artifact, list[str]] | None = None
    for artifact in artifacts:
        if artifact.step != ready.payload["step"]:
            continue
        lines = explain(artifact, ready)
        rank = (len(lines), artifact.manifest.get("label") != label)
        if best is None or rank < best[0]:
            best = (rank, artifact, lines)
    return (best[1], best[2]) if best else None


def explain(artifact: Artifact, ready: Ready) -> list[str]:
    """What differs between an artifact and a step looked for: settings, inputs, step version, packages."""
    manifest = artifact.manifest
    lines = differences(manifest["identity"], ready.payload["identity"])
    for name in sorted(manifest["inputs"].keys() | ready.digests.keys()):
        was, now = manifest["inputs"].get(name, {}).get("digest"), ready.digests.get(name)
        if was != now:
            lines.append(f"input {name} {'changed' if was and now else 'added' if now else 'removed'}")
    if manifest["step_version"] != ready.payload["step_version"]:
        lines.append(f"step version {manifest['step_version']} → {ready.payload['step_version']}")
    lines += [f"package {line}" for line in differences(manifest["packages"], ready.payload["packages"])]
    return lines
