"""The form of a recipe: typed, with its own values, and empty fields change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from registry.errors import InputError
from registry.loading import load_recipe
from registry.recipes import RECIPES
from registry.run_form import recipe_form, stage_form


def filled(form: dict[str, Any]) -> Any:
    """What a page sends when nobody changes a thing: the defaults."""
    if form.get("type") != "object":
        return form.get("default")
    values = {key: filled(field) for key, field in form["properties"].items()}
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("name", RECIPES)
def test_a_form_sent_as_it_is_changes_nothing(name: str) -> None:
    form = recipe_form(name)
    values = filled(form)
    jsonschema.validate(values, form)
    shipped = load_recipe(name)
    assert replace(load_recipe(name, settings=values), raw={}) == replace(shipped, raw={})
    assert list(form["properties"]["stages"]["properties"]) == list(shipped.raw["stages"])


def test_a_field_says_what_it_is_what_it_may_be_and_what_the_recipe_has() -> None:
    above, stage = recipe_form("sft_dpo")["properties"], recipe_form("sft_dpo")["properties"]["stages"]
    dpo = stage["properties"]["dpo"]["properties"]
    assert above["finetuning_type"]["enum"] == ["lora", "freeze", "full"]
    assert above["finetuning_type"]["default"] == "lora"
    assert above["model_name_or_path"]["default"] == "smollm2-135m-instruct"
    assert {key: value for key, value in dpo["learning_rate"].items() if key != "position"} == {
        "title": "learning_rate",
        "type": "number",
        "exclusiveMinimum": 0,
        "default": 2e-4,
        "description": "Peak learning rate.",
    }
    assert dpo["dataset"]["default"] == ["assistant_preferences"]
    assert dpo["seed"]["description"] == "Seed of initialisation, order and dropout. Default: 42."
    assert "default" not in dpo["num_train_epochs"]
    assert not {"model", "stage"} & dpo.keys()


def test_what_a_cluster_is_asked_for_is_a_mapping_in_the_form(tmp_path: Path) -> None:
    file, asked = tmp_path / "cluster.yaml", {"partition": "gpu", "time": "1:00:00"}
    stage = {"stage": "sft", "dataset": "assistant", "nnodes": 2, "nproc_per_node": 8}
    file.write_text(json.dumps({"name": "far", "launcher": "slurm", "slurm": asked, "stages": {"sft": stage}}))
    form = recipe_form(str(file))
    assert (form["properties"]["slurm"]["type"], form["properties"]["slurm"]["default"]) == ("object", asked)
    assert form["properties"]["launcher"]["enum"] == ["local", "slurm", "kubernetes"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": {"sft": {"learning_rate": "fast"}}},
        {"stages": {"sft": {"learning_rate": 0}}},
        {"stages": {"sft": {"lerning_rate": 1e-4}}},
        {"stages": {"sft2": {}}},
        {"finetuning_type": "lorra"},
        {"evaluation": {"max_new_tokens": 0}},
    ],
)
def test_what_cannot_be_is_refused_by_the_form(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, recipe_form("demo"))


def test_what_is_filled_in_is_laid_over_the_recipe_and_what_is_empty_is_not() -> None:
    given = {"name": "", "stages": {"sft": {"learning_rate": 1e-4, "dataset": [], "max_steps": None}}}
    recipe = load_recipe("demo", settings=given)
    assert recipe.name == "demo"
    assert recipe.raw["stages"]["sft"]["learning_rate"] == 1e-4
    assert recipe.raw["stages"]["sft"]["dataset"] == ["assistant", "assistant_chat"]
    assert "max_steps" not in recipe.raw["stages"]["sft"]


def test_settings_alone_are_a_recipe_of_one_stage() -> None:
    given = {"name": "mine", "stage": "sft", "model_name_or_path": "smollm2-135m-instruct", "dataset": ["assistant"]}
    jsonschema.validate(given, stage_form())
    recipe = load_recipe(None, settings=given)
    assert (recipe.name, [stage.name for stage in recipe.stages]) == ("mine", ["sft"])


def test_a_setting_above_the_stages_that_none_of_them_reads_is_refused() -> None:
    with pytest.raises(InputError, match="learning_rate: every stage of the recipe has its own"):
        load_recipe("sft_dpo", settings={"learning_rate": 1e-4})


def test_a_setting_of_the_recipe_that_does_not_fit_any_more_can_be_taken_out() -> None:
    given = {"finetuning_type": "full", "lora_rank": 16}
    with pytest.raises(InputError, match="lora_rank has no effect with finetuning_type full"):
        load_recipe("sft_dpo", settings=given)
    recipe = load_recipe("sft_dpo", ["lora_rank="], given)
    assert [stage.train.finetuning_type for stage in recipe.stages] == ["full", "full"]
    assert "lora_rank" not in recipe.raw
