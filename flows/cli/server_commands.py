"""The commands around servers and deployments and their arguments; what they do is in the modules beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.arguments import Json, Overrides, Recipe

server_app = typer.Typer()


@server_app.command()
def up(
    prefect_port: Annotated[int | None, typer.Option(min=1, max=65535, help="4200 when not given.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(min=1, max=65535, help="5000 when not given.")] = None,
    json: Json = False,
) -> None:
    """Start Prefect's server, MLflow's and a worker in the background; those that run are kept."""
    from flows.cli.serving import start_servers

    raise typer.Exit(start_servers({"prefect": prefect_port, "mlflow": mlflow_port}, json))


@server_app.command()
def down(json: Json = False) -> None:
    """End what `up` started; runs of the worker stop and keep their checkpoints."""
    from flows.cli.serving import end_servers

    raise typer.Exit(end_servers(json))


@server_app.command()
def status(json: Json = False) -> None:
    """Show which servers of `up` run, and the runs in progress; exit code 1 if not all do."""
    from flows.cli.serving import show_status

    raise typer.Exit(show_status(json))


@server_app.command()
def logs(
    name: Annotated[str | None, typer.Argument(help="prefect, mlflow or worker; all three without it.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added; Ctrl-C ends it.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines of each log to begin with.")] = 50,
) -> None:
    """Show what the servers of `up` print."""
    from flows.cli.serving import show_logs

    raise typer.Exit(show_logs(name, follow, lines))


@server_app.command()
def deploy(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME…", help="Shipped recipes, or files; `pipeline`: any recipe; `promote`: approval by a person."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    cron: Annotated[str | None, typer.Option(help="Start runs by this schedule: '0 3 * * *'. One NAME only.")] = None,
    timezone: Annotated[str | None, typer.Option(help="Of the schedule, such as Europe/Berlin; UTC else.")] = None,
    on_data_change: Annotated[
        bool, typer.Option("--on-data-change", help="Start runs when data change: a look each hour, or by --cron.")
    ] = False,
    notify: Annotated[
        str | None, typer.Option(metavar="TYPE/NAME", help="Prefect block told of failures, gates and promotions.")
    ] = None,
    json: Json = False,
) -> None:
    """Make recipes known to Prefect's server, where a person, a schedule or `submit` starts them."""
    from flows.cli.deploying import Wish, deploy_recipes

    wish = Wish(names or [], everything, cron, timezone, on_data_change, notify)
    raise typer.Exit(deploy_recipes(wish, json))


@server_app.command()
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option(help="Show the log until the run ends; Ctrl-C does not stop the run.")] = True,
    json: Json = False,
) -> None:
    """Have a worker do what a recipe says and is not done yet."""
    from flows.cli.deploying import submit_recipe

    raise typer.Exit(submit_recipe(recipe, overrides or [], follow, json))
