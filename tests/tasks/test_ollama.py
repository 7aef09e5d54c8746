"""A model's chat template in Ollama's language: the same text, or refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from tasks.ollama import as_ollama, modelfile, stop_texts, written
from tasks.template import ChatTemplate
from tests.tiny import CHAT_TEMPLATE

TEMPLATES = sorted((Path(__file__).parents[2] / "registry" / "templates").glob("*.jinja"))
CONTROL = frozenset({"<s>", "</s>", "<|im_end|>", "<|eot_id|>"})
NO_SYSTEM = {"falcon", "gemma", "mistral-v0.1", "phi-3-first", "phi-3-medium"}
TALK = [
    {"role": "system", "content": "Rhyme."},
    {"role": "user", "content": 'Say "{{ .Content }}".'},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Why?\n\nPlease."},
]


def template_of(text: str, **fields: Any) -> ChatTemplate:
    return ChatTemplate(text, (("bos_token", "<s>"), ("eos_token", "</s>")), CONTROL, **fields)


def shipped(name: str) -> ChatTemplate:
    (path,) = (path for path in TEMPLATES if path.stem == name)
    return template_of(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_we_ship_writes_the_same_text_in_ollamas_language(path: Path) -> None:
    template = template_of(path.read_text(encoding="utf-8"))
    found = as_ollama(template, None, False)
    has_system = path.stem not in NO_SYSTEM
    assert ("the model's template has no system message; Ollama leaves one out" in found.notes) != has_system
    for talk in (TALK[1:], TALK[1:2], TALK, TALK[:2])[: 4 if has_system else 2]:
        assert written(found.text, talk) == template.render(talk, add_generation_prompt=True)
    assert stop_texts(template, [])


def test_all_templates_we_ship_are_tried() -> None:
    assert len(TEMPLATES) == 43


def test_a_conversation_that_ends_with_an_answer_leaves_it_open() -> None:
    found = as_ollama(template_of(CHAT_TEMPLATE), None, False)
    assert written(found.text, TALK[1:3]) == (
        '<|im_start|>user\nSay "{{ .Content }}".<|im_end|>\n<|im_start|>assistant\nNo.'
    )


def test_a_default_system_message_is_in_the_template_and_in_the_file() -> None:
    found = as_ollama(template_of(CHAT_TEMPLATE, default_system="Be brief."), None, False)
    assert written(found.text, TALK[1:2]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert written(found.text, TALK[:2]).startswith("<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user")
    text = modelfile("m.gguf", found, ["<|im_end|>"], "Be brief.")
    head, _, rest = text.partition('TEMPLATE """')
    body, _, tail = rest.partition('"""\n')
    assert (head, body) == ("# ollama create NAME -f Modelfile\nFROM ./m.gguf\n", found.text)
    assert tail == 'SYSTEM """Be brief."""\nPARAMETER stop """<|im_end|>"""\n'


@pytest.mark.parametrize(
    ("writes", "tokenizer_adds", "file_adds", "start"),
    [
        (True, False, False, "<s>user"),
        (True, True, True, "user"),
        (True, False, True, "user"),
        (False, True, True, "user"),
        (False, True, False, "<s>user"),
        (False, False, False, "user"),
    ],
)
def test_a_model_sees_one_bos_whoever_writes_it(
    writes: bool, tokenizer_adds: bool, file_adds: bool, start: str
) -> None:
    text = ("{{ bos_token }}" if writes else "") + CHAT_TEMPLATE.replace("<|im_start|>", "")
    found = as_ollama(template_of(text), "<s>" if tokenizer_adds else None, file_adds)
    assert written(found.text, TALK[1:2]).startswith(start)


def test_a_bos_that_training_had_not_is_refused() -> None:
    with pytest.raises(InputError, match="puts a BOS in front, and the model was trained without one"):
        as_ollama(template_of(CHAT_TEMPLATE), None, True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "message is not written once and in its place"),
        (
            "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
            "the user's message is not written once",
        ),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "it writes now one text, now another"),
        (
            "{% for m in messages %}{{ m.content | replace('\\n', ' ') }}|{% endfor %}",
            "for user it writes '  Say",
        ),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_template_of_another_form_is_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        as_ollama(template_of(text), None, False)
    assert "--ollama: the chat template cannot be written in Ollama's language: " in str(caught.value)
    assert why in str(caught.value)
    assert str(caught.value).endswith("llama.cpp reads the model's own template from the GGUF file.")


def test_what_ollamas_language_cannot_do_is_said() -> None:
    assert as_ollama(shipped("llama3"), None, False).notes == (
        "the model's template takes white space from both ends of a message; Ollama's language cannot",
    )
    (said,) = as_ollama(shipped("qwen3"), None, False).notes
    assert said == "the model's template changes <think> … </think> of earlier answers; in Ollama it stays as it is"
    assert as_ollama(shipped("qwen2.5"), None, False).notes == ()


def test_where_answers_stop() -> None:
    assert stop_texts(shipped("llama3"), ["<|end_of_text|>"]) == ("<|eot_id|>", "<|end_of_text|>")
    assert stop_texts(shipped("glm4"), []) == ("<|user|>",)  # nothing ends an answer but the next question
    assert stop_texts(shipped("qwen1.5"), []) == ("<|im_end|>",)


@pytest.mark.parametrize("system", ['a """ b', '"a"', "a\u200bb"])
def test_a_system_message_that_a_modelfile_would_change_is_refused(system: str) -> None:
    found = as_ollama(template_of(CHAT_TEMPLATE, default_system=system), None, False)
    with pytest.raises(InputError, match="a Modelfile cannot hold the default_system"):
        modelfile("m.gguf", found, [], system)


GO = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }
type Case struct {
	Template, System string
	Messages         []*Message
}

func main() {
	var cases []Case
	var found []string
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	for _, c := range cases {
		var text strings.Builder
		made := template.Must(template.New("").Parse(c.Template))
		if err := made.Execute(&text, map[string]any{"System": c.System, "Messages": c.Messages}); err != nil {
			panic(err)
		}
		found = append(found, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(found)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_itself_writes_what_our_evaluator_says(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    cases, wanted = [], []
    for path in TEMPLATES:
        text = as_ollama(template_of(path.read_text(encoding="utf-8")), None, False).text
        for talk in (TALK[1:2], TALK[1:3], TALK[1:], TALK[:2], TALK[:3], TALK):
            given = [{"Role": m["role"], "Content": m["content"]} for m in talk]
            system = "".join(m["content"] for m in talk if m["role"] == "system")
            cases.append({"Template": text, "System": system, "Messages": given})
            wanted.append(written(text, talk))
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/go/bin", "GO111MODULE": "off"}
    answer = subprocess.run(
        ["go", "run", str(tmp_path / "main.go")],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(answer.stdout) == wanted
