"""The step `win_rate`: what the reward model reads, what counts as won, and what is left out and told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.errors import InputError
from tasks.measurements import DOCUMENTS
from tasks.program import Events, ProgramError, Spec
from tasks.steps import Input, LocalFolder, Step, upstream
from tasks.train.loading import load_base
from tasks.win_rate import ScoredRow, win_rate_results, win_rate_step
from tasks.win_rate_program import work
from tests.tasks.test_generate_program import data_steps, make, step_of, write
from tests.tiny import read_lines, tiny_model, tiny_scoring_model, write_spec

torch.set_num_threads(1)
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
READING = {"template": None, "default_system": None, "enable_thinking": None, "control_tokens": "plain", "bf16": False}
ROWS = [
    {"instruction": "Who?", "output": "Nobody."},
    {"instruction": "Why?", "output": ""},
    {"instruction": "When?", "output": "Now."},
    {"instruction": "Where?", "output": "Here."},
]
ANSWERS = ["Me.", "Because <|im_end|>", "Now.", "There."]
OTHERS = ["You.", "No.", "Then.", "There."]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer makes the prompts; it is not loaded."""
    return tiny_model(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with another template, and a tokenizer that gives every byte b the id 255 − b."""
    folder = tiny_scoring_model(tmp_path_factory.mktemp("judge") / "tiny", seed=5)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"] = {character: 255 - number for character, number in data["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "chat_template.jinja").write_text(TURNS)
    return folder


def read(text: str) -> list[int]:
    """Ids of a text by the reward model's tokenizer; `</s>` alone is a control token in these texts."""
    ids: list[int] = []
    for part in text.split("</s>"):
        ids += [*(255 - byte for byte in part.encode()), 258]
    return ids[:-1]


def alone(judge: Path, texts: Sequence[str]) -> list[float]:
    """The head's own output at the end of each text."""
    model, scores = load_base(str(judge), torch.float32, score=True).eval(), []
    for text in texts:
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([read(text)])).last_hidden_state
            scores.append(float(model.score(hidden.float())[0, -1, 0]))
    return scores


def turns(question: str, answer: str) -> str:
    return f"[user]{question}</s>[assistant]{answer}</s>"


def answered(folder: Path, answers: Sequence[str], references: Sequence[str | None]) -> Path:
    """The answers of a model, as `generate` writes them."""
    folder.mkdir()
    lines = [{"answer": a, "reference": r} for a, r in zip(answers, references, strict=True)]
    return write(folder / "answers.jsonl", *lines).parent


def inputs_of(policy: Path, data: Path, **given: Any) -> dict[str, Path]:
    """The folders of prompts and rows."""
    prompts = data_steps(policy, data, **given)
    tokenized = make(prompts)[0].artifact.path
    fetched = next(step for step in upstream([prompts]) if step.kind == "fetch")
    return {"set.0": tokenized, "rows": make(fetched)[0].artifact.path}


def run(place: Path, inputs: dict[str, Path], batch: int = 4, **changes: Any) -> tuple[dict[str, Any], Any, list[str]]:
    """What the program writes: results, lines, notes."""
    runtime = {"per_device_eval_batch_size": batch, "set_names": ["held_out"]}
    runtime |= {"digests": {name: f"digest of {name}" for name in (*inputs, "reading")}}
    spec = Spec.read(write_spec(place, READING | changes, inputs, runtime))
    work(spec, Events(spec.events))
    output = place / "output"
    notes = [event["text"] for event in read_lines(place / "events.jsonl") if event["kind"] == "note"]
    return json.loads((output / "results.json").read_text()), read_lines(output / "rewards.jsonl"), notes


@pytest.fixture
def inputs(policy: Path, judge: Path, tmp_path: Path) -> dict[str, Path]:
    found = inputs_of(policy, write(tmp_path / "rows.jsonl", *ROWS))
    references = ["Nobody.", None, "Now.", "Here."]
    found |= {"answers": answered(tmp_path / "own", ANSWERS, references), "reward_model": judge}
    return found | {
        "base_prompts": found["set.0"],
        "base_answers": answered(tmp_path / "other", OTHERS, references),
    }


