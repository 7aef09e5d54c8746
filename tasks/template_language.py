"""The template language: Jinja as transformers runs it, without transformers.

One decision: what a template can do is fixed here: sandboxed, no interpreter names, `{% generation %}` marks, JSON as
transformers writes it, and a clock that stands still.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from registry.errors import InputError, Problem

Kind = TypeVar("Kind", bound=jinja2.Environment)
MARK_START, MARK_END = "\ue0f0", "\ue0f1"  # private use: stand around `generation` bodies in one extra rendering
MARKS_WANTED = "llamatuner_marks"
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


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

    takes_texts = True  # it keeps what it is given and does not read it

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates, closed to the interpreter's own names."""

    takes_texts = True

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


def make_environment(date: str, kind: type[Kind]) -> Kind:
    """The Jinja that chat templates are written for.

    Args:
        date: ISO day that `strftime_now` answers with.
        kind: of environment, a sandboxed one.
    """
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": datetime.fromisoformat(date).strftime,
        "dict": _Dictionary(),
        "namespace": _Namespace,
    }
    return environment


@lru_cache(maxsize=32)
def compile_template(text: str, date: str, where: str) -> jinja2.Template:
    """A template ready to render.

    Args:
        text: Jinja source.
        date: ISO day that `strftime_now` answers with.
        where: file or key, for the error.

    Raises:
        InputError: it does not compile, with the line.
    """
    try:
        return make_environment(date, ImmutableSandboxedEnvironment).from_string(text)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        rule = f"the chat template does not compile: {getattr(error, 'message', error)}"
        problem = Problem(f"{where}:{getattr(error, 'lineno', 1)}", rule)
        raise InputError(problem) from error
