"""What came from what: from a model back to data and code, and from data to every model that has seen it.

One decision: the graph is what the manifests say, read once, and nothing else: no recipe, no Prefect, no file of
a model or of data. An input is its content: what is gone under one key and there under another is there, and a folder
that is an export of a model here is that model, for its digest follows from the model's manifest. What is not there at
all stays in the graph as gone, so that an answer says where it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from flows.lineage_facts import facts
from registry.home import Home
from tasks.artifacts import Artifact, Store, damage, read_artifact, select
from tasks.digests import content_digest
from tasks.export import goes_out
from tasks.fetch import KEPT_BACK, ROWS
from tasks.measurements import KINDS, RESULTS, stored_results
from tasks.train.given import GIVEN, GIVEN_WEIGHTS, REWARD_ADAPTER, REWARD_MODEL
from tasks.training import BASE_FILES, MODEL_STEPS, REWARD_FILES, SHARD_FILES

MODEL_INPUTS = ("model", "adapter", GIVEN, GIVEN_WEIGHTS, "base", "reference", REWARD_MODEL, REWARD_ADAPTER)
TEXT_STEPS = ("render", "tokenize")  # their base is its tokenizer alone
TRAINED, WATCHED, MEASURED = "trained on", "measured on while training", "measured on"
STARTS = "starts from a model trained on it"
REFERENCE = "compared with a reference model trained on it"
REWARD = "scored by a reward model trained on it"
USES = (TRAINED, STARTS, REWARD, REFERENCE, WATCHED, MEASURED)
"""What a model can have to do with data, the closest first."""
WHOLE, GONE, FOLDER = "whole", "gone", "folder"
VALIDATION = "validation"
CHUNKS = "chunks"
TEMPLATE_FILE = "chat_template.jinja"

Node = dict[str, Any]
"""Plain values: `role`, `step`, `name`, `folder` it was read from, `key`, `instead_of` (key that is gone), `digest`,
`state`, `shown_before`, and of what is there and was not shown before `facts` and `inputs` (nodes)."""


class Link(NamedTuple):
    """An input, as a manifest records it."""

    role: str
    digest: str
    key: str | None
    """Of the artifact with this content; None: a folder of no step."""
    place: str
    """The artifact or the folder that it was read from."""
    recorded: str | None
    """Key of the artifact that it was read from; None: it was a folder."""


class Use(NamedTuple):
    """What a model has to do with some data."""

    use: str
    """One of `USES`."""
    via: tuple[str, ...] = ()
    """The models between, the nearest first."""


class Seen(NamedTuple):
    """All that is known of what lies behind an artifact."""

    uses: frozenset[Use] = frozenset()
    gone: frozenset[str] = frozenset()
    """Keys behind which nothing is known."""


class Lineage:
    """The artifacts of a home and what they were made from."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.artifacts = {artifact.key: artifact for artifact in Store(home).all()}
        self._aside = {}
        for path in home.damaged.glob("*"):
            artifact = read_artifact(path)
            if artifact and artifact.key not in self.artifacts:
                self._aside[artifact.key] = artifact
        self._content = {digest: a.key for a in self.artifacts.values() for digest in _part_digests(a)}

    def get(self, key: str | None) -> Artifact | None:
        """The artifact of a key, whole or not, also one that was set aside as damaged; None: gone."""
        return self.artifacts.get(key or "") or self._aside.get(key or "")

    def state(self, key: str) -> str:
        """`whole`, `gone`, or what is wrong with its files."""
        if key in self._aside:
            return f"set aside as damaged: {damage(self._aside[key]) or 'of unlike content'}"
        found = self.artifacts.get(key)
        reason = damage(found) if found else None
        return f"damaged: {reason}" if reason else WHOLE if found else GONE

    def links(self, artifact: Artifact) -> list[Link]:
        """Its inputs: data, then models; a folder that is an export of a model here is that model."""
        found = []
        for role, given in artifact.manifest["inputs"].items():
            key, same = given.get("key"), self._content.get(given["digest"])
            found.append(
                Link(
                    role,
                    given["digest"],
                    key if self.get(key) else same or key,
                    given["folder"] if key is None else given["artifact"],
                    key,
                )
            )
        order = {role: number for number, role in enumerate(MODEL_INPUTS)}
        return sorted(found, key=lambda link: order.get(link.role, -1))

    def name(self, key: str) -> str:
        """Step and folder, as `artifacts show` takes it; of what is gone its key."""
        found = self.get(key)
        if found is None:
            return f"gone (key {key[:12]})"
        return f"{found.step}/{Store(self.home).folder(found.step, found.manifest['label'], key).name}"

    # from a model to what it came from

    def tree(self, key: str) -> Node:
        """Everything behind an artifact, each thing once; where it stands again there is a reference."""
        found = self.get(key)
        assert found is not None
        return self._node(Link("", found.digest, key, "", key), set())

    def _node(self, link: Link, shown: set[str]) -> Node:
        artifact, node = self.get(link.key), self._reference(link) | {"shown_before": False}
        if artifact is None:
            return node
        links, text = self.links(artifact), artifact.step in TEXT_STEPS
        # a model is told of beside the data it was trained on, not behind them, where its tokenizer was used
        own = set().union(*(_ids(each) for each in links if each.role in MODEL_INPUTS and not text)) - shown
        shown |= own
        inputs = []
        for each in links:
            ids = _ids(each)
            known = ids & shown or (text and each.key is None and any(each.place in other for other in shown))
            if known and not ids & own:
                inputs.append(self._reference(each))
            else:
                own -= ids
                shown |= ids
                inputs.append(self._node(each, shown))
        return node | {"facts": facts(artifact, self.get), "inputs": inputs}

    def _reference(self, link: Link) -> Node:
        """A node, without what is behind it."""
        found = self.get(link.key)
        return {
            "role": link.role,
            "step": found.step if found else None,
            "name": self.name(found.key) if found else link.place,
            "folder": None if link.recorded else link.place,
            "instead_of": link.recorded if link.recorded != link.key else None,
            "key": link.key,
            "digest": found.digest if found else link.digest,
            "state": self.state(link.key) if link.key else FOLDER,
            "shown_before": True,
        }

    # from data to what has seen it

    def fetched(self) -> Iterator[Artifact]:
        """Everything that data sets were read into."""
        yield from (a for a in [*self.artifacts.values(), *self._aside.values()] if a.step == "fetch")

    def models(self) -> list[Artifact]:
        """Every trained model, the newest first: merged, or the training where nothing was merged of it."""
        made = [a for a in [*self.artifacts.values(), *self._aside.values()] if a.step in ("train", "merge")]
        merged = {link.key for a in made if a.step == "merge" for link in self.links(a) if link.role == "adapter"}
        return [artifact for artifact in made if artifact.key not in merged]

    def measurements(self) -> list[Artifact]:
        """Everything that measured a model."""
        return [artifact for artifact in self.artifacts.values() if artifact.step in KINDS]

    def data_behind(self, key: str | None) -> tuple[set[str], set[str]]:
        """Fetch artifacts that an artifact of data is made of, and what is gone of what it is made of: keys."""
        artifact = self.get(key)
        if artifact is None:
            return set(), {key} if key else set()
        if artifact.step == "fetch":
            return {artifact.key}, set()
        found, gone = set[str](), set[str]()
        for link in self.links(artifact):
            if link.role not in MODEL_INPUTS:
                behind, missing = self.data_behind(link.key)
                found, gone = found | behind, gone | missing
        return found, gone

    def seen(self, key: str | None, data: frozenset[str], memory: dict[str, Seen]) -> Seen:
        """What a model has to do with data.

        Args:
            key: the model's artifact; None: a folder of no step, of which nothing is known.
            data: keys of fetch artifacts.
            memory: answers for the same data, added to.
        """
        artifact = self.get(key)
        if key is None or artifact is None:
            return Seen(gone=frozenset({key} if key else ()))
        if key not in memory:
            uses, gone = set[Use](), set[str]()
            for link in self.links(artifact):
                if link.role in MODEL_INPUTS:
                    before = self.seen(link.key, data, memory)
                    passed = artifact.step != "train" and link.role != "base"
                    uses |= before.uses if passed else _through(link, before, self.name(link.key or ""))
                    gone |= before.gone
                else:
                    behind, missing = self.data_behind(link.key)
                    uses |= {Use(WATCHED if link.role.startswith("held_out") else TRAINED)} if behind & data else set()
                    gone |= missing
            memory[key] = Seen(frozenset(uses), frozenset(gone))
        return memory[key]

    def set_names(self, measurement: Artifact) -> list[str]:
        """What its data sets are called, in their order."""
        positions = [role.partition(".")[2] for role in measurement.manifest["inputs"] if role.startswith("set.")]
        return [self.set_name(measurement, position) for position in positions or ["0"]]

    def set_name(self, measurement: Artifact, position: str) -> str:
        """What the data set of a measurement is called; its position where the data are gone."""
        if "benchmark" in measurement.manifest["identity"]:
            return str(measurement.manifest["identity"]["benchmark"])
        link = next((each for each in self.links(measurement) if each.role == f"set.{position}"), None)
        tokenized = self.get(link.key) if link else None
        if tokenized is None:
            return position
        parts = [self.get(each.key) for each in self.links(tokenized) if each.role == "rendered"]
        back = any(part and part.manifest["identity"].get("part") == KEPT_BACK for part in parts)
        return VALIDATION if back else str(tokenized.manifest["label"])

    def numbers(self, measurement: Artifact, data: frozenset[str] | None = None) -> list[dict[str, Any]]:
        """What was measured: `metric`, `value`, `low`, `high`, `rows` (see `tasks.measurements`).

        Args:
            measurement: a whole artifact of `measurements`.
            data: keys of fetch artifacts: on these alone.
        """
        behind = {link.role: self.data_behind(link.key)[0] for link in self.links(measurement)}
        found = []
        known = (measurement.path / RESULTS).exists()  # earlier ones have no drawn values, which `numbers` asks for
        for name, result in (stored_results(measurement.path) if known else {}).items():
            metric, _, position = name.rpartition(".")
            if data is None or behind.get(f"set.{position}", set()) & data:
                own = {end: result[end] for end in ("value", "low", "high", "rows") if end in result}
                found.append({"metric": f"{metric}.{self.set_name(measurement, position)}"} | own)
        return found


