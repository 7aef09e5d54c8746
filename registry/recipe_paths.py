"""Relative paths of a recipe, which hold from any working directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from glob import has_magic, iglob
from pathlib import Path
from typing import Any

from registry.core import user_path
from registry.data_files import kind_of
from registry.errors import InputError

PATHS = {
    **dict.fromkeys(("dataset_dir", "adapter_name_or_path", "resume_from_checkpoint", "data_dir"), True),
    **dict.fromkeys(("model_name_or_path", "ref_model", "reward_model", "evaluate", "compare_with"), False),
}
"""Settings that are paths: always, or only when such a folder exists."""


def absolute_paths(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with paths that hold from any working directory.

    A relative path starts at the recipe's folder. Names of registries and hubs stay as they are: a value is a path
    when something of that name exists there, or when it can be nothing else.
    """
    stages = raw.get("stages")
    own = [stage for stage in stages.values() if isinstance(stage, dict)] if isinstance(stages, dict) else []
    # with a dataset_dir a data file that is not here may be there; without one the error names the recipe's folder
    mender = _Mender(folder, not any("dataset_dir" in settings for settings in (raw, *own)))
    whole = mender.settings(raw)
    if isinstance(stages, dict):
        whole["stages"] = {n: mender.settings(own) if isinstance(own, dict) else own for n, own in stages.items()}
    if isinstance(raw.get("evaluation"), dict):
        whole["evaluation"] = mender.settings(raw["evaluation"])
    return whole


@dataclass(frozen=True)
class _Mender:
    """Makes the paths of settings absolute."""

    folder: Path
    file_here: bool
    """A data file is in the recipe's folder, or nowhere."""

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        changed = dict(settings)
        for key, must in PATHS.items():
            if key in changed:
                changed[key] = self._absolute(changed[key], must)
        for key, ending in (("template", ".jinja"), ("deepspeed", ".json")):
            if str(changed.get(key, "")).endswith(ending):
                changed[key] = self._absolute(changed[key], True)
        lists = dict.fromkeys(("dataset", "eval_dataset", "perplexity", "generate"), self._dataset)
        lists |= {"reward_funcs": self._code, "benchmarks": self._task}
        for key, mended in lists.items():
            value = changed.get(key)
            names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
            if isinstance(names, dict):
                names = [names]
            if isinstance(names, list):
                changed[key] = [mended(name) for name in names]
        return changed

    def _absolute(self, value: Any, must: bool) -> Any:
        if not isinstance(value, str) or not value:
            return value
        try:
            path = self.folder / user_path(value, "")
            path = self.folder / user_path(str(path), "")
        except InputError:
            return value  # refused where it is used, with its key
        there = must or path.exists() or (has_magic(value) and any(iglob(str(path), recursive=True)))
        return str(path.absolute()) if there or value.startswith(("~", "./", "../")) else value

    def _dataset(self, wanted: Any) -> Any:
        if isinstance(wanted, dict):
            places = {key: self._dataset(wanted[key]) for key in ("dataset", "file_name") if key in wanted}
            return wanted | places
        if not isinstance(wanted, str) or not any(sign in wanted for sign in "/.*") or "://" in wanted:
            return wanted
        head, at, split = wanted.rpartition("@")  # of `rows.jsonl@train[:100]`
        if at and kind_of(head) and not kind_of(wanted):
            return f"{self._absolute(head, self.file_here)}@{split}"
        return self._absolute(wanted, self.file_here and kind_of(wanted) is not None)

    def _task(self, wanted: Any) -> Any:
        if isinstance(wanted, dict):
            return wanted | {"task": self._task(wanted["task"])} if "task" in wanted else wanted
        return self._absolute(wanted, True) if str(wanted).endswith((".yaml", ".yml")) else wanted

    def _code(self, wanted: Any) -> Any:
        place, colon, function = wanted.rpartition(":") if isinstance(wanted, str) else ("", "", "")
        return f"{self._absolute(place, True)}:{function}" if colon and place.endswith(".py") else wanted
