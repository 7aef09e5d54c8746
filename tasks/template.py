"""The chat template engine: one object for training, evaluation, chat and export.

One decision: rendering equals transformers' `apply_chat_template(tokenize=False)` character for character, but needs
only Jinja, so that it runs in a light process; and training rows come with spans that are proved (see `tasks.spans`).
The day is no input: `strftime_now` answers with a fixed date that is part of the template's identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from registry.errors import InputError, Problem
from tasks.control_text import ControlTokens, Disguise, Scanner, find_typed
from tasks.jsonlines import read_object
from tasks.spans import (
    PROBE_WORDS,
    REASONING_FIELDS,
    Draw,
    Finder,
    Message,
    Refusal,
    Rendered,
    Shape,
    TemplateFailure,
    appears,
    learn,
    plain_text,
)
from tasks.template_files import NAMED_TOKENS, added_tokens, folder_template, token_text
from tasks.template_language import GENERATION, MARK_END, MARK_START, MARKS_WANTED, compile_template

__all__ = ["DEFAULT_DATE", "ChatTemplate", "ControlTokens", "Refusal", "Rendered", "compile_template", "trained_spans"]

DEFAULT_DATE = "2024-07-26"  # the date that Llama 3.1's own template falls back to
Tools = Sequence[Mapping[str, Any]]
Variables = Mapping[str, str | int | float | bool | None]


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
    variables: tuple[tuple[str, Any], ...] = ()
    """Further variables the template sees, e.g. `("enable_thinking", False)`."""
    default_system: str | None = None
    """System message of a conversation that has none; None: whatever the template does then."""

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        text: str | None = None,
        variables: Variables | None = None,
        default_system: str | None = None,
    ) -> ChatTemplate:
        """The template of a model folder.

        Args:
            folder: holds tokenizer_config.json, and perhaps chat_template.jinja (which wins), special_tokens_map.json
                and tokenizer.json.
            text: a template to use instead of the folder's.
            variables: further variables of the template, e.g. `{"enable_thinking": False}`.
            default_system: system message of conversations without one.

        Raises:
            InputError: no template in the folder, a file that is not JSON, or a template that does not compile.
        """
        config = read_object(folder / "tokenizer_config.json")
        named = {**read_object(folder / "special_tokens_map.json"), **config}
        special = tuple((name, token_text(named[name])) for name in NAMED_TOKENS if named.get(name))
        added = added_tokens(folder / "tokenizer.json") or config.get("added_tokens_decoder", {}).values()
        control = frozenset(token["content"] for token in added if token.get("special") and token["content"])
        where = "chat template"
        if text is None:
            where, text = folder_template(folder, config)
        compile_template(text, DEFAULT_DATE, where)
        return cls(text, special, control, None, tuple(sorted((variables or {}).items())), default_system)

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
            "date": self.day if self.uses_date else None,
            "variables": dict(self.variables),
            "default_system": self.default_system,
        }

    def with_variables(self, variables: Variables) -> ChatTemplate:
        """The same template with further variables; made once for each set of them."""
        key = tuple(sorted({**dict(self.variables), **variables}.items()))
        if key == self.variables:
            return self
        if key not in self._variants:
            self._variants[key] = replace(self, variables=key)
        return self._variants[key]

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
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
            return self._draw(self.with_system(messages), tools, add_generation_prompt, **kwargs)
        except TemplateFailure as error:
            raise InputError(Problem("chat template", str(error))) from error

    def render_prompt(
        self, messages: Sequence[Message], tools: Tools | None = None, control_tokens: ControlTokens = "plain"
    ) -> tuple[str, tuple[tuple[int, int], ...]] | Refusal:
        """What a model is given to answer: text with the header of the answer, and where control tokens were typed.

        Args:
            messages, tools, control_tokens: as `render_training`.
        """
        messages = self.with_system([{n: v for n, v in message.items() if v is not None} for message in messages])
        typed = [] if control_tokens == "keep" else list(find_typed(messages, tools, self._scanner))
        for found in typed:
            if control_tokens == "refuse" or not found.can_be_hidden:
                return Refusal("control_text", f"{found.place} has the text of the control token {found.token!r}")
        try:
            kept = self._draw(messages, tools, True)
            if not typed:
                return kept, ()
            disguise = Disguise.of_row(self._scanner, messages, tools, self.text)
            revealed = disguise.reveal(self._draw(disguise.messages(messages), disguise.tools(tools), True))
        except TemplateFailure as error:
            return Refusal("template_error", f"the template refuses the conversation: {error}")
        if revealed is None or revealed.text != kept:
            return Refusal("control_text", "the template acts upon the text of a control token that somebody typed")
        return kept, revealed.typed

    def render_training(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        control_tokens: ControlTokens = "plain",
        variables: Variables | None = None,
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
            control_tokens: what the text of a control token that somebody typed becomes: `plain` (text like any other;
                `Rendered.typed` says where it stands), `keep` (a real control token) or `refuse` (the row).
            variables: of the template, beside its own.

        Returns:
            `Rendered`, or a `Refusal`: `template_error` (the template raised), `no_answer` (no assistant turn),
            `control_text`, `content_lost` (an answer, or its tool call, is not in the text), `empty_answer` (and no
            terminator to learn), `no_generation_prompt` (the template's header for answers is not in its generation
            prompt), `content_not_text`, or `mask_not_proved`.
        """
        if variables:
            return self.with_variables(variables).render_training(messages, tools, control_tokens)
        messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
        if not any(message.get("role") == "assistant" for message in messages):
            return Refusal("no_answer", "no message is an assistant's")
        given, messages = len(messages), self.with_system(messages)
        first = 1 + given - len(messages)
        typed = [] if control_tokens == "keep" else list(find_typed(messages, tools, self._scanner, first))
        for found in typed:
            if control_tokens == "refuse" or not found.can_be_hidden:
                return Refusal("control_text", f"{found.place} has the text of the control token {found.token!r}")
        result = (self._render_disguised if typed else self._render_row)(messages, tools, first)
        if control_tokens != "keep" and isinstance(result, Rendered):
            for border in (border for span in result.spans for border in span):
                if token := self._scanner.across(result.text, border):
                    return Refusal("control_text", f"an answer and the text beside it make the control token {token!r}")
        return result

    def _render_row(self, messages: Sequence[Message], tools: Tools | None, first: int) -> Rendered | Refusal:
        try:
            text = self._draw(messages, tools)
            marked = self.generation_marks(messages, tools, text)
        except TemplateFailure as error:
            return Refusal("template_error", f"the template refuses the conversation: {error}")
        shape = self.shape
        if isinstance(shape, Refusal):
            return shape

        def draw(changed: Sequence[Message], add_generation_prompt: bool) -> str:
            return self._draw(changed, tools, add_generation_prompt)

        finder = Finder(draw, shape, messages, text, marked, first)
        spans = finder.find()
        if isinstance(spans, Refusal):
            return spans
        return Rendered(text, spans, tuple(sorted(finder.lost | _find_lost(draw, messages, tools, text))))

    def _render_disguised(self, messages: Sequence[Message], tools: Tools | None, first: int) -> Rendered | Refusal:
        """A row with typed control tokens: rendered with these disguised, which must change nothing else."""
        disguise = Disguise.of_row(self._scanner, messages, tools, self.text)
        result = self._render_row(disguise.messages(messages), disguise.tools(tools), first)
        try:
            kept = self._draw(messages, tools)
        except TemplateFailure as error:
            return Refusal("template_error", f"the template refuses the conversation: {error}")
        if isinstance(result, Refusal) and result.reason != "template_error":
            return Refusal(result.reason, disguise.plain(result.detail))
        revealed = None if isinstance(result, Refusal) else disguise.reveal(result.text)
        if isinstance(result, Refusal) or revealed is None or revealed.text != kept:
            return Refusal("control_text", "the template acts upon the text of a control token that somebody typed")
        spans = tuple((revealed.shifted(start), revealed.shifted(end)) for start, end in result.spans)
        return replace(result, text=kept, spans=spans, typed=revealed.typed)

    @property
    def day(self) -> str:
        """The ISO day that `strftime_now` answers with."""
        return self.date or DEFAULT_DATE

    @cached_property
    def _scanner(self) -> Scanner:
        return Scanner(self.control_tokens)

    def has_control_text(self, text: str) -> bool:
        """Whether a text holds the text of a control token."""
        return next(self._scanner.find(text), None) is not None

    @cached_property
    def _variants(self) -> dict[tuple[tuple[str, Any], ...], ChatTemplate]:
        return {}

    def with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, with `default_system` in front where they have none."""
        if self.default_system is None or (messages and messages[0].get("role") == "system"):
            return messages
        return [{"role": "system", "content": self.default_system}, *messages]

    @cached_property
    def shape(self) -> Shape | Refusal:
        """What probing learns about the template; a refusal is that of every training row."""
        tokens = self.control_tokens | {token for _, token in self.special_tokens if token}
        return learn(lambda messages, prompt: self._draw(messages, None, prompt), Scanner(tokens))

    def variables_of(
        self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool, **kwargs: Any
    ) -> dict[str, Any]:
        """Everything the template sees of a conversation."""
        return {
            **dict(self.special_tokens),
            **dict(self.variables),
            **kwargs,
            "messages": [_as_templates_expect(message) for message in messages],
            "tools": tools,
            "documents": kwargs.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }

    def _draw(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        variables = self.variables_of(messages, tools, add_generation_prompt, **kwargs)
        try:
            return compile_template(self.text, self.day, "chat template").render(variables)
        except InputError:
            raise
        except Exception as error:  # the template is a stranger's program: it can raise anything
            kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
            raise TemplateFailure(f"{kind}{error}") from error

    def generation_marks(
        self, messages: Sequence[Message], tools: Tools | None = None, text: str | None = None
    ) -> list[tuple[int, int]] | None:
        """The character ranges inside `{% generation %}`; None when the template has no such tag.

        Args:
            messages, tools: the row, without default system message.
            text: its rendering, where it is known.
        """
        if not GENERATION.search(self.text):
            return None
        text = self._draw(messages, tools) if text is None else text
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


def trained_spans(
    rendered: Rendered, train_on_prompt: bool = False, mask_history: bool = False, bos_token: str = ""
) -> tuple[tuple[int, int], ...]:
    """Which part of a rendered row is trained: the answers, only the last of them, or everything.

    >>> row = Rendered("<s>hi: ok; no: yes;", ((7, 10), (15, 19)))
    >>> trained_spans(row), trained_spans(row, mask_history=True)
    (((7, 10), (15, 19)), ((15, 19),))
    >>> trained_spans(row, train_on_prompt=True, bos_token="<s>")
    ((3, 19),)

    Args:
        rendered: the row.
        train_on_prompt: everything but a leading BOS.
        mask_history: only the last answer, with its terminator.
        bos_token: text of the BOS.

    Raises:
        ValueError: both are asked for.
    """
    if train_on_prompt and mask_history:
        raise ValueError("train_on_prompt trains everything, mask_history the last answer only: choose one")
    if train_on_prompt:
        start = len(bos_token) if bos_token and rendered.text.startswith(bos_token) else 0
        return ((start, len(rendered.text)),)
    return rendered.spans[-1:] if mask_history else rendered.spans


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
