"""The loop of ppo, grpo and rloo: draw answers, score them, learn from them, keep what is needed to go on.

One decision: a step is a function of the step's number and of the state behind the step before it. Prompts, random
numbers and orders follow from the seed, so a run that is resumed, or that has another number of processes, does the
same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tokenizers import Tokenizer
from torch import Tensor

from tasks.batch_plan import BatchPlan
from tasks.train.batches import Rows
from tasks.train.online.advantages import answer_mask, next_coefficient
from tasks.train.online.experience import Experience, learn_from
from tasks.train.online.inputs import Answered
from tasks.train.online.roles import Roles
from tasks.train.online.rollout import draw_answers, uniforms
from tasks.train.online.scoring import Held, Scored, score
from tasks.train.online.sources import Source, judge
from tasks.train.online.state import Numbers
from tasks.train.online.update import Update, micro_batches, mini_batches


class Processes:
    """The processes of a run, by accelerate."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on each."""
        return self.accelerator.reduce(value, "sum") if self.count > 1 else value

    def sum_for(self, owner: int, value: Tensor) -> None:
        """Put the sum over all processes into the owner's tensor; what the others then have is undefined."""
        torch.distributed.reduce(value, owner)

    def share(self, owner: int, value: Tensor) -> None:
        """Put the owner's tensor into everybody's."""
        torch.distributed.broadcast(value, owner)

    def here(self) -> range:
        """The processes of this machine."""
        before = self.index - self.accelerator.local_process_index
        return range(before, before + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def autocast(self) -> Any:
        """The precision of forward passes."""
        return self.accelerator.autocast()

    def everybodys(self, own: dict[int, Any]) -> list[Any]:
        """Numbered things of all processes, in the order of their numbers."""
        pairs = list(own.items())
        pairs = gather_object(pairs) if self.count > 1 else pairs
        return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]

    def told(self, value: Any) -> Any:
        """What the first process has, on each."""
        if self.count == 1:
            return value
        held = [value]
        broadcast_object_list(held, from_process=0)
        return held[0]


@dataclass
class Words:
    """What turns prompts and answers into text, and where an answer ends."""

    tokenizer: Tokenizer
    stops: frozenset[int]
    pad: int

    def texts(self, answers: Sequence[Answered]) -> dict[str, list[str]]:
        """`prompts` with their control tokens, `completions` without any."""
        prompts = [self.tokenizer.decode(item.prompt, skip_special_tokens=False) for item in answers]
        completions = [
            self.tokenizer.decode(item.answer[:-1] if item.stopped else item.answer, skip_special_tokens=True)
            for item in answers
        ]
        return {"prompts": prompts, "completions": completions}


