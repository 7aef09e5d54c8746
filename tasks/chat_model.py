"""A model that answers conversations: what `chat`, `serve` and the chat page have in common.

One decision: a conversation becomes ids by the renderer and the encoder of the data steps, and ids become an answer by
the function that the step `generate` calls; so a model sees in a chat what it saw in training and evaluation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem
from registry.evaluation_records import GenerationSettings
from tasks.answer_text import AnswerText
from tasks.answers import ended, stop_ids, write_answers
from tasks.formats.tool_calls import tools_text
from tasks.formats.turns import turns_reader
from tasks.model import longest_sequence
from tasks.reading import BadRow
from tasks.render import RowRenderer
from tasks.spans import appears
from tasks.tokens import TOKENIZERS, Text, TextEncoder

WHOLE = {"shape": "prompt", "mask_history": False, "train_on_prompt": False}
read_turns = turns_reader("role", "content", {})


class TooLong(InputError):
    """A conversation that leaves no room for an answer."""


@dataclass(frozen=True)
class Answered:
    """An answer that has ended."""

    text: str
    prompt_tokens: int
    tokens: int
    """Of the answer, its terminator not counted."""
    stopped: bool
    """By the model itself or by a stop word; False when it was cut."""


class ChatModel:
    """One model and what it needs to answer.

    Args:
        name: what clients call it.
        folder: config.json, weights, tokenizer files, perhaps a chat template.
        reading: `template` (Jinja text, None for its own), `default_system`, `enable_thinking`, `control_tokens`.
        load: gives the causal language model, ready to answer; called when all else is known to be right.

    Raises:
        InputError: no usable chat template, or tokenizer.json is none.
    """

    def __init__(self, name: str, folder: Path, reading: Mapping[str, Any], load: Callable[[], Any]) -> None:
        self.name, self.longest = name, longest_sequence(folder)
        self.renderer = RowRenderer({**WHOLE, **reading}, folder)
        template = self.renderer.template
        assert template is not None  # only plain text has none
        self.encoder = TextEncoder(folder, template.control_tokens, TOKENIZERS)
        self.stops = stop_ids(folder, self.encoder.tokenizer, template.terminator)
        self.encoding = threading.Lock()  # an encoder remembers what stands for typed control tokens
        self.model = load()

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        """Ids of a conversation, up to where the answer begins.

        Args:
            messages: as clients send them: `role` and `content` each, and tool calls; the last one is not an answer.
            tools: JSON schemas, in OpenAI's form.

        Raises:
            TooLong: no room is left for an answer.
            InputError: no conversation, one that the template refuses, or of which it drops something.
        """
        turns = read_turns(messages, "messages")
        written = tools_text(tools, "tools")
        if isinstance(turns, BadRow):
            raise InputError(Problem("messages", turns.detail))
        if isinstance(written, BadRow):
            raise InputError(Problem("tools", written.detail))
        if turns[-1]["role"] not in ("user", "tool"):
            rule = f"the last message is the {turns[-1]['role']}'s: there is nothing to answer"
            raise InputError(Problem("messages", rule, "End with a message of the user, or a tool's."))
        rendered = self.renderer.render({"prompt": turns, "tools": written})
        if isinstance(rendered, BadRow):
            raise InputError(Problem("messages", rendered.detail))
        (text,) = rendered
        self._require_whole(text.text, turns, written)
        with self.encoding:
            ids: list[int] = self.encoder.encode([Text(text.text, (), text.typed)]).ids.tolist()
        if self.longest is not None and len(ids) >= self.longest:
            rule = f"the conversation is {len(ids)} tokens long, and the model can see {self.longest}"
            raise TooLong(Problem("messages", rule, "Begin a new one, or shorten it."))
        return ids

    def _require_whole(self, text: str, turns: list[dict[str, Any]], tools: str | None) -> None:
        """Refuse what the template leaves out in silence."""
        bare = self.renderer.render({"prompt": turns, "tools": None}) if tools else None
        if isinstance(bare, list) and bare[0].text == text:
            rule = "the model's chat template writes no tools"
            raise InputError(Problem("tools", rule, "Leave them out, or use a template that has them."))
        if turns[0]["role"] == "system" and not appears(turns[0]["content"], text):
            rule = "the model's chat template drops the system message"
            raise InputError(Problem("messages", rule, "Say it in the first message of the user."))

    def answer(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        stop: Sequence[str] = (),
        tell: Callable[[str], None] = lambda part: None,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> Answered:
        """Write an answer.

        Args:
            prompt: from `prompt`.
            settings: how tokens are chosen; `max_new_tokens` is cut to what the model can see.
            stop: texts that end the answer as well.
            tell: given each part of the text as soon as it is sure; all of them are the text.
            unwanted: asked after each token; true ends the answer.
        """
        room = (self.longest or len(prompt) + settings.max_new_tokens) - len(prompt)
        settings = settings.model_copy(update={"max_new_tokens": min(settings.max_new_tokens, room)})
        text, new = AnswerText(self._decode, stop), list[int]()

        def watch(token: int) -> bool:
            if settings.num_beams == 1 and token not in self.stops:
                new.append(token)
                tell(text.grow(new))
            return text.stopped or token in self.stops or unwanted()

        def watch_beams(token: int) -> bool:  # which are no answer before the best one is found
            return unwanted()

        watcher = watch if settings.num_beams == 1 else watch_beams
        pad = min(self.stops, default=0)
        (ids,) = write_answers(self.model, [prompt], self.stops, pad, settings, [0], watcher)
        kept, by_itself = ended(ids, self.stops)
        if not text.stopped:
            tell(text.finish(kept))
        return Answered(text.told, len(prompt), len(kept), by_itself or text.stopped)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.encoder.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
