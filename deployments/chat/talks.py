"""What the page does when its buttons are used: conversations with one or several models, side by side.

One decision: conversations are lists of messages as the model server takes them, and what a browser shows is made from
them; so no mark of the page gets into a prompt, or into a vote.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deployments.chat.votes import keep, vote_rows
from tasks.chat_client import Client, Ended, ServerError

Message = dict[str, str]
Talk = list[Message]
STOPPED, CUT = "stopped", "cut at max_new_tokens, or at the end of what the model sees"


@dataclass(frozen=True)
class State:
    """Of one browser tab."""

    talks: tuple[tuple[Message, ...], ...]
    """What was said with each model."""
    best: int | None = None
    """The model whose answer was voted best; with the next message all go on from that one."""
    notes: tuple[str, ...] = ()
    """What there is to say about each model's last answer."""
    running: bool = False

    @property
    def answered(self) -> bool:
        """Whether every model has answered the last message."""
        return not self.running and all(talk and talk[-1]["role"] == "assistant" for talk in self.talks)

    @property
    def comparable(self) -> bool:
        """Whether there are answers to vote on: different ones to the same conversation."""
        if len(self.talks) < 2 or not self.answered or self.best is not None:
            return False
        asked, answers = {repr(talk[:-1]) for talk in self.talks}, {talk[-1]["content"] for talk in self.talks}
        return len(asked) == 1 and len(answers) > 1

    @property
    def said(self) -> str:
        """The last message of the person; empty without one."""
        return next((m["content"] for m in reversed(self.talks[0]) if m["role"] == "user"), "")


@dataclass
class Page:
    """The models of a page, and where its votes go."""

    client: Client
    models: Sequence[str]
    votes: Path
    stops: dict[str, threading.Event] = field(default_factory=dict)
    """Of each tab that is being answered."""

    def empty(self) -> State:
        """Nothing said yet."""
        return State(tuple(() for _ in self.models), notes=tuple("" for _ in self.models))

    def taken_back(self, state: State) -> State:
        """Without the last message of the person and its answers."""
        ends = [next((n for n in reversed(range(len(t))) if t[n]["role"] == "user"), 0) for t in state.talks]
        talks = tuple(talk[:end] for talk, end in zip(state.talks, ends, strict=True))
        return replace(self.empty(), talks=talks)

    def asked(self, state: State, text: str) -> State:
        """With one more message of the person, for all models; behind the answer that was voted best, if one was."""
        talks = state.talks if state.best is None else (state.talks[state.best],) * len(self.models)
        return replace(self.empty(), talks=tuple((*talk, {"role": "user", "content": text}) for talk in talks))

    def answers(self, state: State, system: str, settings: Mapping[str, Any], stop: threading.Event) -> Iterator[State]:
        """The conversation while the models answer, one behind the other.

        Args:
            state: its last message is the person's.
            system: system message; may be empty.
            settings: of generation.
            stop: set, the answers end with the next word.
        """
        state = replace(state, running=True)
        yield state
        for number, model in enumerate(self.models):
            head = [{"role": "system", "content": system}] if system else []
            stream = self.client.answer(model, [*head, *state.talks[number]], settings)
            text, note = "", STOPPED
            try:
                for part in () if stop.is_set() else stream:
                    if isinstance(part, Ended):
                        note = CUT if part.finish_reason == "length" else ""
                        continue
                    text += part
                    yield _with(state, number, text, "")
                    if stop.is_set():
                        break
            except ServerError as error:
                note = f"error: {error}"
            finally:
                stream.close()  # type: ignore[attr-defined]
            state = _with(state, number, text, note) if text or not note else _with(state, number, None, note)
            yield state
        yield replace(state, running=False)

    def voted(self, state: State, best: int, system: str) -> tuple[State, int]:
        """The state after a vote, and the rows of the file of votes.

        Raises:
            OSError: the file cannot be written.
        """
        rows = keep(self.votes, vote_rows(state.talks, self.models, best, system))
        return replace(state, best=best), rows


def _with(state: State, number: int, text: str | None, note: str) -> State:
    """The state with an answer of one model, or without one."""
    talk = state.talks[number]
    talk = talk[:-1] if talk and talk[-1]["role"] == "assistant" else talk
    talk = talk if text is None else (*talk, {"role": "assistant", "content": text})
    talks, notes = list(state.talks), list(state.notes)
    talks[number], notes[number] = talk, note
    return replace(state, talks=tuple(talks), notes=tuple(notes))
