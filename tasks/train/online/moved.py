"""What is trained of a role, and how it is moved by the gradients of all processes.

One decision: where gradients and optimizer state are divided among processes, as ZeRO's stages 1 and 2 do (Rajbhandari
et al. 2020, arXiv:1910.02054), every parameter belongs to one process as a whole. So every optimizer will do, also one
that looks at whole matrices, and whose norm of all gradients is the same number as without a division.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Ranks(Protocol):
    """What the processes of a run do together."""

    index: int
    count: int

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on each."""

    def sum_for(self, owner: int, value: Tensor) -> None:
        """Put the sum over all processes into the owner's tensor; what the others then have is undefined."""

    def share(self, owner: int, value: Tensor) -> None:
        """Put the owner's tensor into everybody's."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Of this run's precision."""


@dataclass
class Moved:
    """What is trained of a role, and what moves it.

    Args:
        parameters: all that are trained, by name.
        optimizer: of those that this process moves.
        ranks: the processes.
        owners: parameter → the process that moves it; None: every process moves all.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    owners: dict[str, int] | None = None

    def move(self, max_norm: float) -> float:
        """Add the gradients of all processes up, and make a step unless they are not finite; their norm.

        A gradient counts as 0 in a process that has none.
        """
        self._add_up()
        own = {name: value for name, value in self.parameters.items() if self._is_own(name)}
        places = {name: place for place, name in enumerate(self.parameters)}
        norms = torch.zeros(len(places), device=next(iter(self.parameters.values())).device)
        for name, value in own.items():
            norms[places[name]] = torch.linalg.vector_norm(_gradient(value))
        norm = torch.linalg.vector_norm(norms if self.owners is None else self.ranks.sum(norms))
        if norm.isfinite():
            nn.utils.clip_grads_with_norm_(own.values(), max_norm, norm)
            self.optimizer.step()
            for name, owner in (self.owners or {}).items():
                self.ranks.share(owner, self.parameters[name].data)
        self.forget()
        return float(norm)

    def passed(self) -> None:
        """To be called behind every backward pass."""

    def finish(self, passes: int) -> None:
        """To be called behind the last backward pass before a move.

        Args:
            passes: of the process that made most.
        """

    def forget(self) -> None:
        """Remove all gradients."""
        for value in self.parameters.values():
            value.grad = None

    def _is_own(self, name: str) -> bool:
        return self.owners is None or self.owners[name] == self.ranks.index

    def _add_up(self) -> None:
        for name, value in self.parameters.items():
            if self.owners is not None:
                self._give(name, value)
            elif self.ranks.count > 1:
                value.grad = self.ranks.sum(_gradient(value))

    def _give(self, name: str, value: nn.Parameter) -> None:
        """Send a gradient to its owner."""
        assert self.owners is not None
        self.ranks.sum_for(self.owners[name], _gradient(value))
        if not self._is_own(name):
            value.grad = None


@dataclass
class MovedAtOnce(Moved):
    """Gradients go to their owners during every backward pass, so that no process ever holds all of them.

    They go in one order, whatever order they are there in: that differs where some rows share what they begin with. One
    that comes early waits, and one that does not come is 0, so a process may make fewer passes than others.
    """

    def __post_init__(self) -> None:
        self.order = list(reversed(self.parameters))  # about as they come
        self.there: set[str] = set()
        self.sent = self.passes = 0
        for name, value in self.parameters.items():
            wanted = value.requires_grad  # a critic beside the policy is not the active one now
            value.requires_grad_(True).register_post_accumulate_grad_hook(lambda _, name=name: self._come(name))
            value.requires_grad_(wanted)

    def _come(self, name: str) -> None:
        """Send what may be sent now that a gradient is there."""
        self.there.add(name)
        while self.sent < len(self.order) and self.order[self.sent] in self.there:
            self._send()

    def _send(self) -> None:
        name = self.order[self.sent]
        self._give(name, self.parameters[name])
        self.sent += 1

    def passed(self) -> None:
        """Send what is left of a pass."""
        while self.sent < len(self.order):
            self._send()
        self.passes, self.sent = self.passes + 1, 0
        self.there.clear()

    def finish(self, passes: int) -> None:
        """Send nothing as often as others make more passes."""
        while self.passes < passes:
            self.passed()
        self.passes = 0

    def _add_up(self) -> None:
        """They are with their owners."""


def _gradient(value: nn.Parameter) -> Tensor:
    if value.grad is None:
        value.grad = torch.zeros_like(value)
    return value.grad


def find_owners(parameters: dict[str, nn.Parameter], count: int) -> dict[str, int]:
    """Parameter → its process, so that all have about as much: the largest one first, to whoever has least."""
    held = [0] * count
    found = {}
    for name in sorted(parameters, key=lambda name: (-parameters[name].numel(), name)):
        found[name] = held.index(min(held))
        held[found[name]] += parameters[name].numel()
    return {name: found[name] for name in parameters}
