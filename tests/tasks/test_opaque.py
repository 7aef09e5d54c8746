"""An opaque text is written, asked about with a guard, or refused: no template reads one unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tasks.opaque import TOKEN, Inspected, Opaque, OpaqueEnvironment, Recorder, changed, holds_opaque
from tasks.template_language import compile_template, make_environment

DAY = "2024-07-26"
TEXTS = [
    "plain",
    "",
    " both ends ",
    "yes",
    "a",
    "abc",
    "a,b",
    "</think>",
    "xx</think>yy",
    "{{ x }}",
    "é\n",
    "user",
    "9",
    "<tool>",
]
PAIRS = [(one, TEXTS[(n + shift) % len(TEXTS)]) for n, one in enumerate(TEXTS) for shift in (0, 1, 5)]


def learn(source: str) -> tuple[str, Recorder]:
    """What a template writes about two opaque texts, with what it asked.

    Raises:
        Inspected: it read one.
    """
    environment = make_environment(DAY, OpaqueEnvironment)
    environment.guard_functions()
    recorder = Recorder()
    messages = [{"role": "user", "content": recorder.text(n)} for n in range(2)]
    return environment.from_string(source).render(messages=messages), recorder


def fill(written: str, recorder: Recorder, texts: Iterable[str]) -> str | None:
    """What was written, with texts in place of the opaque ones; None where a guard does not hold."""
    given = list(texts)
    if not all(guard.holds(given[guard.text]) for guard in recorder.guards):
        return None
    pieces = TOKEN.split(str.__str__(written))
    forms = [recorder.forms[int(number)] for number in pieces[1::2]]
    pieces[1::2] = [changed(given[number], changes) for number, changes in forms]
    return "".join(pieces)


def filled(source: str) -> int:
    """Require that every pair of texts that the guards hold for is written as Jinja writes it.

    Returns:
        How many pairs those were.
    """
    written, recorder = learn(source)
    plain, count = compile_template(source, DAY, "test"), 0
    for texts in PAIRS:
        found = fill(written, recorder, texts)
        if found is None:
            continue
        assert isinstance(written, Opaque) or not TOKEN.search(written)
        assert found == plain.render(messages=[{"role": "user", "content": text} for text in texts]), texts
        count += 1
    return count


M = "{% set x = messages[0].content %}{% set y = messages[1]['content'] %}"
WRITTEN = {
    "alone": "{{ x }}",
    "twice": "{{ x }}-{{ y }}-{{ x }}",
    "+": "{{ '<' + x + '>' + y }}",
    "~": "{{ '<' ~ x ~ 1 ~ '>' ~ y }}",
    "trim filter": "[{{ x | trim }}]",
    "strip": "[{{ x.strip() }}{{ y.lstrip('\n') }}{{ y.rstrip() }}]",
    "strips in turn": "[{{ x.lstrip().rstrip('\n').strip('a') }}]",
    "set block": "{% set z %}<{{ x }}>{% endset %}{{ z }}{{ z }}",
    "filter block": "{% filter trim %}{{ x }}{% endfilter %}",
    "macro": "{% macro show(text, more='') %}<{{ text }}{{ more }}>{% endmacro %}{{ show(x, more=y) }}",
    "call block": "{% macro show(t) %}{{ caller() }}{{ t }}{% endmacro %}{% call show(x) %}!{{ y }}{% endcall %}",
    "namespace": "{% set ns = namespace(t=x) %}{% set ns.t = ns.t + y %}{{ ns.t }}",
    "dictionary": "{% set d = dict(a=x) %}{{ d.a }}{{ {'b': y}['b'] }}",
    "loop": "{% for m in messages %}{{ loop.index }}{{ m.role }}{{ m.content }}{% endfor %}",
    "map": "{% for t in messages | map(attribute='content') %}{{ t }};{% endfor %}",
    "map trim": "{% for t in messages | map(attribute='content') | map('trim') %}{{ t }};{% endfor %}",
    "reverse": "{% for m in messages | reverse | list %}{{ m.content }}{% endfor %}{{ (messages | last).content }}",
    "slice of messages": "{% for m in messages[1:] %}{{ m.content }}{% endfor %}{{ messages | length }}",
    "items": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "items filter": "{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}",
    "type tests": "{{ x is string }}{{ x is mapping }}{{ x is defined }}{{ x is none }}{{ x is iterable }}{{ x }}",
    "not a list": "{% if x is string %}{{ x }}{% else %}{% for p in x %}{{ p.text }}{% endfor %}{% endif %}",
    "default": "{{ x | default('none') }}{{ messages[0].nothing | default(y) }}",
    "string filter": "{{ x | string }}",
    "generation": "{% generation %}{{ x }}{% endgeneration %}",
    "generation in a loop": (
        "{% for m in messages %}{% set z = m.content %}{% generation %}{{ z }}{% endgeneration %}{% endfor %}"
    ),
    "call in a loop": "{% for m in messages %}{% set z = m.content %}{{ range(2) | list }}{{ z }}{% endfor %}",
    "joined is true": "{% if '<' + x %}{{ x }}{% endif %}",
    "of none": "{{ x == none }}{{ x != none }}{{ x is not none }}{{ x == 3 }}{{ x }}",
}
GUARDED = {
    "if": "{% if x %}{{ x }}{% else %}empty{% endif %}",
    "not": "{{ 'empty' if not x else x }}",
    "or": "{{ x or 'empty' }}",
    "boolean default": "{{ x | default('none', true) }}",
    "in": "{% if 'yes' in x %}1{% endif %}{{ x }}",
    "not in": "{% if '</think>' not in x %}{{ x }}{% endif %}",
    "==": "{% if x == 'yes' %}1{% else %}{{ x }}{% endif %}",
    "== the other way": "{% if 'yes' == x %}1{% else %}{{ x }}{% endif %}",
    "!=": "{% if x != 'yes' %}{{ x }}{% endif %}",
    "in a list": "{% if x in ['yes', 'a'] %}1{% else %}{{ x }}{% endif %}",
    "equalto": "{{ messages | selectattr('content', 'equalto', 'yes') | list | length }}{{ x }}",
    "eq test": "{% if x is eq('yes') %}1{% endif %}{{ x }}",
    "selectattr": "{% for m in messages | selectattr('content') %}{{ m.content }}{% endfor %}",
    "select": "{% for t in messages | map(attribute='content') | select %}{{ t }}{% endfor %}",
    "reject equal": "{% for t in messages | map(attribute='content') | reject('==', 'a') %}{{ t }}{% endfor %}",
    "startswith": "{% if x.startswith('<tool') %}1{% endif %}{{ x }}",
    "endswith": "{% if x.strip().endswith('yes') %}1{% endif %}{{ x }}",
    "split": "{{ x.split('</think>')[-1].lstrip('\n') }}",
    "replace method": "{{ x.replace('a', 'b') }}",
    "equal messages": "{% if messages[0] == {'role': 'user', 'content': 'yes'} %}1{% endif %}{{ x }}",
    "trimmed": "{% if (x | trim) == '' %}empty{% else %}{{ x }}{% endif %}",
    "values": "{% if 'yes' in messages[0].values() %}1{% endif %}{{ x }}",
}
READ = {
    "length": "{{ x | length }}",
    "count": "{{ x | count }}",
    "slice": "{{ x[:2] }}",
    "index": "{{ x[0] }}",
    "first": "{{ x | first }}",
    "last": "{{ x | last }}",
    "list": "{{ x | list }}",
    "reverse": "{{ x | reverse }}",
    "loop": "{% for c in x %}{{ c }}.{% endfor %}",
    "unpacked": "{% set a, b = x %}{{ a }}",
    "star": "{% macro m() %}{{ varargs | length }}{% endmacro %}{{ m(*x) }}",
    "upper filter": "{{ x | upper }}",
    "upper": "{{ x.upper() }}",
    "title": "{{ x | title }}",
    "tojson": "{{ x | tojson }}",
    "tojson of messages": "{{ messages | tojson }}",
    "whole message": "{{ messages[0] }}",
    "string of messages": "{{ messages | string }}",
    "~ of messages": "{{ 'a' ~ messages }}",
    "join": "{{ messages | map(attribute='content') | join(', ') }}",
    "join of a list": "{{ [x, y] | join }}",
    "join of a list made": "{{ messages | map(attribute='content') | list | join }}",
    "join method": "{{ ', '.join([x, y]) }}",
    "join method of a generator": "{{ ', '.join(messages | map(attribute='content')) }}",
    "length of a join": "{% if messages | map(attribute='content') | join | length > 9 %}long{% endif %}{{ x }}",
    "join of values": "{{ messages[0].values() | join }}",
    "sum": "{{ messages | map(attribute='content') | sum(start='') }}",
    "format filter": "{{ '%s!' | format(x) }}",
    "format": "{{ '{}!'.format(x) }}",
    "own format": "{{ x.format(1) }}",
    "%": "{{ '%s' % x }}",
    "% of a tuple": "{{ '%-9s|' % (x,) }}",
    "length of %": "{{ ('%s' % (x,)) | length }}{{ x }}",
    "own %": "{{ x % 1 }}",
    "*": "{{ x * 2 }}",
    "* of a list": "{{ [x] * 2 }}",
    "<": "{{ x < 'm' }}",
    "> the other way": "{{ 'm' > x }}",
    "two texts": "{{ x == y }}",
    "one in the other": "{{ x in y }}",
    "in a text": "{{ x in 'a yes' }}",
    "in test": "{{ x is in('a yes') }}",
    "chain of in": "{{ 'a' in ['a'] and x in 'abc' }}",
    "long chain of in": "{{ 'a' in x in 'abc' }}",
    "chain that ends in in": "{{ 'a' == x in 'abc' }}",
    "key": "{{ {'yes': 1}[x] }}",
    "key with a default": "{{ {'yes': 1}[x] | default('none') }}",
    "key of a literal": "{{ {x: 1} | length }}",
    "key in": "{{ x in {'yes': 1} }}",
    "get": "{{ {'yes': 1}.get(x) }}",
    "attr": "{{ messages[0] | attr(x) }}",
    "field": "{{ x.form }}{{ x.recorder }}",
    "no field": "{{ x.text }}",
    "find": "{{ x.find('a') }}",
    "index of": "{{ x.count('a') }}",
    "isdigit": "{{ x.isdigit() }}",
    "several prefixes": "{{ x.startswith(('a', 'b')) }}",
    "prefix from": "{{ x.startswith('a', 1) }}",
    "prefix that is a text": "{{ x.startswith(y) }}",
    "plain text that starts so": "{{ 'yes'.startswith(x) }}",
    "trim by a text": "{{ 'yes' | trim(x) }}",
    "strip by a text": "{{ 'yes'.strip(x) }}",
    "strip by a text of its own": "{{ x.strip(y) }}",
    "replace filter": "{{ x | replace('a', 'b') }}",
    "replace in a plain text": "{{ 'yes' | replace('y', x) }}",
    "split at white space": "{{ x.split()[0] }}",
    "indent": "{{ x | indent }}",
    "escape": "{{ x | e }}",
    "wordcount": "{{ x | wordcount }}",
    "int": "{{ x | int }}",
    "sort": "{{ [x, y] | sort | first }}",
    "unique": "{{ [x, y] | unique | list | length }}",
    "groupby": "{% for k, v in messages | groupby('content') %}{{ k }}{% endfor %}",
    "loop.changed": "{% for m in messages %}{{ loop.changed(m.content) }}{% endfor %}",
    "lower test": "{{ x is lower }}",
    "range": "{{ range(x) }}",
    "clock": "{{ strftime_now(x) }}",
    "fromkeys": "{{ dict.fromkeys([x]) | length }}",
    "map length": "{{ messages | map(attribute='content') | map('length') | list }}",
    "select in": "{{ messages | map(attribute='content') | select('in', 'a yes') | list | length }}",
    "joined is empty": "{% if x + y %}1{% endif %}",
    "joined is equal": "{% if x + '.' == 'yes.' %}1{% endif %}",
    "joined has": "{% if 'yes' in x + '.' %}1{% endif %}",
    "joined is trimmed": "{{ (x + ' ') | trim }}",
    "length of a set block": "{% set z %}{{ x }}{% endset %}{{ z | length }}",
    "length of a macro": "{% macro m() %}{{ x }}.{% endmacro %}{{ m() | length }}",
    "length of a namespace": "{% set ns = namespace(t=x) %}{{ ns.t | length }}",
    "upper block": "{% filter upper %}{{ x }}{% endfilter %}",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_text_that_is_only_written_is_written_as_jinja_does_whatever_it_says(name: str) -> None:
    assert filled(M + WRITTEN[name]) == len(PAIRS)
    assert not learn(M + WRITTEN[name])[1].guards


@pytest.mark.parametrize("name", GUARDED)
def test_a_question_about_a_text_becomes_a_guard(name: str) -> None:
    assert 0 < filled(M + GUARDED[name]) < len(PAIRS)


@pytest.mark.parametrize("name", READ)
def test_any_other_look_at_a_text_is_refused(name: str) -> None:
    with pytest.raises(Inspected):
        learn(M + READ[name])


@pytest.mark.parametrize("question", ["'' in x", "x.startswith('')", "x.endswith('')", "x in ['', 'a']"])
def test_a_question_that_is_always_answered_yes_leaves_no_row_to_the_guard(question: str) -> None:
    filled(M + "{% if " + question + " %}1{% endif %}{{ x }}")


FILTERED = (
    "{{ x | NAME }}",
    "{{ [x, y] | NAME | list }}",
    "{{ 'yes' | NAME(x) }}",
    "{{ messages | map(attribute='content') | NAME | list | length }}{{ x }}",
    "{% for t in [x, y] | map('NAME') %}{{ t }}{% endfor %}",
)


def filled_if_it_can_be(source: str) -> int:
    """As `filled`; 0 where a text is read, or where Jinja does not want such arguments."""
    try:
        return filled(source)
    except AssertionError:
        raise
    except Exception:  # noqa: BLE001 - Jinja raises all kinds
        return 0


def test_every_filter_either_writes_an_opaque_text_as_it_writes_any_or_is_refused() -> None:
    names = list(make_environment(DAY, OpaqueEnvironment).filters)
    through = {name for name in names for source in FILTERED if filled_if_it_can_be(M + source.replace("NAME", name))}
    on_lists = {"length", "count", "first", "last", "list", "reverse", "select", "reject", "map"}
    assert {"trim", "list"} <= through <= {"trim", "string", "default", "d"} | on_lists


@pytest.mark.parametrize("source", ["{{ x is NAME }}", "{{ x is NAME('yes') }}", "{{ 'yes' is NAME(x) }}"])
def test_every_test_answers_about_an_opaque_text_as_about_any_or_is_refused(source: str) -> None:
    names = list(make_environment(DAY, OpaqueEnvironment).tests)
    through = [name for name in names if filled_if_it_can_be(M + source.replace("NAME", name) + "{{ x }}")]
    assert 0 < len(through) < len(names)


@pytest.mark.parametrize("name", [name for name in dir(str) if not name.startswith("_")])
def test_every_method_of_a_text_is_refused_or_answers_no_with_a_guard(name: str) -> None:
    through = [
        filled_if_it_can_be(M + "{{ x." + name + "(" + arguments + ") }}{{ x }}")
        for arguments in ("", "'yes'", "'y', 'n'", "3")
    ]
    known = ("strip", "lstrip", "rstrip", "startswith", "endswith", "replace")
    assert any(through) == (name in known)


PYTHON: dict[str, Callable[[Any], Any]] = {
    "len": len,
    "iter": iter,
    "list": list,
    "hash": hash,
    "repr": repr,
    "format": lambda text: f"{text:>9}",
    "compare": lambda text: text < "m",
    "int": int,
}


@pytest.mark.parametrize("name", PYTHON)
def test_python_itself_cannot_read_an_opaque_text_unseen(name: str) -> None:
    with pytest.raises((Inspected, TypeError, ValueError)) as raised:
        PYTHON[name](Recorder().text(0))
    assert name == "int" or raised.type is Inspected


def test_what_can_only_be_looked_into_by_using_it_up_counts_as_opaque() -> None:
    text = Recorder().text(0)
    assert holds_opaque([{"a": (text,)}])
    assert holds_opaque(iter(["plain"]))
    assert holds_opaque({"a": "plain"}.values())
    assert not holds_opaque([{"a": ("plain", 1, None, range(3))}])
