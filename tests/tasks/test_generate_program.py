"""The step `generate`: its key, what it refuses, and what it writes."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.data_registry import find_dataset
from registry.errors import InputError
from registry.evaluation_records import EvaluationSettings, GenerationSettings
from registry.home import Home
from registry.records import DataSettings, RuntimeSettings
from tasks.answers import ended, generate
from tasks.artifacts import Store
from tasks.digests import DigestMemory
from tasks.fetch import ROWS, fetch_step
from tasks.generate_program import work
from tasks.generation import METRICS, generate_step
from tasks.measurements import numbers, read_results
from tasks.program import Events, Spec
from tasks.render import render_step
from tasks.shards import tokenize_step
from tasks.steps import Input, LocalFolder, Outcome, Step, do, upstream
from tasks.text_metrics import measure_answers
from tasks.train.loading import load_base
from tests.tiny import read_lines, tiny_model, write_shards, write_spec

END, START = 260, 259
ROWS_GIVEN = [
    {"instruction": "Who is there?", "output": "Nobody."},
    {"instruction": "Say something, please; take as long as you like.", "output": ""},
]
SETTINGS: dict[str, Any] = {"generation": {"max_new_tokens": 6}, "template": None, "bf16": False}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def data_steps(model: Path, data: Path, **given: Any) -> Step:
    """The tokenize step of prompts, with what it needs."""
    settings = DataSettings(**{"dataset": (str(data),), "cutoff_len": 200, **given})
    memory = DigestMemory(Home.open().digests)
    source = find_dataset(str(data), None, "dataset")
    fetched = fetch_step("sft", "fetch:set", (source,), settings, RuntimeSettings(), "prompt", 0, memory, split=False)
    base = Input(LocalFolder(model))
    rendered = render_step("sft", "render:set", fetched, ROWS, base, settings, None)
    return tokenize_step("sft", "tokenize:set", rendered, base, settings, packing=False)


def step_of(model: Path, prompts: Step, name: str = "held_out", template: str | None = None, **given: Any) -> Step:
    return generate_step(
        "sft",
        f"generate:{name}",
        "tiny",
        Input(LocalFolder(model)),
        prompts,
        name,
        EvaluationSettings(**{"max_new_tokens": 6, **given}),
        template=template,
        bf16=False,
        per_device_eval_batch_size=2,
    )


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(step: Step) -> tuple[Outcome, list[dict[str, Any]]]:
    """Do a step and what it needs; what it told."""
    store, told = Store(Home.open()), list[dict[str, Any]]()
    memory, stop = DigestMemory(store.home.digests), threading.Event()
    outcomes = [do(each, store, memory, stop, told.append) for each in upstream([step])]
    return outcomes[-1], told


def test_a_data_set_is_answered_and_compared(folder: Path, tmp_path: Path) -> None:
    step = step_of(folder, data_steps(folder, write(tmp_path / "rows.jsonl", *ROWS_GIVEN, ROWS_GIVEN[0])))
    outcome, told = make(step)
    artifact = outcome.artifact
    assert artifact.manifest["counts"] == {"rows": 3, "rows_compared": 2}
    assert set(artifact.manifest["packages"]) == {"rouge-score", "sacrebleu"}
    assert "absent" not in artifact.manifest["packages"].values()
    assert {"kind": "note", "text": "2 of 3 rows have an answer to compare with"} in told
    progress = [event for event in told if event.get("unit") == "answers"]
    assert [(event["step"], event["total"], event["set"]) for event in progress] == [
        (2, 3, "held_out"),
        (3, 3, "held_out"),
    ]
    lines = read_lines(artifact.path / "answers.jsonl")
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert [line["reference"] for line in lines] == ["Nobody.", None, "Nobody."]
    prompt = "<|im_start|>user\nWho is there?<|im_end|>\n<|im_start|>assistant\n"
    assert lines[0]["prompt"] == prompt
    (new,) = generate(load_base(str(folder), torch.float32).eval(), [prompt_ids(prompt)], frozenset({END}), END, 6)
    kept, stopped = ended(new, frozenset({END}))
    assert (lines[0]["tokens"], lines[0]["stopped"]) == (len(kept), stopped)
    assert lines[0]["answer"] == bytes(token for token in kept if token < 256).decode(errors="replace")
    assert lines[2] == lines[0] | {"row": 2}
    found = measure_answers(*([line[key] for line in lines] for key in ("answer", "reference", "tokens", "stopped")))
    results = read_results(artifact.path, ["held_out"])
    assert results == {f"{name}.held_out": measured.result for name, measured in found.measures.items()}
    assert [number.metric for number in numbers(artifact)] == list(METRICS)
    assert {key: lines[0][key] for key in ("exact_match", "token_f1", "rougeL")}.items() <= found.rows[0].items()
    assert "token_f1" not in lines[1]
    assert json.loads((artifact.path / "report" / "timings.json").read_text()).keys() == {
        *("import", "load", "answers", "compare")
    }
    assert (artifact.path / "report" / "program.log").exists()


def prompt_ids(text: str) -> list[int]:
    """Ids of a text with control tokens, by the tiny tokenizer."""
    ids: list[int] = []
    for part in text.split("<|im_start|>")[1:]:
        said, end, behind = part.partition("<|im_end|>")
        ids += [START, *said.encode(), *([END] if end else []), *behind.encode()]
    return ids


def run(folder: Path, tmp_path: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    """The answers that the program writes to three prompts."""
    shards = tmp_path / "shards"
    if not shards.exists():
        prompts = [[START, *b"user\n", *text.encode(), END] for text in ("hi", "Who are you, then?", "1 2 3")]
        rows = [{"input_ids": ids, "labels": [-100] * len(ids)} for ids in prompts]
        write_shards(shards, rows, "prompt", ["Hello.", "Nobody.", "4"])
    settings = {**SETTINGS, "per_device_eval_batch_size": 2, **changes}
    inputs = {"model": folder, "set.0": shards}
    spec = Spec.read(write_spec(tmp_path / name, settings, inputs, {"set_names": ["held_out"]}))
    work(spec, Events(spec.events))
    return read_lines(tmp_path / name / "output" / "answers.jsonl")


def test_settings_of_generation_reach_the_answers(folder: Path, tmp_path: Path) -> None:
    greedy = run(folder, tmp_path, "greedy")
    ways = {
        "longer": {"max_new_tokens": 9},
        "sampled": {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "seed": 1},
        "beams": {"max_new_tokens": 6, "num_beams": 5},
        "penalty": {"max_new_tokens": 6, "repetition_penalty": 2.5},
    }
    for name, generation in ways.items():
        other = run(folder, tmp_path, name, generation=generation)
        assert [line["answer"] for line in other] != [line["answer"] for line in greedy], name
        again = run(folder, tmp_path, f"{name} again", generation=generation, per_device_eval_batch_size=1)
        assert again == other
    assert run(folder, tmp_path, "16 bits", bf16=True) != []


def test_the_template_says_what_ends_an_answer(folder: Path, tmp_path: Path) -> None:
    free = run(folder, tmp_path, "free", generation={"max_new_tokens": 12})
    assert not any(line["stopped"] for line in free)
    word = next(character for character in free[0]["answer"][1:] if character.isascii() and character.isalpha())
    template = TEMPLATE.replace("</s>", word)
    ended_early = run(folder, tmp_path, "ended", generation={"max_new_tokens": 12}, template=template)
    assert ended_early[0]["stopped"]
    assert ended_early[0]["answer"] == free[0]["answer"].partition(word)[0]


def test_a_data_set_without_answers_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "Who?"}, {"instruction": "Why?"}]
    step = step_of(folder, data_steps(folder, write(tmp_path / "rows.jsonl", *rows)), "questions")
    with pytest.raises(InputError) as caught:
        make(step)
    assert str(caught.value).startswith(
        "evaluation.generate: questions: none of 2 rows has an answer to compare with. A conversation has to end"
    )
    assert "output, response, completion, answer" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "is empty"), ([{"text": "Once upon a time."}], "prompt"), ([{"messages": []}], "prompt")],
)
def test_empty_sets_and_sets_of_another_kind_are_refused_by_the_data_steps(
    folder: Path, tmp_path: Path, rows: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        make(data_steps(folder, write(tmp_path / "rows.jsonl", *rows)))


@pytest.fixture
def prompts(folder: Path, tmp_path: Path) -> Step:
    return data_steps(folder, write(tmp_path / "rows.jsonl", ROWS_GIVEN[0]))


def test_what_has_no_effect_is_in_no_key(folder: Path, prompts: Step) -> None:
    plain = step_of(folder, prompts)
    assert plain.identity == {
        "generation": {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0},
        "template": None,
        "bf16": False,
        "per_device_eval_batch_size": 2,
    }
    idle: dict[str, Any] = {"temperature": 0.5, "top_p": 0.5, "top_k": 5, "seed": 1, "length_penalty": 2.0}
    others: dict[str, Any] = {"questions": ("who?",), "perplexity": ("x.jsonl",), "gate": ("perplexity.x < 3",)}
    assert step_of(folder, prompts, "renamed", **idle, **others).identity == plain.identity
    assert (plain.kind, plain.devices, plain.runtime["set_names"]) == ("generate", 1, ["held_out"])


@pytest.mark.parametrize("name", sorted(GenerationSettings.model_fields))
def test_what_has_an_effect_is_in_the_key(folder: Path, prompts: Step, name: str) -> None:
    changed: dict[str, Any] = dict.fromkeys(GenerationSettings.model_fields, 0.5)
    changed |= {"max_new_tokens": 7, "do_sample": True, "num_beams": 2, "top_k": 5, "seed": 1}
    needed: dict[str, Any] = {"length_penalty": {"num_beams": 3}}
    needed |= {drawn: {"do_sample": True} for drawn in ("temperature", "top_p", "top_k", "seed")}
    before = step_of(folder, prompts, **needed.get(name, {}))
    after = step_of(folder, prompts, **needed.get(name, {}), **{name: changed[name]})
    assert after.identity != before.identity
    assert replace(after, identity=before.identity) == before
    assert GenerationSettings(**after.identity["generation"]) == GenerationSettings(
        **{"max_new_tokens": 6, **needed.get(name, {}), name: changed[name]}
    )
