"""What Prefect's server does by itself when something happens to our runs and models: its automations.

One decision: an automation is known by its name. Installing it again brings what it does up to date, and leaves
whether it is switched on as people have it on Prefect's page.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

from flows.model_events import MODEL, PROMOTED, REFUSED, REGISTERED
from registry.errors import InputError, Problem

BEATS_MISSED = 3  # after which a run is taken for dead
ENDS = [f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut")]
FAILED = ["prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"]
NOT_OURS = {"enabled", "owner_resource"}  # fields that people set, or the server
WEBHOOK = "webhook"  # a block that is called with whatever text it is given
RUN_BODY = "{{ flow_run.state.message }}\n{{ flow_run | ui_url }}"
MODEL_BODY = "{{ event.payload.text }}"


def install(client: Any, wanted: Iterable[Any]) -> None:
    """Write automations to the server; those of the same names are brought up to date, but for one that is shipped
    switched off: it is there for people to change."""
    for automation in wanted:
        found = client.read_automations_by_name(automation.name)
        if not found:
            client.create_automation(automation)
            continue
        if not automation.enabled:
            continue
        # validated anew, so that all fields count as set: the client leaves out those that do not
        whole = type(automation).model_validate(automation.model_dump(exclude=NOT_OURS))
        if whole.model_dump(exclude=NOT_OURS) != found[0].model_dump(exclude={"id", *NOT_OURS}):
            # only then: the server forgets what it was waiting for
            client.update_automation(found[0].id, whole.model_copy(update={"enabled": found[0].enabled}))


def measuring(deployment: UUID) -> Any:
    """Measure every version that is registered; switched off, with a benchmark in it that people change as they like.

    Args:
        deployment: the one that takes any recipe.
    """
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

    recipe = {
        "name": "new-version",
        "evaluate": "models:/{{ event.resource.name }}",
        "evaluation": {"benchmarks": ["arc_easy"], "compare_with": "none"},
    }
    return AutomationCore(
        name="llamatuner: measure new versions",
        description="Switch it on, and write into its action what is to be measured of every registered version.",
        enabled=False,
        trigger=EventTrigger(expect={REGISTERED}, match={"prefect.resource.id": f"{MODEL}.*"}),
        actions=[RunDeployment.model_validate({"deployment_id": deployment, "parameters": {"recipe": recipe}})],
    )


def dead_runs(flows: Iterable[str], heartbeat: int) -> Any:
    """Mark a run crashed that gives no sign of life any more: its machine went down, or somebody killed it.

    Args:
        flows: names of the flows.
        heartbeat: seconds between two signs of life.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    beat, seconds = "prefect.flow-run.heartbeat", BEATS_MISSED * heartbeat
    return AutomationCore(
        name="llamatuner: runs that died",
        description=f"A run without a sign of life for {seconds} seconds is marked crashed.",
        trigger=EventTrigger(
            after={beat},
            expect={beat, *ENDS},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_of(flows),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            within=timedelta(seconds=seconds),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                force=False,
                state=StateType.CRASHED,
                message=f"No sign of life for {seconds} seconds: the process or its machine was ended without a word.",
            )
        ],
    )


def _of(flows: Iterable[str]) -> Any:
    return {"prefect.resource.role": "flow", "prefect.resource.name": list(flows)}


def notifications(client: Any, block: str, flows: Iterable[str]) -> list[Any]:
    """Tell a notification block of runs that failed, of gates that were not passed and of promotions.

    Args:
        client: of the server that has the block.
        block: `TYPE/NAME`, as `prefect block ls` shows it: `slack-webhook/team`.
        flows: names of the flows whose runs count.

    Raises:
        InputError: no such block, or one that cannot tell anybody anything.
    """
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

    document = _block(client, block)
    runs = EventTrigger(
        expect=set(FAILED), match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=_of(flows)
    )
    models = EventTrigger(expect={PROMOTED, REFUSED}, match={"prefect.resource.id": f"{MODEL}.*"})
    told = {
        "failed runs": (runs, "{{ flow.name }} {{ flow_run.name }}: {{ flow_run.state.name }}", RUN_BODY),
        "gates and promotions": (models, "{{ event.resource.name }}: {{ event.payload.what }}", MODEL_BODY),
    }
    return [
        AutomationCore(
            name=f"llamatuner: {what} to {block}",
            description=f"Sends a message through the block {block}.",
            trigger=trigger,
            actions=[_message(document, subject, body)],
        )
        for what, (trigger, subject, body) in told.items()
    ]


def _block(client: Any, block: str) -> Any:
    from prefect.exceptions import ObjectNotFound

    kind, _, name = block.partition("/")
    cure = "Make one on Prefect's page under Blocks; `prefect block ls` shows those there are, as slack-webhook/team."
    if not kind or not name:
        raise InputError(Problem("--notify", f"{block!r} is not TYPE/NAME of a block", cure))
    try:
        document = client.read_block_document_by_name(name, kind, include_secrets=False)
    except ObjectNotFound as error:
        raise InputError(Problem("--notify", f"this Prefect server has no block {block}", cure)) from error
    if kind != WEBHOOK and "notify" not in document.block_schema.capabilities:
        raise InputError(Problem("--notify", f"{block} is no notification block and no webhook", cure))
    return document


def _message(document: Any, subject: str, body: str) -> Any:
    from prefect.events.actions import CallWebhook, SendNotification

    if document.block_type.slug == WEBHOOK:
        payload = f'{{"subject": {_quoted(subject)}, "text": {_quoted(body)}}}'
        return CallWebhook(block_document_id=document.id, payload=payload)
    return SendNotification(block_document_id=document.id, subject=subject, body=body)


def _quoted(template: str) -> str:
    """A template whose text comes out as JSON."""
    return "{% filter tojson %}" + template + "{% endfilter %}"
