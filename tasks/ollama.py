"""The Modelfile of Ollama: a model's chat template in Go's template language, and where answers stop.

One decision: the Go template is not translated from the Jinja one. What stands between the messages is read off its
renderings, written down, and then compared with more renderings; a template of another form is refused by name. Ollama
gives its templates messages of which no two neighbours have one role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from registry.errors import InputError, Problem
from tasks.go_template import evaluate, quoted
from tasks.spans import Refusal
from tasks.template import ChatTemplate

MODELFILE = "Modelfile"
OPTION = "--ollama"
CURE = "Leave --ollama out: llama.cpp reads the model's own template from the GGUF file."
SHORT = {"s": "system", "u": "user", "a": "assistant"}
WORDS = "llamatuner {} probe"
LEARNT = ("u", "uauau", "uaua", "su", "suaua", "sua")  # what every template is read off; those with s if it knows them
SELDOM = ("a", "sa", "uasu", "usu", "us")  # joints that some templates refuse
CHECKED = ("u", "su", "uau", "suau", "uauauau", "suauauau", "ua", "sua", "uaua", "suaua", "suauaua")
SAID = (
    "You are terse.\nNever say {{ .Role }}.",
    'What is 1 + 1?\n\nSay "two" \\ or 二, 🙂.',
    "two",
    "And {% if x %} then?",
    "<b>then</b> three\n",
    "`}}` twice",
)
PADDED, THOUGHT = "  a word \n", "<think>\nwhy\n</think>\n\nso"
Messages = list[dict[str, str]]
Draw = Callable[[Messages], str]


class _Unwritable(Exception):
    """A template whose form has no place in an Ollama template; says why."""


@dataclass(frozen=True)
class OllamaTemplate:
    """A chat template as Ollama has it."""

    text: str
    """In Go's language."""
    notes: tuple[str, ...]
    """What it does otherwise than the model's own, for people."""


@dataclass(frozen=True)
class _Joints:
    """What a template writes between messages, by the roles before and behind; "" is the beginning or the end."""

    between: Mapping[tuple[str, str], str]
    last: str
    """In front of an answer that ends the conversation, which the model goes on with."""
    late: str | None = None
    """Behind a system message that stands in front of the last question only; None: it stands where it was said."""


def as_ollama(template: ChatTemplate, trained_bos: str | None, file_adds_bos: bool) -> OllamaTemplate:
    """A chat template in Ollama's language, writing the same text for conversations of system, user and assistant.

    Args:
        template: the model's, with the variables and default system message it was trained with.
        trained_bos: the BOS that the tokenizer puts in front by itself; None: none.
        file_adds_bos: whether a BOS is put in front of what the template writes, as the GGUF file says.

    Raises:
        InputError: the template has another form, or cannot be shown to write the same.
    """
    bos = trained_bos or dict(template.special_tokens).get("bos_token") or ""

    def draw(messages: Messages) -> str:
        """What the model is given: one BOS where the tokenizer or the template puts one, less the one of the file."""
        text = _open(template, messages)
        written = bool(bos) and text.startswith(bos)
        if file_adds_bos and not written and trained_bos is None:
            raise _Unwritable("the GGUF file puts a BOS in front, and the model was trained without one")
        text = text[len(bos) :] if written else text
        return text if file_adds_bos or not (written or trained_bos) else bos + text

    try:
        knows_system = _knows_system(draw)
        text = _write(_learn(draw, knows_system))
        for roles in CHECKED:
            if knows_system or "s" not in roles:
                _compare(text, draw, _conversation(roles, SAID))
        notes = tuple(_notes(template, draw, text, knows_system))
    except (InputError, _Unwritable) as error:
        words = "; ".join(p.rule for p in error.problems) if isinstance(error, InputError) else str(error)
        rule = f"the chat template cannot be written in Ollama's language: {words}"
        raise InputError(Problem(OPTION, rule, CURE)) from error
    return OllamaTemplate(text, notes)


def _conversation(roles: str, contents: Sequence[str]) -> Messages:
    """Messages of roles, written as their first letters; contents are repeated where there are too few."""
    after = 0 if roles.startswith("s") else 1  # the first content is for a system message
    return [{"role": SHORT[r], "content": contents[(n + after) % len(contents)].strip()} for n, r in enumerate(roles)]


def _open(template: ChatTemplate, messages: Messages) -> str:
    """A conversation up to where the model goes on: the next answer, or the one that has begun."""
    if messages[-1]["role"] != "assistant":
        return template.render(messages, add_generation_prompt=True)
    text, content = template.render(messages), messages[-1]["content"]
    return text[: text.rindex(content) + len(content)] if content in text else text


