"""Benchmarks by name: which files they read, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli.looking import list_registries
from registry.benchmarks import BENCHMARKS, Benchmark, find_benchmark
from registry.benchmarks.task_files import data_files, read_task
from registry.errors import InputError
from registry.evaluation_records import BenchmarkSettings, EvaluationSettings

WHERE = "evaluation.benchmarks"
OWN = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl, train: more.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [red, blue]
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def write(folder: Path, **files: str) -> Path:
    """Files by their path in the folder; the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def find(name: str | BenchmarkSettings, **evaluation: Any) -> Benchmark:
    return find_benchmark(name, EvaluationSettings(**evaluation), WHERE)


def mmlu(folder: Path) -> Path:
    head = "question,choice0,choice1,choice2,choice3,answer\n"
    names = ("test/law_test.csv", "dev/law_dev.csv", "test/art_history_test.csv", "dev/art_history_dev.csv")
    return write(folder, **dict.fromkeys(names, head + "Who?,a,b,c,d,1\n"))


def test_a_name_of_ours_reads_the_files_of_data_dir(tmp_path: Path) -> None:
    write(tmp_path, **{"ARC-Easy_test.json": '[{"instruction": "x", "answer": "answer1"}]', "other.json": "x"})
    found = find("arc_easy", data_dir=str(tmp_path), limit=3)
    assert (found.name, found.folder, found.files) == ("arc_easy", tmp_path, ("ARC-Easy_test.json",))
    assert (found.num_fewshot, found.limit, found.seed, found.apply_chat_template) == (0, 3, None, False)
    assert found.definition is not None
    assert found.definition["dataset_kwargs"] == {"data_files": {"test": ["ARC-Easy_test.json"]}}
    assert found.definition["metadata"] == {"version": 1.0}


def test_without_data_dir_a_name_is_lm_evals(tmp_path: Path) -> None:
    found = find("arc_easy", seed=7)
    assert found == Benchmark("arc_easy", None, seed=7)
    assert find(BenchmarkSettings(task="hellaswag", num_fewshot=3), data_dir=str(tmp_path)).num_fewshot == 3


def test_every_subject_that_is_there_is_a_task_of_the_group(tmp_path: Path) -> None:
    found = find("mmlu", data_dir=str(mmlu(tmp_path)))
    assert [task["task"] for task in found.tasks] == ["mmlu_art_history", "mmlu_law"]
    assert found.tasks[0]["task_alias"] == "art_history"
    assert "about art history.\n\n" in found.tasks[0]["description"]
    assert found.files == (
        *("dev/art_history_dev.csv", "dev/law_dev.csv"),
        *("test/art_history_test.csv", "test/law_test.csv"),
    )
    assert (found.num_fewshot, found.seed) == (5, None)  # the first rows of dev, which are not drawn
    assert found.definition is not None
    assert found.definition["aggregate_metric_list"] == [{"metric": "acc", "weight_by_size": True}]


def test_a_benchmark_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    mmlu(tmp_path / "mmlu")
    assert find("mmlu", data_dir=str(tmp_path)).folder == tmp_path / "mmlu"


def test_without_examples_their_files_are_not_read(tmp_path: Path) -> None:
    mmlu(tmp_path)
    (tmp_path / "dev" / "law_dev.csv").unlink()
    found = find(BenchmarkSettings(task="mmlu", num_fewshot=0), data_dir=str(tmp_path), num_fewshot=5)
    assert found.files == ("test/art_history_test.csv", "test/law_test.csv")
    assert "fewshot_split" not in found.tasks[0]
    with pytest.raises(InputError, match=r"dev/law_dev\.csv is not there"):
        find("mmlu", data_dir=str(tmp_path))


def test_examples_that_are_drawn_have_a_seed(tmp_path: Path) -> None:
    row = '{"question": "1+1?", "answer": "#### 2"}\n'
    write(tmp_path, **{"test.jsonl": row, "train.jsonl": row})
    assert find("gsm8k", data_dir=str(tmp_path)).seed == 42
    assert find("gsm8k", data_dir=str(tmp_path), num_fewshot=0).seed is None


def test_settings_of_its_own_come_before_those_of_all() -> None:
    own = BenchmarkSettings(task="arc_easy", num_fewshot=0, limit=5, apply_chat_template=False)
    found = find(own, num_fewshot=3, limit=9, apply_chat_template=True)
    assert (found.num_fewshot, found.limit, found.apply_chat_template) == (0, 5, False)
    others = find("arc_easy", num_fewshot=3, limit=9, apply_chat_template=True)
    assert (others.num_fewshot, others.limit, others.apply_chat_template) == (3, 9, True)


