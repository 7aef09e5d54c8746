"""Perplexity and sample answers: the numbers, and that nothing about how they are measured moves them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from registry.errors import InputError
from registry.evaluation_records import GenerationSettings
from tasks.answers import Answer, Chat, answer_questions, generate, stop_ids
from tasks.evaluate_program import load, work, write_lines
from tasks.program import Events, ProgramError, Spec
from tasks.scoring import RowScore, Shards, batches, perplexity, score_batch, score_rows
from tasks.train.loading import load_base
from tests.tasks.test_statistics import size
from tests.tiny import pack_rows, random_pairs, random_rows, read_lines, tiny_model, write_shards, write_spec

ROOT = Path(__file__).parents[2]
QUESTIONS = ["hi", "What is the capital of France?", "Count to three, slowly."]
END, START = 260, 259  # <|im_end|>, <|im_start|>


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_base(str(folder), torch.float32).eval()


def slow_scores(model: Any, rows: Sequence[dict[str, list[int]]]) -> list[tuple[float, int]]:
    """One row at a time, one token at a time, in float64."""
    scores = []
    for row in rows:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        picked = [(place, label) for place, label in enumerate(row["labels"]) if place > 0 and label != -100]
        nll = [-float(torch.log_softmax(logits[place - 1], dim=-1)[label]) for place, label in picked]
        scores.append((math.fsum(nll), len(nll)))
    return scores


def test_perplexity_is_one_division_at_the_end() -> None:
    result = perplexity([RowScore(2.0, 2), RowScore(16.0, 8)]).result
    limits = {"low": pytest.approx(math.exp(1)), "high": pytest.approx(math.exp(2))}  # one row twice, or the other
    assert result == {"value": pytest.approx(6.0496, abs=5e-5), **limits, "nll": 18.0, "tokens": 10, "rows": 2}


def test_perplexity_does_not_depend_on_the_order_or_split_of_rows() -> None:
    rows = [RowScore(0.1 * number, number) for number in range(1, 50)]
    whole = perplexity(rows).result
    assert perplexity(rows[::-1]).result["value"] == whole["value"]
    parts = [perplexity(rows[:7]).result, perplexity(rows[7:]).result]
    again = perplexity([RowScore(part["nll"], part["tokens"]) for part in parts]).result
    assert again["value"] == pytest.approx(whole["value"], rel=1e-14)


def test_rows_without_scored_tokens_change_nothing_but_the_count_of_rows() -> None:
    with_one, without = perplexity([RowScore(3.0, 2), RowScore(0.0, 0)]).result, perplexity([RowScore(3.0, 2)]).result
    assert with_one == without | {"rows": 2}  # drawn without a scored token there is no perplexity, and none counts


@pytest.mark.parametrize(
    ("row", "kind"),
    [(RowScore(math.nan, 2), "not_finite"), (RowScore(5000.0, 2), "not_finite"), (RowScore(0.0, 0), "bad_setting")],
)
def test_what_has_no_perplexity_is_an_error(row: RowScore, kind: str) -> None:
    with pytest.raises(ProgramError) as caught:
        perplexity([row])
    assert caught.value.kind == kind


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_scores_are_those_of_a_plain_loop_for_every_batch_size(model: Any, tmp_path: Path, batch_size: int) -> None:
    rows = [
        *random_rows(13, seed=3),
        {"input_ids": [65], "labels": [65]},
        {"input_ids": [1, 2], "labels": [-100, -100]},
    ]
    found = score_rows(model, Shards(write_shards(tmp_path / "shards", rows)), batch_size)
    scores = list(found.values())
    expected = slow_scores(model, rows)
    assert [score.tokens for score in scores] == [tokens for _, tokens in expected]
    for score, (nll, _) in zip(scores, expected, strict=True):
        assert score.nll == pytest.approx(nll, rel=1e-5, abs=1e-9)
    total = perplexity(RowScore(*score) for score in expected).result
    assert perplexity(scores).result["value"] == pytest.approx(total["value"], rel=1e-6)


def test_bfloat16_differs_between_batch_sizes_by_rounding_only(folder: Path, tmp_path: Path) -> None:
    model = load_base(str(folder), torch.bfloat16).eval()
    shards = Shards(write_shards(tmp_path / "shards", random_rows(20, seed=4)))
    one, four = (perplexity(score_rows(model, shards, size).values()).result["value"] for size in (1, 4))
    assert one == pytest.approx(four, rel=2e-3)


def test_the_same_measurement_twice_gives_the_same_bits(model: Any, tmp_path: Path) -> None:
    shards = Shards(write_shards(tmp_path / "shards", random_rows(9, seed=5)))
    assert score_rows(model, shards, 4) == score_rows(model, shards, 4)


def test_the_head_is_left_as_it_was(model: Any) -> None:
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    score_batch(model, [([1, 2, 3], [-100, 2, 3])])
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_batch_ends_where_its_logits_would_need_too_much_memory() -> None:
    assert list(batches([100, 4000, 3000, 5], 8, 50_000)) == [[1], [2, 0, 3]]


def test_packed_shards_are_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [pack_rows(random_rows(2))])
    with pytest.raises(ProgramError, match="packed"):
        Shards(shards)


def plain_chat(folder: Path, stops: frozenset[int] = frozenset({END})) -> Chat:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Chat(tokenizer, lambda question: f"<|im_start|>{question}\n", None, stops, pad=min(stops))


def slow_answer(model: Any, prompt: list[int], stops: frozenset[int], most: int) -> list[int]:
    """Greedy, one whole forward pass per token, no cache, no padding."""
    ids = list(prompt)
    while len(ids) - len(prompt) < most and not (len(ids) > len(prompt) and ids[-1] in stops):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_answers_are_those_of_a_plain_loop_for_every_batch_size(model: Any, folder: Path, batch_size: int) -> None:
    chat = plain_chat(folder)
    answers = answer_questions(model, chat, QUESTIONS, GenerationSettings(max_new_tokens=12), batch_size)
    expected = [chat.answer(text, slow_answer(model, chat.prompt(text), chat.stops, 12)) for text in QUESTIONS]
    assert answers == expected
    assert len({answer.answer for answer in answers}) == 3


def test_an_answer_ends_at_any_stop_id_while_others_go_on(model: Any, folder: Path) -> None:
    free = [slow_answer(model, plain_chat(folder).prompt(text), frozenset(), 12) for text in QUESTIONS]
    stop = next(token for token in free[1][2:] if token not in free[1][:2] and token not in free[0])
    chat = plain_chat(folder, frozenset({END, stop}))
    answers = answer_questions(model, chat, QUESTIONS, GenerationSettings(max_new_tokens=12))
    where = free[1].index(stop)
    assert answers[1] == Answer(QUESTIONS[1], chat.tokenizer.decode(free[1][:where]), True, where)
    assert (answers[0].stopped, answers[0].tokens) == (False, 12)


def test_sampling_settings_of_the_folder_do_not_reach_the_answers(folder: Path, model: Any) -> None:
    from transformers import GenerationConfig

    prompts = [plain_chat(folder).prompt(text) for text in QUESTIONS]
    expected = generate(model, prompts, frozenset({END}), END, 12)
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=30)
    assert generate(model, prompts, frozenset({END}), END, 12) == expected


def test_stop_ids_come_from_template_and_every_file(tmp_path: Path, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert stop_ids(tmp_path, tokenizer, "<|im_end|>") == {1, 2, 3, 258, END}
    assert stop_ids(tmp_path / "none", tokenizer, None) == set()


@pytest.mark.parametrize("written_by_template", [True, False])
def test_a_prompt_has_exactly_one_bos(folder: Path, written_by_template: bool) -> None:
    start = "<s>" if written_by_template else ""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chat = Chat(tokenizer, lambda question: f"{start}{question}", ("<s>", 257), frozenset({END}), END)
    assert chat.prompt("hi") == [257, *b"hi"]


def test_a_question_has_the_system_message_and_the_variables_of_the_rows(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ 'think' if enable_thinking else 'no' }}"
    )
    chat = Chat.from_folder(folder, template, "Be brief.", enable_thinking=False)
    assert chat.render("Who?") == "system:Be brief.;user:Who?;no"
    assert Chat.from_folder(folder, template, enable_thinking=True).render("Who?") == "user:Who?;think"


def test_the_chat_of_a_folder_renders_with_its_template(folder: Path) -> None:
    chat = Chat.from_folder(folder)
    wanted = [START, *b"user\nhi", END, *b"\n", START, *b"assistant\n"]
    assert chat.prompt("hi") == wanted
    assert END in chat.stops


def test_lines_with_unusual_line_ends_stay_lines(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\n中文"
    write_lines(tmp_path / "x.jsonl", [{"text": text}, {"text": "next"}])
    written = (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["text"] for line in written.splitlines()] == [text, "next"]
    assert "中文" in written


def run(spec: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tasks.evaluate_program", str(spec)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_program_writes_results_answers_and_progress(folder: Path, model: Any, tmp_path: Path) -> None:
    rows = random_rows(6, seed=7)
    settings = {
        "questions": QUESTIONS,
        "generation": {"max_new_tokens": 5},
        "bf16": False,
        "shapes": ["chat"],
        "measure": "perplexity",
        "sets": ["0"],
    }
    inputs = {"model": folder, "set.0": write_shards(tmp_path / "shards", rows)}
    spec = write_spec(tmp_path, settings, inputs, {"per_device_eval_batch_size": 4, "set_names": ["held_out"]})
    answer = run(spec)
    assert answer.returncode == 0, answer.stderr
    output = tmp_path / "output"
    expected = perplexity(RowScore(*score) for score in slow_scores(model, rows)).result
    found = json.loads((output / "results.json").read_text())
    assert found["perplexity.0"] == {name: pytest.approx(value) for name, value in expected.items()}
    texts = sum(len(row["labels"]) - 1 - row["labels"][1:].count(-100) for row in rows)  # a token is a byte
    assert found["bits_per_byte.0"]["bytes"] == expected["tokens"] == texts
    assert found["bits_per_byte.0"]["value"] == pytest.approx(math.log2(expected["value"]))
    assert [line["row"] for line in read_lines(output / "nll.0.jsonl")] == list(range(6))
    answers = read_lines(output / "answers.jsonl")
    assert [line["question"] for line in answers] == QUESTIONS
    assert all(set(line) == {"question", "answer", "stopped", "tokens"} for line in answers)
    events = read_lines(tmp_path / "events.jsonl")
    progress = [(event["step"], event["total"], event["set"]) for event in events if event["kind"] == "progress"]
    assert progress == [(4, 6, "held_out"), (6, 6, "held_out"), (3, 3, "")]
    assert json.loads((output / "report" / "timings.json").read_text())["import"] > 0


def test_an_adapter_is_measured_on_its_own_base_only(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load_base(str(folder), torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    (adapter / "base.json").write_text(json.dumps({"base_digest": "aaaa"}))
    rows = random_rows(5, seed=8)
    inputs = {"model": folder, "adapter": adapter, "set.0": write_shards(tmp_path / "shards", rows)}
    settings = {
        "questions": [],
        "generation": {"max_new_tokens": 5},
        "bf16": False,
        "shapes": ["chat"],
        "measure": "perplexity",
        "sets": ["0"],
        "base_digest": "aaaa",
    }
    spec = Spec.read(write_spec(tmp_path, settings, inputs, {"per_device_eval_batch_size": 4}))
    work(spec, Events(spec.events))
    expected = perplexity(RowScore(*score) for score in slow_scores(adapted.eval(), rows)).result["value"]
    stored = json.loads((tmp_path / "output" / "results.json").read_text())["perplexity.0"]["value"]
    assert stored == pytest.approx(expected, rel=1e-6)
    assert not (tmp_path / "output" / "answers.jsonl").exists()
    with pytest.raises(ProgramError, match="aaaa") as caught:
        load(replace(spec, settings={**settings, "base_digest": "bbbb"}))
    assert caught.value.kind == "bad_setting"


def test_a_reward_model_is_measured_on_pairs_and_scores_answers_without_one(folder: Path, tmp_path: Path) -> None:
    scoring = load_base(str(folder), torch.float32, score=True)
    scoring.save_pretrained(tmp_path / "scoring")
    (tmp_path / "scoring" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    pairs, rows = random_pairs(6), random_rows(3)
    inputs = {
        "model": tmp_path / "scoring",
        "set.0": write_shards(tmp_path / "pairs", pairs, "preference"),
        "set.1": write_shards(tmp_path / "rows", rows),
    }
    settings = {
        "questions": [],
        "bf16": False,
        "shapes": ["preference", "chat"],
        "measure": "reward",
        "sets": ["0", "1"],
    }
    spec = Spec.read(write_spec(tmp_path, settings, inputs, {"per_device_eval_batch_size": 4}))
    work(spec, Events(spec.events))
    output = tmp_path / "output"
    lines = read_lines(output / "rewards.0.jsonl")
    assert [line["row"] for line in lines] == list(range(6))
    results = json.loads((output / "results.json").read_text())
    right = sum(line["chosen"] > line["rejected"] for line in lines)
    assert results["reward_accuracy.0"].items() >= {"value": right / 6, "right": right, "ties": 0, "rows": 6}.items()
    longer = sum(line["chosen_tokens"] > line["rejected_tokens"] for line in lines)
    assert results["longer_is_better_accuracy.0"]["right"] == longer
    by_length = [result for name, result in results.items() if name.startswith("reward_accuracy_")]
    assert sum(result["rows"] for result in by_length) == 6
    assert sum(each["rows"] for each in results["reward_calibration_error.0"]["bins"]) == 6
    alone = read_lines(output / "rewards.1.jsonl")
    assert [line["tokens"] for line in alone] == [sum(label != -100 for label in row["labels"]) for row in rows]
    mean = math.fsum(line["score"] for line in alone) / 3
    assert results["reward_score.1"]["value"] == pytest.approx(mean)
    assert [name for name in results if name.endswith(".1")] == ["reward_score.1"]
    assert size((output / "report" / "rewards.0.png").read_bytes()) == (990, 429)
    assert not (output / "report" / "rewards.1.png").exists()
    with pytest.raises(InputError, match="is no reward model"):
        load(replace(spec, inputs={"model": str(folder)}))
