"""Which answer of a pair a language model prefers: the numbers, their rows, and that perplexity is as it was."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.home import Home
from tasks.evaluate_program import work
from tasks.measurements import read_results
from tasks.preferences import (
    PairNll,
    implicit_reward,
    implicit_reward_accuracy,
    implicit_reward_step,
    preference_results,
)
from tasks.program import Events, ProgramError, Spec
from tasks.scoring import RowScore, Shards, perplexity, score_rows
from tasks.steps import Input, LocalFolder, Step, Work
from tasks.train.compared import collate_pairs
from tasks.train.loading import load_base
from tasks.train.objectives import make_objective
from tasks.train.reference import Reference
from tests.tiny import random_pairs, random_rows, read_lines, tiny_model, write_shards, write_spec

torch.set_num_threads(1)
PAIRS = random_pairs(9, seed=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and another one, its reference."""
    root = tmp_path_factory.mktemp("models")
    return tiny_model(root / "policy", seed=1), tiny_model(root / "reference", seed=2)


def logps(folder: Path) -> list[list[tuple[float, int]]]:
    """Of every pair: log-likelihood and tokens of both answers, one token at a time."""
    model, found = load_base(str(folder), torch.float32).eval(), []
    for pair in PAIRS:
        border = pair["seq_lengths"][0]
        answers = []
        for part in (slice(0, border), slice(border, None)):
            ids, labels = pair["input_ids"][part], pair["labels"][part]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double()
            picked = [(n, label) for n, label in enumerate(labels) if n > 0 and label != -100]
            answers.append(
                (sum(float(torch.log_softmax(logits[n - 1], -1)[label]) for n, label in picked), len(picked))
            )
        found.append(answers)
    return found


def measured(folder: Path, place: Path, shapes: list[str], sets: dict[str, Path], batch: int = 4) -> Path:
    """The output of measuring a model."""
    settings = {
        "questions": [],
        "bf16": False,
        "shapes": shapes,
        "measure": "perplexity",
        "sets": [*sets],
    }
    inputs = {"model": folder} | {f"set.{name}": shards for name, shards in sets.items()}
    spec = Spec.read(write_spec(place, settings, inputs, {"per_device_eval_batch_size": batch}))
    work(spec, Events(spec.events))
    return place / "output"


def test_equal_answers_are_not_right_and_length_can_turn_a_pair_around() -> None:
    pairs = [
        (RowScore(4.0, 2), RowScore(5.0, 5)),  # more likely, and less likely by token
        (RowScore(6.0, 6), RowScore(5.0, 1)),
        (RowScore(2.0, 2), RowScore(2.0, 2)),
        (RowScore(1.0, 1), RowScore(9.0, 1)),
    ]
    found = {name: measure.result for name, measure in preference_results(pairs).items()}
    limits = {"low": 0.0, "high": 1.0, "rows": 4}
    assert found == {
        "preference_accuracy": {"value": 0.5, "right": 2, "ties": 1, **limits},
        "preference_accuracy_norm": {"value": 0.5, "right": 2, "ties": 1, **limits},
    }
    with pytest.raises(ProgramError, match="no scored token"):
        preference_results([(RowScore(1.0, 1), RowScore(0.0, 0))])
    with pytest.raises(ProgramError, match="not a number"):
        preference_results([(RowScore(1.0, 1), RowScore(float("nan"), 1))])


def test_both_answers_of_a_pair_are_measured_and_perplexity_stays_to_the_bit(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "pairs", PAIRS, "preference")
    rows = write_shards(tmp_path / "rows", random_rows(3))
    output = measured(folders[0], tmp_path, ["preference", "chat"], {"0": shards, "1": rows})
    lines, wanted = read_lines(output / "nll.0.jsonl"), logps(folders[0])
    assert [(line["row"], line["answer"]) for line in lines] == [
        (number, ("chosen", "rejected")[number % 2]) for number in range(18)
    ]
    flat = [answer for pair in wanted for answer in pair]
    assert [line["nll"] for line in lines] == pytest.approx([-logp for logp, _ in flat], rel=1e-5)
    assert [line["tokens"] for line in lines] == [tokens for _, tokens in flat]
    results = json.loads((output / "results.json").read_text())
    right = sum(chosen > rejected for (chosen, _), (rejected, _) in wanted)
    by_token = sum(c / n > r / m for (c, n), (r, m) in wanted)
    assert 0 < right < 9
    assert results["preference_accuracy.0"].items() >= {"value": right / 9, "right": right, "rows": 9}.items()
    assert results["preference_accuracy_norm.0"].items() >= {"value": by_token / 9, "right": by_token}.items()
    model = load_base(str(folders[0]), torch.float32).eval()
    alone = perplexity(score_rows(model, Shards(shards, "preference"), 4).values()).result
    assert results["perplexity.0"] == alone
    assert all("answer" not in line for line in read_lines(output / "nll.1.jsonl"))
    assert [name for name in results if name.endswith(".1")] == ["perplexity.1", "bits_per_byte.1"]
    done = [(e["step"], e["total"]) for e in read_lines(tmp_path / "events.jsonl") if e.get("unit") == "rows"]
    assert done[:6] == [(4, 18), (8, 18), (9, 18), (13, 18), (17, 18), (18, 18)]


