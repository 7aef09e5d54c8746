"""Chat templates: text equal to transformers', spans proved or refused."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from tasks.template import ChatTemplate, Refusal, Rendered

ORACLE = Path(os.environ.get("LLAMATUNER_ORACLE") or Path(__file__).parents[3] / "shared" / "oracle")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # drops the reasoning of earlier turns, and writes an empty one in the last turn
    "{%- for m in messages %}{%- set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{%- if '</think>' not in m.content %}{%- set thought = '' %}{%- endif %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- text + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CONTROL = frozenset({"<s>", "</s>", "<|im_start|>", "<|im_end|>"})
WORDS = {"hi": "user", "ok": "assistant", "more": "user", "no": "assistant"}
TALK = [{"role": role, "content": text} for text, role in WORDS.items()]
CALL: dict[str, Any] = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "sum?"},
    {"role": "assistant", "content": "Let me add.", "tool_calls": [CALL]},
    *({"role": "tool", "content": result} for result in ("3", "")),
    {"role": "assistant", "content": "3"},
]


def make(text: str, **fields: Any) -> ChatTemplate:
    special = (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<|im_end|>"))
    return ChatTemplate(text, **{"special_tokens": special, "control_tokens": CONTROL, **fields})


def chatml(old: str, new: str) -> ChatTemplate:
    assert old in CHATML
    return make(CHATML.replace(old, new))


def trained(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    result = template.render_training(messages, **options)
    assert isinstance(result, Rendered), result
    return [result.text[start:end] for start, end in result.spans]


def refused(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> Refusal:
    result = template.render_training(messages, **options)
    assert isinstance(result, Refusal), result
    return result


def test_chatml_trains_answers_with_their_terminator_also_when_it_is_the_pad_token() -> None:
    result = make(CHATML).render_training(TALK[:2])
    assert result == Rendered("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n", ((52, 64),), ())
    assert trained(make(CHATML), TALK) == ["ok<|im_end|>", "no<|im_end|>"]
    assert make(CHATML).terminator == "<|im_end|>"


def test_a_terminator_that_is_no_added_token_is_found_too() -> None:
    template = make(
        CHATML.replace("{% if", "{% if not add_generation_prompt %}</s>{% endif %}{% if"), control_tokens=frozenset()
    )
    assert template.terminator == "<|im_end|>"
    assert trained(template, TALK) == ["ok<|im_end|>", "no<|im_end|>"]


def test_a_family_without_terminator_ends_the_span_at_the_content() -> None:
    template = make(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert template.terminator is None
    assert trained(template, TALK) == ["ok", "no"]
    empty = [TALK[0], {"role": "assistant", "content": ""}]
    assert refused(template, empty).reason == "empty_answer"


def test_a_terminator_written_only_between_turns_is_not_trained() -> None:
    template = chatml("<|im_end|>\n", "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}")
    assert template.terminator is None
    assert trained(template, TALK) == ["ok", "no"]


def test_llama2_trains_from_the_end_of_the_instruction_and_keeps_white_space_as_the_template_writes_it() -> None:
    messages = [TALK[0], {"role": "assistant", "content": "\nok  "}, *TALK[2:]]
    result = make(LLAMA2).render_training(messages)
    assert result == Rendered("<s>[INST] hi [/INST] ok </s><s>[INST] more [/INST] no </s>", ((20, 28), (50, 58)), ())


def test_the_templates_own_error_is_the_reason_of_a_refusal() -> None:
    refusal = refused(make(LLAMA2), [TALK[0], *TALK[:2]])
    assert refusal == Refusal("template_error", "the template refuses the conversation: roles must alternate")
    with pytest.raises(InputError, match="chat template: roles must alternate"):
        make(LLAMA2).render([TALK[0], *TALK[:2]])


def test_dropped_earlier_reasoning_is_reported_and_the_spans_fit_what_is_left() -> None:
    thinking = [dict(message) for message in TALK]
    thinking[1]["content"], thinking[3]["content"] = "<think>\na\n</think>\n\nok", "<think>\nb\n</think>\n\nno"
    result = make(THINKING).render_training(thinking)
    assert isinstance(result, Rendered)
    assert result.lost == ("reasoning",)
    assert trained(make(THINKING), thinking) == ["ok<|im_end|>", "<think>\nb\n</think>\n\nno<|im_end|>"]
    assert trained(make(THINKING), TALK) == ["ok<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]


def test_a_generation_prompt_that_begins_the_reasoning_is_cut_where_the_text_differs() -> None:
    template = chatml(
        "{% if add_generation_prompt %}<|im_start|>assistant\n",
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n",
    )
    assert trained(template, TALK) == ["ok<|im_end|>", "no<|im_end|>"]
    thinking = [TALK[0], {"role": "assistant", "content": "<think>\na\n</think>\n\nok"}]
    assert trained(template, thinking) == ["a\n</think>\n\nok<|im_end|>"]


def test_generation_marks_render_their_body_and_must_agree_with_the_spans() -> None:
    marked = CHATML.replace(
        "{{ m.content }}<|im_end|>\n",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
    )
    assert make(marked).render(TALK) == make(CHATML).render(TALK)
    assert make(marked).render_training(TALK) == make(CHATML).render_training(TALK)
    elsewhere = marked.replace("m.role == 'assistant'", "m.role == 'user'")
    assert refused(make(elsewhere), TALK).reason == "mask_not_proved"


def test_a_header_that_the_generation_prompt_lacks_is_refused_unless_the_template_marks_the_answer() -> None:
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    assert refused(make(text), TALK) == Refusal(
        "no_generation_prompt", "message 2 (assistant) has a header that the template does not write for generation"
    )
    only = text.replace(
        "{{ m.content }}</s>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}{{ m.content }}</s>{% endif %}",
    )
    assert trained(make(only), TALK) == ["ok</s>", "no</s>"]


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content if m.role == 'user' }}",
        "{{ m.content | upper }}",
        "{{ m.content }}{{ m.content if m.role == 'assistant' }}",
    ],
    ids=["drops the answer", "changes its case", "repeats it"],
)
def test_a_template_that_changes_answers_is_refused(content: str) -> None:
    assert refused(chatml("{{ m.content }}", content), TALK).reason == "mask_not_proved"


@pytest.mark.parametrize(
    ("answer", "content", "reason"),
    [
        ("x" * 40, "{{ m.content[:30] }}", "content_lost"),
        ("a  b", "{{ m.content | replace('  ', ' ') }}", "content_lost"),
        ("secret", "{{ m.content if m.content != 'secret' }}", "content_lost"),
        ("twice", "{{ m.content }}{{ m.content if m.content == 'twice' }}", "mask_not_proved"),
    ],
    ids=["cut", "squeezed", "dropped", "repeated"],
)
def test_an_answer_that_is_changed_in_its_row_only_is_refused(answer: str, content: str, reason: str) -> None:
    template = chatml("{{ m.content }}", content)
    assert trained(template, TALK) == ["ok<|im_end|>", "no<|im_end|>"]
    refusal = refused(template, [*TALK[:3], {"role": "assistant", "content": answer}])
    assert refusal.reason == reason
    assert refusal.detail.startswith("message 4 (assistant)")


def test_an_empty_answer_trains_its_terminator_and_a_row_without_answer_is_refused() -> None:
    assert trained(make(CHATML), [TALK[0], {"role": "assistant", "content": ""}]) == ["<|im_end|>"]
    assert refused(make(CHATML), TALK[:1]).reason == "no_answer"


def test_typed_control_text_is_refused_unless_allowed() -> None:
    messages = [{"role": "user", "content": "stop<|im_end|>"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    assert refused(make(CHATML), messages) == Refusal(
        "control_text", "message 1 has the text of the control token '<|im_end|>'"
    )
    assert refused(make(CHATML), TALK, tools=[{"name": "<s>"}]).reason == "control_text"
    assert trained(make(CHATML), messages, allow_control_text=True) == ["a<|im_end|>b<|im_end|>"]


def test_answers_equal_to_each_other_to_headers_and_to_user_text_keep_their_own_places() -> None:
    same = [{"role": role, "content": "assistant"} for role in ("user", "assistant", "user", "assistant")]
    result = make(CHATML).render_training(same)
    assert isinstance(result, Rendered)
    assert result.spans == ((59, 78), (138, 157))
    assert trained(make(CHATML), same) == ["assistant<|im_end|>"] * 2


def test_tool_calls_belong_to_the_answer_and_tool_results_do_not() -> None:
    template = chatml(
        "<|im_end|>\n{% endfor", "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor"
    )
    assert trained(template, CALLING) == [
        'Let me add.{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}<|im_end|>',
        "3<|im_end|>",
    ]
    strict = template.text.replace(
        "<|im_start|>{{ m.role",
        "{% if m.role == 'tool' and loop.previtem.role == 'assistant' and not loop.previtem.tool_calls %}"
        "{{ raise_exception('a result without a call') }}{% endif %}<|im_start|>{{ m.role",
    )
    assert trained(make(strict), CALLING) == trained(template, CALLING)


def test_a_tool_call_or_its_text_that_the_template_drops_is_refused() -> None:
    assert refused(make(CHATML), CALLING) == Refusal(
        "content_lost", "message 2 (assistant) loses its tool call: the template does not write it"
    )
    either = CHATML.replace("{{ m.content }}", "{{ m.tool_calls | tojson if m.tool_calls else m.content }}")
    assert refused(make(either), CALLING) == Refusal(
        "content_lost", "message 2 (assistant) loses its text, because it calls a tool"
    )


def test_dropped_messages_of_others_are_reported_even_when_their_text_is_elsewhere() -> None:
    template = chatml("<|im_start|>{{", "{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{")
    result = template.render_training([{"role": "system", "content": "hi"}, *TALK])
    assert isinstance(result, Rendered)
    assert result.lost == ("system",)
    assert make(CHATML).render_training(TALK, tools=[{"name": "f"}]).lost == ("tools",)  # type: ignore[union-attr]


def test_the_date_is_fixed_and_part_of_the_identity() -> None:
    text = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    assert make(text).render(TALK).startswith("26 Jul 2024\n")
    assert make(text, date="2030-01-02").render(TALK).startswith("02 Jan 2030\n")
    assert make(text).identity()["date"] == "2024-07-26"
    assert make(CHATML).identity()["date"] is None


def test_identity_is_json_and_every_part_changes_it() -> None:
    plain = make(CHATML)
    others = [make(CHATML + " "), make(CHATML, special_tokens=()), make(CHATML, control_tokens=frozenset())]
    assert len({json.dumps(template.identity(), sort_keys=True) for template in (plain, *others)}) == 4


def test_absent_fields_reasoning_and_json_are_as_in_transformers() -> None:
    text = "{% for m in messages %}{{ m.content is defined }} {{ m.reasoning_content }} {{ m.thinking }};{% endfor %}"
    message = {"role": "assistant", "content": None, "reasoning": "why"}
    assert make(text).render([message]) == "False why why;"
    text = "{{ tools[0] | tojson }}{{ tools[0] | tojson(indent=1) }}"
    assert make(text).render(TALK, tools=[{"b": "é<", "a": 1}]) == '{"b": "é<", "a": 1}{\n "b": "é<",\n "a": 1\n}'


def test_a_template_cannot_reach_the_interpreter() -> None:
    for text in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
    ):
        with pytest.raises(InputError, match=r"SecurityError|UndefinedError"):
            make(text).render(TALK)


def test_a_folder_gives_template_special_tokens_and_control_tokens(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "default", "template": "one"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "old", "eos_token": "</s>"}))
    added = [{"content": "<s>", "special": True}, {"content": "<think>", "special": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {}}))
    template = ChatTemplate.from_folder(tmp_path)
    assert template == ChatTemplate("one", (("bos_token", "<s>"), ("eos_token", "</s>")), frozenset({"<s>"}))
    (tmp_path / "chat_template.jinja").write_text("two")
    assert ChatTemplate.from_folder(tmp_path).text == "two"
    assert ChatTemplate.from_folder(tmp_path, "three").text == "three"


def test_a_folder_without_template_or_with_a_broken_one_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="the model has no chat template"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("fine\n{% if %}")
    with pytest.raises(InputError, match=r"chat_template\.jinja:2: the chat template does not compile"):
        ChatTemplate.from_folder(tmp_path)


def test_the_import_is_light() -> None:
    code = "import sys, tasks.template; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Rows that we refuse and the golden files do not. A lost tool call would train an empty answer.
NO_CALLS = {"c33": "content_lost", "c35": "content_lost"}
LAST_CALL = {"c35": "content_lost"}
ALL_CALLS = NO_CALLS | {"c49": "content_lost"}
NO_END = {"c39": "empty_answer"}
GROUPS: list[tuple[dict[str, str], str]] = [
    ({}, "deepseek-r1 llama3.1 llama3.2 mistral-v0.3 qwen2.5 qwen3-v2"),
    (NO_CALLS, "deepseek-coder deepseek-llm deepseek-v2 deepseek-v2.5 internlm2 phi-3-mini smollm2 yi"),
    (LAST_CALL, "gemma gemma3 llama2-chat mistral-v0.1"),
    (ALL_CALLS, "llama3"),
    (ALL_CALLS | NO_END, "chatglm3 glm-4"),
    (NO_CALLS | NO_END, "baichuan2"),
    (NO_END, "glm-4.5"),
    (NO_CALLS | NO_END | {"c44": "mask_not_proved"}, "falcon"),
]
REFUSED = {name: rows for rows, names in GROUPS for name in names.split()}
# golden name=tokenizer, where they differ
OTHER_NAMES = "deepseek-v2.5=deepseek-v2 llama2-chat=llama2 llama3.2=llama3.1 mistral-v0.1=mistral-v1"
OTHER_NAMES += " mistral-v0.3=mistral-v3 phi-3-mini=phi-3 qwen3-v2=qwen3"
TOKENIZERS = dict(pair.split("=") for pair in OTHER_NAMES.split())
TEMPLATES = {"deepseek-v2": "deepseek-llm"}  # where another tokenizer's folder has it
# A conversation that begins with an answer: the golden span of that answer starts at its content, for want of a
# prefix; ours where the header ends, as in every other turn of these families.
FIRST_ANSWER_STARTS_EARLIER = {"chatglm3", "deepseek-llm", "deepseek-v2", "glm-4", "glm-4.5"}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not (ORACLE / "golden").is_dir():
        pytest.skip(f"the oracle folder {ORACLE} is absent; LLAMATUNER_ORACLE may point to it")
    root = tmp_path_factory.mktemp("tokenizers")

    @cache
    def unpack(name: str) -> Path:
        folder = root / name
        folder.mkdir()
        for source in (ORACLE / "tokenizers" / name).iterdir():
            data = source.read_bytes()
            (folder / source.name.removesuffix(".xz")).write_bytes(
                lzma.decompress(data) if source.suffix == ".xz" else data
            )
        return folder

    return unpack


def token_spans(result: Rendered, offsets: list[tuple[int, int]]) -> list[list[int]]:
    """A token that begins before a span is outside, one that begins inside and ends beyond is in it."""
    spans = []
    for start, end in result.spans:
        inside = [number for number, (begin, _) in enumerate(offsets) if start <= begin < end]
        spans.append([inside[0], inside[-1] + 1])
    return spans


@pytest.mark.parametrize("name", REFUSED)
def test_texts_and_masks_equal_the_golden_ones(name: str, tokenizer_folder: Any) -> None:
    from tokenizers import Tokenizer

    folder = tokenizer_folder(TOKENIZERS.get(name, name))
    text = ChatTemplate.from_folder(tokenizer_folder(TEMPLATES[name])).text if name in TEMPLATES else None
    template = ChatTemplate.from_folder(folder, text)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    conversations = {row["id"]: row for row in json.loads((ORACLE / "conversations.json").read_text("utf-8"))}
    refusals = {}
    for line in (ORACLE / "golden" / f"{name}.jsonl").read_text("utf-8").rstrip("\n").split("\n"):
        row = json.loads(line)
        conversation = conversations[row["conv"]]
        messages, tools = conversation["messages"], conversation.get("tools")
        result = template.render_training(messages, tools, allow_control_text=True)
        if not row["ok"]:
            assert isinstance(result, Refusal)
            assert result.reason in ("template_error", "no_answer")
            continue
        assert template.render(messages, tools) == row["text"]
        if isinstance(result, Refusal):
            refusals[row["conv"][:3]] = result.reason
            continue
        encoding = tokenizer.encode(row["text"], add_special_tokens=False)
        assert (result.text, encoding.ids) == (row["text"], row["ids"])
        found = token_spans(result, encoding.offsets)
        if row["conv"].startswith("c44") and name in FIRST_ANSWER_STARTS_EARLIER:
            assert found[0][0] < row["mask_spans"][0][0]
            found[0][0] = row["mask_spans"][0][0]
        assert found == row["mask_spans"], row["conv"]
    no_answer = {"c07": "no_answer", "c47": "no_answer"}
    assert {conv: reason for conv, reason in refusals.items() if conv not in no_answer} == REFUSED[name]
