"""The quicker forward of LoRA layers has PEFT's values and gradients."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tasks.train.fast_lora import GATED, drawing, speed_up
from tests.tiny import tiny_model

torch.set_num_threads(1)
FEW = torch.tensor([[72, 105, 33, 7, 9], [1, 2, 3, 4, 5]])
MANY = torch.arange(150).view(2, 75)  # rows that are multiplied in the usual way


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("fast") / "base")


def adapted(base: Path, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """A model with two adapters of other ranks, whose matrices are all not 0; float64, so that order hardly matters."""
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = get_peft_model(alone, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **fields))
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_(std=0.3)
    return model


def logits_and_gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("adapter", ["default", "other"])
def test_values_and_gradients_are_those_of_peft(base: Path, adapter: str, ids: torch.Tensor) -> None:
    plain, fast = adapted(base), adapted(base)
    assert speed_up(fast) == 14
    for model in (plain, fast):
        model.base_model.set_adapter(adapter)
    wanted, gradients = logits_and_gradients(plain, ids)
    found, others = logits_and_gradients(fast, ids)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    assert others.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(others[name], value, atol=1e-11, rtol=1e-11, msg=name)


def test_without_an_adapter_it_is_the_base_to_the_bit(base: Path) -> None:
    model = adapted(base)
    speed_up(model)
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=MANY).logits, alone(input_ids=MANY).logits)
        torch.testing.assert_close(model(input_ids=FEW).logits, alone(input_ids=FEW).logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
def test_an_adapter_that_begins_with_0_is_the_base_to_the_bit(base: Path, ids: torch.Tensor) -> None:
    model = adapted(base)
    speed_up(model)
    for name, value in model.named_parameters():
        if ".lora_B.default." in name:
            value.data.zero_()
    with torch.no_grad():
        found = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, found)


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
def test_in_bfloat16_it_is_as_near_to_the_exact_values_as_peft(base: Path, ids: torch.Tensor) -> None:
    whole = adapted(base)
    exact, gradients = logits_and_gradients(whole, ids)
    drawn, distances = dict(whole.named_parameters()), []
    for fast in (False, True):
        model = adapted(base, torch.bfloat16)
        for name, value in model.named_parameters():
            if "lora_" in name:  # as training holds them
                value.data = drawn[name].data.float()
        assert speed_up(model) == 14 if fast else True
        with torch.autocast("cpu", torch.bfloat16):
            found, others = logits_and_gradients(model, ids)
        assert others.keys() == gradients.keys()
        assert {value.dtype for value in others.values()} == {torch.float32}
        far = [(others[name] - value).norm() / value.norm() for name, value in gradients.items()]
        distances.append(((found - exact).norm() / exact.norm(), max(far)))
    (plain, plain_gradients), (own, own_gradients) = distances
    assert own < 1.2 * plain < 0.05
    assert own_gradients < 1.2 * plain_gradients < 0.5


@pytest.mark.parametrize("ids", [FEW, MANY], ids=["few", "many"])
def test_in_bfloat16_too_an_adapter_that_begins_with_0_is_the_base_to_the_bit(base: Path, ids: torch.Tensor) -> None:
    model = adapted(base, torch.bfloat16)
    speed_up(model)
    for name, value in model.named_parameters():
        value.data = value.data.float() if "lora_" in name else value.data
        if ".lora_B.default." in name:
            value.data.zero_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, found)


def kept_widths(mlp: Any, x: torch.Tensor) -> list[int]:
    """Widths of the tensors with as many rows as x that one pass keeps for its gradients."""
    kept = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if (
            value.numel() % x.shape[:-1].numel() == 0
            and value.dim() > 1
            and value.shape[-1] != mlp.down_proj.r["default"]
        ):
            kept[value.untyped_storage().data_ptr()] = value.numel() // x.shape[:-1].numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        mlp(x)
    weights = {value.untyped_storage().data_ptr() for value in mlp.parameters()}
    return sorted(width for place, width in kept.items() if place not in weights)


def test_a_gated_mlp_keeps_its_input_and_two_tensors_and_has_the_same_values_and_gradients(base: Path) -> None:
    model, without = adapted(base), adapted(base)
    assert speed_up(model) == speed_up(without) == 14
    for module in without.modules():
        if type(module).__name__ == "LlamaMLP":
            del module.forward
    mlp, plain = (each.base_model.model.model.layers[0].mlp for each in (model, without))
    h, i = mlp.down_proj.out_features, mlp.down_proj.in_features
    x = torch.randn(2, 75, h, dtype=torch.float64, generator=torch.manual_seed(0)).requires_grad_()
    assert kept_widths(mlp, x) == [h, i, i]
    assert kept_widths(plain, x) == [h, i, i, i, i]
    (wanted, gradients), (found, others) = (logits_and_gradients(each, MANY) for each in (without, model))
    assert torch.equal(found, wanted)
    for name, value in gradients.items():
        torch.testing.assert_close(others[name], value, atol=1e-13, rtol=1e-13, msg=name)


@pytest.mark.parametrize("name", sorted(GATED))
def test_the_mlps_that_are_known_as_gated_are(name: str) -> None:
    family = name.removesuffix("MLP").lower()
    module, config = (
        import_module(f"transformers.models.{family}.{kind}_{family}") for kind in ("modeling", "configuration")
    )
    (made,) = (value for key, value in vars(config).items() if key.lower() == f"{family}config")
    mlp = getattr(module, name)(made(hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=2))
    x = torch.randn(3, 8, generator=torch.manual_seed(0))
    assert mlp.config.hidden_act == "silu"
    assert torch.equal(mlp(x), mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


@pytest.mark.parametrize("fields", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_keeps_pefts_own_forward(base: Path, fields: dict[str, Any]) -> None:
    assert speed_up(adapted(base, **fields)) == 0


def test_few_rows_from_the_other_side_have_the_same_values_and_leave_no_trace(base: Path) -> None:
    model = adapted(base).eval()
    for fast in (False, True):
        if fast:
            speed_up(model)
        for adapter in ("default", "other"):
            model.base_model.set_adapter(adapter)
            with torch.no_grad():
                wanted, own = model(input_ids=FEW).logits, [vars(module).get("forward") for module in model.modules()]
                with drawing(model):
                    torch.testing.assert_close(model(input_ids=FEW).logits, wanted, atol=1e-12, rtol=1e-12)
                assert torch.equal(model(input_ids=FEW).logits, wanted)
            assert [vars(module).get("forward") for module in model.modules()] == own
