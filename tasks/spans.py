"""Where the answers stand in a rendered conversation.

One decision: a template is a black box that is asked questions. Each answer is swapped for a marker word and the
conversation rendered again; what stays the same before and after the marker is proved to be outside the answer, and
what stood in its place must be the answer, letter for letter. The generation prompt and the turn's terminator are
learned by rendering two small probe conversations. What is not proved is refused, with a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.control_text import Scanner

Message = Mapping[str, Any]
Draw = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) → text; raises `TemplateFailure`."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
THINK_END = "</think>"
# mixed case, so that a template that changes case is found out
PROBE_WORDS = ("QuxenoVar", "BrilkoTam", "ZorvaPlin", "WexuDral")


class TemplateFailure(Exception):
    """The template raised; the text is its own message."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the parts of it that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Character ranges [start, end), one per assistant turn, in order."""
    lost: tuple[str, ...] = ()
    """What the row has and the text has not: roles, `tools`, `reasoning`. Sorted."""
    typed: tuple[tuple[int, int], ...] = ()
    """Character ranges of control tokens that are plain text, because somebody typed them (see `tasks.encoding`)."""


@dataclass(frozen=True)
class Refusal:
    """Why a row cannot be trained on."""

    reason: str
    """`template_error`, `no_answer`, `content_lost`, `empty_answer`, `control_text`, `no_generation_prompt`,
    `content_not_text` or `mask_not_proved`."""
    detail: str
    """A sentence with the number of the turn (messages count from 1)."""


@dataclass(frozen=True)
class Shape:
    """What the probes tell about a template."""

    ending: str
    """From the end of an answer to the end of its terminator, e.g. ` </s>`; empty: the family has none."""
    forms: tuple[tuple[str, str], ...]
    """(prompt, lead), longest first: the generation prompt and what the template writes between it and the answer."""
    prompted: bool
    """False: the template writes a header before answers that its generation prompt does not have."""


