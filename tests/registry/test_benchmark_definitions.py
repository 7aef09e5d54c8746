"""That our benchmarks say what lm-eval's tasks of that name say."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from registry.benchmarks import BENCHMARKS
from registry.benchmarks.harness import harness_tasks
from registry.benchmarks.task_files import KEYS, METRICS, REFUSED

THEIRS = {
    "arc_challenge": "arc/arc_easy.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq_no_passage": "super_glue/boolq/default.yaml",
    "ceval": "ceval/ceval-valid_accountant.yaml",
    "cmmlu": "cmmlu/cmmlu_anatomy.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "mmlu": "mmlu/default/mmlu_high_school_biology.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "winogrande": "winogrande/default.yaml",
}


def theirs(file: str) -> dict[str, Any]:
    """A task file of lm-eval's, functions unresolved."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(str(lm_eval.__file__)).parent / "tasks" / file, resolve_func=False)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_benchmark_is_scored_as_lm_eval_scores_it(name: str) -> None:
    own, other = BENCHMARKS[name].definition, theirs(THEIRS[name])
    same = (
        "output_type",
        "generation_kwargs",
        "filter_list",
        "target_delimiter",
        "fewshot_config",
        "fewshot_delimiter",
    )
    for key in same:
        assert own.get(key) == other.get(key), key
    metrics = other["metric_list"]
    if name == "boolq_no_passage":  # lm-eval leaves to its defaults what is written here
        metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    else:
        assert own["metadata"]["version"] == other["metadata"]["version"]
    assert own["metric_list"] == metrics


def test_there_are_eleven_benchmarks_and_each_says_what_it_is_and_reads() -> None:
    assert set(BENCHMARKS) == set(THEIRS)
    for name, entry in BENCHMARKS.items():
        assert (entry.definition["metadata"].get("group") or entry.definition["task"]) == entry.name == name
        assert entry.description.endswith(".")
        assert "Files under data_dir: " in entry.summary


def test_the_words_of_a_prompt_are_lm_evals() -> None:
    for name, subject in (("mmlu", "high school biology"), ("cmmlu", "解剖学"), ("ceval", "注册会计师")):
        own, other = BENCHMARKS[name].definition, theirs(THEIRS[name])
        assert own["description"].replace("{subject_words}", subject) == other["description"]
        assert own["doc_to_choice"] == other["doc_to_choice"] == ["A", "B", "C", "D"]
    assert BENCHMARKS["mmlu"].definition["doc_to_text"] == theirs(THEIRS["mmlu"])["doc_to_text"].replace(
        "choices[0]", "choice0"
    ).replace("choices[1]", "choice1").replace("choices[2]", "choice2").replace("choices[3]", "choice3")
    for name in ("cmmlu", "ceval", "gsm8k"):
        assert BENCHMARKS[name].definition["doc_to_text"] == theirs(THEIRS[name])["doc_to_text"]
        assert BENCHMARKS[name].definition["doc_to_target"] == theirs(THEIRS[name])["doc_to_target"]
    row = {"question": "Who?"}
    assert render(BENCHMARKS["truthfulqa_mc1"].definition["doc_to_text"], row) == render(
        theirs(THEIRS["truthfulqa_mc1"])["doc_to_text"], row
    )
    assert {entry["data"] for entry in subjects("cmmlu")} == {
        theirs(f"cmmlu/{e['file']}")["description"] for e in subjects("cmmlu")
    }


def subjects(name: str) -> list[dict[str, str]]:
    """What is asked about each subject, and lm-eval's file of it."""
    own = BENCHMARKS[name].definition
    words = own["metadata"]["subjects"]
    return [
        {"data": own["description"].replace("{subject_words}", word), "file": f"cmmlu_{subject}.yaml"}
        for subject, word in words.items()
    ]


def render(template: str, row: dict[str, Any]) -> str:
    from lm_eval.utils import apply_template

    return apply_template(template, row)


