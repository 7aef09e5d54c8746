"""render: canonical rows → text and the byte spans that are trained on.

One decision: text and spans come from one rendering of the whole conversation with the chat template, and a row whose
spans cannot be proved is refused by number. Rows of a form that the template treats like any other of that form are
filled into its skeleton (`tasks.skeleton`), which is proved to give the same.

A row is one text, but for preferences: two, the chosen one first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from registry.errors import InputError, Problem
from tasks.canonical import MARKS, Row, mark_field, read_table, to_rows, write_table
from tasks.chunks import Chunk, ChunkCache, Made, link
from tasks.fetch import FILES, file_names
from tasks.fingerprint import fingerprints
from tasks.reading import BadRow, place
from tasks.rejects import Rejects
from tasks.skeleton import Skeletons, flat_bytes
from tasks.steps import Input, Step, Work
from tasks.template import ChatTemplate, Refusal, trained_spans
from tasks.template_language import MARK_END, MARK_START
from tasks.workers import make_chunks

if TYPE_CHECKING:  # workers have no use for it, and it takes 0.2 s
    from registry.records import DataSettings

VERSION = 4  # a pair whose texts come out the same is refused
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "vocab*", "merges*")
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("spans", pa.list_(pa.int32())),
        ("typed", pa.list_(pa.int32())),
        ("row", pa.int64()),
        ("line", pa.int32()),
    ]
)
CHUNKS, META = "chunks.json", "rendered.json"
THOUGHT = "think>"  # rows with one may be moved about by the template: no skeleton
STEP_ONLY = ("bad_rows", "bad_rows_limit", "part")  # settings that change no chunk
SIMPLE = {"role", "content"}


def render_step(
    stage: str, name: str, rows: Step, part: str, base: Input, data: DataSettings, template: str | None
) -> Step:
    """The step that renders rows.

    Args:
        stage, name: where it stands in the plan.
        rows, part: the fetch step and the folder of it to render, `rows` or `kept_back`.
        base: the model whose tokenizer files (and template, for `auto`) are used.
        data: what is trained, `control_tokens`, `bad_rows`.
        template: Jinja text, or None for the model's own.
    """
    identity = {
        "template": template,
        "shape": rows.identity["shape"],
        "mask_history": data.mask_history,
        "train_on_prompt": data.train_on_prompt,
        "control_tokens": data.control_tokens,
        "default_system": data.default_system,
        "enable_thinking": data.enable_thinking,
        "bad_rows": data.bad_rows,
        "bad_rows_limit": data.bad_rows_limit,
        "part": part,
    }
    if rows.identity["shape"] == "text":  # no template
        identity = {name: identity[name] for name in ("shape", "bad_rows", "bad_rows_limit", "part")}
    return Step(
        stage=stage,
        name=name,
        version=VERSION,
        label=rows.label,
        identity=identity,
        inputs={"rows": Input(rows, (f"{part}/*", f"{part}.json")), "base": Input(base.source, TOKENIZER_FILES)},
        run="tasks.render:render",
        runtime=rows.runtime,
        packages=("jinja2", "pyarrow"),
    )


def messages_of(stored: Sequence[Row]) -> list[dict[str, Any]]:
    """Stored messages as templates expect them: absent fields absent, tool calls as objects."""
    messages = []
    for given in stored:
        message = {name: value for name, value in given.items() if value is not None or name == "content"}
        if "tool_calls" in message:
            message["tool_calls"] = json.loads(message["tool_calls"])
        if "reasoning" in message:
            message["reasoning_content"] = message.pop("reasoning")
        messages.append(message)
    return messages


class RenderedText(NamedTuple):
    """One text, ready to be tokenized."""

    text: str
    spans: list[int]
    """Flat byte offsets of what is trained."""
    typed: list[int]
    """Flat byte offsets of control tokens that somebody typed and that stay text."""
    lost: tuple[str, ...] = ()
    """What the row has and the text has not."""


class RowRenderer:
    """Renders rows; the step, `check` and `preview` share it.

    Args:
        identity: of the render step.
        base: the model's folder.

    Raises:
        InputError: the model has no template, or it does not compile.
    """

    def __init__(self, identity: dict[str, Any], base: Path) -> None:
        self.identity, self.shape = identity, identity["shape"]
        self.template: ChatTemplate | None = None
        if self.shape != "text":
            thinking = identity["enable_thinking"]
            variables = {} if thinking is None else {"enable_thinking": thinking}
            self.template = ChatTemplate.from_folder(base, identity["template"], variables, identity["default_system"])
            self.skeletons = Skeletons(self.template, self._spans, identity["control_tokens"])

    def meta(self) -> dict[str, Any]:
        """What the tokenize step has to know about the texts."""
        control = sorted(self.template.control_tokens) if self.template else []
        return {"shape": self.shape, "control_tokens": control}

    def _spans(self, rendered: Any) -> tuple[tuple[int, int], ...]:
        assert self.template is not None
        bos = dict(self.template.special_tokens).get("bos_token", "")
        return trained_spans(rendered, self.identity["train_on_prompt"], self.identity["mask_history"], bos)

    def render_all(self, rows: Sequence[Row]) -> list[list[RenderedText] | BadRow]:
        """The texts of rows, or why there are none; the same as `render` of each, only faster."""
        if self.shape != "chat":
            return [self.render(row) for row in rows]
        # one look over all texts: control tokens and thoughts are rare, and a row with one goes the slow way
        everything = "\n".join([message["content"] or "" for row in rows for message in row["messages"]])
        suspicious = self._is_suspicious(everything)
        return [self._filled(row, suspicious) or self.render(row) for row in rows]

    def _filled(self, row: Row, suspicious: bool) -> list[RenderedText] | None:
        messages = row["messages"]
        if row["tools"] is not None:
            return None
        contents = []
        for message in messages:
            content = message["content"]
            if len(message) != len(SIMPLE) or not content or content.isspace():
                return None
            contents.append(content)
        if suspicious and any(map(self._is_suspicious, contents)):
            return None
        skeleton = self.skeletons.of(tuple([message["role"] for message in messages]))
        filled = skeleton.fill(contents) if skeleton else None
        return [RenderedText(*filled, [], skeleton.lost)] if filled and skeleton else None

    def _is_suspicious(self, text: str) -> bool:
        """Whether the engine has to look at a text: thoughts, control tokens, characters that it marks with itself."""
        assert self.template is not None
        return THOUGHT in text or MARK_START in text or MARK_END in text or self.template.has_control_text(text)

    def render(self, row: Row) -> list[RenderedText] | BadRow:
        """The texts of a canonical row: one, or chosen and rejected; or why there are none."""
        if self.shape == "text":
            return [RenderedText(row["text"], [0, len(row["text"].encode())], [])]
        tools = json.loads(row["tools"]) if row["tools"] else None
        if self.shape == "chat":
            return self._one(row["messages"], tools, 0)
        if self.shape == "prompt":
            return self._prompt(row["prompt"], tools)
        texts: list[RenderedText] = []
        for part in ("chosen", "rejected") if self.shape == "preference" else ("completion",):
            found = self._one([*row["prompt"], *row[part]], tools, len(row["prompt"]))
            if isinstance(found, BadRow):
                return BadRow(found.reason, f"{part}: {found.detail}")
            texts += found
        if len(texts) == 2 and texts[0].text == texts[1].text:  # many templates cut white space off
            return BadRow("tie", "'chosen' and 'rejected' are the same text once the template has rendered them")
        return texts

    def _one(self, stored: Sequence[Row], tools: Any, first: int) -> list[RenderedText] | BadRow:
        """A conversation as one text; answers before message `first` belong to the prompt."""
        assert self.template is not None
        messages = messages_of(stored)
        result = self.template.render_training(messages, tools, self.identity["control_tokens"])
        if isinstance(result, Refusal):
            return BadRow(result.reason, result.detail)
        spans = self._spans(result)
        if first:
            earlier = sum(message["role"] == "assistant" for message in messages[:first])
            spans = result.spans[earlier:]
        text = result.text
        return [RenderedText(text, flat_bytes(text, spans), flat_bytes(text, result.typed), result.lost)]

    def _prompt(self, stored: Sequence[Row], tools: Any) -> list[RenderedText] | BadRow:
        assert self.template is not None
        result = self.template.render_prompt(messages_of(stored), tools, self.identity["control_tokens"])
        if isinstance(result, Refusal):
            return BadRow(result.reason, result.detail)
        return [RenderedText(result[0], [], flat_bytes(*result))]


class ChunkRenderer:
    """Makes one chunk of texts of one chunk of rows."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.renderer = RowRenderer(settings["identity"], Path(settings["base"]))

    def __call__(self, task: dict[str, Any], payload: bytes, target: Path) -> dict[str, Any]:
        rows = to_rows(read_table(Path(task["input"])), self.renderer.shape)
        texts: list[RenderedText] = []
        places: list[tuple[Any, ...]] = []
        mark = MARKS.get(self.renderer.shape)
        refused, lost = [], Counter[str]()
        for row, result in zip(rows, self.renderer.render_all(rows), strict=True):
            if isinstance(result, BadRow):
                text = json.dumps(row, ensure_ascii=False)
                refused.append([row["row"], row["line"], result.reason, result.detail, text])
                continue
            texts += result
            places += [(row["row"], row["line"], row[mark] if mark else None)] * len(result)
            if any(text.lost for text in result):
                lost.update({name for text in result for name in text.lost})
        write_table(target, _table(texts, places, self.renderer.shape))
        return {"read": len(rows), "rows": len(rows) - len(refused), "left_out": refused, "lost": dict(lost)}


