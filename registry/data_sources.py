"""What a data set is once it has been found: the vocabulary of its entry, and one record for later steps.

One decision: the vocabulary is LLaMA-Factory's and LLamaTuner's (`file_name`, `formatting`, `columns`, `tags`), read
as it is; whatever a recipe writes (a name, a file, a hub id, a mapping) becomes one `DataSource`, the only thing later
steps see. `registry.data_registry` finds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from registry.errors import InputError, Problem

FORMATS = ("alpaca", "sharegpt", "openai", "transcript", "text")
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
COLUMNS = (
    *("prompt", "query", "response", "history", "system", "tools", "messages", "text"),
    *("chosen", "rejected", "ranked", "margin", "kto_tag", "instances"),
)
TAG_NAMES = (*TAGS, "answer_tag", "rank_tag", "score_tag")
MEDIA = ("images", "videos", "audios")
"""Columns of LLaMA-Factory's vocabulary that are refused: the models here read text."""
SPLIT = re.compile(r"(?P<split>[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class RowSlice:
    """A range of rows as Hugging Face writes it: `[10:20]`, `[:10%]`, `[-100:]`."""

    start: int | None = None
    """First row, or percent; negative from the end; None: the first."""
    stop: int | None = None
    """Row, or percent, behind the last; negative from the end; None: all of them."""
    start_percent: bool = False
    stop_percent: bool = False

    @property
    def needs_total(self) -> bool:
        """Whether the range can be known only when all rows have been counted."""
        percent = (self.start_percent and self.start not in (None, 0)) or self.stop_percent
        return percent or (self.start or 0) < 0 or (self.stop or 0) < 0

    def bounds(self, total: int) -> tuple[int, int]:
        """First row and row behind the last among `total`; percents to the nearest row, as `datasets` rounds them.

        >>> RowSlice(stop=10, stop_percent=True).bounds(25), RowSlice(start=-5).bounds(25)
        ((0, 2), (20, 25))
        """

        def place(value: int | None, percent: bool, default: int) -> int:
            if value is None:
                return default
            rows = round(value * total / 100) if percent else value
            return min(max(rows + total if rows < 0 else rows, 0), total)

        start = place(self.start, self.start_percent, 0)
        return start, max(start, place(self.stop, self.stop_percent, total))


def parse_split(text: str, where: str) -> tuple[str | None, RowSlice | None]:
    """A split and the range of its rows.

    >>> parse_split("train[:10%]", "")
    ('train', RowSlice(start=None, stop=10, start_percent=False, stop_percent=True))

    Raises:
        InputError: not of that form, or a range that can hold no row.
    """
    match = SPLIT.fullmatch(text.strip())
    cure = "E.g. train, train[:1000], train[10%:20%] or test[-100:]; for two splits name the data set twice."
    if not match or not text.strip():
        raise InputError(Problem(where, f"{text!r} is not a split", cure))
    split = match["split"] or None
    if "[" not in text:
        return split, None
    bounds = (match["start"], match["stop"])
    start, stop = (int(bound.rstrip("%")) if bound else None for bound in bounds)
    start_percent, stop_percent = (bool(bound) and bound.endswith("%") for bound in bounds)
    if (start_percent and abs(start or 0) > 100) or (stop_percent and abs(stop or 0) > 100):
        raise InputError(Problem(where, f"{text!r} is more than 100 percent", cure))
    comparable = start is not None and stop is not None and start_percent == stop_percent and (start < 0) == (stop < 0)
    if stop == 0 or (comparable and (start or 0) >= (stop or 0)):
        raise InputError(Problem(where, f"{text!r} holds no row", cure))
    rows = RowSlice(start, stop, start_percent, stop_percent)
    return split, rows


@dataclass(frozen=True)
class Remote:
    """Where the files of a data set are downloaded from."""

    kind: Literal["hub", "modelscope", "url"]
    """Hugging Face hub, ModelScope, or one file by its URL."""
    address: str
    """`owner/name`, or the URL."""
    subset: str | None = None
    """Configuration of the repository; None: its default one."""
    split: str | None = None
    """Split of the subset; None: `train`, or the only one there is."""
    revision: str | None = None
    """Branch, tag or commit; None: the default branch."""
    folder: str | None = None
    """Folder of the repository to look in; None: all of it."""

    def identity(self) -> dict[str, Any]:
        """What is downloaded, as plain JSON values: the identity of the download step."""
        return {
            "kind": self.kind,
            "address": self.address,
            "subset": self.subset,
            "split": self.split,
            "revision": self.revision,
            "folder": self.folder,
        }


@dataclass(frozen=True)
class DataSource:
    """A data set as later steps see it: files, and how a row is read."""

    name: str
    """For people; never part of a key."""
    files: tuple[Path, ...] = ()
    """The files on this machine, in order; empty for a remote one."""
    remote: Remote | None = None
    """What has to be downloaded first; None for files on this machine."""
    formatting: str | None = None
    """One of `FORMATS`; None: found from the columns of the first row."""
    ranking: bool = False
    """Rows have a preferred and a rejected answer."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our column name → the file's, as the entry says. When it names any, those it does not name are not read, as in
    LLaMA-Factory; empty: the names of the format."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Role and content keys of a message, where they differ from the format's own."""
    num_samples: int | None = None
    """Most rows to take, in order, over all files; the entry's word."""
    slice: RowSlice | None = None
    """Range of rows, over all files, before anything else is left out."""
    weight: float = 1.0
    """Share of the mixture, relative to those of the other data sets."""
    max_rows: int | None = None
    """Most rows to take, in order, over all files; the recipe's word."""
    repeat: int = 1
    """How many times its rows are seen in one epoch."""
    licence: str = ""
    description: str = ""
