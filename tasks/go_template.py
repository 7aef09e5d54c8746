"""The part of Go's template language that an Ollama template of ours is written in: how a text is quoted, and what a
template writes.

One decision: what is not known here raises, so that a template that was evaluated says nothing that was skipped. Known
are texts, quoted strings, fields, variables, `if`, `else if`, `else`, `range` over `.Messages`, and the functions `eq`,
`len` and `slice`; white space goes at `{{-` and `-}}` as Go's documentation of text/template says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ACTION = re.compile(r"""\{\{(-(?=\s))?((?:"(?:\\.|[^"\\])*"|[^"}]|\}(?!\}))*?)(?:(?<=\s)(-))?\}\}""", re.DOTALL)
WORD = re.compile(r'\s*("(?:\\.|[^"\\])*"|:=|[=(),]|\$?\.?[A-Za-z_][\w.]*|\$\.\w+|\$|\d+)')
SPACE = " \t\r\n"  # what Go trims; Python's strip takes more
Data = Mapping[str, Any]


class NotKnown(ValueError):
    """A template uses what this file does not know."""


def quoted(text: str) -> str:
    r"""A text as a string of Go, in one line, of characters that a file of Ollama keeps.

    >>> print(quoted('<|user|>\n"{{ hi }}"'))
    "<|user|>\n\"{{ hi }}\""
    """
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else _escaped(c)) for c in text) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@dataclass
class _Block:
    """An `if` or a `range` with what it holds; an `else if` is a block within the `else`."""

    head: list[str]
    then: list[Any] = field(default_factory=list)
    otherwise: list[Any] = field(default_factory=list)


def evaluate(template: str, data: Data) -> str:
    """What a template writes.

    >>> evaluate('{{ range .Messages }}{{ if eq .Role "user" }}{{ "Q: " }}{{ end }}{{ .Content }} {{ end -}} .',
    ...          {"Messages": [{"Role": "user", "Content": "hi"}, {"Role": "assistant", "Content": "ho"}]})
    'Q: hi ho .'

    Raises:
        NotKnown: anything that this file does not know.
    """
    return "".join(_run(_parse(template), data, {"$": data}))


def _parse(template: str) -> list[Any]:
    """Texts, actions (lists of words) and blocks, one behind the other."""
    root: list[Any] = []
    open_blocks: list[tuple[_Block, bool]] = []  # and whether an `else if` began it, so that its parent's end ends it
    place, at, trim = root, 0, False
    for found in ACTION.finditer(template):
        text = template[at : found.start()]
        text = text.lstrip(SPACE) if trim else text
        place.append(text.rstrip(SPACE) if found[1] else text)
        at, trim = found.end(), bool(found[3])
        words = _words(found[2])
        if words[0] in ("if", "range"):
            block = _Block(words)
            place.append(block)
            open_blocks.append((block, False))
            place = block.then
        elif words[0] == "else" and open_blocks:
            place = open_blocks[-1][0].otherwise
            if words[1:]:
                block = _Block(words[1:])
                place.append(block)
                open_blocks.append((block, True))
                place = block.then
        elif words == ["end"] and open_blocks:
            while open_blocks.pop()[1]:
                continue
            place = _place(open_blocks, root)
        else:
            place.append(words)
    if open_blocks:
        raise NotKnown("a block has no end")
    rest = template[at:]
    if "{{" in rest:
        raise NotKnown(f"{rest[rest.index('{{') :][:40]!r} is no action")
    root.append(rest.lstrip(SPACE) if trim else rest)
    return root


def _place(open_blocks: Sequence[tuple[_Block, bool]], root: list[Any]) -> list[Any]:
    if not open_blocks:
        return root
    block = open_blocks[-1][0]
    return block.otherwise or block.then  # an `else` that has begun has at least its first text


def _words(action: str) -> list[str]:
    words, at, action = [], 0, action.strip(SPACE)
    while at < len(action):
        found = WORD.match(action, at)
        if found is None:
            raise NotKnown(f"{action!r} is not understood at {action[at:][:20]!r}")
        words.append(found[1])
        at = found.end()
    if not words:
        raise NotKnown("an action is empty")
    return words


def _run(nodes: Sequence[Any], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _Block):
            yield from _run_block(node, dot, variables)
        elif len(node) > 2 and node[0].startswith("$") and node[1] in ("=", ":="):
            if (node[1] == "=") != (node[0] in variables):
                raise NotKnown(f"{node[0]} is set before it is made, or made twice")
            variables[node[0]] = _value(node[2:], dot, variables)
        else:
            value = _value(node, dot, variables)
            if not isinstance(value, str):
                raise NotKnown(f"{' '.join(node)} is no text")
            yield value


def _run_block(block: _Block, dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    if block.head[0] == "if":
        yield from _run(block.then if _value(block.head[1:], dot, variables) else block.otherwise, dot, variables)
        return
    names, source = block.head[1:-1], block.head[-1]
    if block.otherwise or (names and (len(names) != 4 or names[1] != "," or names[3] != ":=")):
        raise NotKnown(f"{' '.join(block.head)} is not understood")
    outer = set(variables)
    for index, item in enumerate(_value([source], dot, variables)):
        if names:
            variables |= {names[0]: index, names[2]: item}
        yield from _run(block.then, item, variables)
        for name in set(variables) - outer:  # made within: known no more
            del variables[name]


def _value(words: Sequence[str], dot: Any, variables: Data) -> Any:
    value, rest = _call(list(words), dot, variables)
    if rest:
        raise NotKnown(f"{' '.join(words)} is not understood")
    return value


def _call(words: list[str], dot: Any, variables: Data) -> tuple[Any, list[str]]:
    """The value of a function with its arguments, or of one word; and the words behind it."""
    if words[:1] and words[0] in ("eq", "len", "slice"):
        name, rest, values = words[0], words[1:], []
        while rest and rest[0] != ")":
            value, rest = _one(rest, dot, variables)
            values.append(value)
        if len(values) != {"eq": 2, "len": 1, "slice": 2}[name]:
            raise NotKnown(f"{' '.join(words)} has another number of arguments")
        if name == "eq":
            return values[0] == values[1], rest
        return (len(values[0]) if name == "len" else values[0][values[1] :]), rest
    return _one(words, dot, variables)


def _one(words: list[str], dot: Any, variables: Data) -> tuple[Any, list[str]]:
    first, rest = (words[0], words[1:]) if words else ("", [])
    if first == "(":
        value, rest = _call(rest, dot, variables)
        if rest[:1] != [")"]:
            raise NotKnown(f"{' '.join(words)} is not understood")
        return value, rest[1:]
    if first.startswith('"'):
        return json.loads(re.sub(r"\\U([0-9a-f]{8})", _pair, first)), rest
    if first.isdigit():
        return int(first), rest
    base, _, name = first.partition(".")
    holder: Any = dot if not base else variables.get(base)
    if holder is None and base not in variables:
        raise NotKnown(f"{' '.join(words)} is not understood")
    return (holder[name] if name else holder), rest


def _pair(found: re.Match[str]) -> str:
    """Go's name of a character beyond the 16 bits, as JSON's."""
    return json.dumps(chr(int(found[1], 16)))[1:-1]
