"""Raw rows in every form people keep them in → the five canonical shapes.

One decision: a form is told by the registry entry (`declared`) or found from a row's columns (`detect`), and one
`converter` is made from it. Nothing is guessed row by row: a row that does not fit is a `BadRow` with field and rule.

| shape | canonical row |
|---|---|
| text | `text` |
| chat | `messages`, `tools` |
| preference | `prompt`, `chosen`, `rejected`, `tools`, `margin` |
| labelled | `prompt`, `completion`, `tools`, `label` |
| prompt | `prompt`, `tools`, `reference` |

`messages`, `prompt`, `chosen`, `rejected` and `completion` are lists of messages: `role` (`system user assistant
tool`), `content`, and where the source has them `reasoning`, `tool_calls`, `name`, `tool_call_id`. `tools` and
`tool_calls` are JSON text.
"""

from tasks.formats.converters import Canonical, Converter, converter
from tasks.formats.detection import detect
from tasks.formats.form import FORMATTINGS, SHAPES, Form, declared, misfit, unknown_columns

__all__ = [
    "FORMATTINGS",
    "SHAPES",
    "Canonical",
    "Converter",
    "Form",
    "converter",
    "declared",
    "detect",
    "misfit",
    "unknown_columns",
]
