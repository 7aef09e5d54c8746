"""`lineage`: what a model came from, and which models have seen some data, on a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from flows.cli.output import people, print_json
from flows.lineage import FOLDER, GONE, MEASURED, USES, WHOLE, Lineage, Node, Use
from flows.lineage_facts import facts
from flows.lineage_names import Data, Model, find
from flows.registrations import NOW, Version, registrations, runs_with
from registry.deepspeed import zero_stage
from registry.home import Home
from tasks.artifacts import Artifact
from tasks.training import BASE_FILES

PACKAGES = ("torch", "transformers", "peft")
MAIN_SETTINGS = (
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("lora_rank", "lora_alpha", "quant_bit", "pref_loss", "pref_beta", "deepspeed", "packing", "seed"),
)
SHORT = 12  # hex digits of a key or digest on a terminal


def show_lineage(asked: str, as_json: bool) -> None:
    """From a model back, or from data to models.

    Args:
        asked: see `flows.lineage_names.find`.
        as_json: print one object for programs.

    Raises:
        InputError: it means nothing, or several things.
    """
    console, home = people(as_json), Home.default()
    lineage = Lineage(home)
    found = find(asked, lineage)
    versions, trouble = registrations(home)
    answer = _model(found, lineage, versions) if isinstance(found, Model) else _data(found, lineage, versions)
    answer = {"what": asked} | answer
    answer["notes"] = [*answer["notes"], *([trouble] if trouble else [])]
    if answer["kind"] == "model":
        _print_model(console, answer)
    else:
        _print_data(console, answer)
    for note in answer["notes"]:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    if as_json:
        print_json(answer)


# what there is to say


def _model(found: Model, lineage: Lineage, versions: Mapping[str, list[Version]]) -> dict[str, Any]:
    artifact = lineage.get(found.key)
    assert artifact is not None
    return {
        "kind": "model",
        **_named(artifact, lineage),
        "runs": runs_with({artifact.key}, lineage.home),
        "registered": versions.get(artifact.digest, []),
        "measured": _measured(artifact, lineage),
        "tree": lineage.tree(artifact.key),
        "notes": list(found.notes),
    }


def _named(artifact: Artifact, lineage: Lineage) -> dict[str, Any]:
    return {
        "name": lineage.name(artifact.key),
        "key": artifact.key,
        "digest": artifact.digest,
        "state": lineage.state(artifact.key),
    }


def _measured(model: Artifact, lineage: Lineage) -> list[dict[str, Any]]:
    """Everything that measured these very weights."""
    weights = model.part_digest(BASE_FILES)
    found = []
    for each in lineage.measurements():
        if any(link.role == "model" and weights == link.digest for link in lineage.links(each)):
            named = _named(each, lineage)
            found.append(named | {"numbers": lineage.numbers(each) if named["state"] == WHOLE else None})
    return found


def _data(found: Data, lineage: Lineage, versions: Mapping[str, list[Version]]) -> dict[str, Any]:
    whole, partly = frozenset(found.whole), frozenset(found.partly)
    notes = list(found.notes)
    if not whole and not partly:
        notes.append("no run of this home has read these data, as far as its artifacts go back")
    models, unknown = _seen_by(whole, lineage, versions)
    return {
        "kind": "data",
        "files": found.digests,
        "read_into": [_read_into(key, how, lineage) for key, how in found.whole.items()],
        "models": models,
        "partly": {
            "read_into": [_read_into(key, how, lineage) for key, how in found.partly.items()],
            "models": _seen_by(partly, lineage, versions)[0] if partly else [],
        },
        "unknown": unknown,
        "notes": notes,
    }


def _read_into(key: str, how: str, lineage: Lineage) -> dict[str, Any]:
    artifact = lineage.get(key)
    assert artifact is not None
    runs = [run["id"] for run in runs_with({key}, lineage.home)]
    return _named(artifact, lineage) | {"how": how, "runs": runs} | facts(artifact, lineage.get)


def _seen_by(
    data: frozenset[str], lineage: Lineage, versions: Mapping[str, list[Version]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The models that have to do with data, those trained on them first; and what cannot be told of, with the keys
    that are gone."""
    memory: dict[str, Any] = {}
    uses: dict[str, list[dict[str, Any]]] = {}
    unknown: list[dict[str, Any]] = []
    for model in lineage.models():
        seen = lineage.seen(model.key, data, memory)
        if seen.uses:
            ordered = sorted(seen.uses, key=_order)
            uses[model.key] = [{"use": each.use, "via": list(each.via)} for each in ordered]
        if seen.gone and not seen.uses:
            unknown.append({"name": lineage.name(model.key), "key": model.key, "gone": sorted(seen.gone)})
    folders: dict[str, dict[str, Any]] = {}
    for each in lineage.measurements():
        behind = [lineage.data_behind(link.key) for link in lineage.links(each) if link.role.startswith("set.")]
        gone = set().union(*(missing for _, missing in behind))
        if gone:
            unknown.append({"name": lineage.name(each.key), "key": each.key, "gone": sorted(gone)})
        if not any(found & data for found, _ in behind):
            continue
        whole = lineage.state(each.key) == WHOLE
        use = {
            "use": MEASURED,
            "via": [],
            "by": lineage.name(each.key),
            "numbers": lineage.numbers(each, data) if whole else None,
        }
        (link,) = (link for link in lineage.links(each) if link.role == "model")
        if lineage.get(link.key):
            uses.setdefault(str(link.key), []).append(use)
        else:
            entry = {
                "name": link.place,
                "key": link.key,
                "digest": link.digest,
                "state": "gone" if link.key else FOLDER,
            }
            folders.setdefault(f"{link.place} {link.digest}", entry | {"runs": [], "registered": [], "uses": []})
            folders[f"{link.place} {link.digest}"]["uses"].append(use)
    models = []
    for key, found in uses.items():
        artifact = lineage.get(key)
        assert artifact is not None
        runs = runs_with({key}, lineage.home)
        models.append(
            _named(artifact, lineage) | {"runs": runs, "registered": versions.get(artifact.digest, []), "uses": found}
        )
    everything = [*models, *folders.values()]
    return sorted(everything, key=lambda model: USES.index(model["uses"][0]["use"])), unknown


