"""How the rows of one source are read, and what can be made of them.

One decision: a source holds one of the five shapes by itself; it gives another one only where `GIVES` says how, and
everything else is refused before the first row with what the shape needs and what was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from registry.errors import InputError, Problem, did_you_mean, shown
from tasks.formats.turns import ROLES

SHAPES = ("text", "chat", "preference", "labelled", "prompt")
FORMATTINGS = ("alpaca", "sharegpt", "openai", "transcript", "text")
OPTIONAL = {"query": "input", "system": "system", "history": "history", "tools": "tools"}
MEDIA = ("images", "videos", "audios")
COLUMNS = (
    *("prompt", "query", "response", "system", "history", "tools", "messages", "text"),
    *("chosen", "rejected", "ranked", "margin", "kto_tag", "instances"),
    *MEDIA,
)
TAGS = ("role_tag", "content_tag", *ROLES, "answer_tag", "rank_tag", "score_tag")
NEEDS = {
    "text": "text row (stage pt) needs a column of plain text, `text` or `content`; conversations are for stage sft",
    "chat": (
        "chat row (stage sft) needs a question with an answer: `instruction` and `output` (alpaca), `conversations` "
        "(sharegpt) or `messages` (openai)"
    ),
    "preference": (
        "preference row (stages rm, dpo, orpo) needs a better and a worse answer: `chosen` and `rejected`, beside a "
        "prompt column, `conversations` or `messages`, or as whole conversations that begin alike"
    ),
    "labelled": (
        "labelled row (stage kto) needs an answer marked as good or bad: a column of true and false, `label` or "
        "`kto_tag`, beside `messages`, `conversations` or a prompt and an answer"
    ),
    "prompt": (
        "prompt row (stages ppo, grpo, rloo) needs a question: `prompt`, `instruction`, `question`, `messages` or "
        "`conversations`"
    ),
}
GIVES = {
    ("text", "text"): "",
    ("chat", "chat"): "",
    ("chat", "prompt"): "the last answer is the reference, everything before it the prompt",
    ("preference", "preference"): "",
    ("preference", "chat"): "the chosen answers are used",
    ("preference", "labelled"): "each pair gives two rows, the chosen answer as true and the rejected one as false",
    ("preference", "prompt"): "the chosen answer is the reference, everything before it the prompt",
    ("labelled", "labelled"): "",
    ("labelled", "chat"): "answers marked as bad are left out as bad rows",
    ("labelled", "prompt"): "an answer marked as good is the reference, everything before it the prompt",
    ("prompt", "prompt"): "",
}
"""(what a source holds, shape wanted) → what is done with it, for people; empty where nothing is changed."""
HOLDS = {
    "text": "plain text",
    "chat": "questions with answers",
    "preference": "pairs of answers",
    "labelled": "answers marked as good or bad",
    "prompt": "questions without answers",
}


@dataclass(frozen=True)
class Form:
    """How the rows of one source are read."""

    formatting: str
    """`alpaca` (a column for each text), `sharegpt` or `openai` (a list of turns), `transcript` (a conversation written
    as one text) or `text`."""
    ranking: bool
    """Whether a row holds better and worse answers."""
    columns: Mapping[str, str]
    """Our column name → the file's."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Keys and role names of a turn that are not the format's own."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Columns that a row may have beside these."""

    @property
    def holds(self) -> str:
        """The shape the source has by itself."""
        if self.formatting == "text":
            return "text"
        if self.ranking:
            return "preference"
        if "kto_tag" in self.columns:
            return "labelled"
        return "chat" if "response" in self.columns or "messages" in self.columns else "prompt"

    def sentence(self) -> str:
        """What was found, for people.

        >>> Form("alpaca", False, {"prompt": "instruction", "response": "output"}).sentence()
        'alpaca columns instruction, output'
        """
        names = list(dict.fromkeys(self.columns.values()))
        return f"{self.formatting} {'column' if len(names) == 1 else 'columns'} {', '.join(names)}"

    def change(self, shape: str) -> str:
        """What is done to the rows to get a shape, for people; empty when nothing is."""
        return GIVES[(self.holds, shape)]


