"""`export` with a config of LLaMA-Factory: an adapter merged into its base, as a folder that others can load.

One decision: the merge is the step that pipelines have, with its key and its check that adapter and base belong
together; so it is done once, and a wrong base is refused. Relative paths start at the working directory, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.cli.exporting import Progress, Wanted, checked
from flows.cli.making import make_steps
from flows.cli.old_commands import read_config, written_digest
from flows.cli.output import DONE, FAILED, people, print_json, say_error
from registry.errors import InputError, Problem, shown
from registry.home import Home
from registry.loading import SUFFIXES
from registry.models import DEFAULT_REVISION
from registry.old_configs import translate
from tasks.export import Exported, export, require_target, saved_dtype
from tasks.launch import ProgramFailed
from tasks.model import base_input
from tasks.push import PushFailed, open_repository, push_folder
from tasks.steps import Input, LocalFolder, require_folder
from tasks.training import merge_step

OPTIONS = ("export_dir", "export_size", "export_hub_model_id")
USED = ("name", "dataset_dir", "model_name_or_path", "model_revision", "adapter_name_or_path", "finetuning_type")
IDLE = {
    "template": "the adapter's own chat template goes with the model",
    "export_device": "weights are merged where there is room",
    "export_legacy_format": "weights are written as safetensors",
}


def merge_config(name: str, overrides: Sequence[str]) -> dict[str, Any] | None:
    """The config, if it is one of a merge: it names an adapter and where to, and no data."""
    if not name.endswith(SUFFIXES):
        return None
    raw, _ = read_config([name, *overrides])
    return raw if isinstance(raw, dict) and raw.get("export_dir") and "dataset" not in raw else None


def export_merged(raw: Mapping[str, Any], wanted: Wanted, as_json: bool) -> int:
    """Merge, and write the folder; the exit code.

    Args:
        raw: a config of `merge_config`.
        wanted: options of the command, which go before those of the config.
        as_json: print one object for programs.

    Raises:
        InputError: everything wrong with the config, or a target that is not free.
    """
    console, home = people(as_json), Home.open()
    problems = _problems(raw, wanted, console)
    if problems:
        raise InputError(problems, "merge")
    size = wanted.max_shard_size or f"{raw.get('export_size') or 5}GB"
    repo = wanted.push_to_hub or raw.get("export_hub_model_id")
    target = (wanted.to or Path(str(raw["export_dir"]))).expanduser().absolute()
    dtype, most = checked(Wanted(dtype=wanted.dtype, max_shard_size=size, push_to_hub=repo, private=wanted.private))
    base, name = base_input(raw["model_name_or_path"], raw.get("model_revision") or DEFAULT_REVISION, home)
    adapter = Path(raw["adapter_name_or_path"]).expanduser().absolute()
    require_folder(adapter, "adapter_name_or_path")
    there = written_digest(target) if target.is_dir() else None
    if there is None:
        require_target(target)
    if repo:
        open_repository(repo, wanted.private)
    step = merge_step("model", adapter.name, base, Input(LocalFolder(adapter), ("*.safetensors", "*.json")))
    try:
        artifact = make_steps([step], home, console)[-1]
        if artifact.digest != there:
            require_target(target)
            saved = saved_dtype(artifact)
            folder = Exported(artifact, target, None if dtype == saved else dtype, most)
            export(folder, _card(target.name, name, adapter.name, artifact.digest), home, Progress(console))
        said = push_folder(target, repo, f"content digest {artifact.digest[:12]}") if repo else None
    except (ProgramFailed, PushFailed, OSError) as error:
        say_error(str(error))
        return FAILED
    console.print(f"{target}: {'the model is there already' if artifact.digest == there else 'written'}", markup=False)
    if as_json:
        answer = {"folder": str(target), "artifact": str(artifact.path), "key": artifact.key, "commit": said}
        print_json(answer | {"digest": artifact.digest})
    return DONE


def _problems(raw: Mapping[str, Any], wanted: Wanted, console: Console) -> list[Problem]:
    """Everything wrong with a config; what has no effect is said."""
    found = translate({k: v for k, v in raw.items() if k not in (*OPTIONS, *USED, *IDLE)}, lambda key: key)
    found.without_effect |= {key: why for key, why in IDLE.items() if raw.get(key)}
    problems = found.problems
    for key in found.settings:
        problems.append(Problem(found.origins.get(key, key), "has no place in a merge", "Remove it."))
    for key in ("model_name_or_path", "adapter_name_or_path"):
        if not isinstance(raw.get(key), str):
            problems.append(Problem(key, f"{shown(raw.get(key))} is no model", "A merge needs a base and an adapter."))
    if raw.get("export_legacy_format") is True:
        problems.append(Problem("export_legacy_format", "weights are written as safetensors only", "Remove it."))
    if wanted.file.any or wanted.file.gguf_type:
        problems.append(Problem("--gguf", "is about a recipe", "Leave it out, and convert the folder yourself."))
    if wanted.stage or wanted.adapter:
        problems.append(Problem("--adapter" if wanted.adapter else "--stage", "is about a recipe", "Leave it out."))
    for note in found.reasons(lambda key: key):
        console.print(note, markup=False, soft_wrap=True)
    return problems


def _card(name: str, base: str, adapter: str, digest: str) -> str:
    return f"# {name}\n\nThe adapter {adapter}, merged into {Path(base).name}; content digest `{digest}`.\n"
