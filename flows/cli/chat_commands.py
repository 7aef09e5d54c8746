"""The commands that let models answer, and their arguments; what they do is in the modules beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.arguments import Json

chat_app = typer.Typer()

WORDS = {"ignore_unknown_options": True}  # flags of LLaMA-Factory are read with its configs
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL…",
        help="Finished run or recipe (:STAGE), folder, adapter, models:/NAME@ALIAS, or hub id; or a config of "
        "LLaMA-Factory.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="temperature=0.7, max_new_tokens=200, template=chatml, quant_bit=4"
    ),
]


@chat_app.command(context_settings=WORDS)
def chat(
    models: Models,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    overrides: Settings = None,
    web: Annotated[bool, typer.Option("--web", help="On a page for a browser; several models side by side.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="With --web: where the page is.")] = 7860,
    votes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --web: votes, as rows for dpo; LLAMATUNER_HOME/votes.jsonl else."),
    ] = None,
) -> None:
    """Talk to a model in the terminal; /help lists what else can be typed."""
    from flows.cli.chatting import chat_here, chat_on_page

    if web:
        raise typer.Exit(chat_on_page(models, system, overrides or [], port, votes))
    raise typer.Exit(chat_here(models, system, overrides or [], votes))


@chat_app.command("api", context_settings=WORDS, hidden=True)  # its name in LLaMA-Factory
@chat_app.command(context_settings=WORDS)
def serve(
    models: Models,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="What clients have to show; better in the environment: LLAMATUNER_API_KEY."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(metavar="ENGINE", help="transformers, or vllm: many requests at once."),
    ] = "transformers",
    overrides: Settings = None,
    json: Json = False,
) -> None:
    """Answer over HTTP as OpenAI's API does, until Ctrl-C: /v1/chat/completions, /v1/models."""
    from flows.cli.chatting import serve_models

    raise typer.Exit(serve_models(models, (host, port), api_key, overrides or [], engine, json))
