"""Bad input of every kind ends with one clear error, exit code 2, and nothing begun: place, rule and cure."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from flows.cli.app import run_app
from tasks.devices import slow_bf16
from tests.flows.refusals import nothing_begun, refusal, write_lines

SETTINGS: list[tuple[str, str, list[str]]] = [
    (
        "unknown key",
        "stages.sft.lerning_rate=1",
        ["stages.sft.lerning_rate: unknown key. Did you mean learning_rate or critic_learning_rate?"],
    ),
    (
        "LLaMA-Factory's key of an export",
        "export_dir=out",
        ["export_dir: a recipe says what to train. Models are written by `llamatuner export`, --to there."],
    ),
    (
        "another one, without an option",
        "export_device=cpu",
        ["export_device: a recipe says what to train. Models are written by `llamatuner export`."],
    ),
    ("unknown key of evaluation", "evaluation.question=[x]", ["evaluation.question: unknown key. Did you mean quest"]),
    ("unicode key", "stages.sft.学习率=1", ["stages.sft.学习率: unknown key"]),
    ("wrong type", "stages.sft.lora_rank=many", ["stages.sft.lora_rank: 'many' should be a valid integer"]),
    ("no steps", "stages.sft.max_steps=0", ["stages.sft.max_steps: 0 should be greater than or equal to 1"]),
    ("not a number", "stages.sft.learning_rate=.nan", ["stages.sft.learning_rate: nan should be a finite number"]),
    ("infinite", "stages.sft.learning_rate=1e999", ["stages.sft.learning_rate: inf should be a finite number"]),
    ("huge", f"stages.sft.seed={10**30}", ["stages.sft.seed: ", "should be less than 4294967296"]),
    ("huge beyond reading", f"stages.sft.seed={'9' * 5000}", ["--set stages.sft.seed", "a value that cannot be read"]),
    ("too many steps", "stages.sft.max_steps=99999999999999999999", ["max_steps", "should be less than 2147483648"]),
    ("null", "stages.sft.seed=null", ["stages.sft.seed: null should be a valid integer. seed: Seed of"]),
    ("a date", "stages.sft.seed=2024-01-01", ["stages.sft.seed", "only text, numbers", "Quote it."]),
    ("a date that is none", "stages.sft.seed=2024-13-41", ["a value that cannot be read", "month must be in 1..12"]),
    ("a set", "stages.sft.lora_target={a, b}", ["stages.sft.lora_target"]),
    ("a Python object", "stages.sft.seed=!!python/object:os.system x", ["not valid YAML or JSON: could not determine"]),
    ("half a character", 'evaluation.questions=["\\ud800"]', ["evaluation.questions", "only text, numbers"]),
    ("deeply nested", "stages.sft.seed=" + "[" * 5000, ["not valid YAML or JSON: nested too deeply"]),
    ("data set taken out", "stages.sft.dataset=", ["stages.sft.dataset: missing, and it has no default"]),
    ("empty text as data set", "stages.sft.dataset=''", ["stages.sft.dataset: '' is not a known data set"]),
    ("data set as mapping", "stages.sft.dataset={a: 1}", ["stages.sft.dataset[0].a: unknown key. Known: columns"]),
    ("empty model", "model_name_or_path=''", ["model_name_or_path: '' ", "at least 1 character"]),
    ("empty name", "name=''", ["name: '' is not a name"]),
    ("unknown data set", "stages.sft.dataset=assistnt", ["not a known data set", "Did you mean assistant"]),
    ("unknown model", "model_name_or_path=smollm2-135m-instuct", ["not a known model", "smollm2-135m-instruct"]),
    ("unknown template", "stages.sft.template=chatm", ["'chatm' is not a known template. Did you mean chatml?"]),
    ("unknown stage", "stages.sft.stage=stf", ["stages.sft.stage: 'stf' is not a known stage. Did you mean sft?"]),
    ("missing data file", "stages.sft.dataset=trian.jsonl", ["trian.jsonl does not exist. Did you mean /", "train.js"]),
    ("missing template file", "stages.sft.template=no.jinja", ["no.jinja does not exist"]),
    ("folder as data", "stages.sft.dataset=./data.jsonl", ["data.jsonl holds no data file (.json, .jsonl, .csv"]),
    ("folder as template", "stages.sft.template=dir.jinja", ["dir.jinja is a folder, not a template file"]),
    ("other folder as template", "stages.sft.template=model", ["'model' is not a known template"]),
    ("file as model", "model_name_or_path=train.jsonl", ["is a file, a model is a folder"]),
    ("data as model", "model_name_or_path=dir.jinja", ["not a whole model: config.json, tokenizer.json"]),
    ("file as folder", "stages.sft.dataset_dir=train.jsonl", ["is not a folder"]),
    ("long name", f"stages.sft.dataset={'x' * 3000}.jsonl", ["cannot be a path: File name too long"]),
    ("long model", f"model_name_or_path={'x' * 3000}", ["model_name_or_path: 'xxx", "File name too long"]),
    ("null character", 'stages.sft.dataset="a\\0b.jsonl"', ["cannot be a path: it has a null character"]),
    ("nobody's home", "stages.sft.dataset=~nobody_of_that_name/x.jsonl", ["cannot be a path"]),
    ("fraction of a row", "stages.sft.val_size=2.5", ["val_size", "neither a share below 1 nor a whole number"]),
    ("all rows kept back", "stages.sft.val_size=24", ["val_size 24 keeps back 24 of 24 rows"]),
    ("stage as number", "stages.sft=5", ["stages.sft: 5 is not a mapping of settings"]),
    ("stages as list", "stages=[sft]", ["stages: ['sft'] is not a mapping of stage names to settings"]),
    ("no stages", "stages={}", ["stages: {} is not a mapping of stage names"]),
    ("two stages", "stages.dpo={stage: sft}", ["no stage 'dpo'"]),
    ("no sign", "stages.sft.seed", ["--set stages.sft.seed: an override is key=value"]),
    ("no key", "=5", ["--set =5: an override is key=value"]),
    ("torn list", "stages.sft.lora_target=[a", ["--set stages.sft.lora_target=[a:1: not valid YAML or JSON"]),
    ("through a value", "name.x=1", ["name is not a mapping"]),
    ("evaluation as list", "evaluation=[1]", ["evaluation: [1] should be an object"]),
    ("evaluation nothing", "evaluation=null", ["evaluation: null should be an object"]),
]


@pytest.mark.parametrize(("setting", "said"), [pytest.param(*case[1:], id=case[0]) for case in SETTINGS])
def test_a_bad_setting_is_named_with_its_rule_and_cure(
    folder: Path, home: Path, capsys: pytest.CaptureFixture[str], setting: str, said: list[str]
) -> None:
    (folder / "data.jsonl").mkdir()
    (folder / "dir.jinja").mkdir()
    text = refusal(capsys, "run", "toy.json", "--set", setting)
    for piece in said:
        assert piece in text
    assert nothing_begun(home)


ANCHORS = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in ("ab", "bc", "cd", "de", "ef", "fg")
)
RECIPES: list[tuple[str, bytes, list[str]]] = [
    ("empty", b"", ["bad.yaml: 1 problem", "a recipe is a mapping of settings. See `llamatuner list recipes`"]),
    ("only a comment", b"# nothing\n", ["a recipe is a mapping of settings"]),
    ("a list", b"- stage: sft\n", ["a recipe is a mapping of settings"]),
    ("one word", b"sft\n", ["a recipe is a mapping of settings"]),
    ("torn", b"name: x\nstages: {sft: {stage: sft\n", ["bad.yaml:3: not valid YAML or JSON"]),
    ("tabs", b"stages:\n\tsft:\n\t\tstage: sft\n", ["bad.yaml:2: not valid YAML or JSON", "'\\t'"]),
    ("not UTF-8", b"name: \xff\xfe\n", ["bad.yaml: not UTF-8 text at byte 6. Save it as UTF-8."]),
    ("binary", b"name: \x00\x01\n", ["bad.yaml: not valid YAML or JSON"]),
    ("two documents", b"name: a\n---\nname: b\n", ["bad.yaml:2: not valid YAML or JSON"]),
    ("a key twice", b"name: a\nname: b\n", ["bad.yaml:2:", "key 'name' is written twice, first in line 1"]),
    ("a stage twice", b"stages:\n  sft: {}\n  sft: {}\n", ["bad.yaml:3:", "key 'sft' is written twice"]),
    ("twice in JSON", b'{"name": "a",\n "name": "b"}', ["bad.yaml:2:", "key 'name' is written twice"]),
    ("a number as key", b"1: x\n", ["bad.yaml:1: not valid YAML or JSON: a key is text, not 1"]),
    ("yes as key", b"yes: x\n", ["a key is text, not yes"]),
    ("a list as key", b"? [a, b]\n: x\n", ["a key is text, not a list or mapping"]),
    ("a Python object", b"name: !!python/object/apply:os.getcwd []\n", ["bad.yaml:1:", "could not determine a constr"]),
    ("nested", b"a: " + b"[" * 3000 + b"]" * 3000, ["bad.yaml: not valid YAML or JSON: nested too deeply"]),
    ("nested JSON", b'{"a":' * 3000 + b"1" + b"}" * 3000, ["bad.yaml: not valid YAML or JSON: nested too deeply"]),
    ("contains itself", b"name: &x [*x]\n", ["holds more than 100,000 values"]),
    ("aliases to aliases", ANCHORS.encode(), ["holds more than 100,000 values"]),
    ("a list as stage", b"stage: [sft]\ndataset: x.jsonl\n", ["stage: ['sft'] should be a valid string"]),
]


@pytest.mark.parametrize(("content", "said"), [pytest.param(*case[1:], id=case[0]) for case in RECIPES])
def test_a_bad_recipe_file_is_named_with_its_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: list[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    text = refusal(capsys, "run", str(path))
    for piece in said:
        assert piece in text
    assert nothing_begun(home)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dmo", "recipe: 'dmo' is neither a file nor a known recipe. Did you mean demo?"),
        ("nowhere.yaml", "nowhere.yaml: the recipe file does not exist. Check the path."),
        (".", "a folder, not a recipe file. Name the file in it."),
        ("", "a folder, not a recipe file"),
        ("x" * 5000, "cannot be a path: File name too long"),
        ("~nobody_of_that_name/x.yaml", "cannot be a path"),
    ],
)
def test_a_recipe_that_is_not_there(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, "run", name)
    assert nothing_begun(home)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf%s", b"\r\n%s\r\n", b"\n\n  %s  "])
def test_a_byte_order_mark_and_foreign_line_ends_are_read_over(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    recipe = (folder / "toy.json").read_bytes().replace(b"\n ", b"\r\n\t")
    (folder / "toy.json").write_bytes(content.replace(b"%s", recipe))
    rows = (folder / "train.jsonl").read_bytes().replace(b"\n", b"\r\n")
    (folder / "train.jsonl").write_bytes(content.replace(b"%s", rows))
    assert run_app(["check", "toy.json"]) == 0
    assert "sft/fetch: 24 rows" in capsys.readouterr().out


def test_every_problem_is_said_at_once_and_each_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["stages.sft.max_steps=0", "stages.sft.dataset=[a, b]", "model_nam=x", "evaluation.x=1"]
    text = refusal(capsys, "prepare", "toy.json", *(part for s in settings for part in ("--set", s)))
    assert "toy.json: 5 problems" in text
    for place in ("stages.sft.max_steps: 0", "'a' is not", "'b' is not", "model_nam: unknown", "evaluation.x: unknown"):
        assert text.count(place) == 1
    write_lines(folder / "train.jsonl", *[{"instruction": "a", "output": ""}] * 14)
    write_lines(folder / "held_out.jsonl", {"instruction": "", "output": "a"})
    text = refusal(capsys, "prepare", "toy.json")
    assert text.count("a row without an answer [empty_output]") == 10
    assert "and 4 more rows; in all 14 empty_output. Mend the rows, or set bad_rows: skip" in text
    assert "held_out.jsonl, line 1: 'instruction' is empty [empty_prompt]" in text


def test_a_home_that_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMATUNER_HOME", str(folder / "train.jsonl" / "home"))
    text = refusal(capsys, "run", "toy.json")
    assert "train.jsonl/home: the home cannot be written: Not a directory. Set LLAMATUNER_HOME to" in text
    assert run_app(["artifacts", "ls"]) == run_app(["runs"]) == run_app(["env"]) == 0


def test_a_disk_that_is_too_small(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        monkeypatch.setenv("LLAMATUNER_HOME", str(small / "home"))
        text = refusal(capsys, "run", "toy.json")
        assert "8 MB free on the disk, about 100 MB needed. Free space, run `llamatuner artifacts gc`" in text
        assert nothing_begun(small / "home")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_bf16_on_a_device_without_it(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bin").mkdir()
    tool = folder / "bin" / "nvidia-smi"  # stands in for the driver's own
    tool.write_text("#!/bin/sh\necho 'GPU-7a, Tesla T4, 7.5, 15360'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    text = refusal(capsys, "run", "toy.json", "--set", "stages.sft.bf16=true")
    assert "stages.sft.bf16: bf16 is not possible on Tesla T4 (compute capability 7.5, 8.0 is needed)" in text
    assert "Set bf16: false." in text
    assert nothing_begun(home)


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["rum", "demo"], ["run", "demo", "--set"], ["run", "demo", "--sett", "a=b"], ["list", "modls"]],
)
def test_a_command_line_that_cannot_be_read(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    refusal(capsys, *arguments)


def test_bf16_on_a_processor_without_units_for_it_is_said_to_be_slow() -> None:
    assert slow_bf16("flags\t: fpu avx2 avx512f avx512_vnni") is not None
    assert slow_bf16("flags\t: fpu avx512_bf16 amx_bf16") is None
    assert slow_bf16("Features\t: fp asimd bf16") is None
    assert slow_bf16("") is None


def test_a_quantised_base_and_a_kernel_without_its_device_are_said_before_anything_begins(
    folder: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = json.loads((folder / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    text = refusal(capsys, "run", "toy.json", "--set", "stages.sft.enable_liger_kernel=true")
    assert "stages.sft.model_name_or_path: the base model's weights are quantised (awq)" in text
    assert "Use the model as it was before, and quant_bit" in text
    assert "enable_liger_kernel: the kernels are written for CUDA devices" in text
    assert nothing_begun(home)
