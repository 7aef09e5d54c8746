"""What becomes of the arguments of other programs, `docs/coming-from-llama-factory.md`, made from the tables.

python -m registry.old_keys_page > docs/coming-from-llama-factory.md
"""

from __future__ import annotations

from collections.abc import Iterator

from registry.errors import shown
from registry.old_keys import OLD_KEYS, TRANSFORMERS, OldKey
from registry.old_values import CONVERSIONS, MEANINGS
from registry.stage_settings import ALIASES, FIELDS

TOP = """\
# Coming from LLaMA-Factory

Made by `make docs` from the tables in `registry/`. Configs and commands of LLaMA-Factory and of the LLamaTuner before
this one run as they are:

```
llamatuner train examples/train_lora/llama3_lora_sft.yaml
llamatuner train examples/train_lora/llama3_lora_sft.yaml learning_rate=5e-5 max_samples=100
llamatuner-cli train --stage sft --do_train --model_name_or_path MODEL --dataset a,b --template qwen --output_dir out
llamatuner eval examples/train_lora/llama3_lora_eval.yaml
llamatuner export examples/merge_lora/llama3_lora_sft.yaml
llamatuner chat examples/inference/llama3_lora_sft.yaml
llamatuner import examples/train_lora/llama3_lora_sft.yaml --out recipe.yaml
```

`train` takes relative paths from the working directory, looks into `data/` where that has a `dataset_info.json`, does
only what is not done yet, and writes the adapter (or the weights) to `output_dir`. There the next config finds it, as
`adapter_name_or_path` or `reward_model`; with `overwrite_output_dir` a model that was there before is kept beside it.
An adapter that was trained elsewhere does not say which base weights it belongs to: it is taken, and a note says that
this could not be checked. One of LLamaTuner's own on other weights is refused. `llamatuner run CONFIG` does the same
from any folder, with paths relative to the file, and writes no `output_dir`. `import` writes the recipe that a config
means, with what was renamed and what has no effect; `export` merges an adapter into its base; `llamatuner check` looks
at a recipe and its data without training.

A config with `do_predict` or `task` and no training measures: answers written anew (`predict_with_generate`, drawn as
LLaMA-Factory draws them), the loss of the answers there, or a benchmark. With `do_train` and `do_predict`, answers are
written after training.

What is said nowhere in a config is not everywhere the same here: rows longer than `cutoff_len` are left out and counted
(LLaMA-Factory cuts them: `overlong: truncate`), control tokens that somebody typed stay text (`control_tokens: keep`),
packed rows never see each other, activations are kept (`gradient_checkpointing: true` saves memory), and stage `ppo`
draws from all tokens (`temperature: 0.95`, `top_p: 0.7`, `top_k: 50` there), at most 64 (1024 there), with a fixed
penalty (`ppo_target: 6.0` there).

Every argument that is a setting of the same name is in [settings.md](settings.md). All others:
"""


def old_keys_page() -> str:
    """The page, as Markdown."""
    lines = [TOP, "## Read as something else", "", "| argument | here |", "|---|---|"]
    renamed = {name: f"`{target}`" for name, target in ALIASES.items()} | MEANINGS
    lines += [f"| `{name}` | {_cell(text)} |" for name, text in sorted(renamed.items())]
    lines += ["", "## Without effect, which is said", "", "| arguments | why |", "|---|---|"]
    lines += [f"| {names} | {_cell(key.why)} |" for names, key in _grouped(refused=False)]
    lines += ["", "## Refused, with the reason", "", "A value in brackets asks for nothing, and is let through.", ""]
    lines += ["| arguments | why | instead |", "|---|---|---|"]
    lines += [f"| {names} | {_cell(key.why)} | {_cell(key.cure)} |" for names, key in _grouped(refused=True)]
    lines += [
        "",
        "`do_train: false`, `do_predict` and what belongs to them are refused where a recipe has `stages`; in a",
    ]
    lines += ["config without, they are read as is told above. So are `task`, `n_shot` and `batch_size`.", ""]
    lines += ["Arguments of transformers' `TrainingArguments` that are not supported:"]
    lines += [", ".join(f"`{name}`" for name in sorted(TRANSFORMERS)) + "."]
    return "\n".join(lines) + "\n"


def _grouped(refused: bool) -> Iterator[tuple[str, OldKey]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, key in OLD_KEYS.items():
        if key.refused is refused:
            harmless = ", ".join(shown(value) for value in key.harmless)
            groups.setdefault((key.why, key.cure), []).append(f"`{name}`" + (f" ({harmless})" if harmless else ""))
    for (why, cure), names in groups.items():
        yield ", ".join(names), OldKey(why, cure)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def status(name: str) -> str:
    """What becomes of an argument: `same`, `renamed`, `converted`, `no effect`, `refused`, or `unknown`."""
    if name in ALIASES:
        return "renamed"
    if name in MEANINGS:
        return "converted"
    if name in FIELDS or name in CONVERSIONS:
        return "same"
    if name in OLD_KEYS:
        return "refused" if OLD_KEYS[name].refused else "no effect"
    return "refused" if name in TRANSFORMERS else "unknown"


if __name__ == "__main__":
    print(old_keys_page(), end="")
