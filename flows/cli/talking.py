"""A conversation in a terminal, or on standard input and output.

One decision: what a model writes goes to standard output as it is, without its control characters, and nothing else
goes there where that is no terminal; so answers can be piped.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from flows.cli.output import DONE, FAILED, INTERRUPTED
from registry.chat_settings import WRITING, generation, joined
from registry.core import read_yaml
from registry.errors import InputError, Problem, did_you_mean
from tasks.chat_client import Client, Ended, ServerError
from tasks.jsonlines import append_json_line

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model may have learnt to write those that move a cursor
PROMPT = "> "
HELP = """\
/clear               forget the conversation
/undo                take back your last message and its answer
/retry               answer your last message again
/system TEXT         set the system message; without a text, show it; /system - removes it
/model NAME          let another of the models answer from here on; without a name, list them
/set temperature 0.7 change a setting of generation; alone, show them
/save FILE           add the conversation to a file of messages, which stage sft reads
/exit                end, as Ctrl-D does; Ctrl-C stops an answer and keeps what there is"""


class _Terminated(BaseException):
    """SIGTERM; Ctrl-C means something else here."""


def is_terminal() -> bool:
    """Whether a person types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def printable(text: str) -> str:
    """A text without control characters, but for line ends and tabs."""
    return CONTROL.sub("", text)


