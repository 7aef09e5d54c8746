"""What happens to registered models, told to Prefect as events, which automations wait for.

One decision: a model is told of where a Prefect server is there to listen, and nothing that is done depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from flows.promotion import decision_lines
from registry.home import Home
from tasks.servers import PREFECT, address

MODEL = "llamatuner.model"  # how the ids of models begin
REGISTERED, PROMOTED, REFUSED = f"{MODEL}.registered", f"{MODEL}.promoted", f"{MODEL}.refused"


def tell_registered(version: str, run: Mapping[str, Any], home: Home, say: Callable[[str], None]) -> None:
    """A version is in MLflow's registry.

    Args:
        version: `name/version`.
        run: the record of the run that made it.
        home: of the run.
        say: told when Prefect cannot be.
    """
    text = f"version {version.rpartition('/')[2]} of {version.rpartition('/')[0]} was made by run {run['id']}"
    _tell(REGISTERED, version, {"what": "registered", "text": text, "run": run["id"]}, run, home, say)


def tell_decided(record: dict[str, Any], home: Home, say: Callable[[str], None]) -> None:
    """A model became the champion, or did not.

    Args:
        record: of the decision, see `flows.promotion.promote`.
        home: of the run.
        say: told when Prefect cannot be.
    """
    event, what = (PROMOTED, "promoted") if record["passed"] else (REFUSED, "failed gate")
    payload = {"what": what, "text": "\n".join(decision_lines(record)), **record}
    _tell(event, f"{record['model']}/{record['version']}", payload, {}, home, say)


def _tell(
    event: str,
    version: str,
    payload: Mapping[str, Any],
    run: Mapping[str, Any],
    home: Home,
    say: Callable[[str], None],
) -> None:
    if not (os.environ.get("PREFECT_API_URL") or address(home, PREFECT)):
        return
    from flows.deploying import shared_api

    with shared_api(home):
        from httpx import HTTPError
        from prefect.client.orchestration import get_client
        from prefect.events import Event

        flow_run = {"prefect.resource.id": f"prefect.flow-run.{run.get('flow_run_id')}"}
        told = Event.model_validate(
            {
                "event": event,
                "resource": {
                    "prefect.resource.id": f"{MODEL}.{version.replace('/', '.')}",
                    "prefect.resource.name": version,
                },
                "related": [flow_run | {"prefect.resource.role": "flow-run"}] if run.get("flow_run_id") else [],
                "payload": dict(payload),
                "occurred": datetime.now(UTC),
            }
        )
        try:
            with get_client(sync_client=True) as client:
                client.request("POST", "/events", json=[told.model_dump(mode="json")])
        except HTTPError as error:
            say(f"Prefect could not be told that {version} was {payload['what']}: {error}")
