"""The commands and their arguments; what they do is in the modules beside this one."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.arguments import Json, Overrides, Recipe, Strict
from flows.cli.artifact_commands import artifacts_app
from flows.cli.chat_commands import chat_app
from flows.cli.output import BAD_INPUT, FAILED, INTERRUPTED, print_json, say_error
from flows.cli.result_commands import result_app
from flows.cli.server_commands import server_app

app = typer.Typer(
    name="llamatuner",
    help="Fine-tuning as a workflow: one recipe says what to train; only what is not done yet runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(artifacts_app, name="artifacts")
app.add_typer(result_app)  # without a name: its commands stand beside the others
app.add_typer(chat_app)
app.add_typer(server_app)


@app.command()
def run(recipe: Recipe, overrides: Overrides = None, json: Json = False, strict_versions: Strict = False) -> None:
    """Do what a recipe says and is not done yet."""
    from flows.cli.running import run_recipe

    raise typer.Exit(run_recipe(recipe, overrides or [], json, strict_versions))


@app.command()
def init(
    file: Annotated[Path | None, typer.Argument(help="New recipe; named by data and goal without it.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="A name, a hub id or a folder.")] = None,
    data: Annotated[str | None, typer.Option(metavar="DATA", help="A file, folder, URL, hub id or name.")] = None,
    goal: Annotated[
        str | None, typer.Option(metavar="GOAL", help="sft, dpo, kto, orpo, rm or pt; found from the rows without it.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a first recipe that fits your data and this machine; asks what is not given."""
    from flows.cli.beginning import begin

    raise typer.Exit(begin(file, model, data, goal, json))


@app.command()
def sweep(
    recipe: Recipe,
    file: Annotated[str, typer.Argument(metavar="SWEEP", help="YAML or JSON file; docs/sweeps.md.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the recipe with the best values.")] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Put the best model through evaluation.gate.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the trials and what they share; run none.")] = False,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Run a recipe with other values again and again, and find the best; the same command goes on after a stop."""
    from flows.cli.sweeping import show_sweep, sweep_recipe

    if dry_run:
        show_sweep(recipe, file, overrides or [], json)
        return
    raise typer.Exit(sweep_recipe(recipe, file, overrides or [], out, promote, json))


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
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    show_launch: Annotated[
        bool, typer.Option("--show-launch", help="Show the command, sbatch file or manifest of every training.")
    ] = False,
    json: Json = False,
    strict_versions: Strict = False,
) -> None:
    """Show what would run, and why. Starts nothing."""
    from flows.cli.looking import show_plan

    show_plan(recipe, overrides or [], json, strict_versions, show_launch)


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
    gguf: Annotated[bool, typer.Option("--gguf", help="Also one file for llama.cpp, by its own converter.")] = False,
    gguf_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Of the numbers in it: f16 (by default), bf16, f32 or q8_0.")
    ] = None,
    ollama: Annotated[bool, typer.Option("--ollama", help="--gguf with a Modelfile for Ollama.")] = False,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Write the model of a finished run as a folder that others can load, with its model card; or merge an adapter, as
    a config of LLaMA-Factory says."""
    from flows.cli.exporting import Wanted, export_recipe
    from flows.cli.gguf_export import FileWanted
    from flows.cli.merging import export_merged, merge_config

    file = FileWanted(gguf, gguf_type, ollama)
    wanted = Wanted(stage, to, adapter, dtype, max_shard_size, push_to_hub, private, file)
    config = merge_config(recipe, overrides or [])
    if config is not None:
        raise typer.Exit(export_merged(config, wanted, json))
    raise typer.Exit(export_recipe(recipe, overrides or [], wanted, json))


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
def doctor(json: Json = False) -> None:
    """Look for what crashes left behind and put it right; exit code 1 if something is left to do."""
    from flows.cli.doctoring import check_home

    raise typer.Exit(check_home(json))


@app.command()
def version(json: Json = False) -> None:
    """Show the version."""
    from tasks.versions import git_commit, package_version

    if json:
        print_json({"version": package_version("llamatuner"), "git_commit": git_commit()})
    else:
        print(f"llamatuner {package_version('llamatuner')}")


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