def test_answers_are_read_by_the_reward_models_own_template_and_tokenizer(
    inputs: dict[str, Path], judge: Path, tmp_path: Path
) -> None:
    results, lines, notes = run(tmp_path / "run", inputs)
    questions = [row["instruction"] for row in ROWS]
    own, others = ([turns(*pair) for pair in zip(questions, texts, strict=True)] for texts in (ANSWERS, OTHERS))
    wanted, base = alone(judge, own), alone(judge, others)
    assert [line["answer"] for line in lines] == pytest.approx(wanted, abs=1e-5)
    assert [line["base"] for line in lines] == pytest.approx(base, abs=1e-5)
    references = alone(judge, [turns("Who?", "Nobody."), turns("When?", "Now."), turns("Where?", "Here.")])
    assert [lines[n]["reference"] for n in (0, 2, 3)] == pytest.approx(references, abs=1e-5)
    assert [lines[1]["reference"], lines[1]["left_out"]] == [None, {}]
    assert [(line["row"], line["file"]) for line in lines] == [(n, 0) for n in range(4)]
    # the same answer ties to the bit: with the reference in row 2, with the other model in row 3
    assert lines[2]["answer"] == lines[2]["reference"]
    assert lines[3]["answer"] == lines[3]["base"]
    won = [wanted[0] > references[0], wanted[3] > references[2]]
    against = results["win_rate_reference.0"]
    assert (against["won"], against["ties"], against["lost"]) == (sum(won), 1, 2 - sum(won))
    assert (against["value"], against["rows"]) == (pytest.approx((sum(won) + 0.5) / 3), 3)
    won = [mine > other for mine, other in zip(wanted[:3], base[:3], strict=True)]
    assert results["win_rate_base.0"]["value"] == pytest.approx((sum(won) + 0.5) / 4)
    score = results["reward_score.0"]
    assert score["value"] == pytest.approx(sum(wanted) / 4, abs=1e-5)
    assert (score["lowest"], score["highest"]) == pytest.approx((min(wanted), max(wanted)), abs=1e-5)
    assert notes == ["1 of 4 prompts have no reference", "loading the reward model"]


@pytest.mark.parametrize("batch", [1, 2])
def test_scores_do_not_depend_on_the_batch(inputs: dict[str, Path], tmp_path: Path, batch: int) -> None:
    one, lines, _ = run(tmp_path / "one", inputs)
    other, found, _ = run(tmp_path / "other batch", inputs, batch)
    for line, again in zip(lines, found, strict=True):
        names = ("answer", "base", *(["reference"] if line["reference"] is not None else []))
        assert [line[name] for name in names] == pytest.approx([again[name] for name in names], abs=1e-5)
    for name in ("win_rate_reference.0", "win_rate_base.0"):
        assert one[name] == other[name]


def test_settings_of_the_reward_model_reach_what_it_reads(inputs: dict[str, Path], judge: Path, tmp_path: Path) -> None:
    _, lines, _ = run(tmp_path / "system", inputs, default_system="Be brief.")
    wanted = alone(judge, [f"[system]Be brief.</s>{turns('Who?', 'Me.')}"])
    assert lines[0]["answer"] == pytest.approx(wanted[0], abs=1e-5)
    _, lines, _ = run(tmp_path / "template", inputs, template=TURNS.replace("[", "("))
    wanted = alone(judge, [turns("Who?", "Me.").replace("[", "(")])
    assert lines[0]["answer"] == pytest.approx(wanted[0], abs=1e-5)
    del inputs["base_prompts"], inputs["base_answers"]
    results, lines, notes = run(tmp_path / "alone", inputs, control_tokens="refuse")
    assert set(results) == {"reward_score.0", "win_rate_reference.0"}
    assert lines[1]["left_out"]["answer"].startswith("control_text: ")
    assert "left out 1 of 4 answers: 1 control_text" in notes


