"""Chat templates: text equal to transformers', spans proved or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from tasks.template import ChatTemplate, Refusal, Rendered, trained_spans

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


TYPED = [{"role": "user", "content": "stop<|im_end|>"}, {"role": "assistant", "content": "a<|im_end|>b"}]


def test_typed_control_tokens_are_plain_text_kept_or_refused() -> None:
    template = make(CHATML)
    plain, kept = (template.render_training(TYPED, control_tokens=way) for way in ("plain", "keep"))  # type: ignore[arg-type]
    assert isinstance(plain, Rendered)
    assert kept == replace(plain, typed=())
    assert [plain.text[start:end] for start, end in plain.spans] == ["a<|im_end|>b<|im_end|>"]
    assert plain.typed == ((21, 31), (65, 75))
    assert template.render_training(TYPED) == plain
    assert refused(template, TYPED, control_tokens="refuse") == Refusal(
        "control_text", "message 1 has the text of the control token '<|im_end|>'"
    )
    assert refused(template, TALK, tools=[{"name": "<s>"}], control_tokens="refuse").reason == "control_text"


def test_typed_tokens_are_found_in_tools_calls_and_keys_beside_characters_of_private_use() -> None:
    json_too = "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{{ tools | tojson if tools and loop.last }}"
    template = chatml("{{ m.content }}<|im_end|>", json_too.replace("}}{{ tools", "}}<|im_end|>{{ tools"))
    call = {"function": {"name": "f", "arguments": {"</s>": "\ue100<s>\ue101"}}}
    row = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    plain = template.render_training(row, tools=[{"function": {"name": "f", "description": "<|im_start|>"}}])
    assert isinstance(plain, Rendered)
    assert [plain.text[start:end] for start, end in plain.typed] == ["</s>", "<s>", "<|im_start|>"]


@pytest.mark.parametrize(
    ("new", "messages"),
    [
        ("{{ m.content if '<|im_end|>' not in m.content }}", TYPED),
        ("{{ m.content | replace('<|im_end|>', '') }}", TYPED),
        ("{{ m.content[:7] }}{{ raise_exception('no') if m.content[4:6] == '<|' and m.content[-1] != '>' }}", TYPED),
        (
            "{{ m.content[0] + m.content[1] if m.role == 'user' else m.content }}",
            [{"role": "user", "content": ["a<", "s>"]}, TALK[1]],
        ),
    ],
    ids=["asks for it", "cuts it out", "cuts it in two", "joins it of two parts"],
)
def test_a_row_whose_typed_tokens_cannot_be_told_from_real_ones_is_refused(new: str, messages: Any) -> None:
    assert refused(chatml("{{ m.content }}", new), messages).reason in ("control_text", "mask_not_proved")


def test_a_control_token_made_of_a_question_and_its_answer_is_refused() -> None:
    template = make("{% for m in messages %}{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}")
    row = [{"role": "user", "content": "a<"}, {"role": "assistant", "content": "s>b"}]
    assert refused(template, row).detail == "an answer and the text beside it make the control token '<s>'"
    assert trained(template, row, control_tokens="keep") == ["s>b</s>"]


def test_the_reasoning_tags_of_an_answer_are_its_own_also_where_they_are_control_tokens() -> None:
    template = make(THINKING, control_tokens=CONTROL | {"<think>", "</think>"})
    row = [TALK[0], {"role": "assistant", "content": "<think>\na\n</think>\n\nok"}]
    plain = template.render_training(row)
    assert plain == template.render_training(row, control_tokens="keep")
    asked = template.render_training([{"role": "user", "content": "what is <think>?"}, row[1]])
    assert isinstance(asked, Rendered)
    assert [asked.text[start:end] for start, end in asked.typed] == ["<think>"]


def test_a_default_system_message_is_for_rows_without_one_and_numbers_in_refusals_stay() -> None:
    template = make(CHATML, default_system="Be kind.")
    assert template.render(TALK[:1]) == "<|im_start|>system\nBe kind.<|im_end|>\n" + make(CHATML).render(TALK[:1])
    own = [{"role": "system", "content": "Be brief."}, *TALK]
    assert template.render_training(own) == make(CHATML).render_training(own)
    assert trained(template, TALK) == ["ok<|im_end|>", "no<|im_end|>"]
    assert refused(template, CALLING).detail.startswith("message 2 (assistant) loses its tool call")
    assert refused(template, TYPED, control_tokens="refuse").detail.startswith("message 1 has")
    drops = chatml("<|im_start|>{{", "{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{")
    assert replace(drops, default_system="x").render_training(TALK).lost == ("system",)  # type: ignore[union-attr]


def test_variables_reach_the_template_its_probes_and_its_identity() -> None:
    text = CHATML.replace("assistant\n{% endif", "assistant\n{{ '<think></think>' if not enable_thinking }}{% endif")
    off, on = make(text), make(text, variables=(("enable_thinking", True),))
    assert off.render(TALK[:1], add_generation_prompt=True).endswith("<think></think>")
    assert on.render(TALK[:1], add_generation_prompt=True).endswith("assistant\n")
    assert on.render(TALK[:1], add_generation_prompt=True, enable_thinking=False).endswith("<think></think>")
    assert off.with_variables({"enable_thinking": True}) == on
    assert off.with_variables({"enable_thinking": True}) is off.with_variables({"enable_thinking": True})
    marked = make(text.replace("{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"))
    assert trained(marked, TALK[:2]) == ["ok<|im_end|>"]
    assert trained(marked, TALK[:2], variables={"enable_thinking": True}) == ["<think></think>ok<|im_end|>"]


def test_trained_are_all_answers_the_last_one_or_everything_but_the_bos() -> None:
    row = make("{{ bos_token }}" + CHATML).render_training(TALK)
    assert isinstance(row, Rendered)
    assert [row.text[start:end] for start, end in trained_spans(row, mask_history=True)] == ["no<|im_end|>"]
    ((start, end),) = trained_spans(row, train_on_prompt=True, bos_token="<s>")
    assert (row.text[:start], row.text[end:]) == ("<s>", "")
    assert trained_spans(row, train_on_prompt=True) == ((0, len(row.text)),)
    with pytest.raises(ValueError, match="choose one"):
        trained_spans(row, train_on_prompt=True, mask_history=True)


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
    others += [make(CHATML, variables=(("enable_thinking", False),)), make(CHATML, default_system="")]
    assert len({json.dumps(template.identity(), sort_keys=True) for template in (plain, *others)}) == 6


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
