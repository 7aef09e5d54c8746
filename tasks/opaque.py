"""Texts that a chat template may write but not read.

One decision: a template is run once on opaque texts. If it gets through without looking at one, what it writes around
them is the same for *every* conversation of that form, and that is a proof, not a guess. Looking is allowed where the
answer can be asserted for each row afterwards ("does it hold `</think>`?"): such a question is answered no, and kept as
a guard. Any other use raises `Inspected`.

Python and Jinja know ways to read a `str` that no method of a subclass sees (`"".join`, a plain string's own methods);
`OpaqueEnvironment` closes those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import do_default
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

OPEN, CLOSE = "\ue100", "\ue101"  # private use: stand around the number of a text
TOKEN = re.compile(f"{OPEN}([0-9]+){CLOSE}")
STRIPS = ("strip", "lstrip", "rstrip")
FILTERS_THAT_WRITE = frozenset({"trim", "string", "default", "d"})
FILTERS_ON_LISTS = frozenset(
    {
        "list",
        "length",
        "count",
        "first",
        "last",
        "map",
        "select",
        "reject",
        "selectattr",
        "rejectattr",
        "items",
        "reverse",
    }
)
TESTS_OF_TYPE = frozenset(
    {"string", "defined", "undefined", "none", "mapping", "number", "boolean", "true", "false", "integer", "float"}
)
JINJA_OWN = frozenset({"_loop_vars", "_block_vars"})  # names around a call, which Jinja takes away again
TESTS_BY_EQUALITY = frozenset({"eq", "==", "equalto", "ne", "!="})


class Inspected(Exception):
    """The template reads what a message says, in a way that no guard can assert."""


@dataclass(frozen=True)
class Guard:
    """A question that the template asked about a text, and that has to be answered `no` for a row."""

    text: int
    """Number of the text."""
    changes: tuple[tuple[str, str | None], ...]
    """What had been stripped from it: (method of str, characters)."""
    question: str
    """`has`, `starts`, `ends`, `equals` or `empty`."""
    argument: str

    def holds(self, value: str) -> bool:
        """Whether the answer is no."""
        value = changed(value, self.changes)
        if self.question == "has":
            return self.argument not in value
        if self.question == "starts":
            return not value.startswith(self.argument)
        if self.question == "ends":
            return not value.endswith(self.argument)
        return value != self.argument  # `empty` asks whether it equals ""


def changed(value: str, changes: Iterable[tuple[str, str | None]]) -> str:
    """A text after strips.

    >>> changed(" a\\n", (("rstrip", "\\n"),))
    ' a'
    """
    for method, characters in changes:
        value = getattr(value, method)(characters)
    return value


@dataclass
class Recorder:
    """The opaque texts of one run, and what was asked about them."""

    forms: list[tuple[int, tuple[tuple[str, str | None], ...]]] = field(default_factory=list)
    """Number in the output → (text, what was stripped)."""
    guards: dict[Guard, None] = field(default_factory=dict)
    """In the order in which they were asked."""

    def text(self, number: int, changes: tuple[tuple[str, str | None], ...] = ()) -> Opaque:
        """The opaque text of that number."""
        if (number, changes) not in self.forms:
            self.forms.append((number, changes))
        return Opaque.of(f"{OPEN}{self.forms.index((number, changes))}{CLOSE}", self, (number, changes))

    def ask(self, form: tuple[int, tuple[tuple[str, str | None], ...]], question: str, argument: str) -> None:
        """Note a question whose answer is taken to be no."""
        self.guards[Guard(*form, question, argument)] = None


class Opaque(str):
    """A text that can be written, joined and stripped; see the module."""

    recorder: Recorder
    form: tuple[int, tuple[tuple[str, str | None], ...]] | None
    """(text, what was stripped); None for one that was joined with others."""

    @classmethod
    def of(cls, raw: str, recorder: Recorder, form: Any = None) -> Opaque:
        """An opaque text whose place in the output is `raw`."""
        made = str.__new__(cls, raw)
        made.recorder, made.form = recorder, form
        return made

    def _ask(self, question: str, argument: Any) -> bool:
        if self.form is None or type(argument) is not str:
            raise Inspected
        self.recorder.ask(self.form, question, argument)
        return False

    def _stripped(self, method: str, characters: Any = None) -> Opaque:
        if self.form is None or isinstance(characters, Opaque):
            raise Inspected
        number, changes = self.form
        change = (method, characters)
        return self if changes[-1:] == (change,) else self.recorder.text(number, (*changes, change))

    def strip(self, chars: Any = None, /) -> Opaque:
        return self._stripped("strip", chars)

    def lstrip(self, chars: Any = None, /) -> Opaque:
        return self._stripped("lstrip", chars)

    def rstrip(self, chars: Any = None, /) -> Opaque:
        return self._stripped("rstrip", chars)

    def __contains__(self, item: Any) -> bool:
        return self._ask("has", item)

    def startswith(self, prefix: Any, *rest: Any) -> bool:
        return self._ask("starts", prefix) if not rest else self._read()

    def endswith(self, suffix: Any, *rest: Any) -> bool:
        return self._ask("ends", suffix) if not rest else self._read()

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[Any]:
        self._ask("has", sep)
        return [self]

    def replace(self, old: Any, new: Any, *rest: Any) -> Opaque:
        self._ask("has", old)
        return self

    def __eq__(self, other: object) -> bool:
        return False if other is None or not isinstance(other, str) else self._ask("equals", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise Inspected  # the key of a mapping is compared with others

    def __bool__(self) -> bool:
        if self.form is None and TOKEN.sub("", str.__str__(self)):
            return True  # joined with something that is there
        return not self._ask("empty", "")

    def __add__(self, other: Any) -> Opaque:
        return join_texts((self, other))  # type: ignore[return-value]

    def __radd__(self, other: Any) -> Opaque:
        return join_texts((other, self))  # type: ignore[return-value]

    def __str__(self) -> str:
        return self

    def _read(self, *_: Any, **__: Any) -> NoReturn:
        raise Inspected


ALLOWED = frozenset(vars(Opaque)) | frozenset(
    (
        "__class__",
        "__new__",
        "__init__",
        "__getattribute__",
        "__setattr__",
        "__init_subclass__",
        "__subclasshook__",
        "__doc__",
    )
)
for _name in dir(str):  # every other way of a string to be read
    if _name not in ALLOWED and callable(getattr(str, _name)):
        setattr(Opaque, _name, Opaque._read)


def join_texts(parts: Iterable[Any]) -> str:
    """`"".join` that stays opaque."""
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    opaque = [text for text in texts if isinstance(text, Opaque)]
    if not opaque:
        return "".join(texts)
    others = [text for text in texts if not isinstance(text, Opaque)]
    if len(opaque) == 1 and not any(others):
        return opaque[0]
    return Opaque.of("".join(texts), opaque[0].recorder)


def holds_opaque(value: Any) -> bool:
    """Whether there is an opaque text in a value; also true of what can only be looked into by using it up."""
    if isinstance(value, str):
        return isinstance(value, Opaque)
    if isinstance(value, dict):
        return any(map(holds_opaque, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_opaque, value))
    return isinstance(value, Iterable) and not isinstance(value, range | bytes | Undefined | Context)


def _refuse() -> NoReturn:
    raise Inspected


def _contains(item: Any, container: Any) -> bool:
    if isinstance(item, Opaque) and isinstance(container, str):
        raise Inspected
    return item in container


class _Code(CodeGenerator):
    """Compiles `~` and `in` to functions that know opaque texts."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        (operand, *more) = node.ops
        membership = [each for each in node.ops if each.op in ("in", "notin")]
        if not membership:
            super().visit_Compare(node, frame)
            return
        if more:  # `a in b in c`: nobody writes that
            self.write("environment.refuse()")
            return
        self.write("(not " if operand.op == "notin" else "(")
        self.write("environment.contains(")
        self.visit(node.expr, frame)
        self.write(", ")
        self.visit(operand.expr, frame)
        self.write("))")