def test_what_the_reward_model_cannot_read_is_counted_named_and_told(
    inputs: dict[str, Path], policy: Path, judge: Path, tmp_path: Path
) -> None:
    long = [*ANSWERS[:3], "x" * 600]
    inputs["answers"] = answered(tmp_path / "long", long, ["y" * 600, None, "Now.", "Here."])
    results, lines, notes = run(tmp_path / "run", inputs)
    length = len(read(turns("Where?", long[3])))
    assert lines[3]["left_out"] == {"answer": f"too_long: {length} tokens, cutoff_len is 512"}
    assert [lines[3]["answer"], lines[0]["reference"]] == [None, None]
    assert [*lines[0]["left_out"]] == ["reference"]
    assert "left out 1 of 4 answers: 1 too_long" in notes
    assert "left out 1 of 3 references: 1 too_long" in notes
    counts = {name: (found["rows"], found["left_out"]) for name, found in results.items()}
    assert counts == {"reward_score.0": (3, 1), "win_rate_reference.0": (1, 2), "win_rate_base.0": (3, 1)}
    inputs["answers"] = answered(tmp_path / "all", ["x" * 600] * 4, [None] * 4)
    with pytest.raises(ProgramError, match=r"can read none of 4 answers: \{'too_long': 4\}") as caught:
        run(tmp_path / "none", inputs)
    assert caught.value.kind == "bad_setting"
    with pytest.raises(InputError, match=r"evaluation\.reward_model: the model .* is no reward model"):
        run(tmp_path / "language", inputs | {"reward_model": policy})


def test_answers_belong_to_their_rows_also_where_rows_are_left_out(policy: Path, judge: Path, tmp_path: Path) -> None:
    """The second prompt is too long for the one model, and answered by the other."""
    rows = [ROWS[0], {"instruction": "Why " * 60, "output": "So."}, ROWS[2]]
    data = write(tmp_path / "rows.jsonl", *rows)
    found, whole = inputs_of(policy, data), inputs_of(policy, data, cutoff_len=400)
    references = ["Nobody.", "So.", "Now."]
    found |= {"answers": answered(tmp_path / "own", ["Me.", "Later."], ["Nobody.", "Now."]), "reward_model": judge}
    found |= {"base_prompts": whole["set.0"]}
    found |= {"base_answers": answered(tmp_path / "other", ["You.", "Never.", "Then."], references)}
    _, lines, _ = run(tmp_path / "run", found)
    assert [line["row"] for line in lines] == [0, 2]
    wanted = alone(judge, [turns("When?", text) for text in ("Later.", "Now.", "Then.")])
    assert [lines[1][name] for name in ("answer", "reference", "base")] == pytest.approx(wanted, abs=1e-5)
    # and the other way round
    turned = {"set.0": whole["set.0"], "answers": found["base_answers"], "base_prompts": found["set.0"]}
    results, lines, notes = run(tmp_path / "turned", found | turned | {"base_answers": found["answers"]})
    assert "1 of 3 prompts have no base answer" in notes
    assert [lines[1]["base"], results["win_rate_base.0"]["rows"]] == [None, 2]


