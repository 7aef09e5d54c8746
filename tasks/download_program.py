"""The program that downloads data sets: from the Hugging Face hub, from ModelScope, or one file by its URL.

One decision: only data files are asked for, never scripts or archives, and they are named by the commit that the
revision pointed to when it was asked, so that all of them are of one version.

Run as `python -m tasks.download_program SPEC.json`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from registry.data_registry import DATASETS
from registry.errors import InputError, Problem
from tasks.digests import sha256_file
from tasks.download import FILES, SOURCE
from tasks.download_url import fetch_url
from tasks.hub import HubUnreachable, explain_hub, hub_endpoint
from tasks.hub_files import Wanted, choose_files
from tasks.program import Events, ProgramError, Spec, main

ASK_SECONDS = 30.0
README = "README.md"


def work(spec: Spec, events: Events) -> None:
    """Download what the settings name.

    Raises:
        ProgramError: `network` when the other side cannot be reached.
        InputError: it says no, or has nothing of what was asked for.
    """
    fetch = {"hub": fetch_hub, "modelscope": fetch_modelscope, "url": _fetch_one}[spec.settings["kind"]]
    (Path(spec.output) / FILES).mkdir(exist_ok=True)
    try:
        found = fetch(spec, events)
    except HubUnreachable as error:
        cure = "Check the network, set HF_ENDPOINT to a hub in reach, or download the files and name them."
        message = f"{spec.runtime['where']}: {spec.settings['address']} cannot be reached ({error})"
        if type(error.__cause__).__name__ == "OfflineModeIsEnabled":
            raise InputError(Problem("", message, cure)) from error  # asked for: trying again would not help
        raise ProgramError("network", f"{message}. {cure}") from error
    path = Path(spec.output) / SOURCE
    path.parent.mkdir(exist_ok=True)
    asked = {key: value for key, value in spec.settings.items() if value is not None}
    path.write_text(json.dumps({**asked, **found}, indent=1) + "\n", encoding="utf-8")


def fetch_hub(spec: Spec, events: Events) -> dict[str, Any]:
    """Download from the Hugging Face hub; commit and files.

    Raises:
        HubUnreachable: the connection failed.
        InputError: the hub says no, or has nothing of what was asked for.
    """
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    repo, revision = spec.settings["address"], spec.settings["revision"] or "main"
    try:
        return _from_hub(spec, events, repo, revision)
    except (InputError, ProgramError):
        raise
    except Exception as error:  # noqa: BLE001 - every one is raised again, with its meaning
        hub_ids = [str(entry.values["hf_hub_url"]) for entry in DATASETS.values() if "hf_hub_url" in entry.values]
        explain_hub(error, repo, revision, spec.runtime["where"], "revision", hub_ids)


def _from_hub(spec: Spec, events: Events, repo: str, revision: str) -> dict[str, Any]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.hf_api import RepoFile

    api, folder = HfApi(endpoint=hub_endpoint()), Path(spec.scratch) / "hub"
    kind: dict[str, Any] = {"repo_type": "dataset"}
    commit = str(api.repo_info(repo, revision=revision, timeout=ASK_SECONDS, **kind).sha)
    tree = api.list_repo_tree(repo, revision=commit, recursive=True, **kind)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def get(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=commit, local_dir=folder, endpoint=hub_endpoint(), **kind))

    readme = get(README).read_text(encoding="utf-8", errors="replace") if README in files else None
    chosen = choose_files(files, readme, _wanted(spec))
    total = sum(files[name].size for name in chosen)
    kept = []
    with _progress(events, folder, total):
        for number, name in enumerate(chosen, 1):
            events.note(f"{repo}: file {number} of {len(chosen)}, {name}")
            path, lfs = get(name), files[name].lfs
            if lfs and sha256_file(path) != lfs.sha256:
                path.unlink()
                raise ProgramError("network", f"{repo}: {name} was damaged on its way. It was not used.")
            kept.append({"name": name, "size": path.stat().st_size, "etag": lfs.sha256 if lfs else files[name].blob_id})
    _take(folder, chosen, Path(spec.output))
    return {"commit": commit, "files": kept}


def fetch_modelscope(spec: Spec, events: Events) -> dict[str, Any]:
    """Download from ModelScope with its own client; files, and the revision that was asked for.

    Raises:
        HubUnreachable: the connection failed.
        ProgramError: `network`: a file came damaged.
        InputError: the package is not installed; ModelScope says no, or has nothing of what was asked for.
    """
    where, repo = spec.runtime["where"], spec.settings["address"]
    try:
        from modelscope_hub.errors import APIError, FileIntegrityError, HubError, RateLimitError, ServerError
    except ImportError as error:
        rule, cure = "ModelScope needs the package modelscope-hub", "Install it: pip install 'llamatuner[modelscope]'"
        raise InputError(Problem(where, rule, cure)) from error
    try:
        return _from_modelscope(spec, events, repo, spec.settings["revision"] or "master")
    except (RateLimitError, ServerError) as error:
        raise HubUnreachable(f"ModelScope: {error.message}") from error
    except APIError as error:
        rule = f"{repo} is not on ModelScope, or not for this person ({error.message})"
        raise InputError(Problem(where, rule, "Check name and revision; set MODELSCOPE_API_TOKEN.")) from error
    except FileIntegrityError as error:
        raise ProgramError("network", f"{repo} was damaged on its way, and was not used: {error.message}") from error
    except HubError as error:
        raise HubUnreachable(f"ModelScope: {error}") from error


def _from_modelscope(spec: Spec, events: Events, repo: str, revision: str) -> dict[str, Any]:
    from modelscope_hub import HubApi

    api, folder = HubApi(), Path(spec.scratch) / "modelscope"
    files = {entry.path: entry for entry in api.list_repo_files(repo, "dataset", revision=revision) if not entry.is_dir}

    def get(name: str) -> Path:
        entry = files[name]
        return api.download_file(
            repo,
            "dataset",
            name,
            revision=revision,
            local_dir=folder,
            expected_sha256=entry.sha256,
            file_size=entry.size,
        )

    readme = get(README).read_text(encoding="utf-8", errors="replace") if README in files else None
    chosen = choose_files(files, readme, _wanted(spec))
    kept = []
    with _progress(events, folder, sum(files[name].size for name in chosen)):
        for number, name in enumerate(chosen, 1):
            events.note(f"{repo}: file {number} of {len(chosen)}, {name}")
            etag = files[name].sha256 or files[name].blob_id
            kept.append({"name": name, "size": get(name).stat().st_size, "etag": etag})
    _take(folder, chosen, Path(spec.output))
    return {"commit": None, "files": kept}


def _fetch_one(spec: Spec, events: Events) -> dict[str, Any]:
    folder = Path(spec.scratch) / "url"
    folder.mkdir(exist_ok=True)
    found = fetch_url(spec.settings["address"], folder, spec.runtime["where"], events)
    _take(folder, [found["name"]], Path(spec.output))
    return {"files": [found]}


def _wanted(spec: Spec) -> Wanted:
    asked = spec.settings
    return Wanted(asked["address"], asked["subset"], asked["split"], asked["folder"], spec.runtime["where"])


def _take(folder: Path, names: Sequence[str], output: Path) -> None:
    """Move whole files into the artifact."""
    for name in names:
        (output / FILES / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(output / FILES / name)


@contextmanager
def _progress(events: Events, folder: Path, total: int) -> Iterator[None]:
    """Tell once a second how many bytes are here, whatever the client does."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(1.0):
            here = sum(path.stat().st_size for path in list(folder.rglob("*")) if path.is_file())
            events.emit("progress", step=min(here, total), total=total, unit="bytes")

    thread = threading.Thread(target=tell, name="download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    events.emit("progress", step=total, total=total, unit="bytes")


if __name__ == "__main__":
    main(work)
