"""Commands that documents print do what is said there: they are run, in order, on tiny twins of the shipped recipes.

Those of docs/quick-start.md and of the pages of stages and methods have tests of their own. What is not run here is
listed with the reason, so that nothing is left out in silence.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.cli.app import run_app
from registry.recipes import RECIPES
from tests.flows.conftest import Server, server  # noqa: F401 - a fixture of this file too
from tests.flows.twins import twin, work_here
from tests.test_documents import DOCUMENTS, PROJECT, blocks, commands
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]
DATA = PROJECT / "registry" / "data"
ELSEWHERE = ("quick-start.md", "coming-from-llama-factory.md", "README_zh.md")
"""Pages whose commands have tests of their own, the translation prints the same."""
NOT_HERE = {
    "up": "servers for good: tests.flows.test_servers",
    "down": "as `up`",
    "status": "as `up`",
    "logs": "as `up`",
    "deploy": "needs the servers of `up`: tests.flows.test_deploying",
    "submit": "as `deploy`",
    "serve": "does not end: tests.flows.test_chatting",
    "chat sft_dpo:sft sft_dpo:dpo --web": "as `serve`",
    "evaluate sft_dpo --benchmarks": "the rows of benchmarks are on a hub: tests.tasks.test_benchmark",
    "evaluate sft_dpo --perplexity held_out.jsonl wiki.txt --benchmarks": "as above",
    "evaluate models:/sft_dpo-dpo@champion --benchmarks": "as above",
    "export demo --push-to-hub": "a hub: tests.flows.test_exporting",
    "export demo --gguf": "needs llama.cpp's converter: tests.flows.test_exporting",
    "export demo --ollama": "as above",
    "compare 20261126-164542": "runs of somebody else's home",
    "run recipe.yaml": "several devices or machines: tests.tasks.train, tests.flows.test_machines",
    "check|prepare": "a list of commands",
    "run sft_dpo": "what `workplace` begins with",
    "run demo": "as above",
}
"""Beginning of a command → why it is not run by this test."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documents speak of."""
    folder = tmp_path_factory.mktemp("printed")
    model = tiny_model(folder / "model")
    twins = folder / "twins"
    twins.mkdir()
    for name in ("demo", "sft_dpo", "sft_rm_ppo", "orpo"):
        (twins / f"{name}.yaml").write_text(yaml.safe_dump(twin(name, model)))
    mine = twin("sft_rm_ppo", model) | {"name": "my-recipe"}
    (folder / "my-recipe.yaml").write_text(yaml.safe_dump(mine))
    (sweep,) = (block for block in blocks(PROJECT / "docs" / "sweeps.md") if block.startswith("# sweep.yaml"))
    (folder / "sweep.yaml").write_text(sweep)
    for name in ("x.jsonl", "held_out.jsonl", "questions.jsonl", "withdrawn.jsonl"):
        lines = (DATA / "assistant_held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:6]), encoding="utf-8")
    shutil.copy(DATA / "assistant_preferences_held_out.jsonl", folder / "answers.jsonl")
    (cluster,) = (block for block in blocks(PROJECT / "docs" / "machines.md") if block.startswith("launcher: slurm"))
    (folder / "recipe.yaml").write_text(f"model_name_or_path: {model}\n" + cluster.replace("rows.jsonl", "x.jsonl"))
    return folder


@pytest.fixture
def place(workplace: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The same, with the environment set for commands in this process."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("LLAMATUNER_HOME", str(workplace / "home"))
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    for path in (workplace / "twins").iterdir():
        monkeypatch.setitem(RECIPES.entries, path.stem, path)
    work_here(monkeypatch)
    return workplace


def test_what_documents_print_runs(place: Path, capsys: Capture) -> None:
    do = ["run demo", "run demo --set stages.sft.learning_rate=5e-4", "run orpo", "run sft_rm_ppo"]
    do += ["run my-recipe.yaml"]
    do += ["run sft_dpo --set stages.dpo.learning_rate=1e-5", "promote sft_dpo --gate perplexity.assistant_held_out>0"]
    do += ["run sft_dpo", "promote sft_dpo --gate perplexity.assistant_held_out>0"]
    do += ["export sft_dpo --adapter --to my_adapter", "export my-recipe.yaml --stage rm --to my-rm"]
    assert "".join(trouble(command.split(), capsys) for command in do) == ""
    left, found, done = dict(NOT_HERE), [], set()
    for page in DOCUMENTS:
        if page.name in ELSEWHERE or page.parent.name in ("stages", "methods"):
            continue
        for words in commands(page):
            said = " ".join(words)
            reasons = [beginning for beginning in NOT_HERE if said.startswith(beginning)]
            for beginning in reasons:
                left.pop(beginning, None)
            if not reasons and said not in done:
                done.add(said)
                if words[0] == "export":  # alternatives, which write the same folders
                    for name in ("assistant", "demo-sft"):
                        shutil.rmtree(place / name, ignore_errors=True)
                found.append(trouble(["demo" if word == "RECIPE" else word for word in words], capsys))
    assert "".join(found) == ""
    assert left == {}, "said not to be run, and printed nowhere"


def trouble(words: list[str], capsys: Capture) -> str:
    """Run a command: nothing when it succeeds, else what it says. One that reads what is typed is a process."""
    capsys.readouterr()
    if words[0] == "chat":
        command = [sys.executable, "-m", "flows", *words]
        done = subprocess.run(command, input="Hello\n", text=True, capture_output=True, check=False, timeout=600)
        code, said = done.returncode, done.stderr
    else:
        code = run_app(words)
        said = capsys.readouterr().err
    refused = words[0] == "promote" and code == 1  # a gate that is not met has been asked, too
    return "" if code == 0 or refused else f"{shlex.join(words)}: exit code {code}: {said[-2000:]}"
