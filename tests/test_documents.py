"""What documents print can be typed: commands and options exist, links lead somewhere, translations show the same."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from flows.cli.app import app
from registry.templates_page import templates_page
from tasks.formats import detect

PROJECT = Path(__file__).parents[1]
IN_FRONT = ("README.md", "README_zh.md", "CONTRIBUTING.md")
DOCUMENTS = [*(PROJECT / name for name in IN_FRONT), *PROJECT.glob("docs/**/*.md")]
OURS = re.compile(r"(?:\$ )?(?:[A-Z_]+=\S* )*llamatuner(?:-cli)?\b(.*)")
AS_TYPED = {"train", "eval"}  # which take the flags of other programs


def blocks(path: Path) -> list[str]:
    """The code blocks of a document."""
    return re.findall(r"^```[a-z]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> Iterator[list[str]]:
    """Words of every command of ours that a document prints, without what a shell does with them."""
    for block in blocks(path):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"[;|&]+ ", line.split(" # ")[0].split("  #")[0]):
                found = OURS.match(part.strip())
                if found:
                    yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_their_options_exist(path: Path) -> None:
    root = get_command(app)
    for words in commands(path):
        command, rest = root, words
        while rest and hasattr(command, "commands") and "|" not in rest[0]:
            assert rest[0] in command.commands, f"{path.name}: llamatuner {' '.join(words)}"
            command, rest = command.commands[rest[0]], rest[1:]
        if command.name in AS_TYPED or (rest and "|" in rest[0]):
            continue
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        options = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)} - {"--help"}
        assert options <= known, f"{path.name}: llamatuner {' '.join(words)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
    for target in re.findall(r"\bdocs/[a-z-]+\.md", path.read_text(encoding="utf-8")):
        assert (PROJECT / target).exists(), f"{path.name}: {target}"


def test_the_site_builds_with_every_page_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=PROJECT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=300)
    settings = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PROJECT.glob("docs/**/*.md"):
        name = page.relative_to(PROJECT / "docs")
        assert f": {name}\n" in settings, f"{name} is not in the site's contents"
        text = (tmp_path / name.with_suffix(".html")).read_text(encoding="utf-8")
        assert re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?https?:[^>]*""", text) == []


def test_every_form_of_the_data_page_is_found_as_it_says() -> None:
    page = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    shapes = {"alpaca": "chat", "sharegpt": "chat", "openai": "chat", "pairs": "preference", "marked": "labelled"}
    shapes |= {"text": "text", "prompts": "prompt"}
    found = re.findall(r"^### (\w+)\n.*?^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in found] == list(shapes)
    for name, row in found:
        form = detect(json.loads(row), shapes[name])
        assert form is not None, name
        assert form.holds == shapes[name]
        assert name not in ("alpaca", "sharegpt", "openai") or form.formatting == name


def test_pages_made_from_tables_are_as_their_tables() -> None:
    assert (PROJECT / "docs" / "templates.md").read_text(encoding="utf-8") == templates_page()


def test_the_chinese_readme_prints_the_same_commands() -> None:
    assert blocks(PROJECT / "README_zh.md") == blocks(PROJECT / "README.md")