def test_rows_of_several_files_and_earlier_turns_keep_their_places(policy: Path, judge: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.jsonl", ROWS[0])
    write(data / "b.jsonl", {"instruction": "u2", "output": "a2", "history": [["u1", "a1"]], "system": "S"})
    found = inputs_of(policy, data)
    found |= {"answers": answered(tmp_path / "own", ["x", "y"], ["Nobody.", "a2"]), "reward_model": judge}
    _, lines, _ = run(tmp_path / "run", found)
    assert [(line["file"], line["row"]) for line in lines] == [(0, 0), (1, 0)]
    text = "[system]S</s>[user]u1</s>[assistant]a1</s>[user]u2</s>[assistant]y</s>"
    wanted = alone(judge, [turns("Who?", "x"), text])
    assert [line["answer"] for line in lines] == pytest.approx(wanted, abs=1e-5)


def test_numbers_of_models_belong_together_where_the_same_was_read_and_compared() -> None:
    digests = {"rows": "r", "reward_model": "m", "reading": "h", "base_answers": "b"}
    scores = [{"answer": 2.0, "reference": 1.0, "base": 3.0}, {"answer": 0.5, "reference": 0.5}]
    rows = [ScoredRow(0, number, each) for number, each in enumerate(scores)]

    def documents(rows: list[ScoredRow], changed: dict[str, str] | None = None) -> dict[str, str]:
        return {
            name: found.result[DOCUMENTS] for name, found in win_rate_results(rows, digests | (changed or {})).items()
        }

    one = documents(rows)
    assert one["reward_score"] == one["win_rate_reference"] != one["win_rate_base"]
    better = [row._replace(scores=dict.fromkeys(row.scores, 9.0)) for row in rows]
    assert documents(better) == one
    other_base = documents(rows, {"base_answers": "c"})
    assert [name for name in one if one[name] != other_base[name]] == ["win_rate_base"]
    for changed in ({"rows": "s"}, {"reward_model": "n"}, {"reading": "i"}):
        assert not {*documents(rows, changed).values()} & {*one.values()}
    assert documents(rows[:1])["reward_score"] != one["reward_score"]


def test_a_row_without_a_readable_answer_is_in_no_number_and_counted_once() -> None:
    digests = {"rows": "r", "reward_model": "m", "reading": "h"}
    rows = [
        ScoredRow(0, 0, {"answer": 1.0, "reference": 0.0}),
        ScoredRow(0, 1, {"reference": 5.0}, {"answer": "too_long: …"}),
        ScoredRow(0, 2, {}, {"answer": "too_long: …", "reference": "too_long: …"}),
        ScoredRow(0, 3, {"answer": 2.0}),
    ]
    found = {name: measure.result for name, measure in win_rate_results(rows, digests).items()}
    assert {name: (f["value"], f["rows"], f["left_out"]) for name, f in found.items()} == {
        "reward_score": (1.5, 2, 2),
        "win_rate_reference": (1.0, 1, 2),
    }


def step(policy: Path, judge: Path, prompts: Step, reading: dict[str, Any] | None = None, name: str = "set") -> Step:
    """The step that compares a model with itself."""
    generated = step_of(policy, prompts, name)
    model = Input(LocalFolder(policy))
    scored = (model, generated, generated, name, Input(LocalFolder(judge)), reading or {}, 4)
    return win_rate_step("sft", f"win_rate:{name}", "tiny", *scored)


def test_how_the_reward_model_reads_is_in_the_key_and_names_are_not(policy: Path, judge: Path, tmp_path: Path) -> None:
    prompts = data_steps(policy, write(tmp_path / "rows.jsonl", ROWS[0]))
    plain = step(policy, judge, prompts)
    assert (plain.kind, plain.devices, plain.identity) == ("win_rate", 1, READING)
    assert step(policy, judge, prompts, name="renamed").identity == plain.identity
    changes: dict[str, Any] = {"template": "{{ x }}", "default_system": "S", "enable_thinking": False}
    for name, value in (changes | {"control_tokens": "keep", "bf16": True}).items():
        assert step(policy, judge, prompts, {name: value}).identity == READING | {name: value}
    assert plain.runtime["metrics"] == ("reward_score", "win_rate_reference", "win_rate_base")
    alone = win_rate_step(
        *("sft", "win_rate:set", "tiny", Input(LocalFolder(policy)), step_of(policy, prompts), None, "set"),
        *(Input(LocalFolder(judge)), {}, 4),
    )
    assert alone.runtime["metrics"] == ("reward_score", "win_rate_reference")
    assert plain.inputs.keys() - alone.inputs.keys() == {"base_prompts", "base_answers"}