def refused(name: str | BenchmarkSettings, **evaluation: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        find(name, **evaluation)
    return [str(problem) for problem in caught.value.problems]


def test_an_unknown_name_is_answered_with_the_nearest_of_both() -> None:
    assert "Did you mean boolq_no_passage" in refused("boolq_nopassage")[0]
    assert "hellaswag" in refused("helaswag")[0]
    unlike = refused("?")[0]
    assert "Known: arc_challenge, arc_easy" in unlike
    assert len(unlike) < 400
    assert refused("ceval") == [
        f"{WHERE}: ceval is read from files only. Set evaluation.data_dir to the folder with its files; "
        "docs/evaluation.md says which."
    ]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert refused("piqa", data_dir=str(tmp_path / "none"))[0].startswith(
        f"evaluation.data_dir: {tmp_path}/none is not"
    )
    assert f"{tmp_path}/piqa_test.json is not there" in refused("piqa", data_dir=str(tmp_path))[0]
    assert f"{tmp_path}/test/*_test.csv" in refused("mmlu", data_dir=str(tmp_path))[0]
    assert "nothing.yaml does not exist" in refused(str(tmp_path / "nothing.yaml"))[0]


def test_a_file_without_its_columns_is_refused(tmp_path: Path) -> None:
    mmlu(tmp_path)
    write(tmp_path, **{"test/law_test.csv": "Who?,a,b,c,d,B\n"})
    assert "test/law_test.csv has no column question, choice0" in refused("mmlu", data_dir=str(tmp_path))[0]
    write(tmp_path, **{"piqa_test.json": "{"})
    assert "piqa_test.json: cannot be read" in refused("piqa", data_dir=str(tmp_path))[0]


def test_a_task_file_of_ones_own_is_found_with_its_files(tmp_path: Path) -> None:
    write(tmp_path, **{"own.yaml": OWN, "colours.jsonl": "{}", "more.jsonl": "{}"})
    found = find(str(tmp_path / "own.yaml"), num_fewshot=1)
    assert (found.name, found.folder, found.num_fewshot, found.seed) == ("colours", tmp_path, 1, 42)
    assert found.files == ("colours.jsonl", "more.jsonl")
    write(tmp_path / "data", **{"colours.jsonl": "{}", "more.jsonl": "{}"})
    assert find(str(tmp_path / "own.yaml"), data_dir=str(tmp_path / "data")).folder == tmp_path / "data"


def test_a_task_file_may_take_its_data_from_the_hub(tmp_path: Path) -> None:
    text = OWN.replace("json\ndataset_kwargs: {data_files: {test: colours.jsonl, train: more.jsonl}}", "some/colours")
    found = find(str(write(tmp_path, **{"own.yaml": text}) / "own.yaml"))
    assert (found.folder, found.files) == (None, ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("process_results: !function utils.score", "the YAML tag !function is refused: it runs code"),
        ("process_docs: shuffle", "process_docs: refused: it runs code"),
        ("custom_dataset: x", "custom_dataset: refused: it runs code"),
        ("include: other.yaml", "include: refused: a task file of your own is one file"),
        ("num_fewshots: 3", "num_fewshots: unknown key. Did you mean num_fewshot"),
        ("num_fewshot: three", "num_fewshot: 'three' is not a number of examples"),
        ("metric_list: [{metric: accc}]", "metric_list: 'accc' is not a metric of lm-eval. Did you mean acc"),
        ("metric_list: [{metric: bleu, hf_evaluate: true}]", "hf_evaluate is refused"),
        ("dataset_kwargs: {data_files: x.json, trust_remote_code: true}", "trust_remote_code: refused: it runs code"),
        ("dataset_kwargs: {}", "dataset_kwargs.data_files: missing"),
        ("dataset_kwargs: {data_files: {test: 3}}", "{'test': 3} are no files"),
        ("dataset_kwargs: {data_files: {test: x.jsonl}}", "fewshot_split: 'train' has no files. data_files has test"),
        ("dataset_kwargs: {data_files: {test: '{subject}.jsonl'}}", "task: it needs {subject} as well"),
        ("task: x_{subject}", "data_files: no file has {subject}"),
        ("dataset_path: /some/folder", "dataset_path: '/some/folder' is refused"),
        ("output_type: multiple_choices", "'multiple_choices' is not known. Did you mean multiple_choice"),
        ("test_split: null", "test_split: missing"),
        ("task: a b", "task: 'a b' is not a name"),
        ("doc_to_target: null", "doc_to_target: missing"),
        ("metadata: [1]", "metadata: [1] is not a mapping"),
    ],
)
def test_what_a_task_file_may_not_say_is_refused_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    key = text.split(":")[0]
    kept = "\n".join(line for line in OWN.splitlines() if not line.startswith(f"{key}:"))
    path = write(tmp_path, **{"own.yaml": f"{kept}\n{text}\n"}) / "own.yaml"
    assert any(words in problem for problem in refused(str(path)))


