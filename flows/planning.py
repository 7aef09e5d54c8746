"""The plan: what would run, and why. Reads manifests and digests only; no server, and no network but that of the shared
store, where there is one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from flows.estimates import estimate_planned
from flows.graph import Pipeline
from tasks.artifacts import Artifact, Store, damage, read_artifact
from tasks.digests import DigestMemory
from tasks.explain import nearest
from tasks.manifests import version_drift
from tasks.sharing import known
from tasks.steps import Input, Ready, Step, prepare
from tasks.training_estimate import Estimate


@dataclass(frozen=True)
class PlannedStep:
    """One line of a plan."""

    step: Step
    key: str | None
    state: str
    """`cached`, `shared` (in the shared store, not here), `run`, `resume` (an interrupted attempt left something) or
    `unknown` (waits for an earlier step)."""
    why: tuple[str, ...]
    artifact: Artifact | None
    """In this home."""
    estimate: Estimate | None = None
    """Of a training step that is not done."""
    shared: Artifact | None = None
    """In the shared store only: its manifest, and no files."""

    @property
    def made(self) -> bool:
        """Whether its artifact is there, in this home or in the shared store."""
        return self.state in ("cached", "shared")

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        path = str(self.artifact.path) if self.artifact else None
        return {
            "stage": self.step.stage,
            "step": self.step.name,
            "key": self.key,
            "state": self.state,
            "why": list(self.why),
            "artifact": path,
            "estimate": self.estimate.as_json() if self.estimate else None,
        }


def plan(pipeline: Pipeline, store: Store) -> list[PlannedStep]:
    """What each step would do now."""
    memory = DigestMemory(store.home.digests)
    everything: list[Artifact] | None = None
    lines: list[PlannedStep] = []
    for step in pipeline.steps:
        ready = prepare(step, store, memory)
        if ready is None:
            lines.append(PlannedStep(step, None, "unknown", (f"waits for {', '.join(_missing(step, lines))}",), None))
            continue
        artifact = store.find(step.kind, ready.key)
        if artifact:
            drift = version_drift(artifact)
            why = (f"made with other versions: {', '.join(drift)}",) if drift else ()
            lines.append(PlannedStep(step, ready.key, "cached", why, artifact))
            continue
        shared = known(store, step.kind, ready.key) if store.shared else None
        if shared:
            lines.append(PlannedStep(step, ready.key, "shared", ("made on another machine",), None, shared=shared))
            continue
        if everything is None:
            everything = list(store.all())
        scratch = store.work_folder(step.kind, ready.key) / "scratch"
        state = "resume" if scratch.is_dir() and any(scratch.iterdir()) else "run"
        lines.append(PlannedStep(step, ready.key, state, tuple(_why(step, ready, store, everything)), None))
    made = {id(line.step): line.artifact for line in lines if line.artifact}
    return [
        replace(line, estimate=estimate_planned(line.step, made))
        if line.step.kind == "train" and not line.made
        else line
        for line in lines
    ]


def _missing(step: Step, lines: list[PlannedStep]) -> list[str]:
    made = {id(line.step) for line in lines if line.made}
    sources = [wanted.source for wanted in step.inputs.values() if isinstance(wanted, Input)]
    return [s.title for s in sources if isinstance(s, Step) and id(s) not in made]


def _why(step: Step, ready: Ready, store: Store, everything: list[Artifact]) -> list[str]:
    """Damaged, never made, or what differs from the nearest artifact made before."""
    for path in (store.home.artifacts / step.kind).glob(f"*-{ready.key[:12]}"):
        artifact = read_artifact(path)
        reason = "manifest.json is missing or unreadable" if artifact is None else damage(artifact)
        if reason:
            return [f"the artifact is damaged: {reason}"]
    # of other data or another stage everything differs, which explains nothing
    found = nearest(ready, step.label, [each for each in everything if each.manifest.get("label") == step.label])
    if found is None:
        return ["not made before"]
    artifact, lines = found
    return [_readable(step, line) for line in lines] or [f"its artifact {artifact.path.name} was moved"]


def _readable(step: Step, line: str) -> str:
    """What differs, with the name of a data set in place of its files' digests."""
    found = re.match(r"sources\.(\d+)\.files ", line)
    names = step.runtime.get("names", ())
    return f"{names[int(found[1])]} changed" if found and int(found[1]) < len(names) else line
