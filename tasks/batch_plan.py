"""The batch arithmetic of a training, without torch: the plan of a recipe tells it as well.

One decision: an epoch is cut into global batches of rows first, and only then dealt out to processes and
micro-batches. So the rows of a step do not depend on how the step is split, and the last, shorter step of an epoch
repeats nobody (a sampler sharded per process fills up with rows from the beginning).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy

FILLER = -1  # index of the row that keeps a process busy when a step has fewer rows than micro-batches


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a run, and which row goes where.

    >>> BatchPlan(rows=10, per_device=1, accumulation=2, processes=2, seed=0).steps_per_epoch()
    3
    """

    rows: int
    """Sequences in the shards."""
    per_device: int
    """Sequences per process in one forward pass."""
    accumulation: int
    """Forward passes per optimizer step."""
    processes: int
    """Training processes."""
    seed: int
    """Seed of the order."""
    generations: int = 1
    """Sequences that are made of each row: answers to a prompt."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], rows: int, per_device: int, processes: int) -> BatchPlan:
        """The arithmetic of a training.

        Args:
            settings: `TrainSettings.identity()`.
            rows: sequences in the shards.
            per_device: sequences of a forward pass; fewer than the settings say where memory ran out, in as many more.
            processes: of all machines.
        """
        parts = settings["gradient_accumulation_steps"] * settings["per_device_train_batch_size"] // per_device
        parts *= settings.get("ppo_buffer_size", 1)
        return cls(rows, per_device, parts, processes, settings["seed"], settings.get("num_generations", 1))

    def global_batch(self) -> int:
        """Sequences per step."""
        return self.per_device * self.accumulation * self.processes

    def rows_per_step(self) -> int:
        """Rows they are made of; the last step of an epoch may have fewer."""
        return self.global_batch() // self.generations

    def steps_per_epoch(self) -> int:
        """Steps in one pass over the rows; the last one may be short."""
        return math.ceil(self.rows / self.rows_per_step())

    def total_steps(self, max_steps: int | None, epochs: float | None) -> int:
        """Steps of the run: `max_steps`, or what `epochs` passes need, rounded up."""
        return max_steps if max_steps is not None else math.ceil((epochs or 0.0) * self.steps_per_epoch())

    def sentence(self, total: int) -> str:
        """The arithmetic, said once at the start."""
        one = "process" if self.processes == 1 else "processes"
        each = f", {self.generations} for each row" if self.generations > 1 else ""
        return (
            f"{self.per_device} per device x {self.accumulation} accumulation x {self.processes} {one} = "
            f"{self.global_batch()} sequences per step{each}; {self.rows} {'rows' if each else 'sequences'}, "
            f"{self.steps_per_epoch()} steps per epoch; total {total} steps"
        )

    def order(self, epoch: int) -> list[int]:
        """The rows of one epoch in the order they are trained on."""
        return [int(row) for row in numpy.random.default_rng([self.seed, epoch]).permutation(self.rows)]

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step, counted from 1, in their order.

        Five rows, 2 in a step, order 3 0 4 1 2: step 3 has `[2]`, step 4 begins the next epoch.
        """
        epoch, number = divmod(step - 1, self.steps_per_epoch())
        return self.order(epoch)[number * self.rows_per_step() : (number + 1) * self.rows_per_step()]

    def micro_batches(self, epoch: int, process: int) -> Iterator[list[int]]:
        """The rows of each forward pass of one process.

        Five rows, 1 per device, accumulation 2, 1 process, order 3 0 4 1 2: `[3] [0]`, `[4] [1]`, `[2] [FILLER]`.
        """
        order = self.order(epoch)
        for start in range(0, self.rows, self.global_batch()):
            step = order[start : start + self.global_batch()]
            for number in range(process, self.accumulation * self.processes, self.processes):
                yield step[number * self.per_device : (number + 1) * self.per_device] or [FILLER]
