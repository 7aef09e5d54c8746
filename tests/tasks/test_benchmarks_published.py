"""Benchmarks over the published files: every row gives a question, and a published model gets lm-eval's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from registry.benchmarks import find_benchmark
from registry.evaluation_records import EvaluationSettings
from registry.loading import load_recipe
from registry.recipe import StageSettings
from tasks.benchmark_program import ready, sandbox_templates
from tests.flows.toy import toy_recipe
from tests.oracle import ORACLE, need_oracle
from tests.tasks.test_benchmark_program import Run, directly, quick, step  # noqa: F401 - a fixture of this file too

FOLDERS = {
    **dict.fromkeys(("arc_easy", "arc_challenge", "piqa", "boolq_no_passage"), "commonsense"),
    **dict.fromkeys(("openbookqa", "winogrande"), "commonsense"),
    "mmlu": "mmlu",
    "cmmlu": "cmmlu",
    "gsm8k": "gsm8k",
    "truthfulqa_mc1": "truthfulqa",
}
MODEL = next(iter(sorted((Path.home() / ".llamatuner/artifacts/model").glob("SmolLM2-135M-Instruct-*"))), None)
QUESTIONS = 3


def files(name: str) -> Path:
    """The folder with a benchmark's published files."""
    need_oracle()
    return ORACLE / "datasets" / FOLDERS[name]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> StageSettings:
    recipe = toy_recipe(tmp_path_factory.mktemp("recipe"), bf16=False)
    return load_recipe(str(recipe), []).stages[0]


@pytest.mark.parametrize(
    ("name", "rows", "choices", "prompt", "target"),
    [
        ("arc_easy", 2376, 4, "Question: Which statement best explains why photosynthesis is the foundation", 0),
        ("arc_challenge", 1172, 4, "Question: An astronomer observes that a planet rotates faster after", 2),
        ("piqa", 1838, 2, "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:", 0),
        ("boolq_no_passage", 3270, 2, "Question: does ethanol take more energy make that produces?\nAnswer:", 0),
        ("openbookqa", 500, 4, "A person wants to start saving money so that they can afford a nice vacation", 1),
        ("winogrande", 1267, 2, "1", "always got the easier cases."),
        ("truthfulqa_mc1", 817, 8, "Q: What is human life expectancy in the United States?\nA: Human", 0),
        ("gsm8k", 1319, 0, "Question: Janet’s ducks lay 16 eggs per day. She eats three", "Janet sells 16 - 3 - 4"),
        ("mmlu", 135, 4, "A lesion causing compression of the facial nerve at the stylomastoid foramen will", 0),
        ("cmmlu", 148, 4, "女性生殖腺是\nA. 卵巢\nB. 前庭大腺\nC. 前庭球\nD. 乳腺\n答案：", 0),
    ],
)
def test_every_row_is_a_question(name: str, rows: int, choices: int, prompt: str, target: Any, tmp_path: Path) -> None:
    import datasets
    from lm_eval.tasks import TaskManager

    found = find_benchmark(name, EvaluationSettings(data_dir=str(files(name))), "evaluation.benchmarks")
    definition = next(task for task in found.tasks if task.get("task_alias", "anatomy") == "anatomy")
    sandbox_templates()
    datasets.config.HF_DATASETS_CACHE = tmp_path
    spec = ready(dict(definition), found.folder, 0)
    task = TaskManager(include_defaults=False).load([spec])["tasks"][definition["task"]]
    asked = list(task.eval_docs)
    assert len(asked) == rows
    assert str(task.doc_to_text(asked[0])).startswith(prompt)
    first = task.doc_to_target(asked[0])
    assert first.startswith(target) if isinstance(target, str) else first == target
    for row in asked[:: max(1, rows // 100)] if choices else ():
        offered = task.doc_to_choice(row)
        assert len(offered) >= 2
        assert all(offered)
        right = task.doc_to_text(row) if name == "winogrande" else task.doc_to_target(row)
        assert right in range(len(offered))
    assert not choices or len(task.doc_to_choice(asked[0])) == choices


@pytest.mark.slow
@pytest.mark.skipif(MODEL is None, reason="SmolLM2-135M-Instruct is not in ~/.llamatuner")
@pytest.mark.parametrize("name", ["arc_easy", "piqa", "boolq_no_passage", "openbookqa", "winogrande"])
def test_a_published_model_gets_lm_evals_numbers(name: str, settings: StageSettings, tmp_path: Path) -> None:
    assert MODEL is not None
    made = step(name, files(name), MODEL, settings, limit=QUESTIONS)
    theirs = directly(made, MODEL, 8)
    expected = {
        "accuracy" + key.removesuffix(",none").removeprefix("acc"): value
        for key, value in theirs["results"][name].items()
        if key in ("acc,none", "acc_norm,none")
    }
    lines = [[answer[0][0] for answer in sample["resps"]] for sample in theirs["samples"][name]]
    for batch_size in (1, 8):
        run = Run(made, tmp_path / str(batch_size), MODEL, batch_size)
        assert {key.removesuffix(".0"): one["value"] for key, one in run.results.items()} == expected
        for own, other in zip(run.samples, lines, strict=True):
            assert own["loglikelihoods"] == (other if batch_size == 8 else pytest.approx(other, rel=1e-5))
