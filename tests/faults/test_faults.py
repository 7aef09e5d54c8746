"""A part of the matrix of faults; `make test-faults` is all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.events import ALONE, SERVED
from tests.faults.ground import PLACES, Ground, undisturbed
from tests.faults.matrix import alone, cells

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return undisturbed(tmp_path_factory.mktemp("ground"))


# of the others the data steps are the same to a signal, and training is in tests/flows/test_stopping.py
@pytest.mark.parametrize(
    ("place", "event"), [("tokenize", "SIGKILL flow"), ("evaluate", "restart"), ("promote", "SIGKILL flow")]
)
def test_the_next_run_goes_on_to_the_same_bytes_and_nothing_is_left(
    ground: Ground, place: str, event: str, tmp_path: Path
) -> None:
    cell = alone(ground, place, event, tmp_path / "broken")
    assert cell.faults == [], cell.line()


def test_the_matrix_has_every_event_at_every_place() -> None:
    found = {*cells(ALONE), *cells(SERVED)}
    assert len(found) == len(PLACES) * (len(ALONE) + len(SERVED)) - 2 * 2 - 7  # no program, or one rank, is there