def _order(use: Use) -> tuple[int, int, tuple[str, ...]]:
    return USES.index(use.use), len(use.via), use.via


# how it is said


def _print_model(console: Console, answer: dict[str, Any]) -> None:
    console.print(_head(answer))
    for line in _standing(answer):
        console.print(Text(f"  {line}"))
    for each in answer["measured"]:
        console.print(Text(f"  measured by {each['name']}{_unless_whole(each)}"))
        for number in each["numbers"] or ():
            console.print(Text(f"    {_number(number)}"))
    console.print()
    root = Tree(_label(answer["tree"]), guide_style="dim")
    _grow(root, answer["tree"])
    console.print(root)


def _head(named: Mapping[str, Any]) -> Text:
    text = Text(f"{named['name']}{_unless_whole(named)}", style="bold")
    return text.append(f"  digest {named['digest'][:SHORT]}", style="dim")


def _unless_whole(named: Mapping[str, Any]) -> str:
    return "" if named["state"] in (WHOLE, FOLDER) else f" [{named['state']}]"


def _standing(answer: Mapping[str, Any]) -> Iterator[str]:
    """Its runs and versions, a line each."""
    for run in answer["runs"]:
        what = "made by" if run["made"] else "used by"
        yield f"{what} run {run['id']} ({run['recipe']}, {run['stage']}), {run['status']}"
    for version in answer["registered"]:
        champion = version["champion"]
        said = ", the champion" if champion == NOW else ", once the champion" if champion else ""
        yield f"registered as {version['name']} version {version['version']}{said}"


def _number(number: Mapping[str, Any]) -> str:
    limits = f", 95 %: {number['low']:.4g} to {number['high']:.4g}" if "low" in number else ""
    return f"{number['metric']} {number['value']:.4g}{limits}, {number['rows']:,} rows"


def _grow(tree: Tree, node: Node) -> None:
    for each in node.get("inputs", ()):
        _grow(tree.add(_label(each)), each)


def _label(node: Node) -> Text:
    """A node on a terminal."""
    text = Text()
    if node["role"]:
        text.append(f"{node['role']}: ", style="cyan")
    text.append(f"{node['name']}{_gone(node) or _unless_whole(node)}", style="red" if _gone(node) else "bold")
    if node["shown_before"]:
        return text.append(", see there", style="dim")
    if node["folder"] and node["step"]:
        text.append(f"\nread from {node['folder']}, of the same content")
    elif node["instead_of"]:
        text.append(f"\nthe same content as what is gone (key {node['instead_of'][:SHORT]})", style="yellow")
    for line in _facts(node["step"], node["facts"]) if "facts" in node else ():
        text.append(f"\n{line}")
    return text.append(f"\ndigest {node['digest'][:SHORT]}{_made(node)}", style="dim")


