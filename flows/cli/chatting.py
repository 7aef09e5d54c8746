"""`chat` and `serve`: find models, start the program that holds them, and talk to it or let others do so."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from flows.background import Background
from flows.chatting import Partner, find_partners, hold, require_chat
from flows.cli.chat_configs import read_words
from flows.cli.making import make_steps
from flows.cli.output import DONE, FAILED, people, print_json, say_error
from flows.vllm import ENGINES, VLLM, require_place, require_servable
from registry.chat_settings import ChatSettings
from registry.errors import InputError, Problem, did_you_mean
from registry.home import Home
from tasks.chat_client import Client
from tasks.chat_program import API_KEY, LOOPBACK, listen
from tasks.launch import ProgramFailed
from tasks.steps import LocalFolder

HERE = "127.0.0.1"
VOTES = "votes.jsonl"


def chat_here(words: Sequence[str], system: str | None, overrides: Sequence[str], votes: Path | None) -> int:
    """Talk in the terminal, or answer the lines of standard input; the exit code.

    Raises:
        InputError: everything wrong with models and settings, before anything is loaded.
    """
    from flows.cli.talking import Talk, is_terminal

    if votes is not None:
        raise InputError(Problem("--votes", "is about the page", "Add --web."))
    names, said = read_words(words, overrides)
    console, key = Console(stderr=not is_terminal(), highlight=False), secrets.token_urlsafe(32)
    partners, folders = _ready(names, said, console)
    try:
        with hold(partners, folders, said, (HERE, 0), key, _say(console)) as program:
            models = [partner.name for partner in partners]
            return Talk(Client(program.url, key), models, said.generation, system, console, program.check).run()
    except ProgramFailed as error:
        say_error(str(error))
        return FAILED


def chat_on_page(
    words: Sequence[str], system: str | None, overrides: Sequence[str], port: int, votes: Path | None
) -> int:
    """Show a page for a browser until Ctrl-C; the exit code.

    Raises:
        InputError: no Gradio, a port that is taken, everything wrong with models and settings.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError(Problem("--web", "the page needs Gradio", "Install it: pip install 'llamatuner[chat]'"))
    listen(HERE, port).close()
    names, said = read_words(words, overrides)
    console, key = Console(highlight=False), secrets.token_urlsafe(32)
    file = (votes or Home.open().path / VOTES).expanduser().absolute()
    partners, folders = _ready(names, said, console)
    try:
        with ExitStack() as programs:
            held = programs.enter_context(hold(partners, folders, said, (HERE, 0), key, _say(console)))
            told = {"models": [p.name for p in partners], "generation": dict(said.generation), "system": system or ""}
            place = {"server": held.url, "host": HERE, "port": port, "votes": str(file)}
            page = Background("deployments.chat.program", told, place, {}, _say(console), {API_KEY: key})
            programs.enter_context(page)
            console.print(f"{page.url} is the page; Ctrl-C ends it", markup=False, soft_wrap=True)
            _wait([held, page])
    except KeyboardInterrupt:
        return DONE
    except ProgramFailed as error:
        say_error(str(error))
    return FAILED


def serve_models(
    words: Sequence[str],
    place: tuple[str, int],
    api_key: str | None,
    overrides: Sequence[str],
    engine: str,
    as_json: bool,
) -> int:
    """Answer over HTTP until Ctrl-C; the exit code.

    Args:
        words: models, or a config of LLaMA-Factory.
        place: host and port.
        api_key: that clients have to show; None: the one of the environment, if any.
        overrides: `key=value` each.
        engine: `transformers` or `vllm`.
        as_json: print one object for programs.

    Raises:
        InputError: a port that is taken, an address that strangers reach without a key, everything wrong with models
            and settings.
    """
    console, (host, _) = people(as_json), place
    if engine not in ENGINES:
        raise InputError(Problem("--engine", f"{engine!r} is no engine", did_you_mean(engine, ENGINES)))
    key = api_key or os.environ.get(API_KEY) or None
    if host not in LOOPBACK and key is None:
        rule = "others than this machine reach it, and nothing would keep them out"
        raise InputError(Problem(f"--host {host}", rule, f"Set {API_KEY} in the environment; clients send it."))
    if api_key is not None:
        text = f"--api-key can be read by all users of this machine; {API_KEY} in the environment cannot"
        console.print(text, style="yellow", soft_wrap=True)
    if engine == VLLM:
        require_place(host)
    listen(*place).close()
    names, said = read_words(words, overrides)
    partners, folders = _ready(names, said, console)
    if engine == VLLM:
        require_servable(partners, folders, said)
    module = "tasks.vllm_program" if engine == VLLM else "tasks.chat_program"
    try:
        with hold(partners, folders, said, place, key, _say(console), module) as program:
            models = [partner.name for partner in partners]
            console.print(
                f"{program.url}/v1 answers for {', '.join(models)}; Ctrl-C ends it", markup=False, soft_wrap=True
            )
            if as_json:
                print_json({"status": "up", "url": f"{program.url}/v1", "models": models})
            _wait([program])
    except KeyboardInterrupt:
        return DONE
    except ProgramFailed as error:
        say_error(str(error))
    return FAILED


def _ready(names: Sequence[str], said: ChatSettings, console: Console) -> tuple[list[Partner], list[Path]]:
    """The models and their folders; what they need is downloaded and merged."""
    for note in said.notes:
        console.print(note, markup=False, soft_wrap=True)
    home = Home.open()
    partners = find_partners(names, said, home)
    made = iter(make_steps([step for partner in partners for step in partner.steps], home, console))
    folders = [p.model.source.path if isinstance(p.model.source, LocalFolder) else next(made).path for p in partners]
    for partner, folder in zip(partners, folders, strict=True):
        require_chat(partner, folder)
    return partners, folders


def _say(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, style="dim", markup=False, soft_wrap=True)


def _wait(programs: Sequence[Background]) -> None:
    """Wait until one ends, which none should.

    Raises:
        ProgramFailed: it ended.
    """
    while all(program.thread.is_alive() for program in programs):
        programs[0].thread.join(0.2)
    for program in programs:
        program.check()
