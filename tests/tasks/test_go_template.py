"""The evaluator of Go templates: it writes what Go writes, and raises at what it does not know."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.go_template import NotKnown, evaluate, quoted

DATA: dict[str, Any] = {
    "Messages": [{"Role": "user", "Content": " a "}, {"Role": "assistant", "Content": "b"}],
    "System": "",
}


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("plain", "plain"),
        ('a {{- " b " -}} c', "a b c"),
        ('a {{-" b "}} c', None),  # Go wants a space behind the dash
        ("{{ range .Messages }}[{{ .Content }}]\n{{- end }}.", "[ a ][b]."),
        ("{{ range $n, $m := .Messages }}{{ if eq $n 1 }}{{ $m.Role }}{{ end }}{{ end }}", "assistant"),
        (
            "{{ range $n, $_ := .Messages }}{{ if eq (len (slice $.Messages $n)) 1 }}{{ .Role }}{{ end }}{{ end }}",
            "assistant",
        ),
        ('{{ $x := "a" }}{{ range .Messages }}{{ $x }}{{ $x = .Role }}{{ end }}{{ $x }}', "auserassistant"),
        (
            '{{ range .Messages }}{{ if eq .Role "x" }}1{{ else if eq .Role "user" }}2{{ else }}3{{ end }}{{ end }}4',
            "234",
        ),
        ("{{ if .System }}a{{ else }}{{ if eq 1 1 }}b{{ end }}c{{ end }}d", "bcd"),
        ('{{ "}} \\" \\u00a0\\U0001f642" }}', '}} " \u00a0🙂'),
        ("{{ .Nothing }}", None),
        ("{{ $x }}", None),
        ('{{ $x = "a" }}', None),
        ("{{ if eq 1 1 }}", None),
        ("{{ printf 1 }}", None),
        ("{{ eq 1 1 1 }}", None),
        ("{{ .Messages }}", None),
        ("{{ }}", None),
        ("{{ .System", None),
        ("{{ .System | len }}", None),
    ],
)
def test_a_template_writes_what_go_writes_or_is_not_known(template: str, wanted: str | None) -> None:
    if wanted is None:
        with pytest.raises((NotKnown, KeyError)):
            evaluate(template, DATA)
    else:
        assert evaluate(template, DATA) == wanted


@pytest.mark.parametrize("text", ["", "a\nb\t\r", '"""', "\\n{{ x }}", "\u00a0\u200b🙂｜\U000e0001"])
def test_a_quoted_text_is_one_printable_line_and_comes_back(text: str) -> None:
    found = quoted(text)
    assert found.isprintable()
    assert '"""' not in found.strip('"')
    assert evaluate(f"{{{{ {found} }}}}", {}) == text


def test_what_json_reads_it_reads_as_json_does() -> None:
    assert quoted('a"b\\c\n') == json.dumps('a"b\\c\n')
