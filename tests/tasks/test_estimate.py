"""The arithmetic of memory and operations, against numbers worked by hand and against what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from registry.records import TrainSettings
from tasks.architecture import Architecture, describe, shapes_like_llama
from tasks.estimate import LargestBatch, Memory, estimate_memory, kept_and_passing, trained_weights
from tasks.online_estimate import Judges, estimate_drawing
from tasks.operations import step_flops
from tasks.train.batches import collate
from tasks.train.fast_lora import speed_up
from tasks.train.likelihood import token_loss
from tasks.train.lora import add_lora
from tasks.train.norms import keep_less
from tasks.train.online.inputs import Answered, make_inputs, reads_lines
from tasks.train.online.rollout import Sampling
from tasks.train.online.scoring import token_logps
from tests.tasks.test_architecture import SMOLLM2_135M

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
ONE = LargestBatch(texts=1, longest=8, trained=8, masked=False)
SMOLLM2 = describe(SMOLLM2_135M, shapes_like_llama(SMOLLM2_135M))
N, EMBEDDING = 134_515_008, 49152 * 576
LORA = 2_442_240  # rank 8: 30 x 8 x (2 x (576 + 576) + 2 x (192 + 576) + 3 x (1536 + 576))


def settings(**fields: Any) -> dict[str, Any]:
    return TrainSettings(**({"finetuning_type": "full", "nproc_per_node": 1} | fields)).identity()


def parts(**fields: Any) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer of SmolLM2-135M."""
    found = estimate_memory(SMOLLM2, settings(**fields), ONE, accumulation=1, checkpointing=False)
    return found.weights, found.gradients, found.optimizer


def test_full_training_with_adam_holds_sixteen_bytes_of_a_weight() -> None:
    assert parts() == (4 * N, 4 * N, 8 * N)
    assert parts(bf16=True) == (4 * N, 4 * N, 8 * N)  # float32 weights, computed with in bfloat16
    assert parts(optim="sgd") == (4 * N, 4 * N, 0)
    assert parts(optim="adamw_8bit") == (4 * N, 4 * N, 2 * N)


def test_lora_holds_the_frozen_base_and_sixteen_bytes_of_its_own_weights() -> None:
    assert parts(finetuning_type="lora") == (4 * N + 4 * LORA, 4 * LORA, 8 * LORA)
    assert parts(finetuning_type="lora", bf16=True) == (2 * N + 4 * LORA, 4 * LORA, 8 * LORA)


def drawing(judges: Judges, longest: int = 40, common: int = 0, **fields: Any) -> Memory:
    """Memory of stage ppo on SmolLM2-135M, four prompts at a time, 40 tokens and an answer of 24."""
    prompts = LargestBatch(texts=4, longest=longest, trained=0, masked=True)
    known = settings(**({"stage": "ppo", "reward_funcs": ("length",), "max_new_tokens": 24} | fields))
    return estimate_drawing(SMOLLM2, known, prompts, common, judges, checkpointing=False)


def test_of_lora_the_judges_are_matrices_and_heads_beside_one_base() -> None:
    judge = LORA + 576
    alone = drawing(Judges(critic=False), finetuning_type="lora", stage="grpo")
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * N + 4 * LORA, 4 * LORA, 8 * LORA)
    found = drawing(Judges(critic=True, adapter=True), finetuning_type="lora")
    assert found.weights == 4 * N + 4 * LORA + 2 * 4 * judge
    assert (found.gradients, found.optimizer) == (4 * (LORA + judge), 8 * (LORA + judge))


def test_of_full_training_every_role_is_a_model_and_two_are_trained() -> None:
    found = drawing(Judges(critic=True, model=SMOLLM2), bf16=True)
    critic = N + 576
    assert found.weights == 4 * N + 2 * N + 4 * critic + 2 * critic  # policy, reference, critic, reward model
    assert (found.gradients, found.optimizer) == (4 * (N + critic), 8 * (N + critic))


def test_processes_divide_what_moves_two_roles() -> None:
    judges, two = Judges(critic=True, model=SMOLLM2), {"nproc_per_node": 2, "bf16": True}
    whole, state, gradients = (drawing(judges, **two, deepspeed=way) for way in (None, "zero1", "zero2"))
    moved = N + N + 576
    assert whole.weights == state.weights == gradients.weights
    assert (whole.gradients, whole.optimizer) == (4 * moved, 8 * moved)
    assert (state.gradients, state.optimizer) == (4 * moved, 8 * moved / 2)
    assert (gradients.gradients, gradients.optimizer) == (4 * moved / 2, 8 * moved / 2)


