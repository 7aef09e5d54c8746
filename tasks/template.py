"""The chat template engine: one object for training, evaluation, chat and export.

One decision: rendering equals transformers' `apply_chat_template(tokenize=False)` character for character, but needs
only Jinja, so that it runs in a light process; and training rows come with spans that are proved (see `tasks.spans`).
The day is no input: `strftime_now` answers with a fixed date that is part of the template's identity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from registry.core import read_text
from registry.errors import InputError, Problem
from tasks.jsonlines import read_object
from tasks.spans import (
    PROBE_WORDS,
    REASONING_FIELDS,
    Draw,
    Finder,
    Message,
    Refusal,
    Rendered,
    Scanner,
    Shape,
    TemplateFailure,
    appears,
    learn,
    plain_text,
)

__all__ = ["ChatTemplate", "Refusal", "Rendered"]

DEFAULT_DATE = "2024-07-26"  # the date that Llama 3.1's own template falls back to
NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
MARK_START, MARK_END = "\ue0f0", "\ue0f1"  # private use: stand around `generation` bodies in one extra rendering
MARKS_WANTED = "llamatuner_marks"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with all that its rendering depends on."""

    text: str
    """Jinja source."""
    special_tokens: tuple[tuple[str, str], ...] = ()
    """Variables the template sees, e.g. `("bos_token", "<s>")`."""
    control_tokens: frozenset[str] = frozenset()
    """Added tokens marked special: text that the tokenizer turns into control tokens."""
    date: str | None = None
    """ISO day that `strftime_now` answers with; None: 2024-07-26, so that text is reproducible."""

    @classmethod
    def from_folder(cls, folder: Path, text: str | None = None) -> ChatTemplate:
        """The template of a model folder.

        Args:
            folder: holds tokenizer_config.json, and perhaps chat_template.jinja (which wins), special_tokens_map.json
                and tokenizer.json.
            text: a template to use instead of the folder's.

        Raises:
            InputError: no template in the folder, a file that is not JSON, or a template that does not compile.
        """
        config = read_object(folder / "tokenizer_config.json")
        named = {**read_object(folder / "special_tokens_map.json"), **config}
        special = tuple((name, _token(named[name])) for name in NAMED_TOKENS if named.get(name))
        added = _added_tokens(folder / "tokenizer.json") or config.get("added_tokens_decoder", {}).values()
        control = frozenset(token["content"] for token in added if token.get("special") and token["content"])
        where = "chat template"
        if text is None:
            where, text = _folder_template(folder, config)
        compile_template(text, DEFAULT_DATE, where)
        return cls(text, special, control)

    @property
    def uses_date(self) -> bool:
        """Whether the template writes the day's date."""
        return "strftime_now" in self.text

    @property
    def terminator(self) -> str | None:
        """The text that ends an assistant's turn, e.g. `<|im_end|>`, found by probing; None: the family has none.

        None also when probing fails; then every training row is refused with the reason.
        """
        shape = self.shape
        return None if isinstance(shape, Refusal) else shape.ending.strip() or None

    def identity(self) -> dict[str, Any]:
        """All that decides what is rendered, as JSON data for step keys."""
        return {
            "text": self.text,
            "special_tokens": dict(self.special_tokens),
            "control_tokens": sorted(self.control_tokens),
            "date": self._date if self.uses_date else None,
        }

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """A conversation as text, equal to transformers' `apply_chat_template(tokenize=False)`.

        Args:
            messages: role, content and what else the template knows; a field that is None counts as absent.
            tools: JSON schemas.
            add_generation_prompt: end with the header of an assistant's turn.
            **kwargs: further variables of the template, e.g. `enable_thinking=False`.

        Raises:
            InputError: the template refuses the conversation; carries the template's own words.
        """
        try:
            return self._draw(messages, tools, add_generation_prompt, **kwargs)
        except TemplateFailure as error:
            raise InputError(Problem("chat template", str(error))) from error

    def render_training(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        allow_control_text: bool = False,
    ) -> Rendered | Refusal:
        """A conversation as text with the spans to train on, or why not.

        A span begins where the generation prompt ends and ends with the turn's terminator; a line end behind that is
        outside. Tool calls belong to the answer, tool results never do.

        >>> chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>\\n{% endfor %}"
        >>> chatml += "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
        >>> template = ChatTemplate(chatml, control_tokens=frozenset({"<|im_start|>", "<|im_end|>"}))
        >>> row = template.render_training([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}])
        >>> [row.text[start:end] for start, end in row.spans]
        ['ok<|im_end|>']

        Args:
            messages: the row.
            tools: JSON schemas.
            allow_control_text: render a row in which somebody typed the text of a control token, which the tokenizer
                would take for a real one.

        Returns:
            `Rendered`, or a `Refusal`: `template_error` (the template raised), `no_answer` (no assistant turn),
            `control_text`, `content_lost` (an answer, or its tool call, is not in the text), `empty_answer` (and no
            terminator to learn), `no_generation_prompt` (the template's header for answers is not in its generation
            prompt), `content_not_text`, or `mask_not_proved`.
        """
        messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
        if not any(message.get("role") == "assistant" for message in messages):
            return Refusal("no_answer", "no message is an assistant's")
        if not allow_control_text and (refusal := self._control_text(messages, tools)):
            return refusal
        try:
            text = self._draw(messages, tools)
            marked = self._marked(messages, tools, text)
        except TemplateFailure as error:
            return Refusal("template_error", f"the template refuses the conversation: {error}")
        shape = self.shape
        if isinstance(shape, Refusal):
            return shape

        def draw(changed: Sequence[Message], add_generation_prompt: bool) -> str:
            return self._draw(changed, tools, add_generation_prompt)

        finder = Finder(draw, shape, messages, text, marked)
        spans = finder.find()
        if isinstance(spans, Refusal):
            return spans
        return Rendered(text, spans, tuple(sorted(finder.lost | _find_lost(draw, messages, tools, text))))

    @property
    def _date(self) -> str:
        return self.date or DEFAULT_DATE

    @cached_property
    def _scanner(self) -> Scanner:
        return Scanner(self.control_tokens)

    @cached_property
    def shape(self) -> Shape | Refusal:
        """What probing learns about the template; a refusal is that of every training row."""
        tokens = self.control_tokens | {token for _, token in self.special_tokens if token}
        return learn(lambda messages, prompt: self._draw(messages, None, prompt), Scanner(tokens))

    def _draw(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        variables = {
            **dict(self.special_tokens),
            **kwargs,
            "messages": [_as_templates_expect(message) for message in messages],
            "tools": tools,
            "documents": kwargs.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return compile_template(self.text, self._date, "chat template").render(variables)
        except InputError:
            raise
        except Exception as error:  # the template is a stranger's program: it can raise anything
            kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
            raise TemplateFailure(f"{kind}{error}") from error

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, text: str
    ) -> list[tuple[int, int]] | None:
        """The character ranges inside `{% generation %}`; None when the template has no such tag."""
        if not re.search(r"\{%[-+]?\s*generation\b", self.text):
            return None
        ranges, starts, length = [], [], 0
        pieces = re.split(f"([{MARK_START}{MARK_END}])", self._draw(messages, tools, **{MARKS_WANTED: True}))
        for piece in pieces:
            if piece == MARK_START:
                starts.append(length)
            elif piece == MARK_END and starts:
                ranges.append((starts.pop(), length))
            else:
                length += len(piece)
        return ranges if "".join(pieces[::2]) == text else []

    def _control_text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> Refusal | None:
        for place, value in (*((f"message {n}", message) for n, message in enumerate(messages, 1)), ("tools", tools)):
            for string in _strings(value):
                for start, end in self._scanner.find(string):
                    return Refusal("control_text", f"{place} has the text of the control token {string[start:end]!r}")
        return None


def _strings(value: Any) -> Iterator[str]:
    """Every string inside JSON data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(name)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _find_lost(draw: Draw, messages: Sequence[Message], tools: Sequence[Any] | None, text: str) -> set[str]:
    """Roles other than assistant whose message the template drops, and `tools` when it drops those.

    Every such message is swapped for a word of its own: one more rendering tells, whatever the messages say.
    """
    words, swapped = {}, []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant" and (plain_text(message.get("content")) or "").strip():
            words[f"{PROBE_WORDS[1]}{index}z"] = str(message.get("role"))
            message = {**message, "content": f"{PROBE_WORDS[1]}{index}z"}
        swapped.append(message)
    names = [tool.get("function", tool).get("name") for tool in tools or ()]
    lost = set() if all(appears(name, text) for name in names) else {"tools"}
    if not words:
        return lost
    try:
        other = draw(swapped, False)
    except TemplateFailure:  # a template that reads what messages say: look for the messages themselves
        pairs = ((plain_text(message.get("content")) or "", str(message.get("role"))) for message in messages)
        return lost | {role for content, role in pairs if role != "assistant" and not appears(content, text)}
    return lost | {role for word, role in words.items() if word not in other}


def _as_templates_expect(message: Message) -> dict[str, Any]:
    """Absent fields absent, reasoning under the names that templates read (as transformers does)."""
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in REASONING_FIELDS if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: the body, between marks where they are wanted."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own convention

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, context: Context, caller: Callable[[], str]) -> str:
        body = caller()
        return f"{MARK_START}{body}{MARK_END}" if context.get(MARKS_WANTED) else body


class _Dictionary:
    """`dict` for templates, without the class's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates, closed to the interpreter's own names."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not set {name!r} on a namespace")
        super().__setitem__(name, value)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def compile_template(text: str, date: str, where: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    day = datetime.fromisoformat(date)
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": day.strftime,
        "dict": _Dictionary(),
        "namespace": _Namespace,
    }
    try:
        return environment.from_string(text)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        rule = f"the chat template does not compile: {getattr(error, 'message', error)}"
        problem = Problem(f"{where}:{getattr(error, 'lineno', 1)}", rule)
        raise InputError(problem) from error


def _token(value: Any) -> str:
    token = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(token, str):
        raise InputError(Problem("tokenizer_config.json", f"{value!r} is not a special token", "Copy the model again."))
    return token


def _added_tokens(path: Path) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, without reading its vocabulary: that takes a second where it is large."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r'"added_tokens"\s*:\s*', text)
    if found is None:
        return []
    try:
        return json.JSONDecoder().raw_decode(text, found.end())[0]
    except ValueError as error:
        raise InputError(Problem(str(path), f"is not JSON: {error}")) from error


def _folder_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """File and text of a folder's own template."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return str(path), read_text(path)
    path, found = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not found:
        cure = "Choose one with `template:`, e.g. chatml, or use the model's chat variant."
        raise InputError(Problem(str(path), "the model has no chat template", cure))
    return str(path), found
