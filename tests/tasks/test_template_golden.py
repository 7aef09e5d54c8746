"""Texts, ids and masks equal those of the publishers' own templates: with `auto` and with the shipped ones.

What differs is listed here, each with its reason, and nothing else may.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from tokenizers import Tokenizer

from registry.errors import InputError
from registry.templates import find_template, template_text
from tasks.template import ChatTemplate, Refusal, Rendered
from tests.oracle import ORACLE, TOKENIZERS, conversations, golden_rows, tokenizer_folder

# Rows that we refuse and the golden files do not. A lost tool call would train an empty answer; an empty answer in a
# family without terminator has nothing to train.
NO_CALLS = {"c33": "content_lost", "c35": "content_lost"}
LAST_CALL = {"c35": "content_lost"}
ALL_CALLS = NO_CALLS | {"c49": "content_lost"}
NO_END = {"c39": "empty_answer"}
GROUPS: list[tuple[dict[str, str], str]] = [
    ({}, "deepseek-r1 llama3.1 llama3.2 mistral-v0.3 qwen2.5 qwen3 qwen3-instruct-2507 qwen3-v2 qwq-32b"),
    (NO_CALLS, "chatml-qwen2.5 deepseek-coder deepseek-llm deepseek-v2 deepseek-v2.5 deepseek-v3 internlm2 smollm2 yi"),
    (NO_CALLS, "phi-3-medium phi-3-mini phi-3-mini-first yi-1.5 zephyr"),
    (LAST_CALL, "alpaca gemma gemma3 llama2-chat mistral-v0.1 mistral-v0.2 vicuna-v1.1"),
    (ALL_CALLS, "llama3"),
    (ALL_CALLS | NO_END, "chatglm3 glm-4 glm-4-0414"),
    (NO_CALLS | NO_END, "baichuan2 falcon qwen1.5 solar"),
    (NO_END, "glm-4.5"),
]
REFUSED = {name: rows for rows, names in GROUPS for name in names.split()}
# Golden files whose template a tokenizer's folder has.
AUTO = [name for name in REFUSED if name not in TOKENIZERS]
AUTO += ["deepseek-v2.5", "llama2-chat", "llama3.2", "mistral-v0.1", "mistral-v0.3", "phi-3-mini", "qwen3-v2"]
AUTO.remove("qwen3")  # that folder has the later published template, golden as qwen3-v2
OTHER_FOLDER = {"deepseek-v2": "deepseek-llm"}  # the same template, found with another tokenizer
# A conversation that begins with an answer: the golden span of that answer starts at its content, for want of a
# prefix; ours where the header ends, as in every other turn of these families.
FIRST_ANSWER_STARTS_EARLIER = {
    *("chatglm3", "deepseek-llm", "deepseek-v2", "falcon", "glm-4", "glm-4-0414", "glm-4.5"),
}
# Without a newline before it Falcon's first header is not its generation prompt: only a mark tells where it ends.
FALCON_FIRST_ANSWER = {"c44": "mask_not_proved"}
# Golden rows are of an unofficial ChatML that leaves the last message open; ours closes it, or no stop is learned.
OPEN_END = {"chatml-qwen2.5"}
# Refused by the first published file for its missing content, written by the later one, which is the one we ship.
LATER_FILE = {("qwen3", "c49")}
COMPARED = {"texts": 0, "masks": 0, "refused by both": 0}


@lru_cache(maxsize=1)
def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder(name) / "tokenizer.json"))


def token_spans(spans: Any, offsets: list[tuple[int, int]]) -> list[list[int]]:
    """A token that begins before a span is outside, one that begins inside and ends beyond is in it."""
    found = []
    for start, end in spans:
        inside = [number for number, (begin, _) in enumerate(offsets) if start <= begin < end]
        found.append([inside[0], inside[-1] + 1])
    return found


def expected(name: str, row: dict[str, Any], tokenizer: Tokenizer) -> tuple[str, list[int], list[list[int]]]:
    """Golden text, ids and masks; closed where the golden file leaves the last turn open, so that none is trained."""
    if name not in OPEN_END:
        return row["text"], row["ids"], row["mask_spans"]
    tail = tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
    given = row["mask_spans"] or [[len(row["ids"])] * 2]  # c39: of an empty answer nothing is trained there
    closed = [[start, end + 1] for start, end in given]
    return row["text"] + "<|im_end|>\n", row["ids"] + tail, closed


def compare(name: str, template: ChatTemplate, marked: bool) -> tuple[dict[str, int], dict[str, str]]:
    """How many rows were compared, and which were refused though the publisher accepts them."""
    tokenizer = tokenizer_of(TOKENIZERS.get(name, name))
    refusals, counts = {}, dict(COMPARED)
    for row in golden_rows(name):
        conversation, short = conversations()[row["conv"]], row["conv"][:3]
        messages, tools = conversation["messages"], conversation.get("tools")
        result = template.render_training(messages, tools, control_tokens="keep")
        if not row["ok"]:
            if marked and (name, short) in LATER_FILE:
                assert isinstance(result, Rendered)
                continue
            assert isinstance(result, Refusal)
            assert result.reason in ("template_error", "no_answer")
            with pytest.raises(InputError):
                template.render(messages, tools)
            counts["refused by both"] += 1
            continue
        text = template.render(messages, tools)
        counts["texts"] += 1
        if short in ("c07", "c47"):  # without an answer
            assert text == row["text"] + ("<|im_end|>\n" if name in OPEN_END else "")
            assert isinstance(result, Refusal)
            continue
        wanted, ids, spans = expected(name, row, tokenizer)
        assert text == wanted
        if row["generation_prompt_suffix"] is not None and name not in OPEN_END:
            asked = template.render(messages, tools, add_generation_prompt=True)
            assert asked == row["text"] + row["generation_prompt_suffix"]
        if isinstance(result, Refusal):
            refusals[short] = result.reason
            continue
        encoding = tokenizer.encode(result.text, add_special_tokens=False)
        assert (result.text, encoding.ids) == (text, ids)
        found = token_spans(result.spans, encoding.offsets)
        if short == "c44" and name in FIRST_ANSWER_STARTS_EARLIER:
            assert found[0][0] < spans[0][0]
            found[0][0] = spans[0][0]
        assert found == spans, row["conv"]
        counts["masks"] += 1
        plain = template.render_training(messages, tools)
        assert isinstance(plain, Rendered)
        assert (plain.text, plain.spans, plain.lost) == (result.text, result.spans, result.lost)
        if marked and (name, short) != ("qwq-32b", "c30"):  # whose answer itself brings what the prompt would begin
            given = [{key: value for key, value in message.items() if value is not None} for message in messages]
            marks = template.generation_marks(given, tools)
            assert marks is not None
            assert tuple(marks) == result.spans
    return counts, refusals


def compare_own(name: str) -> None:
    """The template in the publisher's folder."""
    folder = tokenizer_folder(TOKENIZERS.get(name, name))
    text = ChatTemplate.from_folder(tokenizer_folder(OTHER_FOLDER[name])).text if name in OTHER_FOLDER else None
    counts, refusals = compare(name, ChatTemplate.from_folder(folder, text), marked=False)
    assert refusals == REFUSED[name] | (FALCON_FIRST_ANSWER if name == "falcon" else {})
    assert counts["texts"] + counts["refused by both"] == 34


