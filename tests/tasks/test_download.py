"""Remote data sets: the hub's real client against a small hub, one file by its URL, and what each refusal says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from registry.data_registry import find_dataset
from registry.data_sources import DataSource, Remote
from registry.errors import InputError
from registry.home import Home
from tasks.artifacts import Artifact, Store
from tasks.digests import DigestMemory
from tasks.download import download_step, downloaded_files
from tasks.hub_files import Wanted, choose_files
from tasks.launch import ProgramFailed
from tasks.locks import Interrupted
from tasks.reading import read_rows
from tasks.steps import do
from tests.small_hub import COMMIT, SmallHub, SmallModelScope, hub_of, serving

SECRET = "hf_not_to_be_seen"
ROWS = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(3)]


def fetch(source: DataSource, events: list[dict[str, Any]] | None = None) -> Artifact:
    store = Store(Home.open())
    emit = (events if events is not None else []).append
    return do(
        download_step("sft", f"download:{source.name}", source),
        store,
        DigestMemory(store.home.digests),
        threading.Event(),
        emit,
    ).artifact


def remote(address: str, kind: Any = "hub", **fields: Any) -> DataSource:
    return DataSource("rows", remote=Remote(kind, address, **fields))


def write_repository(folder: Path) -> Path:
    for split, shards in (("train", 2), ("test", 1)):
        for shard in range(shards):
            path = folder / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"instruction": f"{split} {shard}", "output": "x"}]
            pq.write_table(pa.Table.from_pylist(rows), path)
    (folder / "rows.py").write_text("raise SystemExit")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "README.md").write_text("# rows\n")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[SmallHub]]:
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit")
    handler = hub_of(datasets_rows=write_repository(tmp_path / "repository"), datasets_script=script)
    with serving(handler) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield handler


def test_a_download_holds_the_files_of_the_split_and_where_they_came_from(hub: type[SmallHub]) -> None:
    events: list[dict[str, Any]] = []
    source = remote("acme/rows")
    artifact = fetch(source, events)
    files = downloaded_files(artifact.path)
    assert [file.relative_to(artifact.path).as_posix() for file in files] == [
        f"files/data/train-0000{n}-of-00002.parquet" for n in range(2)
    ]
    assert [row.value for file in files for row in read_rows(file)] == [
        {"instruction": f"train {n}", "output": "x"} for n in range(2)
    ]
    found = json.loads((artifact.path / "report" / "source.json").read_text())
    assert (found["kind"], found["address"], found["commit"]) == ("hub", "acme/rows", COMMIT)
    assert [(file["name"], len(file["etag"])) for file in found["files"]] == [
        (f"data/train-0000{n}-of-00002.parquet", 64) for n in range(2)
    ]
    assert artifact.manifest["counts"]["commit"] == COMMIT
    assert [event for event in events if event["kind"] == "progress"][-1]["unit"] == "bytes"
    asked = " ".join(hub.asked)
    assert "rows.py" not in asked
    assert "test-00000" not in asked


def test_equal_files_have_equal_digests_whichever_way_they_were_asked_for(hub: type[SmallHub]) -> None:
    first, second = fetch(remote("acme/rows")), fetch(remote("acme/rows", split="train", revision=COMMIT))
    assert first.path != second.path
    assert first.digest == second.digest
    before = len(hub.asked)
    assert fetch(remote("acme/rows")).path == first.path
    assert len(hub.asked) == before  # what is here is not asked for again


def test_a_token_reaches_the_hub_and_no_file(hub: type[SmallHub], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    fetch(remote("acme/rows"))
    assert f"Bearer {SECRET}" in hub.tokens
    kept = [path for path in home.rglob("*") if path.is_file()]
    assert kept
    assert [path for path in kept if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (remote("acme/none"), ["data set rows: acme/none is not on", "Check the name"]),
        (remote("acme/gated"), ["accepted its licence", "HF_TOKEN"]),
        (remote("acme/closed"), ["acme/closed", "HF_TOKEN"]),
        (remote("acme/rows", revision="v9"), ["no revision 'v9'", "Check revision."]),
        (remote("acme/rows", split="tset"), ["acme/rows has no split 'tset'. Did you mean test? Splits: test, train"]),
        (remote("acme/rows", subset="en"), ["has no subset 'en'"]),
        (remote("acme/rows", folder="x"), ["no data file in the folder 'x'. Folders with data: data"]),
        (remote("acme/script"), ["a dataset script (script.py) and no data files; scripts are never run"]),
        (remote("tatsu-lab/alpca"), ["Did you mean tatsu-lab/alpaca?"]),
    ],
)
def test_a_refusal_is_one_error_with_its_cure(hub: type[SmallHub], source: DataSource, said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        fetch(source)
    for piece in said:
        assert piece in str(caught.value)
    assert list(Home.open().artifacts.glob("download/*")) == []


def test_a_hub_out_of_reach_is_tried_again_and_offline_mode_is_not(
    hub: type[SmallHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProgramFailed, match=r"acme/busy cannot be reached .*503") as caught:
        fetch(remote("acme/busy"))
    assert caught.value.retried
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"cannot be reached \(.*offline mode.*or download the files and name them"):
        fetch(remote("acme/rows"))


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[SmallModelScope]]:
    pytest.importorskip("modelscope_hub", reason="the package modelscope-hub is not installed")
    folder = write_repository(tmp_path / "repository")
    handler = type("ModelScope", (SmallModelScope,), {"repositories": {"acme/rows": folder}, "asked": []})
    with serving(handler) as address:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope"))
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", SECRET)
        yield handler


def test_modelscope_gives_what_the_hub_gives(modelscope: type[SmallModelScope], hub: type[SmallHub]) -> None:
    artifact = fetch(remote("acme/rows", kind="modelscope", revision="v1"))
    assert artifact.digest == fetch(remote("acme/rows")).digest
    found = json.loads((artifact.path / "report" / "source.json").read_text())
    assert (found["kind"], found["address"], found["revision"]) == ("modelscope", "acme/rows", "v1")
    assert [(file["name"], len(file["etag"])) for file in found["files"]] == [
        (f"data/train-0000{n}-of-00002.parquet", 64) for n in range(2)
    ]
    assert not [question for question in modelscope.asked if "rows.py" in question or "test-00000" in question]
    kept = [path for path in Home.open().path.rglob("*") if path.is_file()]
    assert [path for path in kept if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (remote("acme/none", kind="modelscope"), "acme/none is not on ModelScope, or not for this person"),
        (remote("acme/rows", kind="modelscope", revision="v9"), "Check name and revision; set MODELSCOPE_API_TOKEN."),
        (remote("acme/rows", kind="modelscope", split="tset"), "acme/rows has no split 'tset'. Did you mean test?"),
    ],
)
def test_what_modelscope_does_not_have_is_one_error(
    modelscope: type[SmallModelScope], source: DataSource, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        fetch(source)
    assert said in str(caught.value)


def test_a_file_that_comes_damaged_from_modelscope_is_not_used(modelscope: type[SmallModelScope]) -> None:
    modelscope.damaged = True
    with pytest.raises(ProgramFailed, match="acme/rows was damaged on its way, and was not used") as caught:
        fetch(remote("acme/rows", kind="modelscope"))
    assert caught.value.retried
    assert list(Home.open().artifacts.glob("download/*")) == []


class Files(BaseHTTPRequestHandler):
    """A plain file server: `rows.jsonl.gz` breaks off once, `page.json` is a web page, `N.json` answers with N."""

    data: bytes
    broken: list[int]
    asked: list[str]

    def log_message(self, *arguments: Any) -> None:
        return

    def do_GET(self) -> None:
        name, wanted = self.path.split("?")[0].strip("/"), self.headers.get("Range")
        self.asked.append(f"{name} {wanted}")
        if name.removesuffix(".json").isdigit():
            self._head(int(name.removesuffix(".json")), 0)
        elif name == "page.json":
            self._head(200, 5, ("Content-Type", "text/html; charset=utf-8"))
            self.wfile.write(b"<html")
        else:
            begin = int(wanted.split("=")[1].split("-")[0]) if wanted and self.headers["If-Range"] == '"v1"' else 0
            self._head(206 if begin else 200, len(self.data) - begin, ("ETag", '"v1"'))
            self.wfile.write(self.data[begin : self.broken.pop() if self.broken else None])

    def _head(self, status: int, length: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(length))):
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server() -> Iterator[tuple[str, type[Files]]]:
    import gzip

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    handler = type("Server", (Files,), {"data": gzip.compress(lines), "broken": [], "asked": []})
    with serving(handler) as address:
        yield address, handler


def test_a_file_by_its_url_goes_on_where_it_broke_off(server: tuple[str, type[Files]]) -> None:
    address, handler = server
    handler.broken.append(20)
    source = find_dataset(f"{address}/rows.jsonl.gz?key=secret", None, "dataset")
    assert source.name == "rows"
    with pytest.raises(ProgramFailed, match="broke off") as caught:
        fetch(source)
    assert caught.value.retried
    assert "secret" not in str(caught.value)
    artifact = fetch(source)
    assert handler.asked == ["rows.jsonl.gz None", "rows.jsonl.gz bytes=20-"]
    assert [row.value for row in read_rows(downloaded_files(artifact.path)[0])] == ROWS
    found = json.loads((artifact.path / "report" / "source.json").read_text())
    assert found["files"] == [{"name": "rows.jsonl.gz", "size": len(handler.data), "etag": '"v1"'}]


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("404.json", InputError, r"404\.json does not exist \(HTTP 404\)\. Check the URL"),
        ("401.json", InputError, r"is not for everybody \(HTTP 401\)\. Download the file yourself"),
        ("403.json", InputError, r"is not for everybody \(HTTP 403\)"),
        ("page.json", InputError, "is a web page, not a data file. Name the URL of the file itself"),
        ("503.json", ProgramFailed, r"cannot be had now \(HTTP 503\)"),
        ("429.json", ProgramFailed, r"cannot be had now \(HTTP 429\)"),
    ],
)
def test_a_server_that_says_no(server: tuple[str, type[Files]], name: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        fetch(remote(f"{server[0]}/{name}", kind="url"))


def test_a_server_that_is_not_there_is_tried_again() -> None:
    with pytest.raises(ProgramFailed, match="cannot be reached") as caught:
        fetch(remote("http://127.0.0.1:9/x.jsonl", kind="url"))
    assert caught.value.kind == "network"


def test_a_stop_request_ends_a_download(hub: type[SmallHub]) -> None:
    store, stop = Store(Home.open()), threading.Event()
    stop.set()
    step = download_step("sft", "download", remote("acme/rows"))
    with pytest.raises(Interrupted):
        do(step, store, DigestMemory(store.home.digests), stop, lambda event: None)


def test_local_files_are_not_downloaded(tmp_path: Path) -> None:
    source = DataSource("rows", files=(tmp_path / "rows.jsonl",))
    with pytest.raises(ValueError, match="nothing to download"):
        download_step("sft", "download", source)


def test_the_step_is_known_by_what_is_asked_for_and_not_by_which_rows_are_taken() -> None:
    whole, part = (find_dataset(text, None, "dataset") for text in ("acme/x:en@test", "acme/x:en@test[:10%]"))
    assert download_step("a", "b", whole).identity == download_step("a", "b", part).identity
    assert download_step("a", "b", whole).identity == {
        "kind": "hub",
        "address": "acme/x",
        "subset": "en",
        "split": "test",
        "revision": None,
        "folder": None,
    }


def chosen(names: str, readme: str | None = None, subset: str | None = None, split: str | None = None) -> list[str]:
    return choose_files(names.split(), readme, Wanted("a/b", subset, split, None, "dataset"))


CONFIGS = """---
license: mit
configs:
- config_name: en
  data_files:
  - {split: train, path: data/en-*.jsonl}
  - {split: held_out, path: [test/en/**, extra.jsonl]}
- config_name: zh
  data_files: "data/zh-*.jsonl"
- config_name: own
  data_dir: own
---
# text
"""
FILES = "data/en-1.jsonl data/en-2.jsonl data/zh-1.jsonl test/en/a/b.jsonl extra.jsonl own/test.csv own/train.csv"


@pytest.mark.parametrize(
    ("subset", "split", "expected"),
    [
        ("en", None, "data/en-1.jsonl data/en-2.jsonl"),
        ("en", "held_out", "extra.jsonl test/en/a/b.jsonl"),
        ("zh", "train", "data/zh-1.jsonl"),
        ("own", "test", "own/test.csv"),
    ],
)
def test_what_the_readme_declares_counts(subset: str, split: str | None, expected: str) -> None:
    assert chosen(FILES, CONFIGS, subset, split) == expected.split()


def test_several_declared_subsets_need_a_name_or_a_default() -> None:
    with pytest.raises(InputError, match=r"has 3 subsets and no default. Name one with subset: en, own, zh"):
        chosen(FILES, CONFIGS)
    assert chosen(FILES, CONFIGS.replace("name: zh", "name: zh\n  default: true")) == ["data/zh-1.jsonl"]
    with pytest.raises(InputError, match=r"has no subset 'eng'. Did you mean en\? Subsets: en, own, zh"):
        chosen(FILES, CONFIGS, "eng")


@pytest.mark.parametrize(
    ("names", "subset", "split", "expected"),
    [
        ("rows.json README.md x.py", None, None, "rows.json"),
        ("alpaca.json requirements.txt notes.txt", None, None, "alpaca.json"),
        ("train.jsonl test.jsonl", None, None, "train.jsonl"),
        ("my-train.csv my-dev.csv", None, "validation", "my-dev.csv"),
        ("data/train_sft-00000-of-00001.parquet data/test_sft-00000-of-00001.parquet", None, "train_sft", "data/tr"),
        ("en/train.jsonl.gz en/test.jsonl.gz zh/train.jsonl.gz", "en", None, "en/train.jsonl.gz"),
        ("train/a.jsonl test/a.jsonl", None, "test", "test/a.jsonl"),
        ("en.jsonl zh.jsonl", "zh", None, "zh.jsonl"),
        ("default/train/0000.parquet default/test/0000.parquet", None, None, "default/train/0000.parquet"),
        ("en/train/0000.parquet zh/train/0000.parquet", "zh", None, "zh/train/0000.parquet"),
        ("a.parquet b.parquet a.json", None, None, "a.parquet b.parquet"),
        ("../out.jsonl in.jsonl", None, None, "in.jsonl"),
    ],
)
def test_names_say_which_split_a_file_is_of(names: str, subset: str | None, split: str | None, expected: str) -> None:
    found = chosen(names, None, subset, split)
    assert len(found) == len(expected.split())
    assert all(name.startswith(part) for name, part in zip(found, expected.split(), strict=True))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("test.csv dev.csv", "has no split 'train'. Name one with split. Splits: test, validation"),
        ("model.bin x.zip", "has no data file"),
        ("en/train/0000.parquet zh/train/0000.parquet", "has several subsets. Subsets: en, zh"),
    ],
)
def test_what_cannot_be_told_apart_is_listed(names: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chosen(names)
