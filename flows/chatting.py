"""Which models a chat is with, and the program that holds them.

One decision: a model is found, read and held as `evaluate` does it; an adapter is merged into its base once, by the
step that pipelines have. What is wrong is said before anything is downloaded, merged or loaded, where it can be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.background import Background
from flows.evaluating import as_trained
from flows.measuring import QUANT_SETTINGS
from flows.named_models import NamedModel, find_model
from registry.chat_settings import ChatSettings
from registry.errors import InputError, Problem
from registry.home import Home
from registry.stage_settings import StageSettings
from tasks.chat_program import API_KEY
from tasks.evaluate_program import QUANTISED
from tasks.jsonlines import read_object
from tasks.steps import Input, LocalFolder, Step
from tasks.template import ChatTemplate

SCORES = "ForSequenceClassification"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Partner:
    """A model to chat with."""

    name: str
    """What clients and people call it."""
    model: Input
    settings: StageSettings
    """How it is read and held."""

    @property
    def steps(self) -> list[Step]:
        """What has to be made first: a download, a merge."""
        return [self.model.source] if isinstance(self.model.source, Step) else []

    def told(self) -> dict[str, Any]:
        """What the program that holds it is told."""
        data, train = self.settings.data, self.settings.train
        found: dict[str, Any] = {
            "name": self.name,
            "template": self.settings.template,
            "default_system": data.default_system,
            "enable_thinking": data.enable_thinking,
            "control_tokens": data.control_tokens,
            "bf16": train.bf16,
        }
        if train.quant_bit:
            found[QUANTISED] = {name: value for name, value in train.identity().items() if name in QUANT_SETTINGS}
        return found


def find_partners(asked: Sequence[str], said: ChatSettings, home: Home) -> list[Partner]:
    """The models that names mean, each by a name of its own.

    Args:
        asked: see `flows.named_models.find_model`.
        said: about the chat; what it does not say of a model is as the model's own stage has it.
        home: where runs, artifacts and models are.

    Raises:
        InputError: everything wrong with the names, and models without a usable chat template, as far as they are here.
    """
    problems: list[Problem] = []
    found: list[NamedModel] = []
    for name in dict.fromkeys(asked):
        if asked.count(name) > 1:
            problems.append(Problem(name, "stands there twice", "Name it once."))
        try:
            found.append(find_model(name, home, said.model.settings.model.model_revision, where=name))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    names = [model.name for model in found]
    partners = []
    for name, model in zip(asked, found, strict=True):
        known = model.name if names.count(model.name) == 1 else name
        partner = Partner(known, model.model, as_trained(replace(said.model, model=name), model))
        folder = _folder_of_template(partner.model)
        try:
            if folder is not None:
                require_chat(partner, folder)
        except InputError as error:
            problems += error.problems
        partners.append(partner)
    if problems:
        raise InputError(problems)
    return partners


def _folder_of_template(model: Input) -> Path | None:
    """Where the tokenizer files of a model lie; None where they are not here yet."""
    if isinstance(model.source, LocalFolder):
        return model.source.path
    for name in ("adapter", "base"):  # a merge takes them from the adapter, where that has them
        wanted = model.source.inputs.get(name)
        folder = _folder_of_template(wanted) if wanted is not None else None
        if name == "base" or (folder is not None and (folder / TOKENIZER).is_file()):
            return folder
    return None


def require_chat(partner: Partner, folder: Path) -> None:
    """Refuse a model that cannot answer.

    Args:
        partner: the model.
        folder: its config, tokenizer files and chat template.

    Raises:
        InputError: a reward model, or no usable chat template.
    """
    named = read_object(folder / "config.json").get("architectures") or []
    if any(str(name).endswith(SCORES) for name in named):
        rule = "is a reward model: it gives scores and no answers"
        raise InputError(Problem(partner.name, rule, "Use `llamatuner score MODEL FILE`."))
    try:
        ChatTemplate.from_folder(folder, partner.settings.template)
    except InputError as error:
        cure = "Choose one, such as --set template=chatml (`llamatuner list templates`), or use the chat variant."
        raise InputError([Problem(partner.name, problem.rule, cure) for problem in error.problems]) from error


def hold(
    partners: Sequence[Partner],
    folders: Sequence[Path],
    said: ChatSettings,
    place: tuple[str, int],
    api_key: str | None,
    say: Callable[[str], None],
    program: str = "tasks.chat_program",
) -> Background:
    """The program that holds models and answers, to be entered.

    Args:
        partners: the models.
        folders: where each lies.
        said: about the chat.
        place: host and port it listens on; port 0 is any.
        api_key: that clients have to show.
        say: told what it does until it is ready.
        program: its module.
    """
    settings = {"models": [partner.told() for partner in partners], "generation": dict(said.generation)}
    inputs = {f"model.{number}": str(folder) for number, folder in enumerate(folders)}
    runtime = {"host": place[0], "port": place[1]}
    return Background(program, settings, runtime, inputs, say, {API_KEY: api_key or ""})