def _made(node: Node) -> str:
    """When it was made, how long that took, and by which code."""
    if "facts" not in node:
        return ""
    facts, commit = node["facts"], node["facts"]["git_commit"]
    code = f", commit {commit[:SHORT]}{'+' if commit.endswith('+') else ''}" if commit else ""
    return f", {facts['created'][:16].replace('T', ' ')}, {facts['seconds']:,.1f} s{code}"


def _gone(node: Node) -> str:
    return f" gone (key {node['key'][:SHORT]})" if node["state"] == GONE else ""


def _facts(step: str, facts: Mapping[str, Any]) -> Iterator[str]:
    """What there is to say of how something was made, a line each."""
    if step == "train":
        yield f"stage {facts['kind']}, {facts['method']}, {_listed(facts['numbers'])}"
        settings = {name: facts["settings"].get(name) for name in MAIN_SETTINGS}
        if settings["deepspeed"]:
            settings["deepspeed"] = f"ZeRO stage {zero_stage(settings['deepspeed'])}"
        yield _listed(settings)
    elif step == "fetch":
        for source in facts["sources"]:
            yield from _source(source)
    elif step == "tokenize":
        yield _listed(facts["numbers"] | facts["settings"])
    elif step == "model":
        yield _listed({name: facts.get(name) for name in ("hub_id", "revision", "commit", "wheel", "quantisation")})
    elif step == "download":
        yield _listed({name: facts.get(name) for name in ("kind", "address", "subset", "split", "commit", "files")})
    elif step == "add_tokens":
        yield _listed({name: facts.get(name) for name in ("add_tokens", "add_special_tokens")})
    if facts.get("template_sha256"):
        yield f"chat template sha256 {facts['template_sha256'][:SHORT]}"
    elif step == "render" and facts["settings"]["shape"] != "text":
        yield "the model's own chat template"
    if step in ("train", "merge"):
        yield ", ".join(f"{name} {facts['packages'][name]}" for name in PACKAGES)


def _listed(values: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if value not in (None, {}, [])}
    return ", ".join(f"{name} {f'{v:.6g}' if isinstance(v, float) else v}" for name, v in shown.items())


def _source(source: Mapping[str, Any]) -> Iterator[str]:
    """A data set that was read."""
    parts = [f"{source['name']}: {source['rows']:,} rows"]
    if source["kept_back"]:
        parts.append(f"{source['kept_back']:,} more kept back to measure on")
    if source["slice"] or source["most_rows"] is not None:
        parts.append("a part of what is there")
    yield ", ".join(parts)
    for number, digest in enumerate(source["digests"]):
        yield f"{source['files'][number] if number < len(source['files']) else 'a file'}, digest {digest[:SHORT]}"


def _print_data(console: Console, answer: dict[str, Any]) -> None:
    for file, digest in answer["files"].items():
        console.print(Text(f"{file or 'data'}  digest {digest[:SHORT]}".strip(), style="bold"), soft_wrap=True)
    _print_readings(console, "read into", answer["read_into"])
    _print_models(console, answer["models"])
    if answer["read_into"] and not answer["models"]:
        console.print("no model was trained or measured on them\n")
    if answer["partly"]["read_into"]:
        _print_readings(console, "of which a part is the same", answer["partly"]["read_into"])
        _print_models(console, answer["partly"]["models"])
    for each in answer["unknown"]:
        keys = ", ".join(f"gone (key {key[:SHORT]})" for key in each["gone"])
        console.print(Text(f"not known of {each['name']}: {keys}", style="yellow"), soft_wrap=True)


def _print_readings(console: Console, title: str, readings: list[dict[str, Any]]) -> None:
    for each in readings:
        console.print(
            Text(f"{title} {each['name']}{_unless_whole(each)} ({each['how']})", style="bold"), soft_wrap=True
        )
        for source in each["sources"]:
            for line in _source(source):
                console.print(Text(f"  {line}"), soft_wrap=True)
    if readings:
        console.print()


def _print_models(console: Console, models: list[dict[str, Any]]) -> None:
    for model in models:
        console.print(_head(model))
        for use in model["uses"]:
            via = f", through {' and '.join(use['via'])}" if use["via"] else ""
            console.print(Text(f"  {use['use']}{via}{', ' + use['by'] if 'by' in use else ''}"))
            for number in use.get("numbers") or ():
                console.print(Text(f"    {_number(number)}"))
        for line in _standing(model):
            console.print(Text(f"  {line}"))
        console.print()
