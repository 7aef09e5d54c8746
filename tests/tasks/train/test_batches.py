"""Batches: what is trained, what sees what, and that the loss does not depend on the way rows are put together.

One decision: every comparison runs on the exact batch `collate` makes, with nothing added or taken away.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from tasks.batch_plan import FILLER, BatchPlan
from tasks.program import ProgramError
from tasks.train.batches import MicroBatchSampler, Rows, collate, filler, make_loader
from tasks.train.likelihood import keeps_masked_positions, token_loss
from tasks.train.model import require_separation
from tests.tiny import pack_rows, random_rows, tiny_model, write_shards

torch.set_num_threads(1)  # on matrices this small two threads mostly wait for each other
FIRST = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [3]}
SECOND = {"input_ids": [8, 9], "labels": [8, 9], "seq_lengths": [2]}
SHORT = {"input_ids": [4, 3], "labels": [4, 3], "seq_lengths": [2]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


def load(base: Path, attention: str = "sdpa") -> Any:
    return LlamaForCausalLM.from_pretrained(base, attn_implementation=attention)


def rows_of_lengths(*lengths: int) -> list[dict[str, list[int]]]:
    made = [random_rows(1, seed=number, shortest=length, longest=length)[0] for number, length in enumerate(lengths)]
    return [row | {"seq_lengths": [len(row["input_ids"])]} for row in made]


def test_rows_side_by_side_are_padded_on_the_right() -> None:
    batch = collate([FIRST, SECOND], packing=False)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.inputs["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs["use_cache"] is False
    assert set(batch.inputs) == {"input_ids", "labels", "attention_mask", "use_cache"}
    assert batch.tokens == 5


def test_packed_rows_restart_their_positions_and_pads_are_a_row_of_their_own() -> None:
    batch = collate([pack_rows([FIRST, SECOND]), SHORT], packing=True)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch.inputs["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 3, -100, -100, -100]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert set(batch.inputs) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert batch.tokens == 7


def test_an_end_token_that_equals_the_pad_token_is_trained() -> None:
    row = {"input_ids": [7, 0], "labels": [-100, 0], "seq_lengths": [2]}  # 0 is what pads are filled with
    assert collate([row, FIRST], packing=False).inputs["labels"].tolist()[0] == [-100, 0, -100]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_a_packed_row_has_the_logits_it_has_alone(base: Path, attention: str, training: bool) -> None:
    model = load(base, attention).train(training)
    five, six, nine = rows_of_lengths(5, 6, 9)
    inputs = collate([pack_rows([five, six]), nine], packing=True).inputs
    with torch.no_grad():
        packed = model(**inputs).logits
        alone = [model(**collate([row], packing=False).inputs).logits[0] for row in (five, six, nine)]
    for found, wanted in zip((packed[0, :5], packed[0, 5:11], packed[1, :9]), alone, strict=True):
        assert (found - wanted).abs().max() < 1e-5


def test_a_model_that_mixes_packed_rows_is_refused(base: Path) -> None:
    model = load(base)
    require_separation(model, {"per_device_train_batch_size": 2, "bf16": False})
    plain = model.forward
    model.forward = lambda input_ids, position_ids, use_cache: plain(input_ids=input_ids)
    with pytest.raises(ProgramError, match=r"lets packed rows see each other.*packing: false"):
        require_separation(model, {"per_device_train_batch_size": 2, "bf16": False})


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_plain_forward(base: Path, wrapped: bool, packing: bool) -> None:
    model = load(base)
    if wrapped:
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    assert keeps_masked_positions(model)
    rows = rows_of_lengths(5, 6, 9)
    inputs = collate([pack_rows(rows[:2]), rows[2]] if packing else rows, packing).inputs
    other = copy.deepcopy(model)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    ours = token_loss(model, inputs) / count
    plain = other(**inputs, num_items_in_batch=count).loss
    ours.backward()
    plain.backward()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_loss_and_gradient_norm_do_not_depend_on_split_padding_or_packing(base: Path) -> None:
    rows = [row | {"labels": row["input_ids"]} for row in rows_of_lengths(3, 40, 9, 20)]
    ways = {
        "4 x 1": [collate(rows, False)],
        "2 x 2": [collate(rows[:2], False), collate(rows[2:], False)],
        "1 x 4": [collate([row], False) for row in rows],
        "packed": [collate([pack_rows([rows[0], rows[3]]), pack_rows([rows[2], rows[1]])], True)],
        "one pack": [collate([pack_rows(rows)], True)],
        "with a filler": [collate(rows, False), collate([filler()], False)],
    }
    found = {}
    for name, batches in ways.items():
        model = load(base)
        loss = sum(token_loss(model, batch.inputs) for batch in batches) / 68
        loss.backward()
        norm = torch.nn.utils.get_total_norm([value.grad for value in model.parameters()])
        found[name] = (float(loss.detach()), float(norm))
        assert sum(batch.tokens for batch in batches) == 72
    for name, pair in found.items():
        assert pair == pytest.approx(found["1 x 4"], rel=1e-5), name


def test_a_step_has_the_same_rows_however_it_is_split() -> None:
    one = BatchPlan(rows=10, per_device=1, accumulation=4, processes=1, seed=3)
    two = BatchPlan(rows=10, per_device=1, accumulation=2, processes=2, seed=3)
    assert one.steps_per_epoch() == two.steps_per_epoch() == 3
    alone = list(one.micro_batches(0, 0))
    ranks = [list(two.micro_batches(0, process)) for process in (0, 1)]
    for step in range(3):
        dealt = [batch for rank in ranks for batch in rank[step * 2 : step * 2 + 2]]
        assert sorted(dealt) == sorted(alone[step * 4 : step * 4 + 4])


def test_the_last_step_of_an_epoch_repeats_no_row() -> None:
    plan = BatchPlan(rows=5, per_device=1, accumulation=2, processes=2, seed=0)
    seen = [row for process in (0, 1) for batch in plan.micro_batches(0, process) for row in batch]
    assert sorted(row for row in seen if row != FILLER) == [0, 1, 2, 3, 4]
    assert seen.count(FILLER) == 3


def test_every_process_makes_as_many_forward_passes_as_the_others_and_none_waits_for_ever() -> None:
    for rows in range(1, 14):
        for per_device, accumulation, processes in ((1, 1, 2), (2, 1, 3), (1, 3, 2), (3, 2, 4)):
            plan = BatchPlan(rows, per_device, accumulation, processes, seed=0)
            passes = [list(plan.micro_batches(0, process)) for process in range(processes)]
            assert {len(own) for own in passes} == {plan.steps_per_epoch() * accumulation}
            seen = sorted(row for own in passes for batch in own for row in batch if row != FILLER)
            assert seen == list(range(rows))


def test_every_epoch_has_its_own_order_and_a_seed_repeats_it() -> None:
    plan = BatchPlan(rows=50, per_device=1, accumulation=1, processes=1, seed=1)
    assert plan.order(0) == plan.order(0) != plan.order(1)
    assert plan.order(0) != BatchPlan(rows=50, per_device=1, accumulation=1, processes=1, seed=2).order(0)


def test_the_arithmetic_is_said() -> None:
    plan = BatchPlan(rows=20, per_device=2, accumulation=4, processes=1, seed=0)
    assert plan.sentence(plan.total_steps(None, 2.5)) == (
        "2 per device x 4 accumulation x 1 process = 8 sequences per step; "
        "20 sequences, 3 steps per epoch; total 8 steps"
    )


def test_reading_a_batch_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    rows = Rows(str(write_shards(tmp_path / "shards", random_rows(4))), 264)
    sampler = MicroBatchSampler(BatchPlan(rows=4, per_device=2, accumulation=1, processes=1, seed=0), 0)
    before = torch.random.get_rng_state()
    assert [
        batch.inputs["input_ids"].shape[0] for batch in make_loader(rows, sampler, partial(collate, packing=False))
    ] == [2, 2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_shards_that_do_not_fit_are_refused_by_row(tmp_path: Path) -> None:
    bad = write_shards(tmp_path / "bad", [FIRST, FIRST | {"input_ids": [5, 6, 300], "labels": [-100, 6, 300]}])
    rows = Rows(str(bad), 264)
    with pytest.raises(ProgramError, match="row 1 holds token id 300, the model has 264"):
        rows[1]
    with pytest.raises(ProgramError, match="no rows to train on"):
        Rows(str(write_shards(tmp_path / "none", [])), 264)
