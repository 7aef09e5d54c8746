"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML or JSON file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting: stages.sft.learning_rate=1e-4; KEY= takes it out."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
Strict = Annotated[bool, typer.Option("--strict-versions", help="Other versions of torch, transformers … are a miss.")]
