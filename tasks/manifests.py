"""What the manifest of a step says: what it was made from, with what, when and how long it took."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import Artifact, read_artifact
from tasks.versions import package_versions, provenance

if TYPE_CHECKING:
    from tasks.steps import Ready, Step

RECORDED = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "jinja2", "pyarrow")


def manifest_of(step: Step, ready: Ready, counts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Everything but what the store fills in when it takes the artifact."""
    origins = {name: _origin(path) for name, path in ready.paths.items()}
    return {
        "key": ready.key,
        "step": step.kind,
        "stage": step.stage,
        "label": step.label,
        **{name: ready.payload[name] for name in ("step_version", "identity", "packages")},
        "inputs": {name: {"digest": ready.digests[name], **origins[name]} for name in sorted(ready.digests)},
        "recorded_packages": package_versions(RECORDED),
        "counts": counts,
        "seconds": round(seconds, 3),
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **provenance(),
    }


def _origin(path: Path) -> dict[str, Any]:
    """Where an input came from, for people: artifact folder and key, or the local folder."""
    artifact = read_artifact(path)
    if artifact is None:
        return {"folder": str(path)}
    return {"artifact": f"{artifact.step}/{path.name}", "key": artifact.key}


def version_drift(artifact: Artifact) -> list[str]:
    """Package versions that differ from those an artifact was made with, e.g. `torch 2.12.0 → 2.13.0`."""
    made_with: dict[str, str] = artifact.manifest.get("recorded_packages", {})
    now = package_versions(made_with)
    return [f"{name} {made_with[name]} → {now[name]}" for name in sorted(now) if made_with[name] != now[name]]
