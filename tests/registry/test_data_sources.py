"""Whatever a recipe writes for its data (name, path, glob, URL, hub id, mapping) becomes one source, or says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.data_files import kind_of
from registry.data_registry import DATASETS, find_dataset
from registry.data_sources import COLUMNS, FORMATS, TAG_NAMES, DataSource, Remote, RowSlice, parse_split
from registry.errors import InputError
from registry.loading import load_recipe
from registry.records import DataSettings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data files, in which the test stands."""
    for name in ("rows.jsonl", "more/a.jsonl", "more/b.jsonl", "more/deep/c.csv", "more/notes.md", "other.json.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(wanted: Any, dataset_dir: Path | None = None) -> DataSource:
    return find_dataset(wanted, dataset_dir, "dataset")


def refusal(wanted: Any, dataset_dir: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        find_dataset(wanted, dataset_dir, "dataset")
    return str(caught.value)


def names(source: DataSource, folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in source.files]


@pytest.mark.parametrize(
    ("wanted", "name", "files"),
    [
        ("rows.jsonl", "rows", ["rows.jsonl"]),
        ("./other.json.gz", "other", ["other.json.gz"]),
        ("./more", "more", ["more/a.jsonl", "more/b.jsonl"]),
        ("more/", "more", ["more/a.jsonl", "more/b.jsonl"]),
        ("more/*.jsonl", "more", ["more/a.jsonl", "more/b.jsonl"]),
        ("more/**/*", "more", ["more/a.jsonl", "more/b.jsonl", "more/deep/c.csv"]),
        ("more/[b-c].jsonl", "more", ["more/b.jsonl"]),
        ({"file_name": "rows.jsonl"}, "rows", ["rows.jsonl"]),
        ({"dataset": "more/a.jsonl", "weight": 2}, "a", ["more/a.jsonl"]),
    ],
)
def test_files_folders_and_globs_need_no_entry(folder: Path, wanted: Any, name: str, files: list[str]) -> None:
    source = found(wanted)
    assert (source.name, names(source, folder), source.remote, source.formatting) == (name, files, None, None)


@pytest.mark.parametrize(
    ("wanted", "expected", "rows"),
    [
        ("owner/name", Remote("hub", "owner/name"), None),
        ("owner/name:en", Remote("hub", "owner/name", subset="en"), None),
        ("owner/name@test", Remote("hub", "owner/name", split="test"), None),
        ("owner/name:en@train[10:20]", Remote("hub", "owner/name", "en", "train"), RowSlice(10, 20)),
        ("owner/name@[:10%]", Remote("hub", "owner/name"), RowSlice(None, 10, False, True)),
        ("https://host/x.jsonl.gz", Remote("url", "https://host/x.jsonl.gz"), None),
        ("http://host:80/a%20b.parquet?v=1", Remote("url", "http://host:80/a%20b.parquet?v=1"), None),
        ({"ms_hub_url": "a/b", "revision": "v1"}, Remote("modelscope", "a/b", revision="v1"), None),
        ({"hf_hub_url": "a/b", "ms_hub_url": "c/d", "folder": "x"}, Remote("hub", "a/b", folder="x"), None),
        ({"hf_hub_url": "squad", "split": "train[-100:]"}, Remote("hub", "squad", split="train"), RowSlice(-100)),
        ({"dataset": "a/b:c", "split": "test[:5]"}, Remote("hub", "a/b", "c", "test"), RowSlice(None, 5)),
        ({"file_name": "https://host/x.csv"}, Remote("url", "https://host/x.csv"), None),
    ],
)
def test_hub_ids_and_urls_need_no_entry(folder: Path, wanted: Any, expected: Remote, rows: RowSlice | None) -> None:
    source = found(wanted)
    assert (source.remote, source.slice, source.files) == (expected, rows, ())


def test_a_hub_id_of_a_known_set_is_read_as_its_entry_says(folder: Path) -> None:
    source = found("YeungNLP/firefly-train-1.1M@train[:100]")
    assert source.columns == {"prompt": "input", "response": "target"}
    assert (source.formatting, source.slice) == ("alpaca", RowSlice(None, 100))


def test_an_entry_of_a_dataset_info_is_read_as_it_is(folder: Path) -> None:
    entry = {
        "file_name": "rows.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "chat", "chosen": "good", "rejected": "bad", "images": None, "system": ""},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "bot"},
        "num_samples": 7,
        "split": "train[5:]",
        "licence": "MIT",
    }
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    assert found("mine", folder) == DataSource(
        "mine",
        (folder / "rows.jsonl",),
        formatting="sharegpt",
        ranking=True,
        columns={"messages": "chat", "chosen": "good", "rejected": "bad"},
        tags=entry["tags"],
        num_samples=7,
        slice=RowSlice(5),
        licence="MIT",
    )
    mixed = found({"dataset": "mine", "weight": 2.0, "max_rows": 1000, "repeat": 2, "num_samples": 3}, folder)
    assert (mixed.weight, mixed.max_rows, mixed.repeat, mixed.num_samples) == (2.0, 1000, 2, 3)
    assert mixed.columns == found("mine", folder).columns


def test_an_entry_without_a_format_is_alpaca_as_in_llama_factory(folder: Path) -> None:
    (folder / "dataset_info.yaml").write_text("mine: {file_name: rows.jsonl}\nfolder: {file_name: more}\n")
    assert found("mine", folder).formatting == "alpaca"
    assert names(found("folder", folder), folder) == ["more/a.jsonl", "more/b.jsonl"]
    assert found({"file_name": "rows.jsonl", "columns": {"prompt": "q"}}).formatting == "alpaca"


def test_entries_that_cannot_be_used_are_no_error_until_they_are_asked_for(folder: Path) -> None:
    entries = {
        "good": {"file_name": "rows.jsonl"},
        "script": {"script_url": "belle_multiturn"},
        "media": {"file_name": "mllm.json", "columns": {"images": "images"}},
        "cloud": {"cloud_file_name": "s3://a/b"},
        "modelers": {"om_hub_url": "a/b"},
        "nowhere": {"formatting": "alpaca"},
        "text": "a sentence",
    }
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    assert found("good", folder).files
    said = {name: refusal(name, folder) for name in entries if name != "good"}
    assert "script.script_url: a dataset script is a program that would run here" in said["script"]
    assert "media.columns.images: images are data of other kinds than text" in said["media"]
    assert "cloud storage is not supported. Name the data files" in said["cloud"]
    assert "the Modelers hub is not supported" in said["modelers"]
    assert "says nowhere where its files are. Give it file_name, hf_hub_url or ms_hub_url" in said["nowhere"]
    assert "'a sentence' is not an entry" in said["text"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("asistant", "'asistant' is not a known data set and no such file exists. Did you mean assistant"),
        ("rows.jsnl", "is not a known data set and no such file exists"),
        ("row.jsonl", "row.jsonl does not exist. Did you mean /"),
        ("more/c.jsonl", "c.jsonl does not exist. Did you mean /"),
        ("more/nothing", "more/nothing does not exist"),
        ("more/x*.jsonl", "no file matches /"),
        ("more/*.md", "more/*.md matches is one of .json"),
        ("more/notes.md", "notes.md is not one of .json, .jsonl, .csv"),
        ("./more/deep/..", ""),
        (
            "ftp://host/x.jsonl",
            "'ftp://host/x.jsonl' is not a URL that can be read. It starts with https:// or http://",
        ),
        ("https://host/page", "the path of https://host/page ends in none of .json"),
        ("https://me:secret@host/x.jsonl", "has a user name or password in it"),
        ("owner/name@", "'' is not a split"),
        ("owner/name@train[:0]", "holds no row. E.g. train"),
        ("rows.jsonl@test", "dataset.split: files have no splits, so none is named 'test'. Name the files"),
        ("oasst1", "oasst1: a row is one message of a tree, which no format reads"),
        ({"file_name": "rows.jsonl", "subset": "en"}, "dataset.subset: a file has no subset"),
        ({"file_name": "rows.jsonl", "fomatting": "x"}, "dataset.fomatting: unknown key. Did you mean formatting?"),
        ({"file_name": "rows.jsonl", "formatting": "alpca"}, "unknown format 'alpca'. Did you mean alpaca?"),
        (
            {"file_name": "rows.jsonl", "columns": {"promt": "x"}},
            "dataset.columns.promt: unknown key. Did you mean prom",
        ),
        (
            {"file_name": "rows.jsonl", "tags": {"rol_tag": "x"}},
            "dataset.tags.rol_tag: unknown key. Did you mean role_t",
        ),
        (
            {"file_name": "rows.jsonl", "columns": {"messages": "x"}},
            "dataset.formatting: columns.messages and tags belo",
        ),
        ({"file_name": "rows.jsonl", "weight": 0}, "dataset.weight: 0 is not a number above 0"),
        ({"file_name": "rows.jsonl", "repeat": 1.5}, "dataset.repeat: 1.5 is not a number of rows from 1"),
        ({"dataset": "assistant", "file_name": "rows.jsonl"}, "dataset and file_name both say where the rows are"),
        ({"dataset": "asistant"}, "dataset.dataset: 'asistant' is not a known data set"),
        ({"max_rows": 3}, "a mapping says where its rows are"),
        ({"hf_hub_url": "https://huggingface.co/a/b"}, "is not a hub id. It is owner/name."),
    ],
)
def test_what_cannot_be_used_says_the_rule_and_the_cure(folder: Path, wanted: Any, said: str) -> None:
    if said:
        assert said in refusal(wanted)
    else:
        assert names(found(wanted), folder)


def test_an_empty_file_and_a_folder_without_data_are_refused(folder: Path) -> None:
    (folder / "more" / "b.jsonl").write_text("")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "more" / "only").mkdir()
    assert "b.jsonl is empty" in refusal("more/")
    assert "model holds no data file" in refusal("./model")
    (folder / "above" / "in").mkdir(parents=True)
    (folder / "above" / "in" / "x.parquet").write_text("x")
    assert "above/**/*.parquet for the files in its folders" in refusal("./above")


