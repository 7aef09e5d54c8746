"""Filling rows into skeletons gives exactly what rendering them one by one gives, for every template and many rows."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from tasks.render import RowRenderer
from tasks.skeleton import MOST_TURNS
from tests.oracle import ORACLE, need_oracle, template_folder

TEMPLATES = Path(__file__).parents[2] / "registry" / "templates"
SHIPPED = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
PUBLISHED = sorted(path.name for path in (ORACLE / "tokenizers").glob("*") if path.is_dir())
FORMS_EACH = 10  # of the 15 under each of 5 settings; templates that want turns to alternate refuse most
SLOW = frozenset({"gpt-oss", "minimax-m1", "qwen3"})  # read what messages say
JOINED = "empty"  # puts texts beside each other, which can make a control token of two
NO_TEMPLATE = frozenset({"gpt2", "internlm", "mpt", "phi-2", "starcoder2"})
CONTENTS = [
    "What is a fjord?",
    "A long, narrow inlet.",
    " both ends ",
    "\n\nlines around\n",
    "trailing tab\t",
    "a",
    ".",
    "",
    "  ",
    "<think>\nhm\n</think>\n\nyes",
    "a </think> alone",
    "<think> opened",
    "[INST] typed [/INST]",
    "system",
    "assistant",
    "user\nUSER: ASSISTANT: ### Response:\n",
    "{{ x }} {% if y %}",
    "你好，世界 🙂",
    "e\u0301 naïve",
    "<|im_end|>",
    "</s>",
    "<<SYS>>\nx\n<</SYS>>\n\n",
    "<tool_response>x</tool_response>",
    "Vorlun0q",
    "\ue1000\ue101",
    "QuxenoVar0z",
    "line\r\nline\u2028end",
]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "keep": {"control_tokens": "keep"},
    "refuse": {"control_tokens": "refuse"},
    "train_on_prompt": {"train_on_prompt": True},
    "mask_history": {"mask_history": True},
    "default_system": {"default_system": "Be brief. "},
    "default_system with control text": {"default_system": "Say <|im_end|> or </s> at the end."},
    "no thinking": {"enable_thinking": False},
    "thinking": {"enable_thinking": True},
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def identity(template: str | None, **settings: Any) -> dict[str, Any]:
    """Settings of a render step."""
    return {
        "template": template,
        "shape": "chat",
        "mask_history": False,
        "train_on_prompt": False,
        "control_tokens": "plain",
        "default_system": None,
        "enable_thinking": None,
    } | settings


def row(*turns: tuple[str, str]) -> dict[str, Any]:
    """A canonical row."""
    return {"messages": [{"role": role, "content": content} for role, content in turns], "tools": None}


def forms() -> Iterator[tuple[str, ...]]:
    """Roles of conversations: 1 to 4 turns, with and without system, and some that templates refuse."""
    for turns in range(1, 5):
        yield ("user", "assistant") * turns
        yield ("system", *("user", "assistant") * turns)
    yield ("assistant",)
    yield ("user", "assistant", "user")
    yield ("user", "user", "assistant")
    yield ("assistant", "user", "assistant")
    yield ("user", "assistant", "system", "user", "assistant")
    yield ("user", "assistant", "tool", "assistant")
    yield ("user",)


def every_row() -> list[dict[str, Any]]:
    """Each form with ordinary contents, and with a third of the others in one place or another."""
    made, places = [], itertools.count()
    for form, roles in enumerate(forms()):
        ordinary = [f"{CONTENTS[number % 2]} {number}" for number in range(len(roles))]
        made.append(row(*zip(roles, ordinary, strict=True)))
        for content in CONTENTS[form % 3 :: 3]:  # every content meets a third of the forms
            changed = list(ordinary)
            changed[next(places) % len(roles)] = content
            made.append(row(*zip(roles, changed, strict=True)))
    for content in CONTENTS:  # in every place at once, and in each place of the shortest form
        made.append(row(("system", content), ("user", content), ("assistant", content)))
        made.append(row(("user", content), ("assistant", "ok")))
        made.append(row(("user", "hi"), ("assistant", content)))
        made.append(row(("system", content), ("user", "hi"), ("assistant", "ok")))
    return made


ROWS = every_row()
CONTROL = {"<|im_end|>", "</s>"}  # what settings make a difference to
SOME = [given for n, given in enumerate(ROWS) if n % 7 == 0 or CONTROL & {m["content"] for m in given["messages"]}]


def model_folder(path: Path, template: str | None = None) -> Path:
    """A model's folder with special tokens of many families."""
    special = ["<|im_start|>", "<|im_end|>", *NAMES.values(), "<think>", "</think>"]
    added = [{"id": number, "content": token, "special": True} for number, token in enumerate(special)]
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {}}))
    config: dict[str, Any] = dict(NAMES)
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def compare(base: Path, template: str | None, rows: list[dict[str, Any]], **settings: Any) -> Counter[str]:
    """Require that both ways agree on all rows: texts, spans, typed control tokens, lost parts, refusals.

    Returns:
        `fast`: forms with a skeleton; `slow`: forms without; `filled`: rows that took the fast way.
    """
    renderer, slow = (RowRenderer(identity(template, **settings), base) for _ in range(2))
    found = renderer.render_all(rows)
    for given, one in zip(rows, found, strict=True):
        assert one == slow.render(given), given
    known = Counter("fast" if skeleton else "slow" for skeleton in renderer.skeletons.known.values())
    known["filled"] = sum(renderer._filled(given, True) is not None for given in rows)
    return known