def _table(texts: list[RenderedText], places: list[tuple[Any, ...]], shape: str) -> pa.Table:
    """Texts with their rows' numbers, lines and marks."""
    columns = [
        pa.array([text.text for text in texts], pa.string()),
        pa.array([text.spans for text in texts], pa.list_(pa.int32())),
        pa.array([text.typed for text in texts], pa.list_(pa.int32())),
        pa.array([row for row, _, _ in places], pa.int64()),
        pa.array([line for _, line, _ in places], pa.int32()),
    ]
    fields = mark_field(shape)
    columns += [pa.array([mark for _, _, mark in places], field.type) for field in fields]
    return pa.Table.from_arrays(columns, schema=pa.schema([*SCHEMA, *fields]))


def render(work: Work) -> dict[str, Any]:
    """Render every chunk; finished chunks of earlier attempts and data sets are used again.

    Raises:
        InputError: a refused row under `bad_rows: fail`, or every row refused.
    """
    folder, part = work.inputs["rows"], work.identity["part"]
    chunks = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
    base = work.inputs["base"]
    renderer = RowRenderer(work.identity, base)  # says what is wrong with the template before any worker starts
    chunk_identity = {name: value for name, value in work.identity.items() if name not in STEP_ONLY}
    constant = {
        "step": work.step.kind,
        "version": VERSION,
        "identity": chunk_identity,
        "base": work.digests["base"],
        "packages": work.packages,
    }
    key = fingerprints(constant)
    pending = [Chunk(key({"input": chunk["sha256"]}), {"input": str(folder / chunk["path"])}) for chunk in chunks]
    made = make_chunks(
        "tasks.render:ChunkRenderer",
        {"identity": chunk_identity, "base": str(base)},
        pending,
        ChunkCache(work.home, work.step.kind, work.rebuilding),
        work.step.runtime["workers"],
        work.counter([chunk["rows"] for chunk in chunks]),
        work.stop,
        work.step.runtime["dask"],
    )
    (work.output / META).write_text(json.dumps(renderer.meta(), ensure_ascii=False), encoding="utf-8")
    return _collect(work, chunks, made)


