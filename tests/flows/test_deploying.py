"""Recipes are made known to Prefect, and runs that a worker does end as they should, whatever ends them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import uuid4

import psutil
import pytest

from flows.cli.app import run_app
from flows.services import BUSY, ask
from registry.home import Home
from registry.recipes import RECIPES
from registry.run_form import recipe_form
from tasks.servers import read_servers
from tests.flows.processes import checkpoint, mlflow_states, record_states, require_nothing_open, wait_until
from tests.flows.test_servers import free_port, told
from tests.flows.toy import LONGEST, PROJECT, run, start, toy_recipe, write_rows
from tests.small_hub import serving

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
STEPS = 60
JSON = {"Content-Type": "application/json"}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose servers run, with everything deployed."""
    home = tmp_path_factory.mktemp("deployed") / "home"
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    run("up", *ports, LLAMATUNER_HOME=str(home))
    answer = run("deploy", "--all", LLAMATUNER_HOME=str(home))
    (home / "deployed.json").write_text(json.dumps(answer["deployments"]))
    yield home
    run("down", LLAMATUNER_HOME=str(home))


@pytest.fixture
def here(served: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That home, as the home of this process."""
    monkeypatch.setenv("LLAMATUNER_HOME", str(served))
    return served


@pytest.fixture
def api(here: Path) -> str:
    """Address of its Prefect API."""
    return str(read_servers(Home(here))["prefect"].url)


def test_each_recipe_is_a_deployment_that_any_worker_with_the_package_can_run(here: Path, api: str) -> None:
    made = {each["name"]: each["id"] for each in json.loads((here / "deployed.json").read_text())}
    assert list(made) == [*(f"pipeline/{name}" for name in RECIPES), "pipeline/pipeline", "promote/promote"]
    demo = ask(f"{api}/deployments/{made['pipeline/demo']}")
    assert demo["entrypoint"] == "flows.pipeline.pipeline"
    assert demo["path"] is None
    assert demo["parameters"] == {"recipe": "demo"}
    assert demo["work_pool_name"] == "llamatuner"
    assert demo["tags"] == ["llamatuner"]
    assert demo["schedules"] == []
    assert demo["global_concurrency_limit"]["limit"] == 1
    assert demo["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert demo["description"].startswith("An assistant that knows what LLamaTuner is")
    fields = demo["parameter_openapi_schema"]["properties"]
    assert list(fields) == ["recipe", "settings", "overrides", "data_only"]
    assert all(field["description"] for field in fields.values())
    assert fields["recipe"]["enum"] == ["demo"]
    assert fields["settings"]["properties"] == recipe_form("demo")["properties"]
    assert ask(f"{api}/deployments/{made['pipeline/pipeline']}")["parameters"] == {}


@pytest.mark.parametrize(
    ("deployment", "settings", "said"),
    [
        ("demo", {"stages": {"sft": {"learning_rate": "fast"}}}, "settings.stages.sft.learning_rate"),
        ("demo", {"finetuning_type": "lorra"}, "'lorra' is not one of ['lora', 'freeze', 'full']"),
        ("pipeline", {"max_step": 3}, "'max_step' was unexpected"),
    ],
)
def test_what_the_form_cannot_mean_is_refused_before_a_run_starts(
    api: str, deployment: str, settings: dict[str, Any], said: str
) -> None:
    known = ask(f"{api}/deployments/name/pipeline/{deployment}")["id"]
    with pytest.raises(HTTPError) as refused:
        ask(f"{api}/deployments/{known}/create_flow_run", {"parameters": {"settings": settings}})
    assert refused.value.code == 409
    assert said in json.loads(refused.value.read())["detail"]


def test_to_deploy_again_changes_nothing_and_keeps_the_schedule(here: Path) -> None:
    before = {each["name"]: each["id"] for each in json.loads((here / "deployed.json").read_text())}
    nightly = run("deploy", "demo", "--cron", "0 3 * * *", "--timezone", "Europe/Berlin")["deployments"]
    again = run("deploy", "demo")["deployments"]
    schedule = {"active": True, "cron": "0 3 * * *", "timezone": "Europe/Berlin"}
    assert nightly == again == [{"name": "pipeline/demo", "id": before["pipeline/demo"], "schedules": [schedule]}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["deploy"], "give names, or --all, and not both"),
        (["deploy", "dem"], "no shipped recipe of that name to deploy. Did you mean demo?"),
        (["deploy", "mine.yaml"], "the recipe file does not exist"),
        (["deploy", "--all", "--cron", "0 3 * * *"], "is the schedule of one deployment"),
        (["deploy", "demo", "--timezone", "UTC"], "belongs to --cron"),
        (["deploy", "--all", "--on-data-change"], "is for recipes that are named"),
        (["submit", "dem"], "neither a file nor a known recipe"),
        (["submit", "demo", "--set", "stages.sft.learning_rate=fast"], "stages.sft.learning_rate"),
    ],
)
@pytest.mark.usefixtures("here")
def test_bad_input_is_refused_before_anything_is_asked_for(arguments: list[str], said: str, capsys: Capture) -> None:
    assert said in told(*arguments, code=2, capsys=capsys)["error"]


@pytest.mark.usefixtures("here")
def test_a_schedule_that_is_none_is_refused() -> None:
    problems = run("deploy", "demo", "--cron", "0 3 * *", "--timezone", "Mars", code=2)["problems"]
    assert [problem["rule"] for problem in problems] == ["'Mars' is no time zone", "'0 3 * *' is no schedule"]


def test_without_a_server_the_cure_is_named(capsys: Capture) -> None:
    error = told("deploy", "demo", code=2, capsys=capsys)["error"]
    assert error.endswith("Start one with `llamatuner up`, or set PREFECT_API_URL.")


def ended(api: str, flow_run: str) -> dict[str, Any]:
    """The state of a flow run, when it has ended."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        state: dict[str, Any] = ask(f"{api}/flow_runs/{flow_run}")["state"]
        if state["type"] in ENDED:
            return state
        time.sleep(0.2)
    raise AssertionError(f"{flow_run} has not ended")


def test_a_run_that_was_started_on_a_page_with_bad_input_fails_with_our_words(here: Path, api: str) -> None:
    deployment = ask(f"{api}/deployments/name/pipeline/pipeline")["id"]
    wanted = {"parameters": {"recipe": "demmo", "overrides": []}, "state": {"type": "SCHEDULED"}}
    flow_run = ask(f"{api}/deployments/{deployment}/create_flow_run", wanted)["id"]
    state = ended(api, flow_run)
    assert (state["type"], state["name"]) == ("FAILED", "Failed")
    assert state["message"] == "Bad input: recipe: 'demmo' is neither a file nor a known recipe. Did you mean demo?"
    assert record_states(here) == []


def started(api: str, deployment: str, **parameters: Any) -> str:
    """Start a run as Prefect's page does; its id."""
    known = ask(f"{api}/deployments/name/{deployment}")["id"]
    return str(ask(f"{api}/deployments/{known}/create_flow_run", {"parameters": parameters})["id"])


class Receiver(BaseHTTPRequestHandler):
    """What a webhook of a team chat is told."""

    told: ClassVar[list[dict[str, str]]] = []

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


def save_block(api: str, called: str, **data: Any) -> None:
    """Save a custom webhook as people do on Prefect's page."""
    kind = ask(f"{api}/block_types/slug/custom-webhook")["id"]
    (schema,) = ask(f"{api}/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind]}}})
    block = {"name": called, "data": data, "block_type_id": kind, "block_schema_id": schema["id"]}
    ask(f"{api}/block_documents/", block)


def automations(api: str) -> dict[str, dict[str, Any]]:
    """The automations of the server by name."""
    found = ask(f"{api}/automations/filter", {})
    assert len({each["name"] for each in found}) == len(found)
    return {each["name"]: each for each in found}


def test_a_block_is_told_of_a_run_that_fails_and_a_missing_block_is_refused(here: Path, api: str) -> None:
    (problem,) = run("deploy", "promote", "--notify", "slack-webhook/none", code=2)["problems"]
    assert problem["rule"] == "this Prefect server has no block slack-webhook/none"
    assert "`prefect block ls` shows those there are" in problem["cure"]
    with serving(Receiver) as address:
        template = {"subject": "{{subject}}", "text": "{{body}}", "key": "{{key}}"}
        save_block(api, "team", name="team", url=address, json_data=template, secrets={"key": "hush"})
        for _ in range(2):
            run("deploy", "promote", "--notify", "custom-webhook/team")
        made = automations(api)
        assert {"llamatuner: runs that died", "llamatuner: measure new versions"} < made.keys()
        assert "hush" not in json.dumps(made)
        flow_run = started(api, "promote/promote", run="toy")
        assert ended(api, flow_run)["type"] == "FAILED"
        wait_for(lambda: bool(Receiver.told))
    (told,) = Receiver.told
    assert (told["subject"], told["key"]) == ("promote toy: Failed", "hush")
    assert told["text"].startswith("Bad input: toy: ")
    assert told["text"].endswith(f"/runs/flow-run/{flow_run}")


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something that Prefect's server does by itself."""
    deadline = time.monotonic() + LONGEST / 2
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.2)


def tell(api: str, event: str, resource: dict[str, str], related: list[dict[str, str]]) -> None:
    """Tell the server of an event."""
    told = {"event": event, "resource": resource, "related": related, "payload": {}, "id": str(uuid4())}
    ask(f"{api}/events", [told | {"occurred": datetime.now(UTC).isoformat()}])


def switch(api: str, automation: dict[str, Any], on: bool) -> None:
    """Switch an automation on or off as people do on Prefect's page."""
    body = json.dumps({"enabled": on}).encode()

    def done() -> bool:
        try:
            urlopen(Request(f"{api}/automations/{automation['id']}", body, JSON, method="PATCH")).close()
        except HTTPError as error:
            if error.code != BUSY:
                raise
            return False  # its SQLite database is locked, see `flows.services.ask`
        return True

    wait_for(done)


def test_a_new_version_is_measured_once_that_is_switched_on(here: Path, api: str) -> None:
    measuring = automations(api)["llamatuner: measure new versions"]
    assert not measuring["enabled"]
    switch(api, measuring, True)
    version = {"prefect.resource.id": "llamatuner.model.toy-sft.3", "prefect.resource.name": "toy-sft/3"}
    deployment = ask(f"{api}/deployments/name/pipeline/pipeline")["id"]
    wanted = {"deployments": {"id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}

    def asked() -> list[Any]:
        # again, because Prefect carries out an automation only some moments after it was switched on
        tell(api, "llamatuner.model.registered", version, [])
        time.sleep(1)
        runs = ask(f"{api}/flow_runs/filter", wanted)
        return [each for each in runs if "evaluate" in str(each["parameters"])]

    found: list[Any] = []
    wait_for(lambda: bool(found.extend(asked()) or found))
    assert found[0]["parameters"]["recipe"]["evaluate"] == "models:/toy-sft/3"
    assert ended(api, found[0]["id"])["message"].startswith("Bad input: ")  # there is no such version
    run("deploy", "pipeline")
    assert automations(api)["llamatuner: measure new versions"]["enabled"]  # as people left it
    switch(api, measuring, False)  # the tests below make versions too


SHORT = """
from prefect.client.orchestration import get_client
from flows.automations import dead_runs, install
with get_client(sync_client=True) as client:
    install(client, [dead_runs(["pipeline"], 4)])
"""


def test_a_run_without_a_sign_of_life_is_marked_crashed(here: Path, api: str) -> None:
    subprocess.run([sys.executable, "-c", SHORT], env=os.environ | {"PREFECT_API_URL": api}, cwd=PROJECT, check=True)
    flow = ask(f"{api}/flows/name/pipeline")["id"]
    flow_run = ask(f"{api}/flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]  # nobody runs it
    about = {"prefect.resource.id": f"prefect.flow.{flow}", "prefect.resource.role": "flow"}
    beat = {"prefect.resource.id": f"prefect.flow-run.{flow_run}"}
    tell(api, "prefect.flow-run.heartbeat", beat, [about | {"prefect.resource.name": "pipeline"}])
    state = ended(api, flow_run)
    run("deploy", "promote")  # with the usual time again
    assert (state["type"], state["message"].split(":")[0]) == ("CRASHED", "No sign of life for 12 seconds")


def test_a_cancelled_run_keeps_its_checkpoints_and_the_next_one_goes_on(here: Path, tmp_path: Path, api: str) -> None:
    recipe = toy_recipe(tmp_path / "recipe", steps=STEPS)
    raw = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({name: value for name, value in raw.items() if name != "evaluation"}))
    process = start("submit", str(recipe), "--json")
    wait_until(lambda: checkpoint(here) > 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LONGEST)
    assert process.returncode == 130
    answer = json.loads(out)
    flow_run = answer["flow_run_id"]
    assert answer["status"] == "submitted"
    assert "sft/train" in err
    assert f"To cancel it: PREFECT_API_URL={api} prefect flow-run cancel {flow_run}" in err
    assert ask(f"{api}/flow_runs/{flow_run}")["state"]["type"] == "RUNNING"

    ask(f"{api}/flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})  # as `flow-run cancel` does
    assert ended(api, flow_run)["type"] == "CANCELLED"
    assert not programs(here)
    reached = checkpoint(here)
    assert reached > 2
    assert record_states(here) == ["cancelled"]
    assert "RUNNING" not in mlflow_states(here)

    done = run("submit", str(recipe))
    assert (done["status"], done["deployment"]) == ("completed", "pipeline/pipeline")
    (trained,) = here.glob("artifacts/train/*/manifest.json")
    assert json.loads(trained.read_text())["counts"]["resumed_from"] == reached
    assert record_states(here) == ["cancelled", "completed"]
    require_nothing_open(here)


def programs(home: Path) -> list[psutil.Process]:
    """Training programs of a home that run."""
    spec = str(home / "work")
    return [each for each in psutil.process_iter(["cmdline"]) if spec in " ".join(each.info["cmdline"] or [])]


def test_a_run_is_started_when_data_change_and_says_why(here: Path, tmp_path: Path, api: str) -> None:
    recipe = toy_recipe(tmp_path / "recipe", steps=1)
    write_rows(recipe.parent / "train.jsonl", 24, "fresh")
    raw = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({name: value for name, value in raw.items() if name != "evaluation"}))
    made = run("deploy", str(recipe), "--on-data-change")["deployments"]
    assert [(each["name"], each["schedules"]) for each in made] == [
        ("pipeline/pipeline", []),
        ("watch/toy", [{"active": True, "cron": "0 * * * *", "timezone": "UTC"}]),
    ]
    message = ended(api, started(api, "watch/toy", recipe=str(recipe)))["message"]
    said = re.fullmatch(r"(sft/fetch: .*); started run ([0-9a-f-]{36})\.", message)
    assert said, message
    found = ask(f"{api}/flow_runs/{said[2]}")
    assert found["parameters"] == {"recipe": str(recipe), "overrides": []}
    assert f"data changed: {said[1]}" in found["tags"]
    assert ended(api, said[2])["type"] == "COMPLETED"


def test_a_recipe_of_ones_own_is_deployed_by_its_path_and_its_schedule_fires(
    here: Path, api: str, tmp_path: Path, capsys: Capture
) -> None:
    recipe = toy_recipe(tmp_path / "recipe", steps=1)
    raw = json.loads(recipe.read_text()) | {"name": "demo"}
    recipe.write_text(json.dumps(raw))
    error = told("deploy", str(recipe), code=2, capsys=capsys)["error"]
    assert "the recipe is named demo, as one that ships" in error
    recipe.write_text(json.dumps(raw | {"name": "minutely"}))
    (made,) = run("deploy", str(recipe), "--cron", "* * * * *")["deployments"]
    assert made["name"] == "pipeline/minutely"
    deployment = ask(f"{api}/deployments/{made['id']}")
    assert deployment["parameters"] == {"recipe": str(recipe)}
    fields = deployment["parameter_openapi_schema"]["properties"]
    assert fields["recipe"]["enum"] == [str(recipe)]
    assert fields["settings"]["properties"]["stages"]["properties"]["sft"]["properties"]["max_steps"]["default"] == 1

    def first() -> list[dict[str, Any]]:
        wanted = {
            "deployments": {"id": {"any_": [made["id"]]}},
            "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}},
        }
        runs: list[dict[str, Any]] = ask(f"{api}/flow_runs/filter", wanted)
        return runs

    wait_for(lambda: bool(first()))
    flow_run = first()[0]
    ask(f"{api}/deployments/{made['id']}/pause_deployment", {})
    assert ended(api, flow_run["id"])["type"] == "COMPLETED"
    assert flow_run["auto_scheduled"]


def test_down_stops_a_run_of_the_worker_and_closes_it(here: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path / "recipe", steps=400)
    run("submit", str(recipe), "--no-follow")
    worker = start("logs", "worker", "-f")
    wait_until(lambda: checkpoint(here) > 2, worker)
    worker.send_signal(signal.SIGINT)
    assert worker.wait(LONGEST) == 0
    assert run_app(["down"]) == 0
    assert not programs(here)
    assert checkpoint(here) > 2
    assert record_states(here)[-1] == "cancelled"
    assert "RUNNING" not in mlflow_states(here)