class OpaqueEnvironment(ImmutableSandboxedEnvironment):
    """Jinja in which nothing reads an opaque text unseen."""

    code_generator_class = _Code
    concat = staticmethod(join_texts)
    join_texts = staticmethod(join_texts)
    contains = staticmethod(_contains)
    refuse = staticmethod(_refuse)
    intercepted_binops = frozenset(("%", "*"))  # Python writes texts in a tuple by itself, and pads them

    def guard_functions(self) -> None:
        """Wrap all filters and tests; to be called when all are there."""
        for name, function in list(self.filters.items()):
            if name in FILTERS_THAT_WRITE:
                self.filters[name] = _writing(function)
            else:
                self.filters[name] = _guarded(function, deep=name not in FILTERS_ON_LISTS)
        for name, function in list(self.tests.items()):
            if name in ("iterable", "sequence"):
                self.tests[name] = _true_of_opaque(function)
            elif name not in TESTS_OF_TYPE | TESTS_BY_EQUALITY:
                self.tests[name] = _guarded(function, deep=True)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`%` and `*`, which read their operands."""
        if holds_opaque(left) or holds_opaque(right):
            raise Inspected
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`; an entry cannot be looked up by an opaque text."""
        if isinstance(argument, Opaque):
            raise Inspected
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`; an opaque text has those of a text only."""
        if isinstance(obj, Opaque) and not hasattr(str, attribute):
            raise Inspected
        return super().getattr(obj, attribute)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls; only macros, containers and an opaque text's own methods may get one."""
        own = isinstance(getattr(obj, "__self__", None), Opaque)
        takes_texts = own or isinstance(obj, Macro) or getattr(obj, "takes_texts", False)
        given = [*args, *(value for name, value in kwargs.items() if name not in JINJA_OWN)]
        if not takes_texts and any(map(holds_opaque, given)):
            raise Inspected
        return super().call(context, obj, *args, **kwargs)


def _guarded(function: Any, deep: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if any(map(holds_opaque, given)) if deep else any(isinstance(value, Opaque) for value in given):
            raise Inspected
        return function(*args, **kwargs)

    # Jinja passes context or environment to functions marked so
    if hasattr(function, "jinja_pass_arg"):
        call.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return call


def _writing(function: Any) -> Callable[..., Any]:
    """A filter that may write its first argument and reads the others."""

    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        if function is not do_default and any(map(holds_opaque, (*args, *kwargs.values()))):
            raise Inspected
        return function(value, *args, **kwargs)

    return call


def _true_of_opaque(function: Any) -> Callable[..., Any]:
    return lambda value: True if isinstance(value, Opaque) else function(value)
