"""Every shipped template: registered, explained, proved by its own marks, equal to what transformers makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, models

from flows.cli.looking import list_registries
from registry.errors import InputError
from registry.templates import FOLDER, NAMES, TEMPLATES, TemplateEntry, find_template, template_text
from tasks.template import ChatTemplate, Refusal, Rendered, compile_template, trained_spans

FILES = sorted(FOLDER.rglob("*.jinja"))
NAMED = sorted(path.name.removesuffix(".jinja") for path in FILES)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
NO_THOUGHT = re.compile(r"<think>\s*</think>\s*")  # what some templates write before an answer without reasoning
TALK = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "It is six."},
]
SYSTEM = {"role": "system", "content": "You are terse."}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": "Adds.", "parameters": {"type": "object"}}}
    for name in ("add", "sum")
]
# Two refuse a system message, these drop it.
NO_SYSTEM = {"gemma", "mistral-v0.1"}
LOSES_SYSTEM = {"falcon", "mistral-nemo", "mistral-v0.3", "phi-3-first", "phi-3-medium"}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


def make(name: str, **special: str) -> ChatTemplate:
    """A shipped template with a made-up tokenizer's tokens."""
    special = SPECIAL | special
    entry, text = find_template(name, "template"), template_text(name, "template")
    assert text is not None
    control = frozenset({*special.values(), *entry.stops_at(special["eos_token"])})
    return ChatTemplate(text, tuple(special.items()), control)


def trained(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    row = template.render_training(messages, tools)
    assert isinstance(row, Rendered), row
    return [row.text[start:end] for start, end in row.spans]


def test_every_file_is_registered_and_none_is_missing() -> None:
    assert len(FILES) == 43
    assert sorted(TEMPLATES) == NAMED
    assert {entry.path for entry in TEMPLATES.values()} == set(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_begins_with_a_paragraph_on_what_is_odd_about_it_and_compiles(path: Path) -> None:
    text = path.read_text("utf-8")
    paragraph = text.removeprefix("{#- ").split("-#}\n")[0].strip()
    assert text.startswith("{#- ")
    assert 80 < len(paragraph) < 900
    assert paragraph.endswith(".")
    assert "{% generation %}" not in text  # would keep the white space around it
    assert text.count("{%- generation %}") == text.count("{%- endgeneration %}") > 0
    compile_template(text, "2024-07-26", path.name)


@pytest.mark.parametrize("name", NAMED)
def test_two_turns_train_the_answers_with_the_terminator_that_the_registry_names(name: str) -> None:
    template, entry = make(name), TEMPLATES[name]
    if name == "deepseek-r1":
        entry = entry.model_copy(update={"terminator": "</s>"})  # that is the EOS of its tokenizer
    ends = {"eos_token": "</s>", None: ""}.get(entry.terminator, entry.terminator)
    if entry.terminator in ("<｜end▁of▁sentence｜>", "<|endoftext|>"):  # likewise
        ends = "</s>"
    assert (template.terminator or "") == ends
    answers = [NO_THOUGHT.sub("", text.removesuffix(ends)).strip() for text in trained(template, TALK)]
    assert answers == ["Four.", "It is six."]
    row = template.render_training(TALK)
    assert isinstance(row, Rendered)
    assert row.lost == ()
    assert template.generation_marks(TALK) == list(row.spans)
    assert [row.text[start:end] for start, end in trained_spans(row, mask_history=True)] == trained(template, TALK)[1:]


@pytest.mark.parametrize("name", NAMED)
def test_system_messages_are_written_replaced_refused_or_reported_lost(name: str) -> None:
    template, default = make(name), TEMPLATES[name].default_system
    assert default is None or default in template.render(TALK)
    row = template.render_training([SYSTEM, *TALK])
    if name in NO_SYSTEM:
        assert isinstance(row, Refusal)
        assert row.reason == "template_error"
        return
    assert isinstance(row, Rendered)
    assert ("You are terse." in row.text) == (name not in LOSES_SYSTEM)
    assert row.lost == (("system",) if name in LOSES_SYSTEM else ())
    assert default is None or default not in row.text
    own = ChatTemplate(template.text, template.special_tokens, template.control_tokens, default_system="You are terse.")
    assert own.render_training(TALK) == row


def calling(arguments: Any) -> list[dict[str, Any]]:
    return [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [call("add", arguments)]},
        {"role": "tool", "content": "RESULT", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "Four."},
    ]


@pytest.mark.parametrize("name", NAMED)
def test_tool_calls_are_trained_results_never_and_lost_calls_refuse_the_row(name: str) -> None:
    template = make(name)
    arguments = {"a": 2, "b": "two"}
    messages = calling(json.dumps(arguments) if name == "deepseek-r1" else arguments)
    row = template.render_training(messages, TOOLS)
    if TEMPLATES[name].tool_format is None:
        assert isinstance(row, Refusal)
        assert row.reason in ("content_lost", "template_error")
        return
    assert isinstance(row, Rendered), row
    first, second = (row.text[start:end] for start, end in row.spans)
    assert all(word in first for word in ("add", "two"))
    assert "Four." in second
    assert "RESULT" in row.text
    assert "RESULT" not in first + second
    assert ("tools" in row.lost) == (name == "deepseek-r1")
    assert template.generation_marks(messages, TOOLS) == list(row.spans)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "qwen3-nothink", "qwq", "glm4.5"])
