"""render: chat rows → text and the byte spans that are trained on.

One decision: text and spans come from one rendering of the whole conversation with the chat template, and a row whose
spans cannot be proved is refused by number (see `tasks.template`).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from registry.errors import InputError, Problem
from registry.records import DataSettings
from tasks.fetch import read_chunks, write_chunk
from tasks.reading import BadRow
from tasks.rejects import Rejects
from tasks.steps import Input, Step, Work
from tasks.template import ChatTemplate, Refusal

VERSION = 1  # first form
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "vocab*", "merges*")
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("spans", pa.list_(pa.int32())),
        ("source", pa.int32()),
        ("row", pa.int64()),
        ("place", pa.string()),
    ]
)
REPORT_EVERY = 200  # rows between two looks at the stop request


def render_step(
    stage: str, name: str, rows: Step, part: str, base: Input, data: DataSettings, template: str | None
) -> Step:
    """The step that renders rows.

    Args:
        stage, name: where it stands in the plan.
        rows, part: the fetch step and the folder of it to render, `rows` or `kept_back`.
        base: the model whose tokenizer files (and template, for `auto`) are used.
        data: `mask_history`, `bad_rows`.
        template: Jinja text, or None for the model's own.
    """
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label=rows.label,
        identity={"template": template, "mask_history": data.mask_history, "bad_rows": data.bad_rows, "part": part},
        inputs={"rows": Input(rows, (f"{part}/*",)), "base": Input(base.source, TOKENIZER_FILES)},
        run="tasks.render:render",
        runtime={"files": rows.runtime["files"]},
        packages=("jinja2", "pyarrow"),
    )


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a canonical row as templates expect them: absent fields absent, tool calls as objects."""
    messages = []
    for stored in row["messages"]:
        message = {name: value for name, value in stored.items() if value is not None or name == "content"}
        if "tool_calls" in message:
            message["tool_calls"] = json.loads(message["tool_calls"])
        if "reasoning" in message:
            message["reasoning_content"] = message.pop("reasoning")
        messages.append(message)
    return messages


def byte_spans(text: str, spans: tuple[tuple[int, int], ...]) -> list[int]:
    """Character spans as a flat list of byte offsets in UTF-8.

    >>> byte_spans("é ok", ((2, 4),))
    [3, 5]
    """
    flat = [border for span in spans for border in span]
    return flat if text.isascii() else [len(text[:border].encode("utf-8")) for border in flat]


@dataclass(frozen=True)
class RowRenderer:
    """Renders one row after the other; the step and `preview` share it."""

    template: ChatTemplate
    mask_history: bool

    @classmethod
    def from_step(cls, step: Step, base: Path) -> RowRenderer:
        """The renderer of a render step.

        Raises:
            InputError: the model has no template, or it does not compile.
        """
        return cls(ChatTemplate.from_folder(base, step.identity["template"]), step.identity["mask_history"])

    def render(self, row: dict[str, Any]) -> dict[str, Any] | BadRow:
        """`text`, `spans` (flat byte offsets) and `lost` (roles the template drops) of a canonical row."""
        tools = json.loads(row["tools"]) if row["tools"] else None
        result = self.template.render_training(messages_of(row), tools)
        if isinstance(result, Refusal):
            return BadRow(result.reason, result.detail)
        spans = result.spans[-1:] if self.mask_history else result.spans
        return {"text": result.text, "spans": byte_spans(result.text, spans), "lost": result.lost}


def render(work: Work) -> dict[str, Any]:
    """Render every row; chunks of an interrupted attempt are kept.

    Raises:
        InputError: a refused row under `bad_rows: fail`, or every row refused.
    """
    renderer = RowRenderer.from_step(work.step, work.inputs["base"])
    chunks = read_chunks(work.inputs["rows"] / work.identity["part"])
    total = sum(pq.read_metadata(path).num_rows for path in chunks)
    done = 0
    for number, chunk in enumerate(chunks):
        finished = work.scratch / f"{number:05d}.json"
        if not finished.exists():
            report = _render_chunk(work, renderer, chunk, done, total)
            part = finished.with_suffix(".part")
            part.write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
            part.rename(finished)
        done += pq.read_metadata(chunk).num_rows
        work.progress(done, total, "rows")
    return _collect(work, len(chunks), total)


def _render_chunk(work: Work, renderer: RowRenderer, chunk: Path, done: int, total: int) -> dict[str, Any]:
    rendered, refused, lost = [], [], Counter[str]()
    for index, row in enumerate(pq.read_table(chunk).to_pylist()):
        if index % REPORT_EVERY == 0:
            work.progress(done + index, total, "rows")
        result = renderer.render(row)
        origin = {name: row[name] for name in ("source", "row", "place")}
        if isinstance(result, BadRow):
            refused.append(origin | {"reason": result.reason, "detail": result.detail})
        else:
            lost.update(result.pop("lost"))
            rendered.append(origin | result)
    write_chunk(work.scratch, int(chunk.stem), pa.Table.from_pylist(rendered, SCHEMA))
    return {"refused": refused, "lost": dict(lost)}


def _collect(work: Work, chunks: int, total: int) -> dict[str, Any]:
    """Chunks from scratch to the output, refused rows to the report."""
    rejects, lost, rows = Rejects(), Counter[str](), 0
    files = work.step.runtime["files"]
    (work.output / "rows").mkdir()
    for number in range(chunks):
        report = json.loads((work.scratch / f"{number:05d}.json").read_text(encoding="utf-8"))
        lost.update(report["lost"])
        for row in report["refused"]:
            rejects.add(files[row["source"]], row["place"], row["row"], BadRow(row["reason"], row["detail"]))
        chunk = work.scratch / f"{number:05d}.parquet"
        rows += pq.read_metadata(chunk).num_rows
        (work.output / "rows" / chunk.name).write_bytes(chunk.read_bytes())
    require_rendered(work.step, rejects, rows)
    rejects.write(work.output)
    for role, count in sorted(lost.items()):
        what = f"the {role}" if role in ("tools", "reasoning") else f"a {role} message"
        work.note(f"the template drops {what} of {count} of {total} rows")
    return {"rows": rows, "left_out": rejects.counts(), "lost": dict(lost)}


def require_rendered(step: Step, rejects: Rejects, rows: int) -> None:
    """End a run that the template leaves without rows, or that wants none left out.

    Raises:
        InputError: a refused row under `bad_rows: fail`, or no row but refused ones.
    """
    if step.identity["bad_rows"] == "fail":
        cure = "Mend the rows, use another template, or set bad_rows: skip to leave them out."
        rejects.raise_if_any("chat template", cure)
    if rows == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.counts().items())
        rule = f"the template can use none of {len(rejects.rows)} rows: {reasons}"
        raise InputError(Problem(", ".join(step.runtime["files"]), rule, "Use another template."))
