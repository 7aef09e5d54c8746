"""The flow `promote`: a person, on Prefect's page, makes a model the champion.

One decision: the person is the approval. Without conditions whom they name becomes the champion; with conditions the
model must also meet them, as with `llamatuner promote`.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.comparison import find_side
from flows.model_events import tell_decided
from flows.promotion import decision_lines, promote
from flows.submitting import BAD_INPUT_MARK
from registry.errors import InputError
from registry.gates import condition
from registry.home import Home


@flow(name="promote", flow_run_name="{run}", validate_parameters=True, persist_result=False)
def promote_model(run: str, gate: list[str] = []) -> State[Any]:  # noqa: B006 - never changed
    """Make the model of a finished run the champion of its name in MLflow's registry.

    Args:
        run: Recipe, whose newest finished run is meant, or the beginning of a run's id; RUN:STAGE for a stage of it.
        gate: Conditions that it must meet as well: perplexity.held_out - champion <= 0 at 95%
    """
    logger, home = get_run_logger(), Home.default()
    try:
        conditions = [condition(text, "gate") for text in gate]
        record = promote(find_side(run, home), conditions, home)
    except InputError as error:
        return Failed(message=f"{BAD_INPUT_MARK}{error}")
    *lines, done = decision_lines(record)
    for line in lines:
        logger.info(line)
    tell_decided(record, home, logger.warning)
    return Completed(message=done) if record["passed"] else Failed(name="Failed gate", message=done)