def _ids(link: Link) -> set[str]:
    """By what an input is known where it stands again."""
    return {link.key or "", "" if link.recorded else f"{link.place} {link.digest}"} - {""}


def _part_digests(artifact: Artifact) -> Iterator[str]:
    """The digests under which later steps know what is in an artifact, or in an export of it.

    Not that of a tokenizer, which many models share.
    """
    yield artifact.digest
    if artifact.step == "fetch":
        yield from (artifact.part_digest((f"{part}/*", f"{part}.json")) for part in (ROWS, KEPT_BACK))
    elif artifact.step == "tokenize":
        yield artifact.part_digest(SHARD_FILES)
    elif artifact.step in MODEL_STEPS:
        exported = {name: file for name, file in artifact.files.items() if goes_out(name, artifact.files)}
        for files in (artifact.files, exported):
            yield from (content_digest(select(files, part)) for part in (BASE_FILES, REWARD_FILES))


def _through(link: Link, before: Seen, name: str) -> set[Use]:
    """What a model has to do with data through a model that it was made with."""
    changed = set()
    for use, via in before.uses:
        if link.role == "reference":
            use = REFERENCE
        elif link.role in (REWARD_MODEL, REWARD_ADAPTER):
            use = REWARD
        elif use == TRAINED:
            use = STARTS
        changed.add(Use(use, (name, *via)))
    return changed