def test_what_all_prompts_begin_with_is_passed_once() -> None:
    judges, lora = Judges(critic=True), {"finetuning_type": "lora"}
    shorter = drawing(judges, 20, **lora)
    assert drawing(judges, 40, common=20, **lora) == shorter
    assert shorter.activations < drawing(judges, **lora).activations


def test_a_quantised_base_holds_its_linear_weights_in_fewer_bits() -> None:
    linear = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)
    rest = 2 * (N - linear) + 4 * LORA
    eight = parts(finetuning_type="lora", quant_bit=8, bf16=True)[0]
    four = parts(finetuning_type="lora", quant_bit=4, bf16=True, double_quantization=False)[0]
    double = parts(finetuning_type="lora", quant_bit=4, bf16=True)[0]
    assert eight == linear + rest
    assert four == linear * (0.5 + 4 / 64) + rest
    assert double == pytest.approx(linear * (0.5 + 1 / 64 + 4 / 64 / 256) + rest)


def test_freezing_trains_the_layers_it_names() -> None:
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536 + 2 * 576
    fields = settings(finetuning_type="freeze", freeze_trainable_layers=2)
    assert sum(trained_weights(SMOLLM2, fields).values()) == 2 * layer
    fields = settings(finetuning_type="freeze", freeze_trainable_layers=-1, freeze_extra_modules=["norm"])
    assert sum(trained_weights(SMOLLM2, fields).values()) == layer + 576
    found = parts(finetuning_type="freeze", freeze_trainable_layers=2, bf16=True)
    assert found == (2 * (N - 2 * layer) + 4 * 2 * layer, 4 * 2 * layer, 8 * 2 * layer)


def test_a_reference_is_a_second_model_only_where_nothing_is_shared() -> None:
    assert parts(stage="dpo", finetuning_type="lora")[0] == 4 * N + 4 * LORA
    assert parts(stage="dpo")[0] == parts(stage="kto")[0] == 2 * 4 * N
    assert parts(stage="orpo")[0] == parts(stage="dpo", pref_loss="simpo")[0] == 4 * N
    lora = settings(stage="dpo", finetuning_type="lora")
    assert estimate_memory(SMOLLM2, lora, ONE, 1, False, other_reference=True).weights == 2 * 4 * N + 4 * LORA


def test_launchers_divide_what_they_divide() -> None:
    two = {"nproc_per_node": 2}
    assert parts(**two) == (4 * N, 2 * 4 * N, 8 * N)  # buckets of DistributedDataParallel hold gradients again
    assert parts(deepspeed="zero0") == (4 * N, 4 * N, 8 * N)
    assert parts(deepspeed="zero1", **two) == (4 * N, 4 * N, 12 * N / 2)  # with float32 masters
    assert parts(deepspeed="zero2", **two) == (4 * N, 4 * N / 2, 12 * N / 2)
    assert parts(deepspeed="zero3", **two) == (4 * N / 2, 4 * N / 2, 12 * N / 2)
    assert parts(deepspeed="zero2", bf16=True, **two) == (2 * N, 2 * N / 2, 12 * N / 2)
    assert parts(deepspeed="zero2_offload", **two) == (4 * N, 4 * N / 2, 0)
    assert parts(deepspeed="zero3_offload", **two) == (0, 4 * N / 2, 0)
    assert parts(fsdp=True, **two) == (4 * N / 2, 4 * N / 2, 8 * N / 2)


@pytest.mark.parametrize("cuda", [True, False])
def test_gradients_of_one_pass_wait_for_the_others(cuda: bool) -> None:
    batch = LargestBatch(1, 512, 512, masked=False)
    alone, together = (
        estimate_memory(SMOLLM2, settings(), batch, accumulation, checkpointing=False, cuda=cuda)
        for accumulation in (1, 2)
    )
    assert alone.gradients == together.gradients == 4 * N
    assert alone.total < together.total
    parts_of_it = sum(value for name, value in vars(together).items() if name != "total")
    # on CPU a third gradient of the tied embedding (49152 x 576) stands beside what glibc does not give back
    logits = 4 * 512 * 49152
    more = 0.0 if cuda else 3 * 4 * 49152 * 576 - logits - 2 * logits
    assert together.total == pytest.approx(parts_of_it + more)