def test_a_task_file_that_is_no_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, **{"own.yaml": "task: [a\n", "list.yaml": "- a\n"}) / "own.yaml"
    assert "own.yaml:2" in refused(str(path))[0]
    assert "a task is a mapping" in refused(str(tmp_path / "list.yaml"))[0]


def test_all_problems_of_a_task_file_are_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, **{"own.yaml": "task: x\nclass: y\nfoo: 1\n"}) / "own.yaml"
    assert len(refused(str(path))) == 6


def test_examples_need_a_split_that_is_not_asked(tmp_path: Path) -> None:
    files = {"colours.jsonl": "{}", "more.jsonl": "{}", "own.yaml": OWN.replace("fewshot_split: train\n", "")}
    path = str(write(tmp_path, **files) / "own.yaml")
    assert "colours has no examples to show" in refused(path, num_fewshot=1)[0]
    assert find(path).num_fewshot == 0
    same = OWN.replace("test_split: test\nfewshot_split: train", "validation_split: test\nfewshot_split: test")
    write(tmp_path, **{"own.yaml": same})
    assert "takes its examples from the questions that are asked" in refused(path, num_fewshot=1)[0]


def test_files_outside_of_the_folder_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, **{"colours.jsonl": "{}"})
    for name in ("../colours.jsonl", str(tmp_path / "colours.jsonl"), "https://example.org/x.jsonl"):
        text = OWN.replace("test: colours.jsonl", f'test: "{name}"')
        path = write(tmp_path / "sub", **{"own.yaml": text}) / "own.yaml"
        assert "is not there" in refused(str(path))[0]


def test_subjects_of_a_task_file_of_ones_own_need_a_name_for_the_whole(tmp_path: Path) -> None:
    text = OWN.replace("task: colours", 'task: "colours_{subject}"').replace("colours.jsonl", '"{subject}.jsonl"')
    files = {"own.yaml": text, "red.jsonl": "{}", "blue.jsonl": "{}", "more.jsonl": "{}"}
    path = write(tmp_path, **files) / "own.yaml"
    assert "metadata.group: missing" in refused(str(path))[0]
    text = text.replace(", train: more.jsonl", "").replace("fewshot_split: train\n", "")
    path.write_text(text + "metadata: {group: colours}\n")
    assert [task["task"] for task in find(str(path)).tasks] == ["colours_blue", "colours_more", "colours_red"]


def test_shipped_files_are_task_files_of_anyone() -> None:
    paths = sorted((Path(__file__).parents[2] / "registry" / "benchmarks").glob("*.yaml"))
    assert len(paths) == 11
    assert all(read_task(path)["task"] for path in paths)


def test_the_task_file_of_the_guide_is_one(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    text = guide.partition("### A task of your own")[2].partition("```yaml\n")[2].partition("```")[0]
    write(tmp_path, **{"own.yaml": text, "colours.jsonl": "{}", "examples.jsonl": "{}"})
    found = find(str(tmp_path / "own.yaml"), num_fewshot=2)
    assert (found.name, found.files) == ("colours", ("colours.jsonl", "examples.jsonl"))
    for name, entry in BENCHMARKS.items():
        assert f"`{name}`" in guide
        for file in (file for files in data_files(entry.definition).values() for file in files):
            assert file.replace("{subject}", "SUBJECT").removesuffix("*") in guide


def test_the_list_shows_what_a_benchmark_is_and_reads(capsys: pytest.CaptureFixture[str]) -> None:
    list_registries("benchmarks", as_json=True)
    listed = json.loads(capsys.readouterr().out)["benchmarks"]
    assert listed["mmlu"].endswith("Files under data_dir: test/{subject}_test.csv, dev/{subject}_dev.csv")
