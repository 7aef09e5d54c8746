"""The model card: README.md of an exported model, in the Hugging Face hub's form.

One decision: a card is a function of what manifests say, so equal artifacts have equal cards: no time, no path, no run,
no name of a machine. What a card says is collected by whoever knows the recipe; here it is only written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# the hub's names of what models.yaml calls by the licence's own name
LICENCES = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "Llama 3.1 Community License": "llama3.1",
    "Llama 3.2 Community License": "llama3.2",
    "Gemma Terms of Use": "gemma",
}
LOADERS = {"text-generation": "AutoModelForCausalLM", "text-classification": "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class Made:
    """An artifact of the lineage."""

    step: str
    key: str
    digest: str


@dataclass(frozen=True)
class BaseModel:
    """What the first stage starts from."""

    name: str
    """Registry name, hub id or folder name."""
    digest: str
    """Of weights, config and tokenizer, 64 hex digits."""
    hub_id: str | None = None
    licence: str | None = None
    origin: str = ""
    """Commit on the hub, or the package that carried the weights; empty for a folder."""


@dataclass(frozen=True)
class DataSet:
    """Rows that a stage saw."""

    name: str
    source: str
    """Where they come from, in words."""
    use: str
    """`trained on`, or what was measured on them."""
    rows: int
    digest: str
    """Of the rows as they were read, 64 hex digits."""
    hub_id: str | None = None


@dataclass(frozen=True)
class StageRecord:
    """One stage of the lineage."""

    name: str
    stage: str
    method: str
    starts_from: str
    made: tuple[Made, ...]
    """What it trained, and what that was merged to."""
    template: str
    """Name of the chat template, and the digest of its text."""
    settings: Mapping[str, Any]
    data: tuple[DataSet, ...]
    numbers: Mapping[str, float]
    """`steps`, `trained_tokens`, `train_loss` …"""
    packages: Mapping[str, str]


@dataclass(frozen=True)
class Result:
    """A held-out number of the last stage."""

    name: str
    rows: int
    after: float
    before: float | None = None
    limits: tuple[float, float] | None = None
    """Of the 95 % interval of `after`."""


@dataclass(frozen=True)
class Card:
    """Everything a card says."""

    name: str
    base: BaseModel
    stages: tuple[StageRecord, ...]
    """From the base on; the last one is exported."""
    results: tuple[Result, ...]
    task: str
    """`text-generation` or `text-classification`: a reward model."""
    chat: bool
    """Whether the last stage was trained on conversations."""
    adapter: bool
    """The adapter of the last stage alone."""
    on_base: bool
    """The last stage starts from the base itself, so its adapter goes onto that."""
    saved_dtype: str
    dtype: str

    @property
    def exported(self) -> Made:
        """The artifact whose weights these are."""
        made = self.stages[-1].made
        return made[0] if self.adapter else made[-1]

    def text(self) -> str:
        """README.md."""
        parts = [
            f"---\n{_yaml(self.front_matter())}---",
            f"# {self.name}",
            self._what(),
            "## Load it",
            f"```python\n{self.snippet()}```",
            "## Where it comes from",
            self._lineage(),
            "## Data",
            self._data(),
            "## How it was trained",
            *(text for stage in self.stages for text in _training(stage)),
            "## Results",
            self._results(),
        ]
        return "\n\n".join(parts) + "\n"

    def front_matter(self) -> dict[str, Any]:
        """What the hub reads."""
        base, last = self.base, self.stages[-1]
        values: dict[str, Any] = {}
        if base.hub_id and (self.on_base or not self.adapter):
            values |= {"base_model": base.hub_id, "base_model_relation": "adapter" if self.adapter else "finetune"}
        values |= {"library_name": "peft" if self.adapter else "transformers", "pipeline_tag": self.task}
        if base.licence in LICENCES:
            values["license"] = LICENCES[base.licence]
        elif base.licence:
            values |= {"license": "other", "license_name": base.licence}
        hub_data = dict.fromkeys(d.hub_id for s in self.stages for d in s.data if d.hub_id and d.use == "trained on")
        tags = ["llamatuner", *dict.fromkeys((last.stage, last.method))]
        return values | {"tags": tags} | ({"datasets": list(hub_data)} if hub_data else {})

    def snippet(self) -> str:
        """Python that loads the model and uses it once, in the working directory of the folder."""
        loader = LOADERS[self.task]
        lines = ["from peft import PeftModel"] if self.adapter else []
        lines += [f"from transformers import {loader}, AutoTokenizer", ""]
        lines += [
            'path = "."  # this folder, or its name on the hub',
            "tokenizer = AutoTokenizer.from_pretrained(path)",
        ]
        if self.adapter:
            base = self.base.hub_id if self.on_base and self.base.hub_id else "path/to/the/model/it/starts/from"
            labels = ", num_labels=1" if self.task == "text-classification" else ""
            lines.append(f'model = {loader}.from_pretrained("{base}", dtype="auto"{labels})')
            lines.append("model = PeftModel.from_pretrained(model, path)")
        else:
            lines.append(f'model = {loader}.from_pretrained(path, dtype="auto")')
        return "\n".join([*lines, "", *self._use(), ""])

    def _use(self) -> list[str]:
        if self.task == "text-classification":
            return [
                'messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}]',
                "text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()  # up to the answer's end",
                'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
                "print(model(**inputs).logits[0, 0].item())",
            ]
        if not self.chat:
            start = ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
        else:
            start = [
                'messages = [{"role": "user", "content": "Hello!"}]',
                "inputs = tokenizer.apply_chat_template(",
                '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
                ")",
            ]
        end = 'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
        return [*start, "answer = model.generate(**inputs, max_new_tokens=128)", end]

    def _what(self) -> str:
        kind = "reward model" if self.task == "text-classification" else "language model"
        chain = " → ".join(f"{stage.name} ({stage.stage}, {stage.method})" for stage in self.stages)
        last = self.stages[-1]
        if self.adapter:
            text = f"The LoRA adapter of stage `{last.name}`, without the weights it goes onto: {last.starts_from}."
        elif len(last.made) > 1:
            text = f"A {kind} as whole weights: what its LoRA adapter learnt is merged into them."
        else:
            text = f"A {kind} as whole weights."
        rounded = f", rounded once from {self.saved_dtype}" if self.dtype != self.saved_dtype else ""
        text += f" Made with LLamaTuner from `{self.base.name}`: {chain}. The weights are in {self.dtype}{rounded}."
        if self.adapter and not self.on_base:
            text += " To have those, export the stage it starts from as well, or this one without `--adapter`."
        return text

    def _lineage(self) -> str:
        base = self.base
        name = base.name if base.hub_id in (None, base.name) else f"{base.name} = {base.hub_id}"
        rows = [("base", name + (f", {base.origin}" if base.origin else ""), "", base.digest)]
        for stage in self.stages:
            what = {"train": f"{stage.stage}, {stage.method}, from {stage.starts_from}", "merge": "adapter + weights"}
            rows += [(f"{stage.name}/{made.step}", what[made.step], made.key, made.digest) for made in stage.made]
        table = _table(("step", "what", "key", "content digest"), rows)
        exported = self.exported
        return (
            f"{table}\n\nThe weights here are those of the last `{exported.step}`: key `{exported.key}`, "
            f"content digest `{exported.digest}`. A key says what an artifact was made from, a digest what it is; "
            "`llamatuner artifacts show KEY` shows the whole record."
        )

    def _data(self) -> str:
        rows = [(s.name, d.name, d.source, d.use, str(d.rows), d.digest) for s in self.stages for d in s.data]
        return _table(("stage", "data set", "source", "use", "rows", "digest of the rows"), rows)

    def _results(self) -> str:
        if not self.results:
            return "Nothing was measured on held-out rows."
        rows = []
        for r in self.results:
            before = "" if r.before is None else f"{r.before:.6g}"
            limits = f"{r.limits[0]:.4g} to {r.limits[1]:.4g}" if r.limits else ""
            rows.append((r.name, str(r.rows), before, f"{r.after:.6g}", limits))
        table = _table(("held-out", "rows", "before the last stage", "after", "95 % interval"), rows)
        if self.dtype != self.saved_dtype:
            table += f"\n\nMeasured on the {self.saved_dtype} weights, before they were rounded."
        return table


def _training(stage: StageRecord) -> list[str]:
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in stage.numbers.items())
    packages = ", ".join(f"{name} {version}" for name, version in stage.packages.items())
    off = (None, False)  # 0 is a value
    settings = {name: v for name, v in stage.settings.items() if not any(v is word for word in off) and v != []}
    return [
        f"### {stage.name}",
        f"Chat template: {stage.template}. It ended with {numbers}. Made with {packages}.",
        f"```yaml\n{_yaml(settings)}```",
    ]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)
    return text