def _knows_system(draw: Draw) -> bool:
    """Whether a system message is written; a template may refuse it, or drop it."""
    try:
        return WORDS.format(0) in draw(_conversation("su", [WORDS.format(0), "x"]))
    except InputError:
        return False


def _learn(draw: Draw, knows_system: bool) -> _Joints:
    """Read off what stands between messages.

    Raises:
        _Unwritable: it does not only hang on the roles before and behind, or contents are moved, changed or left out.
    """
    between: dict[tuple[str, str], str] = {}
    last: str | None = None
    late = _late(draw) if knows_system else None
    for roles in (*LEARNT, *SELDOM):
        if "s" in roles and (late is not None or not knows_system):
            continue
        try:
            joints = _joints(draw, roles)
        except (InputError, _Unwritable):
            if roles in SELDOM:
                continue
            raise
        if roles.endswith("ua"):
            (_, text), _ = joints[-2:]
            last = text if last is None else last
            _require_one(("user", "assistant"), {last, text})
            joints = joints[:-2]
        for pair, text in joints:
            if roles in LEARNT:
                _require_one(pair, {between.get(pair, text), text})
            between.setdefault(pair, text)
    return _Joints(between, last or "", late)


def _require_one(pair: tuple[str, str], texts: set[str]) -> None:
    if len(texts) > 1:
        before, behind = pair[0] or "the beginning", pair[1] or "the end"
        raise _Unwritable(f"between {before} and {behind} it writes now one text, now another")


def _late(draw: Draw) -> str | None:
    """What stands behind a system message in front of the last question; None: it has its own place."""
    system, first, answer, last = words = [WORDS.format(number) for number in range(4)]
    text = draw(_conversation("suau", words))
    if not text.find(first) < text.find(answer) < text.find(system) < text.find(last):
        return None
    return text[text.find(system) + len(system) : text.find(last)]


def _joints(draw: Draw, roles: str) -> list[tuple[tuple[str, str], str]]:
    """The texts between the messages of a conversation, with the roles on both sides."""
    words = [WORDS.format(number) for number in range(len(roles))]
    messages = [{"role": SHORT[role], "content": word} for role, word in zip(roles, words, strict=True)]
    text, found, at = draw(messages), [], 0
    names = ["", *(message["role"] for message in messages), ""]
    for number, word in enumerate([*words, ""]):
        place = text.find(word, at) if word else len(text)
        if place < 0 or (word and text.count(word) != 1):
            raise _Unwritable(f"the {names[number + 1]}'s message is not written once and in its place")
        found.append(((names[number], names[number + 1]), text[at:place]))
        at = place + len(word)
    return found


def _write(joints: _Joints) -> str:
    """The template of joints."""
    lines = ['{{- $before := "" }}', "{{- range $index, $_ := .Messages }}"]
    plain = joints.last == joints.between["user", "assistant"]
    for number, role in enumerate(role for role in SHORT.values() if any(b == role for _, b in joints.between)):
        lines.append(f'{{{{- {"else " if number else ""}if eq .Role "{role}" }}}}')
        cases = {before: text for (before, behind), text in joints.between.items() if behind == role}
        if role == "assistant" and not plain:
            lines.append("{{- if eq (len (slice $.Messages $index)) 1 }}")
            lines += [f"{{{{- {quoted(joints.last)} }}}}", "{{- else }}", *_choice(cases), "{{- end }}"]
        else:
            lines += _choice(cases)
        if role == "user" and joints.late is not None:
            lines += ["{{- if $.System }}", "{{- if eq (len (slice $.Messages $index)) 1 }}", "{{- $.System }}"]
            lines += [f"{{{{- {quoted(joints.late)} }}}}", "{{- end }}", "{{- end }}"]
        lines.append("{{- .Content }}")
    end = joints.between["user", ""]
    lines += ["{{- end }}", "{{- $before = .Role }}", "{{- end }}"]
    return "\n".join([*lines, '{{- if eq $before "user" }}', f"{{{{- {quoted(end)} }}}}", "{{- end }}"])


def _choice(cases: Mapping[str, str]) -> Iterator[str]:
    """Write a text by the role before; the last case is also that of roles which none is known for."""
    pairs = sorted(cases.items(), key=lambda case: case[0] == "")
    if len({text for _, text in pairs}) == 1:
        pairs = pairs[-1:]
    for number, (before, text) in enumerate(pairs):
        if len(pairs) > 1 and number < len(pairs) - 1:
            yield f'{{{{- {"else " if number else ""}if eq $before "{before}" }}}}'
        elif len(pairs) > 1:
            yield "{{- else }}"
        yield f"{{{{- {quoted(text)} }}}}"
    if len(pairs) > 1:
        yield "{{- end }}"


