"""The list of chat templates, `docs/templates.md`, made from `registry/templates.yaml`.

python -m registry.templates_page > docs/templates.md
"""

from __future__ import annotations

from registry.templates import TEMPLATES

HEAD = """# Chat templates

Made by `make docs` from `registry/templates.yaml`.

A chat template turns messages into the one text that a model reads. `template: auto`, the default, is the one that
the model itself carries, and the right choice for any model that has been tuned for conversation; training,
evaluation, chat and export all use the same. A base model has none: name one of these, or give a `.jinja` file of
your own by its path.

What the template writes is checked against what it was given, row by row. A system message, tool calls or reasoning
that a template drops are counted and said, as that is the text its model knows; a row that would lose an answer or
a call is refused. What is trained are answers with the token that ends them, so that the model learns to stop.

* `default_system` replaces the system message of conversations that have none.
* `enable_thinking: false` is for models that reason in writing; rows then say that there is none.
* A template of your own marks answers with `{% generation %}` and `{% endgeneration %}` or leaves that out; either
  way the trained part is proved for every row, and `llamatuner preview RECIPE` shows it.

| name | models | ends an answer | tools | also called |
|---|---|---|---|---|
"""


def templates_page() -> str:
    """The page, as Markdown."""
    rows = []
    for name in TEMPLATES:
        entry = TEMPLATES[name]
        ends = f"`{entry.terminator}`".replace("|", "\\|") if entry.terminator else "nothing"
        cells = (f"`{name}`", ", ".join(entry.families), ends, entry.tool_format or "", ", ".join(entry.aliases))
        rows.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(templates_page(), end="")