def test_implicit_rewards_are_differences_to_the_reference() -> None:
    model = [PairNll(4.0, 3.0), PairNll(1.0, 9.0), PairNll(2.0, 2.0)]
    reference = [PairNll(6.0, 4.0), PairNll(1.5, 9.75), PairNll(3.0, 3.0)]  # moved by 2 and 1, 0.5 and 0.75, 1 and 1
    assert implicit_reward_accuracy(model, reference).result == {
        "value": 1 / 3,
        "low": 0.0,
        "high": 1.0,
        "right": 1,
        "ties": 1,
        "rows": 3,
    }


def step_of(name: str, sets: dict[str, Step]) -> Step:
    inputs = {f"set.{number}": Input(step) for number, step in enumerate(sets.values())}
    return Step("dpo", name, 1, "tiny", {}, inputs, "none:none", {"set_names": [*sets]})


def shards_step(shape: str) -> Step:
    rendered = Step("dpo", "render", 1, "rows", {"shape": shape}, {}, "none:none")
    return Step("dpo", "tokenize", 1, "rows", {}, {"rendered": Input(rendered)}, "none:none")


def test_implicit_rewards_are_right_as_often_as_training_logs_for_every_beta(
    folders: tuple[Path, Path], tmp_path: Path, home: Path
) -> None:
    shards = write_shards(tmp_path / "pairs", PAIRS, "preference")
    rows = write_shards(tmp_path / "rows", random_rows(3))
    # batches of other sizes give the same
    sides = {
        side: measured(folder, tmp_path / side, ["chat", "preference"], {"0": rows, "1": shards}, batch)
        for side, folder, batch in zip(("after", "before"), folders, (4, 1), strict=True)
    }
    sets = {"chats": shards_step("chat"), "pairs": shards_step("preference")}
    after, before = step_of("evaluate", sets), step_of("evaluate:dpo", sets)
    model = Input(LocalFolder(folders[0]))
    step = implicit_reward_step("dpo", "implicit_reward", "tiny", model, after, before, [*sets])
    assert step is not None
    assert (step.identity, step.devices, step.runtime["set_names"]) == ({"sets": [1]}, 0, ["pairs"])
    output = tmp_path / "implicit"
    output.mkdir()
    counts = implicit_reward(
        Work(step, sides, {}, output, tmp_path / "scratch", Home(home), threading.Event(), lambda event: None)
    )
    assert counts == {"rows": 9}
    found = read_results(output, ["pairs"])["implicit_reward_accuracy.pairs"]
    policy, frozen = (load_base(str(folder), torch.float32).eval() for folder in folders)
    batch = collate_pairs([{**pair, "row": number, "mark": None} for number, pair in enumerate(numbered(PAIRS))])
    for beta in (0.01, 0.1, 5.0):
        settings = {"stage": "dpo", "pref_beta": beta, "pref_loss": "sigmoid", "pref_ftx": 0.0}
        settings |= {"dpo_label_smoothing": 0.0, "simpo_gamma": 0.5}
        with torch.no_grad():
            sums = make_objective(settings, Reference(policy, frozen)).sums(policy, batch.inputs | {"use_cache": False})
        logged = float(sums.metrics["rewards/accuracies"][1]) / 9
        assert 0 < logged < 1
        assert found["value"] == pytest.approx(logged)


def numbered(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import numpy

    return [{name: numpy.array(value) for name, value in pair.items()} for pair in pairs]


def test_there_is_nothing_to_compare_without_pairs_that_both_were_measured_on(folders: tuple[Path, Path]) -> None:
    pairs, model = shards_step("preference"), Input(LocalFolder(folders[0]))
    after = step_of("evaluate", {"pairs": pairs})

    def step(before: Step) -> Step | None:
        return implicit_reward_step("dpo", "implicit_reward", "tiny", model, after, before, ["pairs"])

    assert step(step_of("evaluate", {"pairs": shards_step("preference")})) is None  # other rows
    assert step(step_of("evaluate", {})) is None
    found = step(replace(after, stage="sft"))
    assert found is not None
    assert {*found.inputs} == {"model", "set.0", "after", "before"}
    chats = step_of("evaluate", {"chats": shards_step("chat")})
    assert implicit_reward_step("sft", "implicit_reward", "tiny", model, chats, chats, ["chats"]) is None
