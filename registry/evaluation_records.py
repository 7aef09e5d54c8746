"""What is measured, and how: the `evaluation` of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from registry.record import Record, Steps, Text, Texts, list_of_one
from registry.records import Datasets


class BenchmarkSettings(Record):
    """A benchmark with settings of its own; what is not given here is as in `evaluation`."""

    task: Text
    """Name of `llamatuner list benchmarks`, a task of lm-eval, or a task file of your own in its form (`*.yaml`)."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples in front of every question."""
    limit: Steps | None = None
    """Most questions, of a group of each subject, in the order of the data."""
    apply_chat_template: bool | None = None
    """Ask every question as a message of a user."""


def _form(value: Any) -> str:
    return "mapping" if isinstance(value, dict | BenchmarkSettings) else "name"


BenchmarkName = Annotated[
    Annotated[str, Tag("name")] | Annotated[BenchmarkSettings, Tag("mapping")], Discriminator(_form)
]


class GenerationSettings(Record):
    """How answers are written that are looked at, or compared with others."""

    max_new_tokens: Steps = 64
    """Longest answer, in tokens."""
    do_sample: bool = False
    """Draw answers instead of taking the most likely token; each row has random numbers of its own."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """With `do_sample`: logits are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With `do_sample`: draw from the smallest set of most likely tokens with this share of the probability."""
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """With `do_sample`: draw from so many most likely tokens; 0 draws from all."""
    num_beams: Steps = 1
    """Beams of beam search; 1 searches none."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Scores of tokens that are there already are divided by it; 1 changes none."""
    length_penalty: float = 1.0
    """With `num_beams`: above 0 prefers longer answers, below 0 shorter ones."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of what is drawn: answers, and the examples in front of a benchmark's questions."""


class EvaluationSettings(GenerationSettings):
    """What is measured after training."""

    perplexity: Datasets = ()
    """Data sets whose answers are scored; nothing means the held-out rows of the stage."""
    stride: Steps | None = None
    """Tokens that a window of a text longer than `cutoff_len` scores; the rest of the window is what stands before
    them. Nothing means as many as fit: all but one."""
    benchmarks: Annotated[tuple[BenchmarkName, ...], BeforeValidator(list_of_one)] = ()
    """Benchmarks, by name or as mappings; a list or `a,b`."""
    data_dir: Text | None = None
    """Folder with the files of benchmarks, for those that are to be read from files."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples in front of every question of a benchmark; nothing leaves it to the benchmark."""
    limit: Steps | None = None
    """Most questions of each benchmark, of a group (`mmlu`) of each subject, in the order of its data; for trying
    things out."""
    apply_chat_template: bool = False
    """Ask the questions of benchmarks as messages of a user."""
    generate: Datasets = ()
    """Data sets of conversations whose last answers are written anew, and compared with those that the data set has."""
    reward_model: Text | None = None
    """What scores the answers of `generate`: a stage of kind rm of the recipe, a registered name, a hub id, a folder,
    or a stage of a finished run (`RECIPE:STAGE`)."""
    questions: Texts = ()
    """Questions answered by the models before and after."""
    compare_with: Text = "base"
    """Measure the base model as well, whose result is shared by all pipelines; or `none`. Where nothing is trained, any
    other model."""
    gate: Texts = ()
    """Conditions that make the model of the last measured stage the champion of MLflow's registry, when all are met at
    the end of a run: `perplexity.held_out - champion <= 0 at 95%`."""
