"""What a setting of `evaluation` makes anew, and nothing else; and what measuring steps there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.graph import build
from registry.errors import InputError
from registry.evaluation_records import EvaluationSettings
from registry.home import Home
from registry.loading import load_recipe
from tasks.steps import Step
from tests.flows.keyed import changed, identities, placed, write_folder
from tests.flows.toy import write_rows
from tests.tiny import tiny_model, tiny_scoring_model

MEASURED = {"evaluate", "generate"}
ASKED = {"benchmark"}
NOTHING: set[str] = set()
# Field → a changed value (FOLDER is where the data lies), and the kinds of steps that become others
FIELDS: dict[str, tuple[Any, set[str]]] = {
    "perplexity": (["FOLDER/more.jsonl", "FOLDER/train.jsonl"], {"fetch", "render", "tokenize", "evaluate"}),
    "stride": (32, NOTHING),  # of texts only, see below
    "benchmarks": (["FOLDER/colours.yaml", "FOLDER/other.yaml"], ASKED),
    "data_dir": ("FOLDER", NOTHING),  # the same files
    "num_fewshot": (1, ASKED),
    "limit": (2, ASKED),
    "apply_chat_template": (True, ASKED),
    "generate": ("FOLDER/more.jsonl", {"fetch", "render", "tokenize", "generate"}),
    "reward_model": ("FOLDER/judge", {"win_rate"}),
    "questions": (["what?"], {"evaluate"}),
    "compare_with": ("none", {*MEASURED, *ASKED}),  # the base is not measured
    "gate": (["perplexity.held_out < 9"], NOTHING),
    "max_new_tokens": (5, MEASURED),
    "do_sample": (True, MEASURED),
    **dict.fromkeys(("temperature", "top_p"), (0.5, MEASURED)),
    "top_k": (3, MEASURED),
    "num_beams": (2, MEASURED),
    "repetition_penalty": (1.5, MEASURED),
    "length_penalty": (0.5, MEASURED),
    "seed": (1, MEASURED),
}
BESIDE: dict[str, dict[str, Any]] = {
    **{key: {"do_sample": True} for key in ("temperature", "top_p", "top_k", "seed")},
    "length_penalty": {"num_beams": 2},
}
"""What a field needs beside it to mean something."""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl, train: {name}.jsonl}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [red, blue]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("keys"))
    tiny_scoring_model(folder / "judge")
    for name in ("colours", "other"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name))
        (folder / f"{name}.jsonl").write_text('{"question": "sky?", "answer": 1}\n{"question": "rose?", "answer": 0}\n')
    return folder


def given(folder: Path, **more: Any) -> dict[str, Any]:
    asked = {"benchmarks": [str(folder / "colours.yaml")], "generate": [str(folder / "held_out.jsonl")]}
    return asked | {name: placed(value, folder) for name, value in more.items()}


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_changes_these_keys_and_no_others(folder: Path, name: str) -> None:
    value, kinds = FIELDS[name]
    beside = BESIDE.get(name, {})
    before = identities(folder, evaluation=given(folder, **beside))
    assert changed(before, identities(folder, evaluation=given(folder, **beside, **{name: value}))) == kinds


def test_the_table_has_every_setting() -> None:
    assert set(FIELDS) == set(EvaluationSettings.model_fields)


def test_the_stride_counts_where_texts_are_scored(folder: Path) -> None:
    (folder / "texts.jsonl").write_text('{"text": "a text"}\n')
    pt = {"stage": "pt", "dataset": str(folder / "texts.jsonl"), "cutoff_len": 64}
    texts = {"perplexity": [str(folder / "texts.jsonl")], "questions": []}
    before = identities(folder, pt, texts)
    assert changed(before, identities(folder, pt, texts | {"stride": 32})) == {"evaluate"}
    # of training the length of blocks, of measuring that of windows
    assert changed(before, identities(folder, pt | {"cutoff_len": 48}, texts)) == {"tokenize", "evaluate"}
    with pytest.raises(InputError, match=r"evaluation\.stride: 64 is not below cutoff_len 64"):
        identities(folder, pt, texts | {"stride": 64})


def test_texts_are_measured_whole_and_without_an_end(folder: Path) -> None:
    (folder / "texts.jsonl").write_text('{"text": "a text"}\n')
    pt = {"stage": "pt", "dataset": str(folder / "texts.jsonl"), "eval_dataset": str(folder / "texts.jsonl")}
    found = identities(folder, pt | {"eval_steps": 2}, {"perplexity": [], "questions": []})
    whole = found["sft/tokenize:texts"][1]
    assert (whole["overlong"], whole["cutoff_len"]) == ("whole", None)
    # while training as training sees texts: a long one would not fit a batch
    assert found["sft/tokenize:texts:watched"][1]["overlong"] == "split"


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("accuracy.colours >= 0.5", None),
        ("acc.colours >= 0.5", "stage sft has no acc.colours. Did you mean accuracy.colours"),
        ("accuracy.colour >= 0.5", "stage sft has no accuracy.colour. Did you mean accuracy.colours"),
        ("bleu.held_out - base > 0", None),
        ("acc_mutual_info.piqa > 0", None),  # of lm-eval's own tasks only lm-eval knows
    ],
)
def test_a_gate_is_on_what_is_measured(folder: Path, condition: str, words: str | None) -> None:
    asked = given(folder, gate=[condition])
    asked["benchmarks"].append("piqa")
    if words is None:
        identities(folder, evaluation=asked)
        return
    with pytest.raises(InputError, match=words):
        identities(folder, evaluation=asked)


def titles(recipe: dict[str, Any]) -> list[str]:
    return [step.title for step in build(load_recipe(recipe), Home.open()).steps]


def test_a_recipe_that_trains_nothing_measures_the_model_and_what_it_is_compared_with(folder: Path) -> None:
    model, other = str(folder / "model"), str(folder / "other_model")
    recipe = {"name": "look", "evaluate": model, "evaluation": {"perplexity": str(folder / "held_out.jsonl")}}
    assert [title for title in titles(recipe) if "evaluate" in title] == ["model/evaluate"]  # its base is not known
    recipe["evaluation"]["compare_with"] = other  # type: ignore[index]
    pipeline = build(load_recipe(recipe), Home.open())
    assert list(pipeline.measured) == ["base", "model"]
    assert pipeline.measured["model"].before == "base"
    # both read texts with the same tokenizer: they are measured on the same rows
    (base,), (own,) = (pipeline.measured[label].steps for label in ("base", "model"))
    assert base.inputs["set.0"].source is own.inputs["set.0"].source
    assert isinstance(own.inputs["set.0"].source, Step)


def test_what_compared_models_read_differently_is_prepared_for_each(folder: Path, tmp_path: Path) -> None:
    model, other = str(folder / "model"), tiny_model(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    evaluation = {"perplexity": str(folder / "held_out.jsonl"), "compare_with": str(other)}
    found = titles({"name": "look", "evaluate": model, "evaluation": evaluation})
    assert {"model/tokenize:held_out", "base/tokenize:held_out"} <= set(found)


def test_what_a_set_is_scored_as_is_told_by_its_rows_or_its_entry_while_training_as_well(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", 3)
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "which?", "chosen": "this", "rejected": "that"}))
    (folder / "plain.txt").write_text("one\ntwo\n")
    # of what is not there yet the entry says it: open-web-math has a column `text` and nothing else
    sets = [*(str(folder / name) for name in ("rows.jsonl", "plain.txt", "pairs.jsonl")), "open-web-math", "alpaca"]
    recipe = {"name": "look", "evaluate": str(folder / "model"), "evaluation": {"perplexity": sets}}
    wanted = ["chat", "text", "preference", "text", "chat"]
    (step,) = build(load_recipe(recipe), Home.open()).measured["model"].steps
    assert step.identity["shapes"] == wanted
    found = identities(folder, evaluation={"perplexity": sets, "questions": []})
    assert found["sft/evaluate"][1]["shapes"][-5:] == wanted


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"evaluation": {}}, "evaluation: there is nothing to measure"),
        ({"evaluation": {"benchmarks": "arc_eazy"}}, r"'arc_eazy' is not a known benchmark\. Did you mean arc_easy"),
        ({"evaluation": {"benchmarks": "mmlu"}, "evaluate": "FOLDER/none"}, "the folder .*none does not exist"),
        ({"learning_rate": 1e-3}, "learning_rate: has no effect: a recipe with `evaluate` trains nothing"),
        ({"stages": {}}, "stages: has no effect"),
        ({"evaluate": 3}, "evaluate: 3 is no model"),
        ({"evaluate": "models:/none"}, "models:/none: is no address of a registered model"),
        ({"evaluate": "demo"}, "no run of the recipe demo is finished"),
        ({"evaluate": "smollm2-135m-instruc"}, "Did you mean smollm2-135m-instruct"),
        ({"evaluation": {"questions": ["a"], "compare_with": "FOLDER/none"}}, "evaluation.compare_with: the folder"),
        ({"evaluation": {"generate": "FOLDER/held_out.jsonl", "top_k": 3}}, "top_k: 3 has no effect without do_sample"),
        (
            {"evaluation": {"generate": "FOLDER/held_out.jsonl", "reward_model": "FOLDER/model"}},
            r"evaluation\.reward_model: the model \(LlamaForCausalLM\) is no reward model",
        ),
        (
            {"evaluation": {"questions": ["a"], "reward_model": "FOLDER/judge"}},
            r"evaluation\.reward_model: scores the answers that `generate` writes, and there is no data set",
        ),
        (
            {"evaluation": {"generate": "FOLDER/held_out.jsonl", "reward_model": "FOLDER/none"}},
            r"evaluation\.reward_model: the folder .*none does not exist",
        ),
        ({"evaluation": {"perplexity": "FOLDER/numbers.jsonl"}}, "the columns .*number.* are those of no known format"),
        (
            {"evaluation": {"questions": ["a"], "gate": ["accuracy.piqa > 0"]}},
            "evaluation.gate: a gate decides on a model that the recipe trains",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    folder: Path, recipe: dict[str, Any], words: str
) -> None:
    (folder / "numbers.jsonl").write_text('{"number": 1}\n')
    asked = {"name": "look", "evaluate": "FOLDER/model", "evaluation": {"questions": ["who?"]}} | recipe
    raw = {
        key: {inner: placed(given, folder) for inner, given in value.items()}
        if isinstance(value, dict)
        else placed(value, folder)
        for key, value in asked.items()
    }
    with pytest.raises(InputError, match=words):
        titles(raw)


@pytest.mark.parametrize(
    ("metric", "cure"),
    [
        ("eval_los", "Did you mean eval_loss"),
        ("eval_loss/held_out", "Did you mean eval_loss"),  # of one set alone it is eval_loss
        ("eval_rewards/accuracies", "Known: eval_loss"),  # nothing is compared in this stage
    ],
)
def test_the_best_model_is_by_what_is_measured_while_training(folder: Path, metric: str, cure: str) -> None:
    stage = {"eval_steps": 2, "eval_dataset": str(folder / "held_out.jsonl"), "metric_for_best_model": metric}
    with pytest.raises(InputError, match=rf"metric_for_best_model: '{metric}' is not measured while training\. {cure}"):
        identities(folder, stage)