class Talk:
    """A conversation with one of several models.

    Args:
        client: of the model server.
        models: their names; the first one answers.
        settings: of generation.
        system: system message.
        console: for what is no answer.
        check: raises `ProgramFailed` when the model server is gone.
    """

    def __init__(
        self,
        client: Client,
        models: Sequence[str],
        settings: Mapping[str, Any],
        system: str | None,
        console: Console,
        check: Callable[[], None],
    ) -> None:
        self.client, self.models, self.model = client, list(models), models[0]
        self.settings, self.system, self.console, self.check = dict(settings), system, console, check
        self.messages: list[dict[str, str]] = []
        self.terminal, self.done = is_terminal(), False
        self.commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/undo": self._undo,
            "/retry": self._retry,
            "/system": self._system,
            "/model": self._model,
            "/set": self._set,
            "/save": self._save,
            "/help": lambda text: self._say(HELP),
            "/exit": self._exit,
        }

    def run(self) -> int:
        """Read, answer, until the end of the input; the exit code.

        Raises:
            ProgramFailed: the model server is gone.
        """
        signal.signal(signal.SIGTERM, _terminated)
        if self.terminal:
            import readline  # noqa: F401 - gives `input` its editing keys and history

            self._say(f"{self.model} answers. /help lists what else can be typed; Ctrl-D ends.")
        code = DONE
        try:
            while not self.done:
                try:
                    line = self._read()
                    if line is None:
                        break
                    code = max(code, self._do(line)) if line.strip() else code
                except KeyboardInterrupt:  # also between what a command says and the next prompt
                    if not self.terminal:
                        raise
                    self._say("\nCtrl-D or /exit ends the chat")
        except _Terminated:
            return INTERRUPTED
        return DONE if self.terminal else code

    def _read(self) -> str | None:
        """The next line; None at the end of the input."""
        try:
            if self.terminal:
                print()
                return input(PROMPT)
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except UnicodeDecodeError as error:
            raise InputError(Problem("standard input", f"is not UTF-8: {error}")) from error
        except EOFError:
            print()
            return None

    def _do(self, line: str) -> int:
        """Do what was typed; the exit code that it would have by itself."""
        try:
            if line.startswith("/"):
                name, _, text = line.partition(" ")
                if name not in self.commands:
                    raise InputError(Problem("", f"{name!r} is no command", did_you_mean(name, list(self.commands))))
                self.commands[name](text.strip())
            else:
                self.messages.append({"role": "user", "content": line})
                self._answer()
        except (InputError, ServerError, OSError) as error:
            self.console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            return FAILED
        return DONE

    def _answer(self) -> None:
        """Let the model answer; what it has written when it is stopped stays.

        Raises:
            ServerError: it cannot; the message stands where it was typed, and not in the conversation.
        """
        parts: list[str] = []
        ended, begun = None, time.monotonic()
        if len(self.models) > 1:
            self._say(f"{self.model}:")
        system = [{"role": "system", "content": self.system}] if self.system else []
        stream = self.client.answer(self.model, system + self.messages, self.settings)
        try:
            for part in stream:
                if isinstance(part, Ended):
                    ended = part
                    continue
                parts.append(part)
                sys.stdout.write(printable(part))
                sys.stdout.flush()
        except KeyboardInterrupt:
            if not self.terminal:
                raise
        except ServerError:
            self.messages.pop()
            self.check()
            raise
        finally:
            print(flush=True)
        self._keep("".join(parts), ended, time.monotonic() - begun)

    def _keep(self, text: str, ended: Ended | None, seconds: float) -> None:
        if ended is None and not text:
            self.messages.pop()
            self._say("stopped before the first word; your message is taken back")
            return
        self.messages.append({"role": "assistant", "content": text})
        if ended is None:
            self._say("stopped; the answer so far is part of the conversation, /undo takes it back")
            return
        speed = f"{ended.tokens} tokens, {ended.tokens / seconds:.1f} a second"
        cut = " cut at max_new_tokens or at the end of what the model sees" if ended.finish_reason == "length" else ""
        if self.terminal or cut:
            self._say(f"({speed};{cut})" if cut else f"({speed})")

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def _clear(self, text: str) -> None:
        self.messages.clear()
        self._say("the conversation is empty")

    def _take_back(self) -> str:
        """Remove the last message of the user and what follows; its text.

        Raises:
            InputError: there is none.
        """
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        raise InputError(Problem("", "there is no message to take back"))

    def _undo(self, text: str) -> None:
        said = self._take_back()
        self._say(f"taken back: {said if len(said) < 60 else said[:60] + '…'}")

    def _retry(self, text: str) -> None:
        self.messages.append({"role": "user", "content": self._take_back()})
        self._answer()

    def _system(self, text: str) -> None:
        if text:
            self.system = None if text == "-" else text
        self._say(f"system message: {self.system or 'none of yours'}")

    def _model(self, text: str) -> None:
        if not text:
            self._say("\n".join(f"{'*' if name == self.model else ' '} {name}" for name in self.models))
            return
        if text not in self.models:
            raise InputError(Problem("", f"{text!r} is none of the models", did_you_mean(text, self.models)))
        self.model = text
        self._say(f"{text} answers")

    def _set(self, text: str) -> None:
        name, _, value = text.replace("=", " ", 1).partition(" ")
        if name:
            if name not in WRITING:
                rule = f"{name!r} is no setting of generation (how a model is held is said by --set at the start)"
                raise InputError(Problem("", rule, did_you_mean(name, WRITING)))
            changed = joined(self.settings, {name: read_yaml(value.strip(), name)})
            generation(changed)
            self.settings = changed
        shown = generation(self.settings).model_dump() | ({} if "seed" in self.settings else {"seed": "drawn"})
        self._say("  ".join(f"{key} {value}" for key, value in shown.items()))

    def _save(self, text: str) -> None:
        messages = list(self.messages)
        if not text or not messages:
            rule = "the conversation is empty" if text else "where to?"
            raise InputError(Problem("/save", rule, "" if text else "/save FILE.jsonl"))
        path = Path(text).expanduser()
        system = [{"role": "system", "content": self.system}] if self.system else []
        rows = append_json_line(path, {"messages": system + messages})
        self._say(f"{path}: {rows} {'conversation' if rows == 1 else 'conversations'}")

    def _exit(self, text: str) -> None:
        self.done = True


def _terminated(number: int, frame: FrameType | None) -> None:
    raise _Terminated