def test_text_before_calls_several_calls_and_neighbouring_results_all_survive(name: str) -> None:
    calls = [call("add", {"a": 1}), call("sum", {"of": [1, 2]})]
    messages = [
        TALK[0],
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "content": "ONE"},
        {"role": "tool", "content": ""},
        {"role": "tool", "content": "THREE"},
        {"role": "assistant", "content": "Three."},
    ]
    first, second = trained(make(name), messages, TOOLS)
    assert all(word in first for word in ("Let me see.", "add", "sum", "[1, 2]"))
    assert "Three." in second
    assert not {"ONE", "THREE"} & {word for text in (first, second) for word in text.split()}


def test_terminators_that_are_not_the_tokenizers_eos_are_trained() -> None:
    ends = {name: make(name).terminator for name in ("gemma", "llama3", "phi-3", "deepseek-coder", "cohere")}
    assert ends == {
        "gemma": "<end_of_turn>",
        "llama3": "<|eot_id|>",
        "phi-3": "<|end|>",
        "deepseek-coder": "<|EOT|>",
        "cohere": "<|END_OF_TURN_TOKEN|>",
    }
    assert trained(make("gemma", pad_token="<end_of_turn>"), TALK)[1] == "It is six.<end_of_turn>"


def test_thinking_is_switched_by_a_variable_and_earlier_reasoning_is_reported_lost() -> None:
    thinking = [*TALK[:3], {"role": "assistant", "content": "<think>\n3+3=6\n</think>\n\nIt is six."}]
    template = make("qwen3")
    assert trained(template, thinking) == ["Four.<|im_end|>", "<think>\n3+3=6\n</think>\n\nIt is six.<|im_end|>"]
    off = template.render_training(TALK, variables={"enable_thinking": False})
    assert isinstance(off, Rendered)
    assert [off.text[start:end] for start, end in off.spans] == ["Four.<|im_end|>", "It is six.<|im_end|>"]
    before = template.render_training([thinking[0], thinking[3], *TALK[2:]])
    assert isinstance(before, Rendered)
    assert before.lost == ("reasoning",)
    assert make("deepseek-r1").render_training(thinking).lost == ("reasoning",)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMED)
def test_rendering_equals_that_of_transformers(name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    template = make(name)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    published = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template.text, **SPECIAL)
    rows = [(TALK, None), ([SYSTEM, *TALK], None), (TALK[:3], None), (TALK, TOOLS), (calling({"a": 1}), TOOLS)]
    compared = 0
    for messages, tools in rows:
        for asked in (False, True):
            try:
                wanted = published.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=asked)
            except (TemplateError, TypeError):
                with pytest.raises(InputError):
                    template.render(messages, tools, add_generation_prompt=asked)
                continue
            assert template.render(messages, tools, add_generation_prompt=asked) == wanted
            compared += 1
    assert compared >= 6


def test_every_name_of_other_tools_means_one_template() -> None:
    assert {name: find_template(name, "").name for name in ("qwen", "mistral", "intern2", "phi", "codeqwen", "yi")} == {
        "qwen": "qwen2.5",
        "mistral": "mistral-v0.3",
        "intern2": "internlm2",
        "phi": "phi-3",
        "codeqwen": "qwen2",
        "yi": "chatml",
    }
    of_llamatuner = "baichuan baichuan2 chatglm3 cohere deepseek falcon gemma intern2 llama2 llama3 mistral phi qwen"
    of_llamatuner += " codeqwen starcoder2 xverse yi yuan vicuna alpaca default empty"
    assert set(of_llamatuner.split()) <= set(NAMES)
    assert len(NAMES) == len(TEMPLATES) + sum(len(entry.aliases) for entry in TEMPLATES.values())
    assert template_text("qwen", "template") == template_text("qwen2.5", "template")
    assert template_text("auto", "template") is None


def test_an_unknown_name_is_answered_with_the_nearest_also_among_aliases() -> None:
    for name, nearest in {"qwne2.5": "qwen2.5", "intern-2": "intern2", "llama-3.1": "llama3.1"}.items():
        with pytest.raises(InputError, match=rf"'{name}' is not a known template\. Did you mean {nearest}\?"):
            template_text(name, "template")
    with pytest.raises(InputError, match=r"Known: alpaca, auto, baichuan"):
        find_template("?", "template")


def test_stop_words_name_the_tokenizers_own_eos_by_its_name() -> None:
    assert TEMPLATES["alpaca"].stops_at("<|endoftext|>") == ("<|endoftext|>",)
    assert TEMPLATES["gemma"].stops_at("</s>") == ("<end_of_turn>", "<eos>")
    with pytest.raises(ValueError, match="stop_words"):
        TemplateEntry.model_validate({"name": "x", "description": "x", "families": ["x"], "stop_words": []})


def test_the_list_shows_name_families_and_stop_words(capsys: pytest.CaptureFixture[str]) -> None:
    list_registries("templates", as_json=True)
    listed = json.loads(capsys.readouterr().out)["templates"]
    assert sorted(listed) == NAMED
    assert "Llama-3.2-Instruct" in listed["llama3.1"]
    assert "Stops at <|eot_id|>" in listed["llama3.1"]
