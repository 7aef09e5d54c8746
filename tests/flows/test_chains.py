"""What stages that start from other stages may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InputError
from registry.loading import load_recipe
from tests.flows.toy import toy_recipe


def write_pairs(path: Path, count: int, word: str) -> None:
    rows = [
        {
            "instruction": f"say {word} {n}",
            "chosen": f"{word} {n} {'y' * (n % 5)}",
            "rejected": f"no {n} {'z' * (n % 3)}",
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chain(folder: Path) -> Path:
    """sft, and dpo that starts from it; whole weights, so that nothing has to be merged."""
    toy_recipe(folder)
    write_pairs(folder / "pairs.jsonl", 12, "pair")
    raw: dict[str, Any] = {
        "name": "chain",
        "model_name_or_path": "model",
        "finetuning_type": "full",
        "cutoff_len": 160,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "stages": {
            "dpo": {"stage": "dpo", "model": "sft", "dataset": "pairs.jsonl", "val_size": 3, "eval_steps": 2},
            "sft": {"stage": "sft", "dataset": "train.jsonl"},
        },
        "evaluation": {"perplexity": ["held_out.jsonl"]},
    }
    path = folder / "chain.json"
    path.write_text(json.dumps(raw))
    return path


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(str(recipe), list(overrides))
    return str(error.value)


def test_a_stage_that_starts_from_none_or_from_itself_is_refused(tmp_path: Path) -> None:
    recipe = chain(tmp_path / "recipe")
    assert "'stf' is no stage of this recipe. Did you mean sft?" in refusal(recipe, "stages.dpo.model=stf")
    assert "start from each other" in refusal(recipe, "stages.sft.model=dpo")


def test_a_default_without_effect_is_refused_where_no_stage_can_use_it(tmp_path: Path) -> None:
    recipe = chain(tmp_path / "recipe")
    load_recipe(str(recipe), ["pref_beta=0.2"])  # dpo uses it
    assert "kto_chosen_weight has no effect with stage" in refusal(recipe, "kto_chosen_weight=2.0")
    assert "stages.sft.pref_beta: pref_beta has no effect with stage sft" in refusal(recipe, "stages.sft.pref_beta=0.2")


def test_what_cannot_go_together_is_refused_with_its_reason(tmp_path: Path) -> None:
    recipe = chain(tmp_path / "recipe")
    assert "a packed sequence holds several" in refusal(recipe, "stages.dpo.packing=true")
    assert "exo_pair takes the logarithm" in refusal(recipe, "stages.dpo.pref_loss=exo_pair")
    assert "simpo has no reference model" in refusal(recipe, "stages.dpo.pref_loss=simpo", "stages.dpo.ref_model=sft")