def misfit(form: Form, shape: str, where: str = "") -> Problem | None:
    """Why a source cannot give a shape; None when it can.

    Args:
        form: as declared or found.
        shape: the one wanted.
        where: file and place, for the error.
    """
    if (form.holds, shape) in GIVES:
        return None
    rule = f"{form.sentence()}: {HOLDS[form.holds]}, which cannot be made into {shape} rows"
    return Problem(where, rule, f"A {NEEDS[shape]}.")


def unknown_columns(columns: Iterable[str], shape: str, where: str = "") -> Problem:
    """What a source lacks in which `detect` found nothing.

    Args:
        columns: of the row looked at.
        shape: the one wanted.
        where: file and place, for the error.
    """
    rule = f"the columns ({', '.join(columns)}) are those of no known format of {shape} rows"
    return Problem(where, rule, f"A {NEEDS[shape]}. Name your own columns with `columns` in dataset_info.")


def declared(formatting: str, ranking: bool, columns: Mapping[str, str], tags: Mapping[str, str], shape: str) -> Form:
    """The form a registry entry means, read as LLaMA-Factory reads it.

    Without `columns` all columns of the format are read where a row has them. With `columns` only those named are,
    beside the format's own question and answer: an entry that leaves `query` out wants the input left out. Pairs are
    also known by a `chosen` column, without `ranking`.

    Args:
        formatting: one of `FORMATTINGS`.
        ranking: rows hold better and worse answers.
        columns, tags: our name → the file's.
        shape: one of `SHAPES`; without `columns` it says which of the format's own columns are meant.

    Raises:
        InputError: every name that is unknown, and a conversation column of alpaca rows.
    """
    problems = []
    if formatting not in FORMATTINGS:
        problems.append(
            Problem("formatting", f"unknown format {shown(formatting)}", did_you_mean(str(formatting), FORMATTINGS))
        )
    for title, given, known in (("columns", columns, COLUMNS), ("tags", tags, TAGS)):
        problems += [
            Problem(f"{title}.{name}", "unknown name", did_you_mean(name, known)) for name in given if name not in known
        ]
    if formatting == "alpaca" and "messages" in columns:
        cure = "Set formatting: sharegpt (turns with from and value) or openai (role and content)."
        problems.append(Problem("columns.messages", "an alpaca row has no list of turns", cure))
    if problems:
        raise InputError(problems)
    if formatting == "text" or (shape == "text" and formatting == "alpaca" and columns and "response" not in columns):
        return Form("text", False, {"text": columns.get("text") or columns.get("prompt") or "text"})
    pairs = ranking or bool({"chosen", "rejected", "ranked"} & set(columns)) or (shape == "preference" and not columns)
    own = _own_columns(formatting, pairs, columns, shape)
    optional = {} if columns else {name: file for name, file in OPTIONAL.items() if file not in own.values()}
    return Form(formatting, pairs, own | dict(columns), dict(tags), optional)


def _own_columns(formatting: str, pairs: bool, columns: Mapping[str, str], shape: str) -> dict[str, str]:
    """The format's own names for what every row needs and the entry does not name."""
    own: dict[str, str] = {}
    if formatting == "alpaca":
        own["prompt"] = "instruction"
        if not pairs and (not columns or shape != "prompt"):
            own["response"] = "output"
    elif formatting == "transcript":
        if not pairs and not {"prompt", "messages"} & set(columns):
            own["messages"] = "text"
    elif not {"messages", "prompt", "chosen"} & set(columns):
        own["messages"] = "messages" if formatting == "openai" else "conversations"
    if pairs and not {"ranked", "response"} & set(columns):
        own |= {"chosen": "chosen", "rejected": "rejected"}
    if shape == "labelled" and not pairs and not columns:
        own["kto_tag"] = "label" if formatting == "openai" else "kto_tag"
    return own