@pytest.mark.parametrize(
    ("name", "instruction", "answer", "prompt", "choices", "target"),
    [
        (
            "arc_easy",
            'Please choose the correct answer to the question: Why?\n\nAnswer1: a b Answer2: it\'s Answer3: "c"'
            "\n\nAnswer format: answer1/answer2/answer3",
            "answer3",
            "Question: Why?\nAnswer:",
            ["a b", "it's", '"c"'],
            "2",
        ),
        (
            "openbookqa",
            "Please choose the correct answer to the question: Fog is at\n\nAnswer1: a marsh Answer2: a desert"
            "\n\nAnswer format: answer1/answer2",
            "answer1",
            "Fog is at",
            ["a marsh", "a desert"],
            "0",
        ),
        (
            "piqa",
            "Please choose the correct solution to the question: dresser\n\nSolution1: nail it. \n\nSolution2: glue\nit"
            "\n\nAnswer format: solution1/solution2",
            "solution2",
            "Question: dresser\nAnswer:",
            ["nail it. ", "glue\nit"],
            "1",
        ),
        (
            "boolq_no_passage",
            "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
            "true",
            "Question: is it?\nAnswer:",
            ["no", "yes"],
            "1",
        ),
        (
            "winogrande",
            "Please choose the correct answer to fill in the blank to complete the given sentence: "
            "Ann met Bo so _ left.\n\nOption1: Ann Option2: Bo Answer format: option1/option2",
            "option2",
            "1",
            ["Ann met Bo so Ann", "Ann met Bo so Bo"],
            "left.",
        ),
    ],
)
def test_question_and_choices_are_found_in_a_row(
    name: str, instruction: str, answer: str, prompt: str, choices: list[str], target: str
) -> None:
    own, row = BENCHMARKS[name].definition, {"instruction": instruction, "answer": answer}
    assert render(own["doc_to_text"], row) == prompt
    found = own["doc_to_choice"]
    assert (found if isinstance(found, list) else ast.literal_eval(render(found, row))) == choices
    assert render(own["doc_to_target"], row) == target


def test_the_best_answer_stands_before_the_wrong_ones_and_each_ends_in_a_full_stop() -> None:
    row = {"best": "Nothing happens", "incorrect": "You die; It's bad. ;"}
    assert render(BENCHMARKS["truthfulqa_mc1"].definition["doc_to_choice"], row) == (
        """['Nothing happens.', 'You die.', "It's bad."]"""
    )


def test_every_key_and_metric_of_lm_eval_is_known_or_refused() -> None:
    import lm_eval.api.metrics  # noqa: F401 - which fills the registry
    from lm_eval.api.registry import METRIC_REGISTRY
    from lm_eval.config.task import TaskConfig

    assert {field.name for field in fields(TaskConfig)} == {*KEYS, *REFUSED} - {"class", "include", "group"}
    assert set(METRIC_REGISTRY) - {"bypass", "acc_all"} == set(METRICS)


def test_the_names_of_lm_evals_tasks_are_those_of_its_own_index() -> None:
    import lm_eval
    from lm_eval.tasks._index import Kind, TaskIndex

    root = Path(str(lm_eval.__file__)).parent / "tasks"
    folders = [root / name for name in ("arc", "ceval", "gsm8k", "mmlu", "super_glue", "squadv2", "leaderboard")]
    index = TaskIndex.build(folders)
    names = {name for name, entry in index.items() if entry.kind is not Kind.TAG}
    assert len(names) > 200
    assert names <= harness_tasks()
    assert {name for name in index if name not in names} & harness_tasks() == set()
    assert len(harness_tasks()) > 10_000


def test_finding_a_benchmark_loads_nothing_heavy() -> None:
    code = (
        "import sys; from registry.benchmarks import find_benchmark; "
        "from registry.evaluation_records import EvaluationSettings; "
        "find_benchmark('arc_easy', EvaluationSettings(), ''); "
        "print([name for name in ('torch', 'lm_eval', 'datasets', 'jinja2') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
