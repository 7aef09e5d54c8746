"""What a word means to `lineage`: a model, or data.

One decision: everything that a word can mean is looked for, and when it means several things that is said, instead of
one kind of name hiding another. A path that is there is a file or folder of data or of a model, never a name.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from flows.lineage import Lineage
from flows.lineage_facts import CHUNKS, JOINED, sources
from flows.registrations import DIGEST_TAG, version_of
from flows.run_records import records
from registry.data_files import is_data
from registry.errors import InputError, Problem, did_you_mean
from tasks.artifacts import read_artifact
from tasks.cuts import Cut, Cuts
from tasks.digests import DigestMemory, blake3_file, sha256_file
from tasks.download import FILES as DOWNLOADED
from tasks.export import CARD
from tasks.raw_rows import Stretch
from tasks.reading import LINES, file_digest

WEIGHTS = ".safetensors"
CARD_KEY = re.compile(r"The weights here are those of .*?key `([0-9a-f]{64})`")
MLFLOW = "models:/"
SHORTEST = 4  # hex digits of a digest; fewer stand for too much
SAME_FILE, SAME_NAMELESS, SAME_ROWS = "this file", "the same file", "the same rows in another file"
MOST_MEANINGS = 6  # that are listed
Matched = tuple[dict[str, Any], set[str] | None]
"""A data set, see `flows.lineage_facts.sources`, and the digests of those files of it that are meant; None: all."""
HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class Model:
    """A model that was asked for."""

    key: str
    """Of its artifact."""
    notes: tuple[str, ...] = ()


@dataclass
class Data:
    """Data that were asked for."""

    digests: dict[str, str] = field(default_factory=dict)
    """Path → digest, of files."""
    whole: dict[str, str] = field(default_factory=dict)
    """Key of a fetch artifact that has them → how it is known."""
    partly: dict[str, str] = field(default_factory=dict)
    """Key of a fetch artifact that has some of them → which."""
    notes: list[str] = field(default_factory=list)


def find(asked: str, lineage: Lineage) -> Model | Data:
    """What is asked for.

    Args:
        asked: see docs/evaluation.md, "Lineage".
        lineage: of the home.

    Raises:
        InputError: it means nothing, or several things.
    """
    if asked.startswith(MLFLOW):
        return _registered(asked, lineage)
    path = Path(asked).expanduser()
    if path.exists() and (os.sep in asked or path.is_file()):
        return _at_path(path, lineage)
    meanings = [*_runs(asked, lineage), *_artifacts(asked, lineage), *_data_sets(asked, lineage)]
    if path.is_dir() and (_files(path, WEIGHTS) or _files(path)):
        meanings.append((f"the folder ./{asked}", _at_path(path, lineage)))
    if not meanings:
        rule = "no run, recipe, artifact, file or data set has that name"
        raise InputError(Problem(asked, rule, _cure(asked, lineage)))
    if len(meanings) > 1:
        named = [text for text, _ in meanings[:MOST_MEANINGS]]
        more = f" and {len(meanings) - len(named)} more" if len(named) < len(meanings) else ""
        rule = f"stands for {len(meanings)} things: {'; '.join(named)}{more}"
        raise InputError(Problem(asked, rule, "Name one: more of its key or id, RECIPE:STAGE, or the path."))
    return meanings[0][1]


def _cure(asked: str, lineage: Lineage) -> str:
    known = [name for record in records(lineage.home) for name in (record.values["recipe"], record.values["id"])]
    known += [source["name"] for fetched in lineage.fetched() for source in sources(fetched, lineage.get)]
    return did_you_mean(asked.partition(":")[0], list(dict.fromkeys(known)))


def _registered(asked: str, lineage: Lineage) -> Model:
    version = version_of(asked, lineage.home)
    key = version.tags.get("llamatuner.key")
    digest = version.tags.get(DIGEST_TAG)
    if key is None:
        raise InputError(Problem(asked, "was not registered by a run of LLamaTuner", "Name another version."))
    if lineage.get(key) is None:
        key = next((a.key for a in lineage.artifacts.values() if a.digest == digest), None)
    if key is None:
        rule = f"its artifact {version.tags.get('llamatuner.artifact')} is not in {lineage.home.path}"
        raise InputError(Problem(asked, rule, "Look in the home it was made in (LLAMATUNER_HOME)."))
    return Model(key)


def _runs(asked: str, lineage: Lineage) -> Iterator[tuple[str, Model]]:
    """Runs whose id begins so, else the newest completed run of that recipe."""
    wanted, _, stage = asked.partition(":")
    known = [record.values for record in records(lineage.home)]
    found = [values for values in known if wanted and values["id"].startswith(wanted)]
    done = [values for values in known if values["recipe"] == wanted and values["status"] == "completed"]
    for values in found or done[:1]:
        steps = [step for step in values.get("steps", []) if step["step"] in ("train", "merge") and step["key"]]
        stages = list(dict.fromkeys(step["stage"] for step in steps))
        if stage not in ("", *stages):
            rule = f"stage {stage!r} of run {values['id']} trained nothing"
            raise InputError(Problem(asked, rule, did_you_mean(stage, stages)))
        if not stages:
            continue
        # as `compare` has it: the last one that was measured
        measured = [step["stage"] for step in values["steps"] if step["step"] == "evaluate" and step["stage"] in stages]
        chosen = stage or (measured or stages)[-1]
        keys = [step["key"] for step in reversed(steps) if step["stage"] == chosen]
        yield f"run {values['id']} of {values['recipe']}", _first_there(asked, keys, lineage)


def _first_there(asked: str, keys: list[str], lineage: Lineage) -> Model:
    """Of merge and training the first that is there."""
    gone = [key for key in keys if lineage.get(key) is None]
    there = [key for key in keys if key not in gone]
    if not there:
        rule = f"what it made is gone (keys {', '.join(key[:12] for key in gone)})"
        raise InputError(Problem(asked, rule, "Run the recipe again."))
    notes = [f"the merged weights are gone (key {key[:12]}); shown is their adapter" for key in gone if key == keys[0]]
    return Model(there[0], tuple(notes))


def _artifacts(asked: str, lineage: Lineage) -> Iterator[tuple[str, Model | Data]]:
    for artifact in lineage.artifacts.values():
        names = (artifact.path.name, f"{artifact.step}/{artifact.path.name}")
        if asked in names or (HEX.fullmatch(asked) and artifact.key.startswith(asked)):
            text = f"artifact {names[1]}"
            if artifact.step == "fetch":
                data = Data(whole={artifact.key: "asked for"})
                yield text, _completed(data, [(each, None) for each in sources(artifact, lineage.get)], lineage)
            elif artifact.step == "download":
                files = {sha for name, (_, sha) in artifact.files.items() if name.startswith(f"{DOWNLOADED}/")}
                yield text, _having(files, Data(), lineage)
            else:
                yield text, Model(artifact.key)


def _data_sets(asked: str, lineage: Lineage) -> Iterator[tuple[str, Data]]:
    """Data sets by name, or by the beginning of a digest; all that have one digest are one meaning."""
    named: tuple[Data, list[Matched]] = Data(), []
    by_digest: dict[str, tuple[Data, list[Matched]]] = {}
    prefix = bool(HEX.fullmatch(asked)) and len(asked) >= SHORTEST
    for fetched in lineage.fetched():
        for source in sources(fetched, lineage.get):
            if _is_called(asked, source):
                named[0].whole[fetched.key] = "by name"
                named[1].append((source, None))
            for digest in filter(None, [*source["digests"], source["rows_digest"]] if prefix else ()):
                if digest.startswith(asked):
                    data, matched = by_digest.setdefault(digest, (Data(digests={"": digest}), []))
                    data.whole[fetched.key] = "by digest"
                    matched.append((source, {digest} if digest in source["digests"] else None))
    if named[0].whole:
        yield f"data set {asked}", _completed(*named, lineage)
    for digest, (data, matched) in by_digest.items():
        yield f"data of digest {digest[:12]}", _completed(data, matched, lineage)


def _is_called(asked: str, source: dict[str, Any]) -> bool:
    paths, download = [Path(file) for file in source["files"]], source["download"] or {}
    names = {source["name"], download.get("address"), *(path.name for path in paths)}
    if asked in names or str(Path(asked).absolute()) in source["files"]:
        return True
    return source[JOINED] and f"-{asked}-" in f"-{source['name']}-"


def _at_path(path: Path, lineage: Lineage) -> Model | Data:
    if path.is_file():
        return _of_files([path], lineage)
    artifact = read_artifact(path)
    if artifact and lineage.get(artifact.key):
        ((_, found),) = _artifacts(artifact.key, lineage)
        return found
    if weights := _files(path, WEIGHTS):
        return _exported(path, weights, lineage)
    if files := _files(path):
        return _of_files(files, lineage)
    raise InputError(Problem(str(path), "holds no data and no weights", "Name a file, or a folder of them."))


def _files(folder: Path, suffix: str = "") -> list[Path]:
    """The files with an ending in a folder; without one the data files, also in folders of it."""
    if suffix:
        return sorted(folder.glob(f"*{suffix}"))
    return sorted(file for file in folder.rglob("*") if file.is_file() and is_data(file.name))


def _exported(path: Path, weights: list[Path], lineage: Lineage) -> Model:
    """The model in a folder, by its weights; where they were written anew (dtype, parts), by what its card says.

    Raises:
        InputError: neither knows it.
    """
    found = {sha256_file(file) for file in weights}
    for artifact in lineage.artifacts.values():
        own = {sha for name, (_, sha) in artifact.files.items() if name.endswith(WEIGHTS)}
        if own == found:
            return Model(artifact.key, (f"{path}: known by its weights",))
    card = path / CARD
    said = CARD_KEY.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if said and lineage.get(said[1]):
        return Model(said[1], (f"{path}: known by its card alone; its weights are other bytes (dtype, or parts)",))
    rule = "no artifact has these weights" + (f", and that of its card is gone (key {said[1][:12]})" if said else "")
    raise InputError(Problem(str(path), rule, "Look in the home it was made in (LLAMATUNER_HOME)."))


def _of_files(files: list[Path], lineage: Lineage) -> Data:
    data, digests = Data(), set[str]()
    known = {digest for fetched in lineage.fetched() for s in sources(fetched, lineage.get) for digest in s["digests"]}
    for file in files:
        own = list(_digests(file, known))
        data.digests[str(file)] = next((digest for digest in own if digest in known), own[0])
        digests |= set(own)
        _earlier(file, own, data, lineage)
    return _having(digests, data, lineage)


def _digests(file: Path, known: set[str]) -> Iterator[str]:
    """By what a file can be known: as what its name says, by its bytes, and, where it may have had a name of another
    kind, as that kind. Nothing is remembered of it: that would change what the next run knows."""
    with tempfile.TemporaryDirectory() as folder:
        first = file_digest(file, DigestMemory(Path(folder) / "memory"))
        yield first
        if first in known:
            return
        yield sha256_file(file)
        yield blake3_file(file)
        for kind in LINES:
            link = Path(folder) / f"rows{kind}"
            link.symlink_to(file.absolute())
            yield file_digest(link, DigestMemory(Path(folder) / "memory"))


def _earlier(file: Path, own: list[str], data: Data, lineage: Lineage) -> None:
    """What the file was when a run read it last, if that was something else."""
    memory = DigestMemory(lineage.home.digests)
    kept = memory.cuts(file) if lineage.home.digests.exists() else None
    digest = blake3(kept.encode()).hexdigest() if kept else None
    if digest is None or digest in own:
        return
    cuts = Cuts(memory, file).of(digest) or []
    had = sum(cut.rows for cut in cuts), sum(cut.rows for cut in cuts if _stands(cut))
    for fetched in lineage.fetched():
        if any(digest in source["digests"] for source in sources(fetched, lineage.get)):
            said = f"{had[1]:,} of its {had[0]:,} rows are known to stand there unchanged"
            data.partly[fetched.key] = f"{file} as it was when it was last read; {said}"


def _stands(cut: Cut) -> bool:
    """Whether its lines are still where they were."""
    try:
        return isinstance(cut.data, Stretch) and bool(cut.data.read())
    except InputError:
        return False


def _having(digests: set[str], data: Data, lineage: Lineage) -> Data:
    """The same, with every fetch artifact that has one of these files."""
    matched: list[Matched] = []
    for fetched in lineage.fetched():
        found = [source for source in sources(fetched, lineage.get) if digests & set(source["digests"])]
        if found:
            data.whole[fetched.key] = SAME_FILE
            matched += [(source, digests) for source in found]
    return _completed(data, matched, lineage)


def _completed(data: Data, matched: list[Matched], lineage: Lineage) -> Data:
    """The same, with what has the same files or rows under other names, and what shares chunks of rows."""
    digests, rows, chunks = set[str](), set[str | None](), set[str]()
    for source, wanted in matched:
        files = source["digests"]
        digests |= set(files) & (wanted or set(files))
        rows.add(source["rows_digest"])
        chunks |= {sha for sha, (_, file) in source[CHUNKS].items() if wanted is None or files[file] in wanted}
    for fetched in lineage.fetched():
        if fetched.key in data.whole:
            continue
        found = sources(fetched, lineage.get)
        shared = sum(count for each in found for sha, (count, _) in each[CHUNKS].items() if sha in chunks)
        if any(digests & set(each["digests"]) for each in found):
            data.whole[fetched.key] = SAME_NAMELESS
        elif any(each["rows_digest"] in rows - {None} for each in found):
            data.whole[fetched.key] = SAME_ROWS
        elif shared and fetched.key not in data.partly:
            data.partly[fetched.key] = f"{shared:,} of its rows are the same, in whole chunks"
    return data