def _compare(text: str, draw: Draw, messages: Messages) -> None:
    """Refuse a template that writes another text than the model's own.

    Raises:
        _Unwritable: with the conversation's roles, and where they part.
    """
    own, other = draw(messages), written(text, messages)
    if own != other:
        at = next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
        roles = ", ".join(message["role"] for message in messages)
        raise _Unwritable(f"for {roles} it writes {own[at : at + 40]!r} where {other[at : at + 40]!r} would stand")


def written(text: str, messages: Messages) -> str:
    """What Ollama makes of a conversation with a template of ours."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    given = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return evaluate(text, {"Messages": given, "System": system})


def _notes(template: ChatTemplate, draw: Draw, text: str, knows_system: bool) -> Iterator[str]:
    """What is otherwise in Ollama, found by trying."""
    if not knows_system:
        yield "the model's template has no system message; Ollama leaves one out"
    padded = [{"role": "user", "content": PADDED}]
    if written(text, padded) != draw(padded):
        yield "the model's template takes white space from both ends of a message; Ollama's language cannot"
    thought = _conversation("uau", ["", "x", THOUGHT])
    if written(text, thought) != draw(thought):
        yield "the model's template changes <think> … </think> of earlier answers; in Ollama it stays as it is"
    late = _conversation("uasu", SAID)
    try:
        if knows_system and written(text, late) != draw(late):
            yield "a system message behind the first question is written otherwise than the model's template does"
    except InputError:
        yield "a system message behind the first question is written, which the model's template refuses"
    if template.uses_date:
        yield f"the day in the template stays {template.day}"


def stop_texts(template: ChatTemplate, eos: Sequence[str]) -> tuple[str, ...]:
    """Texts that end an answer: the template's terminator, the model's ends of sequence; where the template ends
    answers by the next question only, what begins that.

    Args:
        template: the model's.
        eos: texts of the tokens that the model's files call ends of sequence.
    """
    found = [*([template.terminator] if template.terminator else []), *eos]
    shape = template.shape
    if not template.terminator and not isinstance(shape, Refusal):
        try:
            joint = dict(_joints(lambda messages: _open(template, messages), "uau"))["assistant", "user"].strip()
        except (InputError, _Unwritable):
            joint = ""
        found += joint.splitlines()[:1]
    return tuple(dict.fromkeys(found))


def folder_modelfile(folder: Path, template: ChatTemplate, gguf: str, adds_bos: bool) -> tuple[str, tuple[str, ...]]:
    """The text of a model folder's Modelfile, and what is otherwise in Ollama.

    Args:
        folder: config, generation config, tokenizer.
        template: the folder's, as the model was trained with it.
        gguf: name of the file beside it.
        adds_bos: what that file says, see `as_ollama`.

    Raises:
        InputError: as `as_ollama` and `modelfile`.
    """
    from tasks.answers import stop_ids
    from tasks.tokens import added_bos, load_tokenizer

    tokenizer = load_tokenizer(folder)
    bos = added_bos(tokenizer, folder)
    found = as_ollama(template, bos[0] if bos else None, adds_bos)
    ends = [tokenizer.id_to_token(id) for id in sorted(stop_ids(folder, tokenizer, None))]
    stops = stop_texts(template, [text for text in ends if text])
    return modelfile(gguf, found, stops, template.default_system), found.notes


def modelfile(gguf: str, template: OllamaTemplate, stops: Sequence[str], system: str | None) -> str:
    """The text of a Modelfile.

    Args:
        gguf: name of the file beside it.
        template: of the model.
        stops: texts that end an answer.
        system: default system message; None: none, or the template's own.

    Raises:
        InputError: a text that a Modelfile cannot hold.
    """
    lines = ["# ollama create NAME -f Modelfile", *(f"# {note}" for note in template.notes), f"FROM ./{gguf}"]
    lines.append(f'TEMPLATE """{template.text}"""')
    if system:
        lines.append(f"SYSTEM {_value('default_system', system)}")
    return "\n".join([*lines, *(f"PARAMETER stop {_value('stop', text)}" for text in stops)]) + "\n"


def _value(name: str, text: str) -> str:
    """A text between quotes: a Modelfile has no escapes, and loses characters that cannot be printed."""
    lost = [c for c in text if not c.isprintable() and c not in "\n\t"]
    if '"""' in text or text.startswith('"') or text.endswith('"') or lost:
        raise InputError(Problem(OPTION, f"a Modelfile cannot hold the {name} {text!r}", CURE))
    return f'"""{text}"""'
