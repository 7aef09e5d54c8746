"""Commands about results: measuring, comparing, promoting, and where a model came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.arguments import Json, Overrides
from flows.cli.evaluating import SeveralValues

result_app = typer.Typer()


@result_app.command()
def score(
    model: Annotated[str, typer.Argument(help="Folder of a reward model, or the recipe of a finished run.")],
    file: Annotated[str, typer.Argument(help="Pairs, or conversations whose last answer is scored.")],
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="Stage of the recipe; its only one of rm.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="New file for JSON lines, one for each row.")] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Score the answers of a file with a reward model."""
    from flows.cli.scoring import score_file

    raise typer.Exit(score_file(model, file, stage, out, overrides or [], json))


@result_app.command(cls=SeveralValues)
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Finished run or recipe (:STAGE), folder, adapter, models:/NAME@ALIAS, or hub id.")
    ],
    perplexity: Annotated[
        list[str] | None, typer.Option(metavar="DATA…", help="Data sets to score: answers, or plain text whole.")
    ] = None,
    benchmarks: Annotated[
        list[str] | None, typer.Option(metavar="TASK…", help="See `list benchmarks`; lm-eval's tasks, files of yours.")
    ] = None,
    generate: Annotated[
        list[str] | None, typer.Option(metavar="DATA…", help="Data sets whose answers are written anew and compared.")
    ] = None,
    compare_with: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measured beside it: its base by default; none, or any model.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Reward model that scores the answers of --generate.")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(metavar="FOLDER", help="Read benchmarks from files in it.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples before a question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most questions of each benchmark.")] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Measure a model, and its base beside it: perplexity, benchmarks, answers against references."""
    from flows.cli.evaluating import Asked, evaluate_model

    wanted = (perplexity or [], benchmarks or [], generate or [], compare_with, reward, data_dir, num_fewshot, limit)
    raise typer.Exit(evaluate_model(model, Asked(*wanted), overrides or [], json))


@result_app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN…", help="RUN, RUN:STAGE, RECIPE or RECIPE:STAGE; or a measured model.")
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page for a browser as well.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep it in MLflow and on Prefect's pages as well.")] = False,
    json: Json = False,
) -> None:
    """Show what differs between finished runs, or models, and whether it is more than chance."""
    from flows.cli.comparing import compare_runs

    compare_runs(runs, html, record, json)


@result_app.command()
def promote(
    run: Annotated[str, typer.Argument(help="RUN, RUN:STAGE, RECIPE or RECIPE:STAGE, finished.")],
    gate: Annotated[
        list[str] | None, typer.Option("--gate", metavar="CONDITION", help="Such as 'perplexity.mine - champion <= 0'.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a model the champion of MLflow's registry if it passes a gate; exit code 1 if not."""
    from flows.cli.promoting import promote_run

    raise typer.Exit(promote_run(run, gate or [], json))


@result_app.command()
def rollback(model: Annotated[str, typer.Argument(help="Registered model, RECIPE-STAGE.")], json: Json = False) -> None:
    """Make the champion before the present one champion again."""
    from flows.cli.promoting import roll_back_model

    roll_back_model(model, json)


@result_app.command()
def lineage(
    what: Annotated[
        str,
        typer.Argument(
            help="RUN, RECIPE, either with :STAGE, an artifact, an exported folder or models:/NAME@champion; "
            "or data: a file, a folder, a data set's name or the beginning of a digest."
        ),
    ],
    json: Json = False,
) -> None:
    """Show what a model came from, or which models have seen some data."""
    from flows.cli.tracing import show_lineage

    show_lineage(what, json)
