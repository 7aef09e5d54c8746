"""Drawing answers: the distribution, and what an answer may not depend on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.answers import generate
from tasks.train.online.rollout import Sampling, choose, draw_answers, uniforms
from tests.tiny import tiny_model

torch.set_num_threads(1)
STOPS, PAD, EOS = frozenset({260}), 260, 260
PROMPTS = [[72, 105, 33], [1, 2, 3, 4, 5, 6, 7, 8, 9], [200], [65, 66]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_model(tmp_path_factory.mktemp("rollout") / "base")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def draw(
    model: Any, prompts: list[list[int]], places: list[int], sampling: Sampling, n: int = 12, share: bool = True
) -> torch.Tensor:
    return draw_answers(model, prompts, uniforms(3, 7, places, n), sampling, STOPS, PAD, share)


def test_an_answer_depends_on_its_own_prompt_seed_step_and_place_alone(model: Any) -> None:
    together = draw(model, PROMPTS, [0, 1, 2, 3], Sampling())
    for place, prompt in enumerate(PROMPTS):
        assert draw(model, [prompt], [place], Sampling()).tolist() == [together[place].tolist()]
    backwards = draw(model, PROMPTS[::-1], [3, 2, 1, 0], Sampling())
    assert backwards.tolist()[::-1] == together.tolist()
    assert draw(model, PROMPTS, [4, 5, 6, 7], Sampling()).tolist() != together.tolist()


def test_what_prompts_share_is_read_once_and_changes_no_answer(model: Any) -> None:
    system = list(range(100, 112))
    prompts = [[*system, *prompt] for prompt in PROMPTS] + [[*system, *PROMPTS[1]]] * 2
    places = list(range(len(prompts)))
    together = draw(model, prompts, places, Sampling())
    assert together.tolist() == draw(model, prompts, places, Sampling(), share=False).tolist()
    for place, prompt in enumerate(prompts):
        assert draw(model, [prompt], [place], Sampling()).tolist() == [together[place].tolist()]
    assert len({tuple(together[place].tolist()) for place in (1, 4, 5)}) == 3


def test_almost_no_temperature_gives_the_greedy_answer(model: Any) -> None:
    found = draw(model, PROMPTS, [0, 1, 2, 3], Sampling(temperature=1e-4), n=6)
    assert found.tolist() == generate(model, PROMPTS, frozenset(), PAD, 6)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, -1)
    numbers = torch.from_numpy(numpy.random.default_rng(0).random(20000))
    counts = Counter(choose(logits, numbers).tolist())
    for token, share in enumerate(logits[0].softmax(0).tolist()):
        assert counts[token] / 20000 == pytest.approx(share, abs=0.01)


def test_what_has_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(5, -1)
    numbers = torch.tensor([0.0, 0.4999999, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, numbers).tolist() == [1, 1, 3, 3, 3]


def test_top_k_and_top_p_leave_a_distribution_of_what_they_keep() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert Sampling(top_k=2).logits(logits).softmax(1)[0].tolist() == pytest.approx(
        [0.731059, 0.268941, 0, 0], abs=1e-6
    )
    kept = Sampling(top_p=0.7).logits(logits).softmax(1)[0]  # shares 0.644, 0.237, …: the second one crosses 0.7
    assert kept.tolist() == pytest.approx([0.731059, 0.268941, 0, 0], abs=1e-6)
    assert Sampling(top_p=0.5).logits(logits).softmax(1)[0].tolist() == [1, 0, 0, 0]
    assert Sampling(temperature=2.0).logits(logits)[0].tolist() == [1.0, 0.5, 0.0, -0.5]
    assert Sampling(top_k=1).logits(logits, torch.tensor([3])).isfinite()[0].tolist() == [True, False, False, True]


def test_an_answer_ends_at_its_first_terminator(model: Any) -> None:
    found = draw(model, PROMPTS * 8, list(range(32)), Sampling(temperature=3.0), n=60)
    ended = [row for row in found.tolist() if EOS in row]
    assert ended
    for row in ended:
        assert set(row[row.index(EOS) :]) == {PAD}


def test_random_numbers_are_the_same_wherever_they_are_asked_for() -> None:
    both = uniforms(1, 2, [5, 9], 4)
    assert torch.equal(uniforms(1, 2, [9], 4)[0], both[1])
    assert torch.equal(uniforms(1, 2, [9], 3)[0], both[1, :3])
    assert not torch.equal(uniforms(1, 3, [9], 4)[0], both[1])
    assert float(both.min()) >= 0.0
    assert float(both.max()) < 1.0


def test_nothing_of_the_models_own_generation_settings_is_used(model: Any, tmp_path: Path) -> None:
    plain = draw(model, PROMPTS, [0, 1, 2, 3], Sampling())
    model.generation_config.update(repetition_penalty=5.0, top_k=1, do_sample=False, suppress_tokens=[5])
    assert torch.equal(draw(model, PROMPTS, [0, 1, 2, 3], Sampling()), plain)
