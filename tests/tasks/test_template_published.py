"""Shipped templates against the publishers' own on conversations that no golden file has: equal texts, equal spans."""

from __future__ import annotations

from typing import Any

import pytest

from registry.errors import InputError
from registry.templates import template_text
from tasks.template import ChatTemplate, Refusal, Rendered
from tests.oracle import tokenizer_folder

SHIPPED = "baichuan2 chatglm3 deepseek-coder deepseek-r1 falcon gemma gemma3 glm-4 glm-4.5 internlm2 llama2 llama3 "
SHIPPED += "llama3.1 mistral-nemo qwen2.5 qwen3 smollm2 command-r-plus=cohere deepseek-llm=deepseek "
SHIPPED += "deepseek-v2=deepseek3 mistral-v1=mistral-v0.1 mistral-v3=mistral-v0.3 phi-3=phi-3 yi=chatml"
PAIRS = [tuple(pair.split("=")) if "=" in pair else (pair, pair) for pair in SHIPPED.split()]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "abcdefghi"}


def call(name: str, arguments: Any, number: str = "abcdefghi") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


ADD = {"name": "f", "description": 'd "q" é', "parameters": {"type": "object"}, "return": {"type": "string"}}
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": {"name": "g", "parameters": {}}}]
TWO = [call("f", {"x": [1, "a"], "y": None, "z": 1.5}), call("g", {"s": 'é"<'})]
WIRE = [call("f", '{"x": 1}'), call("g", "{}")]
ROWS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "reasoning in a field": (
        [user("q"), answer("a", reasoning_content="why"), user("r"), answer("b", thinking="so")],
        None,
    ),
    "empty reasoning": ([user("q"), answer("a", reasoning_content="")], None),
    "thinking twice": ([user("q"), answer("<think>\nx\n</think>\n\na<think>y</think>z")], None),
    "system in the middle": ([user("q"), answer("a"), system("be good"), user("r"), answer("b")], None),
    "two systems": ([system("one"), system("two"), user("r"), answer("b")], None),
    "system at the end": ([user("r"), answer("b"), system("x")], None),
    "two answers": ([user("q"), answer("a"), answer("b")], None),
    "two questions": ([user("q"), user("a"), answer("b")], None),
    "two calls with text": (
        [user("q"), answer("txt", tool_calls=TWO), result("1"), result("2"), answer("done"), user("u"), answer("v")],
        TOOLS,
    ),
    "two calls": ([user("q"), answer("", tool_calls=TWO), result("1"), result("2"), answer("done")], TOOLS),
    "no content": ([user("q"), answer(None, tool_calls=TWO[1:]), result("1"), answer("done")], TOOLS),
    "arguments as text": ([user("q"), answer("t", tool_calls=WIRE[:1]), result("1"), answer("done")], TOOLS),
    "calls in two turns": (
        [
            *[user("q"), answer("t", tool_calls=WIRE), result("1"), result("2"), answer("done")],
            *[user("x"), answer("t", tool_calls=WIRE[:1]), result("9"), answer("<think>k</think>e")],
        ],
        TOOLS,
    ),
    "calls without tools": ([user("q"), answer("", tool_calls=TWO[:1]), result("1"), answer("done")], None),
    "system and tools": ([system("sys"), user("q"), answer("a"), user("r"), answer("b")], TOOLS),
    "bare tools": ([user("q"), answer("a")], [ADD]),
    "a result at the end": ([user("q"), answer("", tool_calls=TWO[:1]), result("1")], TOOLS),
    "a result first": ([result("1"), user("q"), answer("a")], None),
    "a short id": ([user("q"), answer("", tool_calls=[call("f", {}, "short")]), result("1"), answer("a")], TOOLS),
    "an observation": ([user("q"), answer("a"), {"role": "observation", "content": "42"}, answer("b")], None),
    "a question at the end": ([system("s"), user("q"), answer("a"), user("b")], TOOLS),
    "parts": ([user([{"type": "text", "text": " a"}, {"type": "text", "text": "b "}]), answer("x")], None),
    "metadata": ([user("q"), answer("x", metadata="f"), answer("y")], None),
    "an answer alone": ([answer("x")], None),
    "results as questions": ([user("<tool_response>x</tool_response>"), answer("<think>a</think>b")], None),
    "reasoning and tools": (
        [
            *[user("q"), answer("", reasoning_content="r1", tool_calls=TWO[:1]), result("1")],
            *[answer("z", reasoning_content="r2"), user("n"), answer("m")],
        ],
        TOOLS,
    ),
    "another role": ([user("q"), {"role": "narrator", "content": "n"}, user("q"), answer("a")], None),
    "nothing said": ([system(""), user(""), answer("")], None),
    "the same twice": ([user("q"), answer("a"), user("q"), answer("a")], TOOLS),
}


def rendered(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any, **options: Any) -> str | None:
    try:
        return template.render(messages, tools, **options)
    except InputError:
        return None


@pytest.mark.parametrize(("tokenizer", "name"), PAIRS, ids=[name for _, name in PAIRS])
def test_a_shipped_template_equals_the_publishers_beyond_the_golden_rows(tokenizer: str, name: str) -> None:
    folder = tokenizer_folder(tokenizer)
    published = ChatTemplate.from_folder(folder)
    shipped = ChatTemplate.from_folder(folder, template_text(name, "template"))
    for row, (messages, tools) in ROWS.items():
        for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
            assert rendered(shipped, messages, tools, **options) == rendered(published, messages, tools, **options), row
        ours, theirs = (template.render_training(messages, tools) for template in (shipped, published))
        if isinstance(ours, Rendered) and isinstance(theirs, Rendered):
            assert ours == theirs, row
        elif isinstance(ours, Rendered) or isinstance(theirs, Rendered):  # a mark proves what a black box cannot
            assert isinstance(theirs, Refusal), (row, ours)
            assert theirs.reason == "mask_not_proved", row