def _collect(work: Work, chunks: list[dict[str, Any]], made: list[Made]) -> dict[str, Any]:
    """Chunks to the output, refused rows to the report."""
    rejects, lost = Rejects(), Counter[str]()
    files = file_names(work.inputs["rows"], work.step.runtime)
    for chunk, done in zip(chunks, made, strict=True):
        lost.update(done.report["lost"])
        for row, line, reason, detail, text in done.report["left_out"]:
            rejects.add(files[chunk["source"]][chunk["file"]], place(row, line), row, BadRow(reason, detail), text)
    total, rows = (sum(done.report[name] for done in made) for name in ("read", "rows"))
    require_rendered(work.step, [file for names in files for file in names], rejects, total, rows)
    _write_chunks(work, chunks, made)
    rejects.write(work.output, work.identity["bad_rows"] == "quarantine")
    (work.output / "report" / FILES).write_text(json.dumps(files, ensure_ascii=False), encoding="utf-8")
    for role, count in sorted(lost.items()):
        what = f"the {role}" if role in ("tools", "reasoning") else f"a {role} message"
        work.note(f"the template drops {what} of {count} of {total} rows")
    return {"rows": rows, "left_out": rejects.counts(), "lost": dict(lost)}


def _write_chunks(work: Work, sources: list[dict[str, Any]], made: list[Made]) -> None:
    """Link finished chunks into the output, and list them in `chunks.json`."""
    (work.output / "rows").mkdir()
    entries: list[dict[str, Any]] = []
    for source, chunk in zip(sources, made, strict=True):
        if not chunk.report["rows"]:
            continue
        path = f"rows/{len(entries):05d}.arrow"
        link(chunk, work.output / path)
        work.known[path] = (chunk.size, chunk.sha256)
        entries.append(source | {"path": path, "sha256": chunk.sha256, "rows": chunk.report["rows"]})
    (work.output / CHUNKS).write_text(json.dumps(entries), encoding="utf-8")


def rendered_chunks(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a render artifact holds: its description and its chunks."""
    meta, chunks = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (META, CHUNKS))
    return meta, chunks


def require_rendered(step: Step, files: Sequence[str], rejects: Rejects, read: int, rows: int) -> None:
    """End a run that the template leaves without rows, or that wants none left out.

    Raises:
        InputError: a refused row under `bad_rows: fail`, no row but refused ones, or more of them than
            `bad_rows_limit`.
    """
    if step.identity["bad_rows"] == "fail":
        cure = "Mend the rows, use another template, or set bad_rows: skip to leave them out."
        rejects.raise_if_any("chat template", cure)
    if rows == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.counts().items())
        rule = f"the template can use none of {len(rejects.rows)} rows: {reasons}"
        raise InputError(Problem(", ".join(files), rule, "Use another template."))
    rejects.raise_above(step.identity["bad_rows_limit"], read, "chat template")