def test_a_users_entry_comes_before_files_and_those_before_shipped_names(folder: Path) -> None:
    (folder / "dataset_info.yaml").write_text("assistant: {file_name: more/a.jsonl}\n")
    assert names(found("assistant", folder), folder) == ["more/a.jsonl"]
    (folder / "dataset_info.yaml").unlink()
    (folder / "assistant").mkdir()
    (folder / "assistant" / "x.csv").write_text("a\n1\n")
    assert names(found("assistant", folder), folder) == ["assistant/x.csv"]
    assert found("assistant").files == found("assistant", folder / "more").files  # a bare word is no folder by path
    assert found("assistant").files[0].name == "assistant.jsonl"


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [
        ("train[10:20]", 100, (10, 20)),
        ("train[:10%]", 1234, (0, 123)),
        ("train[33%:66%]", 10, (3, 7)),
        ("train[-5:]", 3, (0, 3)),
        ("train[-10%:]", 50, (45, 50)),
        ("train[90:200]", 100, (90, 100)),
        ("train[200:]", 100, (100, 100)),
        ("[:-1]", 10, (0, 9)),
    ],
)
def test_a_slice_means_what_it_means_to_datasets(text: str, total: int, expected: tuple[int, int]) -> None:
    rows = parse_split(text, "")[1]
    assert rows is not None
    assert rows.bounds(total) == expected
    assert rows.needs_total == (rows.bounds(10**6) != rows.bounds(10**7) and not text.endswith("0:]"))


