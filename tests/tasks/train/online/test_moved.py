"""Who moves which parameter, and in which order gradients go there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tasks.train.online.moved import Moved, MovedAtOnce, find_owners
from tests.tasks.train.online.test_update import Alone


class Second(Alone):
    """The second of two processes, whose mate has no gradients; it notes what is sent."""

    index, count = 1, 2

    def __init__(self) -> None:
        self.sent: list[tuple[int, float]] = []

    def sum_for(self, owner: int, value: torch.Tensor) -> None:
        self.sent.append((owner, float(value.sum())))

    def share(self, owner: int, value: torch.Tensor) -> None:
        self.sent.append((owner, float("nan")))


def parameters(**values: list[float]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}


def test_every_parameter_belongs_to_one_process_and_all_have_about_as_much() -> None:
    some = {name: nn.Parameter(torch.zeros(size)) for name, size in zip("abcdef", (1, 9, 4, 3, 2, 5), strict=True)}
    assert find_owners(some, 2) == {"a": 1, "b": 0, "c": 1, "d": 0, "e": 1, "f": 1}
    assert find_owners(some, 1) == dict.fromkeys("abcdef", 0)


@pytest.mark.parametrize("kind", [Moved, MovedAtOnce])
def test_the_norm_is_that_of_all_gradients_and_a_step_is_clipped_to_it(kind: type[Moved]) -> None:
    values = parameters(a=[1.0, 1.0], b=[1.0])
    divided = kind is MovedAtOnce
    owners = dict.fromkeys(values, 1) if divided else None
    moved = kind(values, torch.optim.SGD(values.values(), lr=1.0), Second() if divided else Alone(), owners)
    (values["a"] * torch.tensor([3.0, 0.0]) + values["b"] * 2.0).sum().backward()  # gradients (3, 0) and 4
    assert moved.move(2.5) == pytest.approx(5.0)
    assert values["a"].tolist() == pytest.approx([-0.5, 1.0])
    assert values["b"].tolist() == pytest.approx([-1.0])
    assert values["a"].grad is values["b"].grad is None


def test_a_step_whose_gradient_is_not_finite_is_not_made() -> None:
    values = parameters(a=[1.0])
    moved = Moved(values, torch.optim.SGD(values.values(), lr=1.0), Alone())
    (values["a"] * torch.inf).sum().backward()
    assert moved.move(1.0) == torch.inf
    assert values["a"].tolist() == [1.0]


def test_gradients_are_sent_in_one_order_whatever_order_they_come_in_and_only_the_owner_keeps_them() -> None:
    values, ranks = parameters(a=[1.0], b=[1.0], c=[1.0]), Second()
    owners = {"a": 1, "b": 0, "c": 1}
    moved = MovedAtOnce(values, torch.optim.SGD([values["a"], values["c"]], lr=1.0), ranks, owners)
    (values["a"] * 2).sum().backward()  # the last one of the order comes first, and waits
    assert ranks.sent == []
    assert values["a"].grad is not None
    moved.passed()
    assert ranks.sent == [(1, 0.0), (0, 0.0), (1, 2.0)]
    ranks.sent.clear()
    (values["a"] * values["b"] * 3 * values["c"]).sum().backward()
    assert sorted(ranks.sent) == [(0, 3.0), (1, 3.0), (1, 5.0)]
    assert values["b"].grad is None
    moved.passed()
    moved.finish(3)  # another process makes one pass more
    assert [owner for owner, _ in ranks.sent[3:]] == [1, 0, 1]
    moved.move(100.0)
    assert [values[name].item() for name in "abc"] == [-4.0, 1.0, -2.0]
    assert [owner for owner, value in ranks.sent if value != value] == [1, 0, 1]