def compare_shipped(name: str) -> None:
    """The template that we ship."""
    known = {"chatml-qwen2.5": "chatml"}.get(name, name)  # every other golden file has our name, or an alias of it
    entry = find_template(known, "template")
    template = ChatTemplate.from_folder(tokenizer_folder(TOKENIZERS.get(name, name)), template_text(known, "template"))
    counts, refusals = compare(name, template, marked=True)
    assert refusals == REFUSED[name]
    assert counts["texts"] + counts["refused by both"] == 34 - sum(name == other for other, _ in LATER_FILE)
    assert counts["masks"] == counts["texts"] - len(refusals) - sum(
        row["ok"] and row["conv"][:3] in ("c07", "c47") for row in golden_rows(name)
    )
    stops = entry.stops_at(dict(template.special_tokens).get("eos_token", ""))
    assert (template.terminator in stops) if entry.terminator else template.terminator is None


# in the order of their tokenizers, so that each is loaded once
CASES = [(name, "the publisher's own") for name in AUTO] + [(name, "shipped") for name in REFUSED]
CASES.sort(key=lambda case: TOKENIZERS.get(case[0], case[0]))


@pytest.mark.parametrize(("name", "whose"), CASES)
def test_a_template_renders_and_masks_as_golden(name: str, whose: str) -> None:
    (compare_shipped if whose == "shipped" else compare_own)(name)


def test_every_golden_file_is_compared() -> None:
    tokenizer_folder("gpt2")  # or skip
    assert {path.stem for path in (ORACLE / "golden").glob("*.jsonl")} == set(REFUSED)
    assert (len(REFUSED), len(AUTO)) == (39, 24)
    assert sum(map(len, REFUSED.values())) == 63
    assert (len(FIRST_ANSWER_STARTS_EARLIER), len(LATER_FILE), len(OPEN_END)) == (7, 1, 1)
