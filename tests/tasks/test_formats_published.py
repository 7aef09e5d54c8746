"""Published data sets come through with every row accounted for."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.formats import SHAPES, converter, detect
from tasks.reading import BadRow

ORACLE = Path(os.environ.get("LLAMATUNER_ORACLE") or Path(__file__).parents[3] / "shared" / "oracle")
needs_oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"no published data sets: {ORACLE} is not there")


def load(name: str) -> list[dict[str, Any]]:
    data = (ORACLE / "datasets" / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")
    if ".jsonl" in name:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    found = json.loads(text)
    return list(found["examples"]) if isinstance(found, dict) else list(found)


def converted(name: str, shape: str) -> tuple[str, dict[str, int]] | None:
    """What was found, and rows made beside bad rows by reason; None where nothing was found."""
    data = load(name)
    form = detect(data[0], shape)
    if form is None:
        return None
    convert, counts = converter(form, shape), Counter[str]()
    for row in data:
        made = convert(row)
        counts.update([made.reason] if isinstance(made, BadRow) else {"rows": len(made)})
    return form.sentence(), dict(counts)


def answered(columns: str, rows: int) -> dict[str, Any]:
    """A set of questions with answers, read as chat and as prompts."""
    return {shape: (columns, {"rows": rows}) for shape in ("chat", "prompt")}


def paired(columns: str, rows: int) -> dict[str, Any]:
    """A set of pairs, in every shape they give."""
    counts = {"chat": rows, "preference": rows, "labelled": 2 * rows, "prompt": rows}
    return {shape: (columns, {"rows": count}) for shape, count in counts.items()}


ALPACA, TARGET = "alpaca columns instruction, input, output", "alpaca columns input, target"
PARTS = "transcript columns chosen, rejected"
IMAGES = ("openai columns messages, images", {"unsupported_content": 6})
LABELS = "openai columns messages, label"
SETS: dict[str, dict[str, tuple[str, dict[str, int]]]] = {
    "llamafactory/alpaca_en_demo.json": answered(ALPACA, 999),
    "llamafactory/alpaca_zh_demo.json": answered(ALPACA, 1000),
    "llamafactory/identity.json": answered(ALPACA, 91),
    "llamafactory/glaive_toolcall_en_demo.json": answered("sharegpt columns conversations, tools", 300),
    "llamafactory/glaive_toolcall_zh_demo.json": answered("sharegpt columns conversations, tools", 300),
    "llamafactory/reason_tool_use_demo_50.jsonl": answered("openai columns messages, tools", 50),
    "llamafactory/v1_sft_demo.jsonl": answered("openai column messages", 500),
    "llamafactory/dpo_en_demo.json": paired("sharegpt columns conversations, chosen, rejected", 300),
    "llamafactory/dpo_zh_demo.json": paired("sharegpt columns conversations, chosen, rejected", 300),
    "llamafactory/v1_dpo_demo.jsonl": paired("openai columns chosen_messages, rejected_messages", 10),
    "llamafactory/kto_en_demo.json": {
        "chat": (LABELS, {"rows": 150, "unwanted_answer": 150}),
        "labelled": (LABELS, {"rows": 300}),
        "prompt": (LABELS, {"rows": 300}),
    },
    "llamafactory/mllm_demo.json": {"chat": IMAGES, "prompt": IMAGES},
    "llamafactory/c4_demo.jsonl": {"text": ("text column text", {"rows": 300})},
    "hh_rlhf/harmless-base_test.jsonl.gz": {  # two speakers in a row, or an empty answer
        "chat": (PARTS, {"rows": 2300, "empty_output": 4, "bad_turn_order": 8}),
        "preference": (PARTS, {"rows": 2299, "empty_output": 4, "bad_turn_order": 9}),
        "labelled": (PARTS, {"rows": 4598, "empty_output": 4, "bad_turn_order": 9}),
        "prompt": (PARTS, {"rows": 2300, "empty_output": 4, "bad_turn_order": 8}),
    },
    "self_instruct/seed_tasks.jsonl": answered("alpaca columns instruction, input, output, instances", 175),
    "alpaca_eval/example_outputs.json": answered("alpaca columns instruction, output", 805),
    "gsm8k/test.jsonl": answered("alpaca columns question, answer", 1319),
    "gsm8k/train.jsonl.gz": answered("alpaca columns question, answer", 7473),
    "commonsense/ARC-Easy_test.json": answered(ALPACA, 2376),
    "commonsense/boolq_test.json": answered(ALPACA, 3270),
    "commonsense/winogrande_test.json": answered(ALPACA, 1267),
    "bbh/boolean_expressions.json": answered(TARGET, 250),
    "bbh/snarks.json": answered(TARGET, 178),
    "bbh/word_sorting.json": answered(TARGET, 250),
    "humaneval/HumanEval.jsonl.gz": {"prompt": ("alpaca column prompt", {"rows": 164})},
    "ifeval/input_data.jsonl": {"prompt": ("alpaca column prompt", {"rows": 540})},
    "mbpp/mbpp.jsonl": {"text": ("text column text", {"rows": 974})},
    "oasst/en_100_message.jsonl.gz": {"text": ("text column text", {"rows": 100})},
    "oasst/realistic_seed_data.json": {"text": ("text column text", {"rows": 444})},
    # trees of messages, and questions without a column of their own, are no rows of any known form
    "oasst/en_100_tree.jsonl.gz": {},
    "vicuna_bench/question.jsonl": {},
    "mt_bench/question.jsonl": {},
    "mt_bench/reference_gpt4.jsonl": {},
    "mt_bench/judge_prompts.jsonl": {},
}


@needs_oracle
@pytest.mark.parametrize("name", SETS)
def test_a_published_set_gives_exactly_these_rows_in_every_shape_it_can(name: str) -> None:
    found = {shape: converted(name, shape) for shape in SHAPES}
    assert {shape: counts for shape, counts in found.items() if counts is not None} == SETS[name]


@needs_oracle
def test_a_published_conversation_is_taken_or_refused_as_it_is_marked() -> None:
    """Those without an answer, or with an empty one, may be rendered but not trained on."""
    convert = converter(detect({"messages": [{"role": "user"}]}, "chat") or pytest.fail("not found"), "chat")
    refused = {}
    for row in json.loads((ORACLE / "conversations.json").read_text(encoding="utf-8")):
        made = convert(row)
        if isinstance(made, BadRow):
            refused[row["id"]] = made.reason
        else:
            assert [message["role"] for message in made[0]["messages"]] == [turn["role"] for turn in row["messages"]]
    assert refused == {
        "c07_prompt_only": "no_answer",
        "c39_empty_answer": "empty_output",
        "c42_same_role_user": "bad_turn_order",
        "c44_assistant_first": "bad_turn_order",
        "c46_unknown_role": "unknown_role",
        "c47_only_system": "no_answer",
    }