@dataclass
class Loop:
    """Makes steps.

    Args:
        roles: the models.
        rows: the prompts.
        plan: which prompts make up a step.
        words: of the policy.
        sources: rewards beside the model's.
        update: how it learns.
        ranks: the processes.
        settings: `TrainSettings.identity()`.
        numbers: what moves besides weights.
    """

    roles: Roles
    rows: Rows
    plan: BatchPlan
    words: Words
    sources: list[Source]
    update: Update
    ranks: Processes
    settings: dict[str, Any]
    numbers: Numbers

    def step(self) -> tuple[dict[str, float], Experience]:
        """Make one step; its numbers, seconds and tokens among them, and what it learned from."""
        step, clock = self.numbers.step + 1, time.perf_counter()
        answers = self._draw(self.plan.rows_of(step), step)
        drawn = time.perf_counter()
        held = Held()
        scored, scores, by_source = self._score(answers, step, held)
        with_running = self.numbers.scores
        experience = learn_from(answers, scored, scores, self.settings, self.numbers.kl_coef, with_running)
        updating = time.perf_counter()
        metrics = self.update(experience, step, held)
        done = time.perf_counter()
        self.numbers.kl_coef = next_coefficient(
            self.numbers.kl_coef, experience.metrics["kl"], self.settings.get("ppo_target")
        )
        self.numbers.step = step
        new, whole = sum(len(item.answer) for item in answers), sum(map(len, answers))
        speeds = {
            "rollout_tokens_per_second": round(new / (drawn - clock), 2),
            "update_tokens_per_second": round(whole * self.settings["ppo_epochs"] / (done - updating), 2),
            "samples_per_second": round(len(answers) / (done - clock), 4),
        }
        return experience.metrics | by_source | metrics | speeds, experience

    def _draw(self, chosen: list[int], step: int) -> list[Answered]:
        """The answers to every prompt of the step, in its order. Prompts of like length are drawn together."""
        each = self.plan.generations
        found = {place: self.rows[chosen[place // each]] for place in range(len(chosen) * each)}
        prompts = {place: [int(token) for token in row["input_ids"]] for place, row in found.items()}
        places = sorted(prompts, key=lambda place: (len(prompts[place]), place))
        size = self.settings.get("rollout_batch_size") or -(-len(places) // self.ranks.count)
        answers: dict[int, Answered] = {}
        self.roles.policy.eval()
        for batch in micro_batches(places, size, self.ranks.index, self.ranks.count):
            numbers = uniforms(self.settings["seed"], step, batch, self.settings["max_new_tokens"])
            with self.ranks.autocast():
                ids = draw_answers(
                    self.roles.policy,
                    [prompts[place] for place in batch],
                    numbers,
                    self.update.sampling,
                    self.words.stops,
                    self.words.pad,
                    self.roles.share,
                )
            lengths = answer_mask(ids, self.words.stops).sum(dim=1).tolist()
            for place, answer, length in zip(batch, ids.tolist(), lengths, strict=True):
                kept, row = answer[:length], found[place]
                stopped = kept[-1] in self.words.stops
                answers[place] = Answered(row["row"], prompts[place], kept, stopped, row["mark"])
        self.roles.policy.train()
        return self.ranks.everybodys(answers)

    def _score(self, answers: list[Answered], step: int, held: Held) -> tuple[list[Scored], Tensor, dict[str, float]]:
        """What was found of each answer, its score from all sources [b], and the mean score of each source."""
        lengths = [len(item) for item in answers]
        own: dict[int, Scored] = {}
        everything = [
            places
            for batch in mini_batches(lengths, self.update.size, 0, (self.settings["seed"], step))
            for places in micro_batches(batch, self.update.micro_batch, self.ranks.index, self.ranks.count)
        ]
        for places in everything:
            asked, kept = [answers[place] for place in places], held if len(everything) == 1 else None
            with self.ranks.autocast():
                own |= zip(places, score(self.roles, asked, self.update.sampling, kept), strict=True)
        scored = self.ranks.everybodys(own)
        parts: dict[str, list[float]] = {}
        if self.roles.reward is not None:
            parts["reward_model"] = [item.score for item in scored]
        texts = self.words.texts(answers) if self.sources or self.roles.reader else {}
        if self.roles.reader is not None:
            parts["reward_model"] = self._read(answers, texts["completions"])
        if self.sources:
            judged = {s.name: judge(s, answers, texts) for s in self.sources} if self.ranks.index == 0 else None
            parts |= self.ranks.told(judged)
        weights = torch.tensor(self.settings["reward_weights"])
        scores = (torch.tensor(list(parts.values())) * weights[:, None]).sum(dim=0)
        means = {f"score/{name}": sum(values) / len(values) for name, values in parts.items()}
        return scored, scores, means if len(parts) > 1 else {}

    def _read(self, answers: list[Answered], texts: list[str]) -> list[float]:
        """The scores of a reward model with a tokenizer of its own; processes share them out."""
        assert self.roles.reader is not None
        own: dict[int, float] = {}
        everything = list(range(len(answers)))
        for places in micro_batches(everything, self.update.micro_batch, self.ranks.index, self.ranks.count):
            rows = [answers[place].row for place in places]
            own |= zip(places, self.roles.reader(rows, [texts[place] for place in places]), strict=True)
        return self.ranks.everybodys(own)