def llama(config: dict[str, Any], fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    kept = {name: value for name, value in config.items() if name != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**kept, attn_implementation="sdpa"))
    if fields["finetuning_type"] == "lora":
        model = add_lora(model.to(torch.bfloat16) if fields["bf16"] else model, fields)
        for value in model.parameters():
            value.data = value.data.float() if value.requires_grad else value.data
    return model.train()


@pytest.mark.parametrize("kind", ["even", "padded", "packed"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(method: str, bf16: bool, kind: str) -> None:
    fields = settings(finetuning_type=method, bf16=bf16)
    model = llama(SMALL, fields)
    row = {"input_ids": list(range(1, 49)), "labels": [-100] * 8 + list(range(9, 49)), "row": 0}
    rows = [row | {"seq_lengths": [24, 24] if kind == "packed" else [48]} for _ in range(2)]
    if kind == "padded":
        short = {"input_ids": row["input_ids"][:40], "labels": row["labels"][:40], "seq_lengths": [40]}  # type: ignore[index]
        rows[1] = row | short
    inputs = collate(rows, packing=kind == "packed").inputs
    found = kept_by_autograd(model, lambda: token_loss(model, inputs), bf16)
    trained = int((inputs["labels"][:, 1:] != -100).sum())
    batch = LargestBatch(2, 48, trained, masked=kind != "even")
    architecture = describe(SMALL, shapes_like_llama(SMALL))
    assert kept_and_passing(architecture, fields, batch, checkpointing=False)[0] == pytest.approx(found, rel=0.02)


def kept_by_autograd(model: Any, loss: Callable[[], torch.Tensor], bf16: bool) -> int:
    """Bytes beside the weights that are kept for the backward pass of a loss."""
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert loss().requires_grad
    return sum(value.untyped_storage().nbytes() for place, value in kept.items() if place not in weights)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_stages_that_draw_answers_keep_is_what_autograd_keeps(method: str, bf16: bool) -> None:
    fields = settings(finetuning_type=method, bf16=bf16, stage="ppo", reward_funcs=("length",))
    model = llama(SMALL, fields)
    assert reads_lines(model)
    if method == "lora":
        assert speed_up(model) == 7 * SMALL["num_hidden_layers"]
        assert keep_less(model) == 2 * SMALL["num_hidden_layers"] + 1
    rows = [Answered(0, [first, *range(20, 27)], list(range(30, 70)), True, None) for first in (1, 2)]
    inputs = make_inputs(rows, torch.device("cpu"), True)
    found = kept_by_autograd(model, lambda: token_logps(model, inputs, Sampling()).sum(), bf16)
    batch = LargestBatch(2, 48, 80, masked=True)
    architecture = describe(SMALL, shapes_like_llama(SMALL))
    assert kept_and_passing(architecture, fields, batch, checkpointing=False)[0] == pytest.approx(found, rel=0.03)


# One layer of a [4, 3] matrix beside q = 2, and a [5, 3] head: the example of `step_flops`.
WORKED = Architecture(
    tensors={"model.layers.0.proj.weight": (4, 3), "model.embed_tokens.weight": (5, 3), "lm_head.weight": (5, 3)},
    family="worked",
    hidden=3,
    intermediate=4,
    layers=1,
    heads=1,
    key_value_heads=1,
    head_dim=2,
    vocabulary=5,
    tied=False,
)


def test_operations_of_a_step_are_those_worked_by_hand() -> None:
    def flops(**fields: Any) -> float:
        return step_flops(WORKED, settings(**fields), tokens=4, trained_tokens=2, squared_lengths=8)

    body, head, attention = 12 * 4, 15 * 2, 1 * 1 * 2 * 8
    assert flops() == 6 * body + 6 * head + 12 * attention == 660
    # rank 8: matrices of 8 x (4 + 3) = 56 weights
    assert flops(finetuning_type="lora") == 4 * body + 4 * head + 12 * attention + 6 * 56 * 4 == 1848
    forward = 2 * body + 2 * head + 4 * attention
    assert flops(stage="dpo") == 660 + forward
    assert flops(stage="kto") == 660 + 3 * forward
    assert flops(stage="rm") == 6 * body + 12 * attention


def test_operations_of_full_training_are_six_per_weight_and_token_and_those_of_attention() -> None:
    matrices = N - 61 * 576  # the norms' weights multiply no matrix
    found = step_flops(SMOLLM2, settings(), tokens=2048, trained_tokens=2048, squared_lengths=2048 * 2048)
    assert found == 6 * matrices * 2048 + 12 * 30 * 576 * 2048 * 2048