def test_every_shipped_entry_is_valid_or_says_why_not() -> None:
    unusable = [name for name, entry in DATASETS.items() if "unusable" in entry.values]
    assert sorted(unusable) == ["hc3", "oasst1"]
    sources = [found(name) for name in DATASETS if name not in unusable]
    assert len(sources) == 38
    assert all(source.description for source in sources)
    assert all(source.licence or "no licence known" in source.description for source in sources)
    assert {source.formatting for source in sources} <= set(FORMATS)
    assert all(set(source.columns) <= set(COLUMNS) and set(source.tags) <= set(TAG_NAMES) for source in sources)
    assert [source.name for source in sources if source.ranking] == [
        *("assistant_preferences", "assistant_preferences_held_out"),
        *("hh_rlhf", "nectar", "orca_pairs", "orca_pairs_de", "dpo_mix_en", "dpo_mix_zh"),
    ]


def recipe(**stage: Any) -> dict[str, Any]:
    own = {"stage": "sft", **stage}
    return {"name": "toy", "model_name_or_path": "smollm2-135m-instruct", "stages": {"sft": own}}


def test_a_recipe_takes_every_form_and_keeps_paths_that_hold_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [
        "assistant",
        "more/*.jsonl",
        "rows.jsonl@train[:3]",
        "owner/name:en@train[10:20]",
        {"dataset": "more/a.jsonl", "weight": 2.0, "max_rows": 1000, "repeat": 2},
        {"file_name": "more/deep/c.csv", "formatting": "alpaca", "columns": {"prompt": "q", "response": "a"}},
    ]
    (folder / "r.json").write_text(
        json.dumps(recipe(dataset=wanted, eval_dataset="assistant, rows.jsonl", mix_strategy="interleave_over"))
    )
    first = load_recipe(str(folder / "r.json"))
    monkeypatch.chdir("/")
    again = load_recipe(first.raw)
    assert again.stages == first.stages
    sources = again.stages[0].sources
    assert [source.name for source in sources] == ["assistant", "more", "rows", "name-en", "a", "c"]
    assert (sources[4].weight, sources[4].max_rows, sources[4].repeat) == (2.0, 1000, 2)
    assert sources[2].slice == RowSlice(None, 3)
    assert names(sources[5], folder) == ["more/deep/c.csv"]
    assert [source.name for source in again.stages[0].eval_sources] == ["assistant", "rows"]


