"""What manifests say of how things were made: the settings that matter, data sets, versions; plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from registry.data_entries import name_of, safe_name
from registry.data_files import is_data
from tasks.artifacts import REPORT, Artifact
from tasks.download import FILES as DOWNLOADED
from tasks.download_url import shown_url
from tasks.fetch import FILES, KEPT_BACK, ROWS
from tasks.fingerprint import fingerprint

CHUNKS, JOINED = "chunks", "joined"
TEMPLATE_FILE = "chat_template.jinja"
Get = Callable[[str | None], Artifact | None]
"""The artifact of a key; None: gone."""


def facts(artifact: Artifact, get: Get) -> dict[str, Any]:
    """How an artifact was made.

    Args:
        artifact: of any step.
        get: finds what was downloaded for it.
    """
    manifest = artifact.manifest
    if artifact.step == "train":
        own = _training(artifact)
    elif artifact.step == "fetch":
        found = [{name: value for name, value in each.items() if name != CHUNKS} for each in sources(artifact, get)]
        own = {"sources": found, "left_out": manifest["counts"].get("left_out", {})}
    elif artifact.step == "download":
        own = _downloaded(artifact)
    elif artifact.step == "render":
        own = _rendering(artifact)
    elif artifact.step == "tokenize":
        own = _tokenizing(artifact)
    else:
        own = manifest["identity"] | manifest["counts"]
    return {
        "stage": manifest["stage"],
        **own,
        "created": manifest["created"],
        "seconds": manifest["seconds"],
        "git_commit": manifest.get("git_commit"),
        "python": manifest.get("python"),
        "packages": manifest.get("recorded_packages", {}) | manifest["packages"],
    }


def sources(artifact: Artifact, get: Get) -> list[dict[str, Any]]:
    """The data sets of a fetch artifact, in their order.

    Returns:
        Of each: `name`; `joined`, whether that is the names of all of them, because its own is not known; `files` as
        they were called; `digests` of the files; `rows` and `kept_back` (row counts); `rows_digest` as model cards have
        it; `chunks` (sha256 → rows, place of the file); `slice` and `most_rows` as asked for; `download`: what was
        downloaded, or None.
    """
    described, inputs = artifact.manifest["identity"]["sources"], artifact.manifest["inputs"]
    read = read_json(artifact.path / REPORT / FILES) or [[] for _ in described]
    parts = {part: read_json(artifact.path / f"{part}.json") or [] for part in (ROWS, KEPT_BACK)}
    names, found = list[str](), []
    for number, source in enumerate(described):
        own = {part: [each for each in entries if each["source"] == number] for part, entries in parts.items()}
        key = inputs.get(f"source{number}", {}).get("key")
        download = get(key)
        taken = {name: sha for name, (_, sha) in download.files.items()} if download else {}
        taken = {name: taken[name] for name in sorted(taken) if name.startswith(f"{DOWNLOADED}/") and is_data(name)}
        files = [*taken] or read[number]
        names.append(str(download.manifest["label"]) if download else safe_name(name_of(files[0])) if files else "")
        found.append(
            {
                "files": files,
                "digests": [*taken.values()] or source["files"],
                "rows": sum(each["rows"] for each in own[ROWS]),
                "kept_back": sum(each["rows"] for each in own[KEPT_BACK]),
                "rows_digest": fingerprint([each["sha256"] for each in own[ROWS]]) if own[ROWS] else None,
                CHUNKS: {each["sha256"]: (each["rows"], each["file"]) for part in own.values() for each in part},
                "slice": source["slice"],
                "most_rows": source["most_rows"],
                "download": _downloaded(download) if download else {"gone": key} if key else None,
            }
        )
    label = str(artifact.manifest["label"])
    if len(names) == 1:
        names = [label]
    known = "-".join(names) == label  # the label is all that is kept of the names in the recipe
    return [
        {"name": name if known else label, JOINED: not known} | each for name, each in zip(names, found, strict=True)
    ]


def _training(artifact: Artifact) -> dict[str, Any]:
    settings, counts = dict(artifact.manifest["identity"]["train"]), artifact.manifest["counts"]
    kind, method = settings.pop("stage"), settings.pop("finetuning_type")
    template = artifact.files.get(TEMPLATE_FILE)
    return {
        "kind": kind,
        "method": "qlora" if settings.get("quant_bit") else method,
        "settings": settings | {"packing": artifact.manifest["identity"]["packing"]},
        "numbers": {name: counts[name] for name in ("steps", "trained_tokens", "train_loss") if name in counts},
        "template_sha256": template[1] if template else None,
    }


def _downloaded(artifact: Artifact) -> dict[str, Any]:
    """What was downloaded, without what a URL can hold that is secret."""
    asked, counts = artifact.manifest["identity"], artifact.manifest["counts"]
    address = shown_url(asked["address"]) if asked["kind"] == "url" else asked["address"]
    return asked | counts | {"address": address}


def _rendering(artifact: Artifact) -> dict[str, Any]:
    identity = dict(artifact.manifest["identity"])
    text = identity.pop("template", None)
    return {"template_sha256": hashlib.sha256(text.encode()).hexdigest() if text else None, "settings": identity}


def _tokenizing(artifact: Artifact) -> dict[str, Any]:
    counts = artifact.manifest["counts"]
    wanted = ("rows", "sequences", "tokens", "trained_tokens", "truncated", "left_out")
    return {
        "settings": artifact.manifest["identity"],
        "numbers": {name: counts[name] for name in wanted if name in counts},
    }


def read_json(path: Path) -> Any:
    """A JSON file of an artifact; None where it is missing or damaged, which its state says."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
