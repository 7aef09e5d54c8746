"""The commands and their arguments; what they do is in the modules beside this one."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.arguments import Json, Overrides, Recipe, Strict
from flows.cli.evaluating import SeveralValues
from flows.cli.output import BAD_INPUT, FAILED, INTERRUPTED, print_json, say_error
from flows.cli.server_commands import server_app

app = typer.Typer(
    name="llamatuner",
    help="Fine-tuning as a workflow: one recipe says what to train; only what is not done yet runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
artifacts_app = typer.Typer(
    help="Look at, check and clean up what steps made.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(artifacts_app, name="artifacts")
app.add_typer(server_app)  # without a name: its commands stand beside the others


@app.command()
def run(recipe: Recipe, overrides: Overrides = None, json: Json = False, strict_versions: Strict = False) -> None:
    """Do what a recipe says and is not done yet."""
    from flows.cli.running import run_recipe

    raise typer.Exit(run_recipe(recipe, overrides or [], json, strict_versions))


AS_TYPED = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=AS_TYPED, options_metavar="[CONFIG] [--key value]… [key=value]…")
def train(ctx: typer.Context, json: Json = False) -> None:
    """Train from a config or flags of LLaMA-Factory; the model goes to output_dir. `run` is the same for recipes."""
    from flows.cli.old_commands import train_config

    raise typer.Exit(train_config(ctx.args, json))


@app.command("eval", context_settings=AS_TYPED, options_metavar="[CONFIG] [--key value]… [key=value]…")
def evaluate_task(ctx: typer.Context, json: Json = False) -> None:
    """Measure a benchmark from a config of LLaMA-Factory; `evaluate` does more."""
    from flows.cli.old_commands import evaluate_config

    raise typer.Exit(evaluate_config(ctx.args, json))


@app.command("import")
def import_config(
    config: Annotated[str, typer.Argument(help="A config of LLaMA-Factory or of the earlier LLamaTuner.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="New file; standard output by default.")] = None,
) -> None:
    """Write a config as the recipe it means, with what was renamed and what has no effect."""
    from flows.cli.importing import import_recipe

    import_recipe(config, out)


@app.command()
def prepare(recipe: Recipe, overrides: Overrides = None, json: Json = False) -> None:
    """Do the data steps only: fetch, render, tokenize."""
    from flows.cli.running import run_recipe

    raise typer.Exit(run_recipe(recipe, overrides or [], json, False, data_only=True))


@app.command()
def plan(recipe: Recipe, overrides: Overrides = None, json: Json = False, strict_versions: Strict = False) -> None:
    """Show what would run, and why. Starts nothing."""
    from flows.cli.looking import show_plan

    show_plan(recipe, overrides or [], json, strict_versions)


@app.command()
def check(recipe: Recipe, overrides: Overrides = None, json: Json = False) -> None:
    """Validate a recipe, its data and this machine. Starts nothing."""
    from flows.cli.looking import check_recipe

    check_recipe(recipe, overrides or [], json)


@app.command()
def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows to show: 5 on a terminal, 100 on a page, all with --json.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page for a browser, cut into tokens, instead.")
    ] = None,
    json: Json = False,
) -> None:
    """Show rendered rows with the trained part coloured."""
    from flows.cli.previewing import preview_recipe

    preview_recipe(recipe, overrides or [], rows, json, html)


@app.command()
def export(
    recipe: Recipe,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="Stage whose model it is; the last one.")] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", "--export-dir", metavar="FOLDER", help="New or empty folder; ./RECIPE-STAGE by default."),
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter alone.")] = False,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; as it was saved by default.")
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", "--export-size", metavar="SIZE", help="Most of one file; 5GB by default."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", "--export-hub-model-id", metavar="OWNER/NAME", help="Send it there as well."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: a private repository.")] = False,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Write the model of a finished run as a folder that others can load, with its model card; or merge an adapter, as
    a config of LLaMA-Factory says."""
    from flows.cli.exporting import Wanted, export_recipe
    from flows.cli.merging import export_merged, merge_config

    wanted = Wanted(stage, to, adapter, dtype, max_shard_size, push_to_hub, private)
    config = merge_config(recipe, overrides or [])
    if config is not None:
        raise typer.Exit(export_merged(config, wanted, json))
    raise typer.Exit(export_recipe(recipe, overrides or [], wanted, json))


@app.command()
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


@app.command(cls=SeveralValues)
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


@app.command()
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


@app.command()
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


@app.command()
def rollback(model: Annotated[str, typer.Argument(help="Registered model, RECIPE-STAGE.")], json: Json = False) -> None:
    """Make the champion before the present one champion again."""
    from flows.cli.promoting import roll_back_model

    roll_back_model(model, json)


@app.command()
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


@app.command("list")
def list_names(
    kind: Annotated[
        str | None, typer.Argument(help="models, datasets, stages, methods, templates, benchmarks or recipes")
    ] = None,
    json: Json = False,
) -> None:
    """List what is known by name."""
    from flows.cli.looking import list_registries

    list_registries(kind, json)


@app.command()
def runs(limit: Annotated[int, typer.Option(min=1, help="Runs to show.")] = 10, json: Json = False) -> None:
    """Show recent pipeline runs with their results."""
    from flows.cli.looking import list_runs

    list_runs(limit, json)


@app.command()
def env(json: Json = False) -> None:
    """Show versions, devices, memory and paths, for bug reports."""
    from flows.cli.looking import show_environment

    show_environment(json)


@app.command()
def version(json: Json = False) -> None:
    """Show the version."""
    from tasks.versions import git_commit, package_version

    if json:
        print_json({"version": package_version("llamatuner"), "git_commit": git_commit()})
    else:
        print(f"llamatuner {package_version('llamatuner')}")


@artifacts_app.command("ls")
def artifacts_ls(json: Json = False) -> None:
    """List artifacts, newest first."""
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
    """Read every file and compare it with its sha256."""
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
    """Remove artifacts that no recent run refers to, unfinished work and damaged folders."""
    from flows.cli.stored import collect_garbage

    collect_garbage(keep_runs, dry_run, json)


def run_app(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    from registry.errors import InputError

    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        result: Any = app(arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except InputError as error:
        say_error(str(error))
        return _bad_input(str(error), [asdict(problem) for problem in error.problems], as_json)
    except KeyboardInterrupt:
        say_error("interrupted")
        return INTERRUPTED
    except typer.Abort:
        return INTERRUPTED
    except typer.Exit as end:
        return end.exit_code
    except Exception as error:  # noqa: BLE001 - the last line of defence shows every fault and its exit code
        return _unusable(error, as_json)


def _bad_input(error: str, problems: list[dict[str, str]], as_json: bool) -> int:
    """The exit code of bad input; with `--json` the error is also the one line of standard output."""
    if as_json:
        print_json({"status": "failed", "error": error, "problems": problems})
    return BAD_INPUT


def _unusable(error: Exception, as_json: bool) -> int:
    """Click's usage errors end with 2 in its own words; anything else is a fault of ours and shows where."""
    show = getattr(error, "show", None)
    if callable(show):
        show()
        rule = str(getattr(error, "format_message", error.__str__)())
        return _bad_input(rule, [{"where": "command line", "rule": rule, "cure": "See --help."}], as_json)
    import traceback

    traceback.print_exc()
    return FAILED