def test_overrides_and_a_single_mapping_are_read_like_lists(folder: Path) -> None:
    raw = recipe(dataset="assistant")
    two = load_recipe(raw, ["stages.sft.dataset=rows.jsonl,assistant"]).stages[0].sources
    assert [source.name for source in two] == ["rows", "assistant"]
    one = load_recipe(raw, ["stages.sft.dataset={file_name: rows.jsonl, repeat: 3}"]).stages[0].sources
    assert [(source.name, source.repeat) for source in one] == [("rows", 3)]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (
            [{"file_name": "rows.jsonl", "formating": "x"}],
            "stages.sft.dataset[0].formating: unknown key. Did you mean for",
        ),
        (
            ["assistant", {"dataset": "assistant", "repeat": 0}],
            "stages.sft.dataset[1].repeat: 0 should be greater than",
        ),
        ([{"dataset": "assistnt"}], "stages.sft.dataset[0].dataset: 'assistnt' is not a known data set"),
        ([3], "stages.sft.dataset: 3 should be a valid string"),
        ([["assistant"]], "stages.sft.dataset: ['assistant'] should be a valid string"),
    ],
)
def test_a_bad_mapping_is_named_by_its_place_in_the_list(folder: Path, wanted: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe(dataset=wanted))
    assert said in str(caught.value)
    assert "1 problem" in str(caught.value)


def test_the_form_of_a_run_knows_names_and_mappings() -> None:
    schema = DataSettings.model_json_schema()
    items = schema["properties"]["dataset"]["items"]
    assert [form.get("type") or form["$ref"] for form in items["oneOf"]] == ["string", "#/$defs/InlineDataset"]
    fields = schema["$defs"]["InlineDataset"]["properties"]
    assert {"file_name", "hf_hub_url", "columns", "weight", "repeat"} <= set(fields)
    assert all(field["description"] for field in fields.values())


def test_the_kind_of_a_file_is_its_names() -> None:
    assert kind_of("a/b.PARQUET") == (".parquet", "")
    assert kind_of("b.json.zst") == (".json", ".zst")
    assert [kind_of(name) for name in ("b.gz", "b", ".jsonl", "b.py", "b.jsonl.bz2")] == [None] * 5
