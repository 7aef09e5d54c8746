"""`export --gguf` and `--ollama`: one file for llama.cpp, and what Ollama reads beside it.

One decision: whatever can be known is refused before anything is written: no converter, a model without a language
head, a chat template that Ollama's language cannot write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.errors import InputError, Problem
from registry.stage_settings import StageSettings
from registry.stages import STAGES
from tasks.artifacts import Artifact
from tasks.export import Further
from tasks.gguf_file import DEFAULT_TYPE, find_converter, make_gguf, needed_bytes, parse_type, trained_bos
from tasks.ollama import MODELFILE, folder_modelfile
from tasks.template import ChatTemplate


@dataclass(frozen=True)
class FileWanted:
    """The options about the file, as they were given."""

    gguf: bool = False
    gguf_type: str | None = None
    ollama: bool = False

    @property
    def any(self) -> bool:
        """Whether a file is wanted; a Modelfile names one."""
        return self.gguf or self.ollama

    def problems(self, adapter: bool) -> list[Problem]:
        """What is wrong with them."""
        option = "--ollama" if self.ollama else "--gguf"
        found = []
        if self.gguf_type and not self.any:
            found.append(Problem("--gguf-type", "is about a GGUF file", "Add --gguf or --ollama."))
        if self.any and adapter:
            found.append(Problem(option, "makes a file of a whole model, not of an adapter", "Leave --adapter out."))
        for check in (lambda: self.gguf_type and parse_type(self.gguf_type), lambda: self.any and find_converter()):
            try:
                check()
            except InputError as error:
                found += error.problems
        return found


@dataclass
class GgufExport:
    """The files of one export, and what is known of them when they are written."""

    artifact: Artifact
    name: str
    settings: StageSettings
    wanted: FileWanted
    say: Callable[[str], None]
    answer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = STAGES[self.settings.train.stage]
        if not kind.makes_text:
            rule = f"stage {self.settings.name} makes a reward model: llama.cpp has no scores of it"
            raise InputError(Problem("--gguf", rule, "Leave it out, or name another stage."))
        if self.wanted.ollama:
            folder = self.artifact.path
            self._modelfile(folder, "model.gguf", trained_bos(folder) is not None)

    def further(self) -> Further:
        """For `tasks.export.export`."""
        return Further(self._write, needed_bytes(self.artifact.path, self._type))

    @property
    def _type(self) -> str:
        return parse_type(self.wanted.gguf_type or DEFAULT_TYPE)

    def _write(self, folder: Path) -> None:
        self.say("converting to GGUF")
        found = make_gguf(folder, self.name, self._type, find_converter())
        self.answer = {"file": found.path.name, "type": self._type, "tensors": found.tensors}
        if self.wanted.ollama:
            text, notes = self._modelfile(folder, found.path.name, found.adds_bos)
            (folder / MODELFILE).write_text(text, encoding="utf-8")
            self.answer |= {"modelfile": MODELFILE, "notes": list(notes)}
            for note in notes:
                self.say(f"{MODELFILE}: {note}")

    def _modelfile(self, folder: Path, file: str, adds_bos: bool) -> tuple[str, tuple[str, ...]]:
        """The text of the Modelfile, and what is otherwise in Ollama."""
        thinking, system = self.settings.data.enable_thinking, self.settings.data.default_system
        variables = {} if thinking is None else {"enable_thinking": thinking}
        return folder_modelfile(folder, ChatTemplate.from_folder(folder, None, variables, system), file, adds_bos)
