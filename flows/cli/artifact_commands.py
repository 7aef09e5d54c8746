"""The commands under `llamatuner artifacts`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.arguments import Json

artifacts_app = typer.Typer(
    help="Look at, check and clean up what steps made.", no_args_is_help=True, rich_markup_mode=None
)


@artifacts_app.command("ls")
def artifacts_ls(json: Json = False) -> None:
    """List the artifacts of this home, newest first; not those of a shared store."""
    from flows.cli.stored import list_artifacts

    list_artifacts(json)


Key = Annotated[str, typer.Argument(help="Beginning of a key, or the artifact's folder name.")]


@artifacts_app.command("show")
def artifacts_show(key: Key, json: Json = False) -> None:
    """Show an artifact's manifest."""
    from flows.cli.stored import show_artifact

    show_artifact(key, json)


@artifacts_app.command("why")
def artifacts_why(key: Key, json: Json = False) -> None:
    """Explain what made an artifact differ from the one nearest to it."""
    from flows.cli.stored import explain_artifact

    explain_artifact(key, json)


@artifacts_app.command("verify")
def artifacts_verify(
    key: Annotated[str | None, typer.Argument(help="Beginning of a key; all artifacts without it.")] = None,
    json: Json = False,
) -> None:
    """Read every file of this home and compare it with its sha256; a shared store's are checked when they come."""
    from flows.cli.stored import verify_artifacts

    raise typer.Exit(verify_artifacts(key, json))


@artifacts_app.command("gc")
def artifacts_gc(
    keep_runs: Annotated[
        int, typer.Option(min=0, help="Keep what the newest so many runs of each recipe refer to.")
    ] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    json: Json = False,
) -> None:
    """Remove artifacts that no recent run refers to, unfinished work, damaged folders; a shared store is left alone."""
    from flows.cli.stored import collect_garbage

    collect_garbage(keep_runs, dry_run, json)
