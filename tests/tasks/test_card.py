"""The model card: what it says of a lineage, literally, and what the hub reads of it."""

from __future__ import annotations

import re
from dataclasses import replace

import yaml

from tasks.card import BaseModel, Card, DataSet, Made, Result, StageRecord

HUB = BaseModel("smollm2-135m-instruct", "b0", "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", "commit c0")
STAGE = StageRecord(
    name="sft",
    stage="sft",
    method="lora",
    starts_from="the base",
    made=(Made("train", "k1", "d1"), Made("merge", "k2", "d2")),
    template="the base model's own, sha256 `t1`",
    settings={
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "use_dora": False,
        "quant_bit": None,
        "additional_target": [],
        "learning_rate": 2e-5,
        "seed": 0,
    },
    data=(
        DataSet("pairs|odd", "Hugging Face hub: acme/pairs, train", "trained on", 20, "r1", "acme/pairs"),
        DataSet("pairs|odd", "Hugging Face hub: acme/pairs, train", "measured on as validation", 4, "r2", "acme/pairs"),
        DataSet("mine", "files", "measured on", 6, "r3"),
    ),
    numbers={"train_loss": 1.23456789, "steps": 48},
    packages={"torch": "2.13.0", "transformers": "5.24.0", "peft": "0.21.2"},
)
CARD = Card(
    name="demo-sft",
    base=HUB,
    stages=(STAGE,),
    results=(Result("perplexity.mine", 6, 2.4812345, 71.4312345, (2.4, 2.56)), Result("perplexity.new", 3, 5.0)),
    task="text-generation",
    chat=True,
    adapter=False,
    on_base=True,
    saved_dtype="bfloat16",
    dtype="bfloat16",
)
DPO = replace(
    STAGE, name="dpo", stage="dpo", starts_from="sft", made=(Made("train", "k3", "d3"), Made("merge", "k4", "d4"))
)


def front(card: Card) -> dict[str, object]:
    """The front matter as the hub parses it."""
    match = re.match(r"---\n(.*?\n)---\n\n# ", card.text(), re.DOTALL)
    assert match
    values: dict[str, object] = yaml.safe_load(match[1])
    assert values == card.front_matter()
    return values


def test_the_hub_reads_base_licence_data_sets_and_tags() -> None:
    assert front(CARD) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["llamatuner", "sft", "lora"],
        "datasets": ["acme/pairs"],
    }


def test_a_base_that_is_on_no_hub_is_not_claimed_to_be() -> None:
    local = replace(CARD, base=BaseModel("model", "b0"), stages=(replace(STAGE, data=STAGE.data[2:]),))
    assert front(local) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llamatuner", "sft", "lora"],
    }
    other = replace(HUB, licence="Some Terms of Use")
    assert front(replace(CARD, base=other)) | {"license": "other", "license_name": "Some Terms of Use"} == front(
        replace(CARD, base=other)
    )


def test_an_adapter_is_said_to_belong_to_the_base_only_where_it_does() -> None:
    alone = replace(CARD, adapter=True, name="demo-sft-adapter")
    assert front(alone)["base_model_relation"] == "adapter"
    assert front(alone)["library_name"] == "peft"
    assert (
        'AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="auto")' in alone.snippet()
    )
    assert "The LoRA adapter of stage `sft`, without the weights it goes onto: the base." in alone.text()
    assert (alone.exported, CARD.exported) == (Made("train", "k1", "d1"), Made("merge", "k2", "d2"))
    behind = replace(alone, stages=(STAGE, DPO), on_base=False)
    assert "base_model" not in front(behind)
    assert 'from_pretrained("path/to/the/model/it/starts/from", dtype="auto")' in behind.snippet()
    assert "without the weights it goes onto: sft." in behind.text()
    assert "To have those, export the stage it starts from as well, or this one without" in behind.text()


def test_the_chain_is_told_from_the_base_on_with_keys_and_digests() -> None:
    text = replace(CARD, stages=(STAGE, DPO), on_base=False).text()
    assert "from `smollm2-135m-instruct`: sft (sft, lora) → dpo (dpo, lora). The weights are in bfloat16." in text
    for line in (
        "| base | smollm2-135m-instruct = HuggingFaceTB/SmolLM2-135M-Instruct, commit c0 |  | b0 |",
        "| sft/train | sft, lora, from the base | k1 | d1 |",
        "| sft/merge | adapter + weights | k2 | d2 |",
        "| dpo/train | dpo, lora, from sft | k3 | d3 |",
        "| dpo/merge | adapter + weights | k4 | d4 |",
    ):
        assert line in text.splitlines()
    assert "the last `merge`: key `k4`, content digest `d4`" in text


def test_data_settings_numbers_and_versions_are_there() -> None:
    lines = CARD.text().splitlines()
    assert "| sft | pairs\\|odd | Hugging Face hub: acme/pairs, train | trained on | 20 | r1 |" in lines
    assert "| sft | mine | files | measured on | 6 | r3 |" in lines
    assert (
        "Chat template: the base model's own, sha256 `t1`. It ended with train_loss 1.23457, steps 48. "
        "Made with torch 2.13.0, transformers 5.24.0, peft 0.21.2."
    ) in lines
    block = CARD.text().partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(block) == {  # what is off is not said; 0 is a value
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "learning_rate": 2e-5,
        "seed": 0,
    }
    assert "| perplexity.mine | 6 | 71.4312 | 2.48123 | 2.4 to 2.56 |" in lines
    assert "| perplexity.new | 3 |  | 5 |  |" in lines


def test_weights_that_were_rounded_are_said_to_be_and_numbers_are_not_theirs() -> None:
    text = replace(CARD, saved_dtype="float32").text()
    assert "The weights are in bfloat16, rounded once from float32." in text
    assert "Measured on the float32 weights, before they were rounded." in text
    assert "rounded" not in CARD.text()
    assert "Nothing was measured on held-out rows." in replace(CARD, results=()).text()


def test_every_snippet_is_python_and_names_the_right_class() -> None:
    kinds = {
        "AutoModelForCausalLM": CARD,
        "PeftModel": replace(CARD, adapter=True),
        "AutoModelForSequenceClassification": replace(CARD, task="text-classification"),
    }
    for name, card in kinds.items():
        compile(card.snippet(), name, "exec")
        assert name in card.snippet()
    assert "apply_chat_template" not in replace(CARD, chat=False).snippet()