def compare_all(base: Path, template: str | None, number: int) -> Counter[str]:
    """`compare` of every second row and under every second setting; the forms of all are counted together.

    Every row and every setting meets half of the shipped templates and half of the published ones.
    """
    counts = compare(base, template, ROWS[number % 2 :: 2])
    for settings in list(SETTINGS.values())[1 + number % 2 :: 2]:
        counts += compare(base, template, SOME, **settings)
    return counts


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_fills_rows_as_it_renders_them(tmp_path: Path, name: str) -> None:
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    counts = compare_all(model_folder(tmp_path / "model"), text, SHIPPED.index(name))
    assert counts["fast"] + counts["slow"] == sum(counts.values()) - counts["filled"] > 60
    assert counts["fast"] >= FORMS_EACH or name == JOINED
    assert counts["filled"] > 2 * counts["fast"]


@pytest.mark.parametrize("name", PUBLISHED or [None])
def test_a_published_template_fills_rows_as_it_renders_them(name: str | None) -> None:
    need_oracle()
    assert name is not None
    if name in NO_TEMPLATE:
        with pytest.raises(InputError, match="the model has no chat template"):
            compare_all(template_folder(name), None, 0)
        return
    counts = compare_all(template_folder(name), None, PUBLISHED.index(name))
    if name not in SLOW:
        assert counts["fast"] >= FORMS_EACH
        assert counts["filled"] > 2 * counts["fast"]


def test_rows_with_parts_that_the_template_drops_say_so_on_the_fast_way_too(tmp_path: Path) -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = RowRenderer(identity(template), model_folder(tmp_path / "model"))
    (found,) = renderer.render_all([row(("system", "Be brief."), ("user", "hi"), ("assistant", "ok"))])
    assert isinstance(found, list)
    assert [(text.lost, text.typed) for text in found] == [(("system",), [])]
    assert list(renderer.skeletons.known.values()) != [None]


def test_a_default_system_message_with_the_text_of_a_control_token_stays_text(tmp_path: Path) -> None:
    text = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    renderer = RowRenderer(identity(text, default_system="Say </s>."), model_folder(tmp_path / "model"))
    (found,) = renderer.render_all([row(("user", "hi"), ("assistant", "ok"))])
    assert isinstance(found, list)
    ((start, end),) = [found[0].typed]
    assert found[0].text.encode()[start:end] == b"</s>"


def test_a_template_with_the_characters_of_opaque_texts_goes_the_slow_way(tmp_path: Path) -> None:
    template = "{% for m in messages %}\ue1000\ue101{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}\ue1000\ue101assistant: {% endif %}"
    counts = compare(model_folder(tmp_path / "model"), template, ROWS[::5])
    assert (counts["fast"], counts["filled"]) == (0, 0)


def test_longer_conversations_than_are_learned_are_rendered_one_by_one(tmp_path: Path) -> None:
    text = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    turns = [(("user", "assistant")[number % 2], f"turn {number}") for number in range(MOST_TURNS + 2)]
    counts = compare(model_folder(tmp_path / "model"), text, [row(*turns[:-2]), row(*turns)])
    assert dict(counts) == {"fast": 1, "slow": 1, "filled": 1}


@pytest.mark.parametrize(
    ("before", "behind", "question"),
    [("<", "</s>", "|im_start|>"), ("", "|im_end|>", "hi<"), ("", "", "<|im_")],
    ids=["with what stands before", "with what stands behind", "with another text"],
)
def test_a_text_that_makes_a_control_token_with_its_neighbour_goes_the_slow_way(
    tmp_path: Path, before: str, behind: str, question: str
) -> None:
    template = "{% for m in messages %}" + before + "{{ m.content }}" + behind + "{% endfor %}"
    rows = [row(("user", question), ("assistant", "end|> ok")), row(("user", "hi"), ("assistant", "ok"))]
    assert compare(model_folder(tmp_path / "model"), template, rows)["filled"] == 0


def test_characters_that_the_engine_marks_answers_with_are_left_to_the_engine(tmp_path: Path) -> None:
    text = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    rows = [row(("user", "hi"), ("assistant", f"a{mark}b")) for mark in "\ue0f0\ue0f1"]
    assert compare(model_folder(tmp_path / "model"), text, rows)["filled"] == 0
