"""Benchmarks: that a number is lm-eval's own digit for digit, and what is kept beside it."""

from __future__ import annotations

import math
import shutil
import threading
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from registry.errors import InputError
from registry.home import Home
from registry.loading import load_recipe
from registry.recipe import StageSettings
from tasks.artifacts import Store
from tasks.benchmark import pattern
from tasks.digests import DigestMemory
from tasks.measurements import numbers, read_results
from tasks.program import ProgramError
from tasks.steps import Input, LocalFolder, Step, do, prepare
from tasks.train.loading import load_base
from tests.flows.toy import toy_recipe
from tests.tasks.benchmark_runs import OWN, Run, directly, step, write_questions
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks the machine for every package and driver it has; that takes 4 s and changes no number."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> StageSettings:
    recipe = toy_recipe(tmp_path_factory.mktemp("recipe"), bf16=False, per_device_eval_batch_size=8)
    return load_recipe(str(recipe), []).stages[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_number_is_that_of_lm_eval_digit_for_digit(
    batch_size: int, data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    made = step("arc_easy", data, folder, settings)
    run, expected = Run(made, tmp_path, folder, batch_size), directly(made, folder, batch_size)
    theirs = expected["results"]["arc_easy"]
    assert run.value("accuracy") == theirs["acc,none"]
    assert run.value("accuracy_norm") == theirs["acc_norm,none"]
    samples = expected["samples"]["arc_easy"]
    for own, other in zip(run.samples, samples, strict=True):
        assert own["loglikelihoods"] == [answer[0][0] for answer in other["resps"]]
        assert own["prompt"] == other["arguments"][0][0]
        assert own["choices"] == [arguments[1] for arguments in other["arguments"]]
        assert (own["accuracy"], own["accuracy_norm"]) == (other["acc"], other["acc_norm"])
    assert 0 < run.value("accuracy") < 1


def test_what_is_kept_of_a_benchmark(data: Path, folder: Path, settings: StageSettings, tmp_path: Path) -> None:
    run = Run(step("arc_easy", data, folder, settings, limit=10), tmp_path, folder)
    assert list(run.results) == ["accuracy.0", "accuracy_norm.0"]
    found = run.results["accuracy.0"]
    assert set(found) == {"value", "low", "high", "documents", "task_version", "num_fewshot", "rows"}
    assert (found["rows"], found["num_fewshot"], found["task_version"]) == (10, 0, 1.0)
    assert found["low"] <= found["value"] <= found["high"]
    assert run.drawn["accuracy.0"].shape == (2000,)
    assert run.drawn["accuracy.0"].mean() == pytest.approx(found["value"], abs=0.02)
    assert [sample["document"] for sample in run.samples] == list(range(10))
    assert run.samples[0]["prompt"] == "Question: What is 0?\nAnswer:"
    assert set(run.report) >= {"results", "configs", "versions", "n-shot", "config"}
    progress = [(event["step"], event["total"]) for event in run.events if event["kind"] == "progress"]
    assert progress[-1] == (35, 35)  # five questions of three choices, five of four
    assert [event["unit"] for event in run.events if event["kind"] == "progress"] == ["requests"] * 35
    assert [event["text"] for event in run.events if event["kind"] == "note"] == [
        *("loading libraries", "reading the questions", "loading the model", "asking")
    ]


def test_batch_sizes_give_one_number(data: Path, folder: Path, settings: StageSettings, tmp_path: Path) -> None:
    made = step("arc_easy", data, folder, settings)
    one, eight = (Run(made, tmp_path / str(size), folder, size) for size in (1, 8))
    assert one.results == eight.results
    for first, second in zip(one.samples, eight.samples, strict=True):
        assert first["loglikelihoods"] == pytest.approx(second["loglikelihoods"], rel=1e-5)


def test_a_group_is_all_its_questions_together(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    made = step("mmlu", data, folder, settings, num_fewshot=2)
    run, expected = Run(made, tmp_path, folder), directly(made, folder, 8)
    parts = {name: expected["results"][f"mmlu_{name}"]["acc,none"] for name in ("law", "old_art")}
    assert run.value("accuracy") == (7 * parts["law"] + 5 * parts["old_art"]) / 12
    found = run.results["accuracy.0"]
    assert found["subjects"] == {
        "law": {"value": parts["law"], "rows": 7},
        "old_art": {"value": parts["old_art"], "rows": 5},
    }
    assert (found["rows"], found["num_fewshot"]) == (12, 2)
    assert list(run.results) == ["accuracy.0"]
    prompt = run.samples[7]["prompt"]
    assert prompt.startswith("The following are multiple choice questions (with answers) about old art.\n\nWhat, 0?\n")
    assert prompt.count("\nA. 1.50\nB. 007\nC. NA\nD. ") == 3  # as written in the file, in examples too
    assert prompt == expected["samples"]["mmlu_old_art"][0]["arguments"][0][0]


def test_a_limit_of_a_group_is_one_of_each_task(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    run = Run(step("mmlu", data, folder, settings, num_fewshot=0, limit=3), tmp_path, folder)
    assert {name: part["rows"] for name, part in run.results["accuracy.0"]["subjects"].items()} == {
        "law": 3,
        "old_art": 3,
    }


def test_answers_that_are_written_are_lm_evals(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    made = step("gsm8k", data, folder, settings, num_fewshot=2, limit=3)
    definition = {**made.identity["definition"]}
    definition["generation_kwargs"] = {**definition["generation_kwargs"], "max_gen_toks": 12}
    made.identity["definition"] = definition
    run, expected = Run(made, tmp_path, folder), directly(made, folder, 8)
    assert list(run.results) == ["exact_match_strict.0", "exact_match_flexible_extract.0"]
    theirs = expected["results"]["gsm8k"]
    assert run.value("exact_match_strict") == theirs["exact_match,strict-match"]
    assert run.value("exact_match_flexible_extract") == theirs["exact_match,flexible-extract"]
    samples = [sample for sample in expected["samples"]["gsm8k"] if sample["filter"] == "strict-match"]
    assert [line["answer"] for line in run.samples] == [sample["resps"][0][0] for sample in samples]
    assert [line["prompt"] for line in run.samples] == [sample["arguments"][0][0] for sample in samples]
    assert set(run.samples[0]["filtered"]) == {"strict-match", "flexible-extract"}
    assert run.results["exact_match_strict.0"]["num_fewshot"] == 2


def test_the_perplexity_of_a_file_of_ones_own_is_lm_evals(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    made = step(str(data / "rivers.yaml"), data, folder, settings)
    run, expected = Run(made, tmp_path, folder), directly(made, folder, 8)
    assert run.value("word_perplexity") == expected["results"]["rivers"]["word_perplexity,none"]
    assert run.value("bits_per_byte") == expected["results"]["rivers"]["bits_per_byte,none"]
    assert run.results["bits_per_byte.0"]["low"] < run.value("bits_per_byte") < run.results["bits_per_byte.0"]["high"]


def test_a_chat_is_drawn_by_the_models_template_or_the_one_given(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    made = step("mmlu", data, folder, settings, num_fewshot=1, limit=1, apply_chat_template=True)
    run = Run(made, tmp_path / "own", folder)
    expected = directly(made, folder, 8, apply_chat_template=True, fewshot_as_multiturn=True)
    prompt = run.samples[0]["prompt"]
    assert prompt == expected["samples"]["mmlu_law"][0]["arguments"][0][0]
    assert prompt.startswith(
        "<|im_start|>system\nThe following are multiple choice questions (with answers) about law."
    )
    assert prompt.endswith("Answer:<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.count("<|im_start|>assistant\n") == 2
    assert run.value("accuracy") == numpy.mean(
        [expected["results"][f"mmlu_{n}"]["acc,none"] for n in ("law", "old_art")]
    )
    made.identity["template"] = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}[{{ m.content }}]"
        "{% endfor %}"
    )
    other = Run(made, tmp_path / "other", folder)
    assert other.samples[0]["prompt"].startswith("[What, 0?\nA. 1.50")
    assert "the task's description is left out" in [e["text"] for e in other.events if e["kind"] == "note"][-1]
    digests = {one.results["accuracy.0"]["documents"] for one in (run, other)}
    assert len(digests) == 1  # the same questions, whatever the template


def test_a_chat_needs_a_template(data: Path, folder: Path, settings: StageSettings, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (bare / name).write_text(text)  # and no weights: it is said before they are looked for
    made = step("arc_easy", data, folder, settings, apply_chat_template=True)
    with pytest.raises(InputError, match="no chat template"):
        Run(made, tmp_path / "run", bare)


def test_the_digest_of_what_was_asked_is_not_the_models_but_the_questions(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "model", seed=5, max_position_embeddings=1024)

    def digest(number: int, model: Path, **own: Any) -> str:
        made = step("arc_easy", data, folder, settings, **own)
        return str(Run(made, tmp_path / str(number), model, 4).results["accuracy.0"]["documents"])

    first = digest(0, folder, limit=6)
    assert digest(1, other, limit=6) == first
    assert digest(2, folder, limit=5) != first
    assert digest(3, folder, limit=6, apply_chat_template=True) != first


def test_an_adapter_is_measured_with_its_base(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load_base(str(folder), torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    made = step("arc_easy", data, folder, settings, limit=4)
    made.inputs["adapter"] = Input(LocalFolder(tmp_path / "adapter"))
    run = Run(made, tmp_path / "run", folder)
    del made.inputs["adapter"]
    expected = directly(made, folder, 8, model=adapted.eval())["samples"]["arc_easy"]
    for own, other in zip(run.samples, expected, strict=True):
        assert own["loglikelihoods"] == [answer[0][0] for answer in other["resps"]]


def test_weights_in_bfloat16_are_scored_in_float32(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    made = step("arc_easy", data, folder, settings)
    made.identity["bf16"] = True
    model = load_base(str(folder), torch.bfloat16).eval()
    precise = directly(made, folder, 8, model, softmax_dtype="float32")["samples"]["arc_easy"]
    coarse = directly(made, folder, 8, model)["samples"]["arc_easy"]
    for own, other, rough in zip(Run(made, tmp_path, folder).samples, precise, coarse, strict=True):
        assert own["loglikelihoods"] == [answer[0][0] for answer in other["resps"]]
        assert all(answer[0][0] * 32 % 1 == 0 for answer in rough["resps"])


def test_a_broken_model_has_no_number(data: Path, folder: Path, settings: StageSettings, tmp_path: Path) -> None:
    model = load_base(str(folder), torch.float32)
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, math.nan)
    shutil.copytree(folder, tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ProgramError, match="arc_easy, question 0: the log-likelihood is not a number") as caught:
        Run(step("arc_easy", data, folder, settings, limit=2), tmp_path / "run", tmp_path / "broken")
    assert caught.value.kind == "not_finite"


def test_a_definition_that_lm_eval_cannot_use_is_said_with_its_words(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path
) -> None:
    for line, words in (
        ('doc_to_target: "{{nothing}}"', "'nothing' is undefined"),
        ("doc_to_target: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\"", "unsafe"),
    ):
        (data / "broken.yaml").write_text(OWN.replace('doc_to_target: "{{text}}"', line))
        made = step(str(data / "broken.yaml"), data, folder, settings)
        with pytest.raises(ProgramError, match=words) as caught:
            Run(made, tmp_path / words[:6].strip("'"), folder)
        assert caught.value.kind == "bad_setting"


def test_data_of_the_hub_that_is_out_of_reach_is_a_matter_of_the_network(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    text = OWN.replace("json\ndataset_kwargs: {data_files: {test: rivers.jsonl}}", "acme/rivers")
    (data / "hub.yaml").write_text(text)
    made = step(str(data / "hub.yaml"), data, folder, settings)
    assert set(made.inputs) == {"model"}
    with pytest.raises(ProgramError, match="the data of rivers cannot be had") as caught:
        Run(made, tmp_path, folder)
    assert caught.value.kind == "network"


def key(made: Step, home: Path) -> str:
    ready_step = prepare(made, Store(Home(home)), DigestMemory(home / "digests.sqlite"))
    assert ready_step is not None
    return ready_step.key


def test_the_key_holds_what_changes_a_number_and_nothing_else(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path, home: Path
) -> None:
    first = key(step("arc_easy", data, folder, settings), home)
    assert key(step("arc_easy", data, folder, settings), home) == first
    for own in ({"limit": 3}, {"apply_chat_template": True}):
        assert key(step("arc_easy", data, folder, settings, **own), home) != first
    other_batch = settings.runtime.model_copy(update={"per_device_eval_batch_size": 2})
    assert key(step("arc_easy", data, folder, replace(settings, runtime=other_batch)), home) == first
    assert key(step("arc_easy", data, folder, replace(settings, template="{{ messages }}")), home) == first
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "ARC-Easy_test.json").write_bytes((data / "ARC-Easy_test.json").read_bytes())
    (moved / "other.json").write_text("not read")
    assert key(step("arc_easy", moved, folder, settings), home) == first
    (moved / "ARC-Easy_test.json").write_text('[{"instruction": "x", "answer": "answer1"}]')
    assert key(step("arc_easy", moved, folder, settings), home) != first
    made = step("arc_easy", data, folder, settings)
    assert (made.kind, made.devices, made.packages) == ("benchmark", 1, ("lm_eval",))
    assert made.runtime == {
        "per_device_eval_batch_size": 8,
        "set_names": ["arc_easy"],
        "metrics": ("accuracy", "accuracy_norm"),
    }
    assert "seed" not in made.identity
    assert step("gsm8k", data, folder, settings).identity["seed"] == 42


@pytest.mark.slow
def test_the_step_makes_a_measurement_once(
    data: Path, folder: Path, settings: StageSettings, tmp_path: Path, home: Path
) -> None:
    store, memory, seen = Store(Home.open()), DigestMemory(home / "digests.sqlite"), []
    made = step("mmlu", data, folder, settings, num_fewshot=1)
    first = do(made, store, memory, threading.Event(), seen.append)
    assert first.state == "ran"
    assert {event["unit"] for event in seen if event["kind"] == "progress"} == {"requests"}
    assert do(made, store, memory, threading.Event(), seen.append).state == "cached"
    (found,) = numbers(first.artifact, ["mmlu"])
    assert (found.metric, found.set_name, found.drawn.shape) == ("accuracy", "mmlu", (2000,))
    assert found.rows == found.result["documents"]
    assert list(read_results(first.artifact.path, ["mmlu"])) == ["accuracy.mmlu"]
    assert first.artifact.manifest["packages"] == {"lm_eval": version("lm_eval")}
    assert set(first.artifact.manifest["inputs"]) == {"model", "data"}


def test_a_pattern_means_one_file_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("a[1].csv", "a1.csv", "b*.csv", "bc.csv"):
        (tmp_path / name).write_text(name)
    memory = DigestMemory(tmp_path / ".digests")
    assert list(memory.files(tmp_path, [pattern("a[1].csv"), pattern("b*.csv")])) == ["a[1].csv", "b*.csv"]
