"""The reference of every setting, `docs/settings.md`, made from the records and the table of combinations.

python -m registry.settings_page > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import PydanticUndefined

from registry.cluster_records import KubernetesSettings
from registry.combinations import NEEDS, REFUSALS, SET, UNSET
from registry.evaluation_records import EvaluationSettings
from registry.record import Record
from registry.records import DataSettings, ModelSettings, RunSettings, RuntimeSettings, TrainSettings
from registry.stage_settings import ALIASES
from registry.stages import METHODS, STAGES
from registry.sweep_records import RangeSettings, SweepSettings

SECTIONS: tuple[tuple[str, type[Record]], ...] = (
    ("The model", ModelSettings),
    ("Data", DataSettings),
    ("Training", TrainSettings),
    ("What changes no result", RuntimeSettings),
    ("The run as a whole, above all stages", RunSettings),
    ("`kubernetes`", KubernetesSettings),
    ("`evaluation`", EvaluationSettings),
    ("A sweep, a file of its own (see sweeps.md)", SweepSettings),
    ("A range in `parameters` of a sweep", RangeSettings),
)


def settings_page() -> str:
    """The page, as Markdown."""
    lines = ["# Settings", "", "Made by `make docs` from the records in `registry/`. A recipe writes them flat.", ""]
    for title, registry in (("Stages", STAGES), ("Methods (`finetuning_type`)", METHODS)):
        lines += [f"## {title}", "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(registry[name].description)} |" for name in registry]
        lines += [""]
    for title, record in SECTIONS:
        lines += [f"## {title}", "", "| setting | default | meaning |", "|---|---|---|", *_rows(record), ""]
    lines += ["## Other names", "", "| written | read as |", "|---|---|"]
    lines += [f"| `{written}` | `{name}` |" for written, name in sorted(ALIASES.items())]
    lines += ["", "## What has an effect only beside something else", "", "| settings | only with |", "|---|---|"]
    lines += [f"| {_names(need.settings)} | {_condition(need.where)} |" for need in NEEDS if need.refused]
    lines += ["", "## What cannot be together", "", "| settings | why | what to do |", "|---|---|---|"]
    lines += [f"| {_condition(rule.when)} | {_cell(rule.reason)} | {_cell(rule.cure)} |" for rule in REFUSALS]
    return "\n".join(lines) + "\n"


def _rows(record: type[Record]) -> Iterator[str]:
    for name, field in record.model_fields.items():
        default: Any = field.default
        shown = "" if default is PydanticUndefined else _value(default)
        yield f"| `{name}` | {shown} | {_cell(field.description or '')} |"


def _value(value: Any) -> str:
    if value in (None, (), {}):
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def _condition(condition: Mapping[str, tuple[Any, ...]]) -> str:
    parts = []
    for name, values in condition.items():
        if values in (SET, UNSET):
            parts.append(f"`{name}`" if values == SET else f"no `{name}`")
        else:
            parts.append(f"`{name}`: {' or '.join(_value(value) for value in values)}")
    return ", ".join(parts)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(settings_page(), end="")