def learn(draw: Draw, scanner: Scanner) -> Shape | Refusal:
    """Render the probe conversations and read terminator and generation prompt off them."""
    first, answer, second, last = PROBE_WORDS
    talk = [{"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, PROBE_WORDS, strict=True)]
    try:
        short, long = draw(talk[:2], False), draw(talk, False)
        bare, prompt, later = draw(talk[:1], False), draw(talk[:1], True), draw(talk[:3], True)
    except TemplateFailure as error:
        return Refusal("template_error", f"a plain conversation of user and assistant fails: {error}")
    wanted = {short: (first, answer), long: PROBE_WORDS, bare: (first,), prompt: (first,), later: (second,)}
    if any(text.count(word) != 1 for text, words in wanted.items() for word in words):
        return Refusal("mask_not_proved", "in a probe conversation the template changes, drops or repeats a message")
    ending = _ending(_between(short, answer, None), _between(long, answer, second), scanner)
    if ending is None:
        return Refusal(
            "mask_not_proved", "no terminator is common to an answer in a conversation and one at the end of it"
        )
    user_end = _between(bare, first, None)
    gaps = (
        (_between(short, first, answer), _between(prompt, first, None)),
        (_between(long, first, answer), _between(prompt, first, None)),
        (_between(long, second, last), _between(later, second, None)),
    )
    forms, prompted = set(), True
    for gap, asked in gaps:
        shared = gap if asked.startswith(gap) else scanner.common_prefix(gap, asked)
        header = shared[len(scanner.common_prefix(shared, user_end)) :]
        lead = gap[len(shared) :]
        prompted = prompted and bool(header.strip() or not lead.strip())
        forms.add((header, lead))
    return Shape(ending, tuple(sorted(forms, key=lambda form: (-len(form[0] + form[1]), form))), prompted)


def _between(text: str, left: str, right: str | None) -> str:
    return text[text.index(left) + len(left) : None if right is None else text.index(right)]


def _ending(at_end: str, within: str, scanner: Scanner) -> str | None:
    """What follows an answer wherever it stands, up to its first control token; None: cannot be told."""
    if not at_end.strip():
        return ""
    common = scanner.common_prefix(at_end, within)
    for _, end in scanner.find(common):
        return common[:end]
    if common != at_end:  # plain text that may be cut inside a word: keep whole words
        common = common[: max(common.rfind(space) for space in " \n\t") + 1]
    return common.rstrip() if common.strip() else None


class Finder:
    """Finds the spans of one conversation.

    Args:
        draw: renders messages, with the row's tools.
        shape: what `learn` found.
        messages: the row.
        text: its rendering.
        marked: parts inside `{% generation %}`, when the template has such marks.
        first: number of the first message, for what refusals say.
    """

    def __init__(
        self,
        draw: Draw,
        shape: Shape,
        messages: Sequence[Message],
        text: str,
        marked: list[tuple[int, int]] | None,
        first: int = 1,
    ) -> None:
        self.draw, self.shape, self.messages, self.text, self.marked = draw, shape, messages, text, marked
        self.first = first
        self.word = PROBE_WORDS[0]
        while self.word in text:
            self.word += "x"
        self.lost: set[str] = set()
        self.turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        self.together = self._together()

    def find(self) -> tuple[tuple[int, int], ...] | Refusal:
        """The span of every assistant turn, or the first reason why not."""
        spans: list[tuple[int, int]] = []
        for index in self.turns:
            span = self._turn(index, self.messages[index])
            if isinstance(span, Refusal):
                return span
            if not (spans[-1][1] if spans else 0) <= span[0] < span[1] <= len(self.text):
                return self._refuse("mask_not_proved", index, "has an empty span, or one inside an earlier answer")
            spans.append(span)
        return tuple(spans) if spans else Refusal("no_answer", "no message is an assistant's")

    def _refuse(self, reason: str, index: int, what: str) -> Refusal:
        return Refusal(reason, f"message {index + self.first} ({self.messages[index]['role']}) {what}")

    def _turn(self, index: int, message: Message) -> tuple[int, int] | Refusal:
        content = plain_text(message.get("content"))
        if content is None:
            return self._refuse("content_not_text", index, "has parts that are not text")
        calls = message.get("tool_calls") or []
        if calls and not all(appears(call.get("function", call).get("name"), self.text) for call in calls):
            return self._refuse("content_lost", index, "loses its tool call: the template does not write it")
        reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name)), "")
        if not (content or calls or reasoning or self.shape.ending):
            return self._refuse("empty_answer", index, "is empty, and the template has no terminator to learn")
        thought, answer = split_thought(content)
        place = self.together.get(index) or self._alone(index, thought, answer)
        if isinstance(place, TemplateFailure) and calls:  # e.g. Mistral allows tool results only behind a tool call
            return self._by_prefix(index, answer, calls)
        if isinstance(place, TemplateFailure):
            return self._refuse("mask_not_proved", index, f"cannot be swapped for another answer: {place}")
        if isinstance(place, Refusal):
            return place
        before, end = place
        start = self._start(index, before, plain=not (thought or reasoning or "<think>" in answer))
        if isinstance(start, Refusal) and thought and isinstance(whole := self._alone(index, "", content), tuple):
            start = self._start(index, whole[0], plain=True)
        if isinstance(start, Refusal):
            return start
        if calls:
            refusal = self._check_calls(index, self.text[start:end], answer, calls)
        else:
            refusal = self._check_answer(index, before, end, answer)
        if refusal or (refusal := self._check_marks(index, end if calls else len(before), end)):
            return refusal
        if not self.text.startswith(self.shape.ending, end):
            return self._refuse("mask_not_proved", index, f"is not followed by the terminator {self.shape.ending!r}")
        for part in filter(None, (thought.removesuffix(THINK_END).rpartition("<think>")[2].strip(), reasoning.strip())):
            if part not in self.text[start:end]:
                self.lost.add("reasoning")
        return start, end + len(self.shape.ending)

    def _together(self) -> dict[int, tuple[str, int]]:
        """(text before, end) of every answer without tool calls, by swapping all at once.

        The text rebuilt from the other rendering and the answers must equal the text; else nothing is found here.
        """
        words, swapped = {}, list(self.messages)
        for index in self.turns:
            content = plain_text(self.messages[index].get("content"))
            if content is not None and not self.messages[index].get("tool_calls"):
                thought, words[index] = split_thought(content)
                swapped[index] = {**swapped[index], "content": f"{thought}{self.word}{index}z"}
        try:
            pieces = re.split(f"{self.word}([0-9]+)z", self.draw(swapped, False))
        except TemplateFailure:
            return {}
        if pieces[1::2] != [str(index) for index in words] or not self.text.startswith(pieces[0]):
            return {}
        places, position = {}, len(pieces[0])
        for (index, answer), behind in zip(words.items(), pieces[2::2], strict=True):
            forms = (answer, answer.strip(), answer.strip("\n"), answer.lstrip("\n"), answer.lstrip(), answer.rstrip())
            written = next((form for form in forms if self.text.startswith(form + behind, position)), None)
            if written is None:
                return {}
            places[index] = self.text[:position], position + len(written)
            position += len(written) + len(behind)
        return places if position == len(self.text) else {}

    def _alone(self, index: int, thought: str, answer: str) -> tuple[str, int] | Refusal | TemplateFailure:
        """(text before, end) of one answer, tool calls included, by swapping only this one."""
        swapped = {name: value for name, value in self.messages[index].items() if name != "tool_calls"}
        swapped["content"] = thought + self.word
        try:
            other = self.draw([*self.messages[:index], swapped, *self.messages[index + 1 :]], False)
        except TemplateFailure as error:
            return error
        if other.count(self.word) != 1:
            return self._not_found(index, answer, f"is written {other.count(self.word)} times")
        before, after = other.split(self.word)
        if not self.text.endswith(after):
            return self._not_found(index, answer, "changes the text behind it")
        return before, len(self.text) - len(after)

    def _prompt(self, index: int) -> str | None:
        """What a model is given to answer here; None where a conversation cannot begin so."""
        if index == 0:
            return None
        try:
            return self.draw(self.messages[:index], True)
        except TemplateFailure:
            return None  # the learned form of the generation prompt has to do

    def _by_prefix(self, index: int, answer: str, calls: Sequence[Any]) -> tuple[int, int] | Refusal:
        """A turn with tool calls as the difference of two prefixes of the conversation, where they are prefixes."""
        prompt, ending = self._prompt(index), self.shape.ending
        try:
            through = self.draw(self.messages[: index + 1], False)
        except TemplateFailure as error:
            return self._refuse("mask_not_proved", index, f"cannot be the end of a conversation: {error}")
        end = through.rfind(ending) + len(ending)
        whole = bool(ending) and self.text.startswith(through[:end]) and not through[end:].strip()
        if prompt is None or not (self.shape.prompted and whole and through.startswith(prompt)):
            return self._refuse("mask_not_proved", index, "calls a tool at a place that cannot be proved")
        written = through[len(prompt) : end]
        if written.count(ending) != 1:
            return self._refuse("mask_not_proved", index, "has the text of the terminator inside")
        return self._check_calls(index, written, answer, calls) or (len(prompt), end)

    def _start(self, index: int, before: str, plain: bool) -> int | Refusal:
        """Where the generation prompt ends, by prefix rendering and by the learned form; both must agree."""
        text = self.text
        if not self.shape.prompted:
            mark = self._mark(index)
            if mark is None:
                return self._refuse(
                    "no_generation_prompt", index, "has a header that the template does not write for generation"
                )
            return mark[0]
        header, lead = next((form for form in self.shape.forms if before.endswith("".join(form))), ("", None))
        form = len(before) - len(lead) if lead is not None and (plain or header.strip()) else None
        if plain and header.strip() and form is not None and index not in (self.turns[0], self.turns[-1]):
            prompt = None  # one way is enough here: prefixes of long conversations take quadratic time
        else:
            prompt = self._prompt(index)
        if prompt is not None and text.startswith(prompt):
            if plain and form is not None and form != len(prompt) and not prompt.startswith(before):
                return self._refuse("mask_not_proved", index, "begins at two different places, found in two ways")
            if before.startswith(prompt) or prompt.startswith(before):
                return len(prompt)
        if form is not None and text.startswith(before[:form]):
            return form
        mark = self._mark(index)  # the header differs here, e.g. at the start of a conversation: the mark has to do
        if mark is None or mark[0] > len(before):
            return self._refuse("mask_not_proved", index, "begins at a place that cannot be proved")
        return mark[0]

    def _check_answer(self, index: int, before: str, end: int, answer: str) -> Refusal | None:
        """The text between what stays the same must be the answer, give or take white space at its ends."""
        written = self.text[len(before) : end]
        same = written in answer and written.strip() == answer.strip()
        if end < len(before) or not self.text.startswith(before) or not same:
            return self._not_found(index, answer, "is changed by the template")
        return None

    def _check_calls(self, index: int, written: str, answer: str, calls: Sequence[Any]) -> Refusal | None:
        if answer.strip() not in written:
            return self._refuse("content_lost", index, "loses its text, because it calls a tool")
        for call in calls:
            function = call.get("function", call)
            if not (appears(function.get("name"), written) and appears(function.get("arguments"), written)):
                return self._refuse("content_lost", index, "loses its tool call: the template does not write it")
        return None

    def _not_found(self, index: int, answer: str, what: str) -> Refusal:
        if answer.strip() and answer.strip() not in self.text:
            return self._refuse("content_lost", index, "does not appear in the text")
        return self._refuse("mask_not_proved", index, what)

    def _mark(self, index: int) -> tuple[int, int] | None:
        """The `{% generation %}` part of a turn, where there is one for each."""
        if self.marked is None or len(self.marked) != len(self.turns):
            return None
        return self.marked[self.turns.index(index)]

    def _check_marks(self, index: int, begin: int, end: int) -> Refusal | None:
        if self.marked is None:
            return None
        mark = self._mark(index)
        if mark is None or not mark[0] <= begin <= end <= mark[1]:
            return self._refuse("mask_not_proved", index, "is not inside the template's own generation mark")
        return None


def split_thought(content: str) -> tuple[str, str]:
    """Content cut behind its last `</think>`: templates move or drop what precedes it.

    >>> split_thought("<think>hm</think>yes")
    ('<think>hm</think>', 'yes')
    """
    thought, mark, answer = content.rpartition(THINK_END)
    return thought + mark, answer


def plain_text(content: Any) -> str | None:
    """A message's content as one string; None when it has parts that are not text.

    >>> plain_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    'ab'
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else None


def appears(value: Any, text: str) -> bool:
    """Whether JSON data is in the text, each leaf as it is or as JSON writes it."""
    if isinstance(value, Mapping):
        return all(name in text and appears(item, text) for name, item in value.items())
    if isinstance(value, list | tuple):
        return all(appears(item, text) for item in value)
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    if value.strip() in text or any(json.dumps(value, ensure_ascii=ascii_)[1:-1] in text for ascii_ in (False, True)):
        return True
    try:
        parsed = json.loads(value)
    except ValueError:
        return False
    return isinstance(parsed, dict) and appears(parsed, text)
