"""The settings of a stage, as frozen records: what changes the result apart from what does not.

One decision: identity and runtime are different types. `ModelSettings`, `DataSettings`, `TrainSettings` and
`EvaluationSettings` enter the keys of steps; nothing of `RuntimeSettings` ever does. A recipe writes them all flat,
with the argument names of LLaMA-Factory and LLamaTuner. Every field says its unit in the string below it; that string
is the help text, the JSON schema and the reference.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag

from registry.combinations import without_effect
from registry.deepspeed import deepspeed_config
from registry.loss_records import LossSettings
from registry.method_records import MethodSettings
from registry.online_records import GroupSettings, OnlineSettings, PpoSettings
from registry.record import Boards, FullShard, Names, Record, Shares, Steps, Text, list_of_one, minus_one_is_unset
from registry.reward_rules import short_name


class ModelSettings(Record):
    """The model a stage starts from."""

    model: Text | None = None
    """Earlier stage of the recipe whose model this stage starts from."""
    model_name_or_path: Text
    """Registry name, Hugging Face hub id (`owner/name`) or local folder of the base model."""
    model_revision: Text = "main"
    """Hub branch, tag or commit of the base model; the commit it pointed to is recorded."""
    adapter_name_or_path: Text | None = None
    """Local folder of a LoRA adapter to continue from; it must have been trained on the same base weights."""
    add_tokens: Names = ()
    """Text that becomes one token of its own wherever it stands; a list or `a,b`. The embedding and the output head get
    rows for them, which begin as the mean of what the text was before, and are trained."""
    add_special_tokens: Names = ()
    """The same for control tokens, such as those of a template of your own."""
    resume_from_checkpoint: Text | None = None
    """Folder of a checkpoint to go on from (`checkpoint-N`, ours or of Hugging Face's Trainer); its content counts.
    The newest checkpoint of an interrupted run is found without it."""
    resume: Literal["exact", "weights_only"] = "exact"
    """From `resume_from_checkpoint` take all (what is missing is an error), or the weights, to begin at step 0."""


class InlineDataset(Record):
    """A data set written into the recipe, or a known one with a share of its own. The keys are those of an entry of
    LLaMA-Factory's dataset_info.json, and four of ours."""

    dataset: Text | None = None
    """A known data set, file, folder, URL or hub id that the other keys of this mapping change."""
    file_name: Text | None = None
    """File, folder, glob (`data/*.jsonl`) or URL; relative to `dataset_dir` or the recipe file."""
    hf_hub_url: Text | None = None
    """Repository on the Hugging Face hub, `owner/name`."""
    ms_hub_url: Text | None = None
    """Repository on ModelScope, `owner/name`; used when `hf_hub_url` is not given."""
    subset: Text | None = None
    """Configuration of the repository."""
    split: Text | None = None
    """Split, and a range of its rows: `train`, `train[:10%]`, `test[100:200]`."""
    folder: Text | None = None
    """Folder of the repository to look in."""
    revision: Text | None = None
    """Branch, tag or commit of the repository."""
    formatting: Text | None = None
    """How a row is read: `alpaca`, `sharegpt` or `openai`; found from the columns when nothing is said of them."""
    ranking: bool | None = None
    """Rows have a preferred and a rejected answer."""
    columns: dict[str, str | None] | None = None
    """Our column name → the file's: prompt, query, response, history, system, tools, messages, chosen, rejected, …"""
    tags: dict[str, str | None] | None = None
    """Keys and role names of a message: role_tag, content_tag, user_tag, assistant_tag, observation_tag, …"""
    num_samples: Steps | None = None
    """Most rows to take, in file order."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the mixture, relative to those of the other data sets; 1 when not given."""
    max_rows: Steps | None = None
    """Most rows to take, in file order, for this run."""
    repeat: Steps | None = None
    """How many times its rows are seen in one epoch; 1 when not given."""
    licence: str | None = None
    """Licence of the rows, to be kept with the run."""
    description: str | None = None
    """What it is, for people."""


def _form(value: Any) -> str:
    return "mapping" if isinstance(value, dict | InlineDataset) else "name"


DatasetName = Annotated[Annotated[str, Tag("name")] | Annotated[InlineDataset, Tag("mapping")], Discriminator(_form)]
Datasets = Annotated[tuple[DatasetName, ...], BeforeValidator(list_of_one)]


class DataSettings(Record):
    """The rows a stage sees and how they become tokens."""

    dataset: Annotated[Datasets, Field(min_length=1)] = ()
    """Data sets to train on: names, files, folders, URLs, hub ids (`owner/name:subset@train[:10%]`) or mappings; a
    list or `a,b`. A stage cannot do without."""
    eval_dataset: Datasets = ()
    """Held-out data sets, in the same forms; each is reported by its own name."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = "concat"
    """Order of several data sets: one behind the other, or drawn at random until one has no more rows (`under`) or
    until all have been seen whole (`over`)."""
    interleave_probs: Shares = ()
    """Share of each data set when they are interleaved, in their order; a list or `0.7,0.3`. Nothing means their
    `weight`s."""
    val_size: Annotated[float, Field(ge=0)] = 0.0
    """Rows kept back from `dataset` for evaluation: a share below 1, or a number of rows from 1."""
    max_samples: Steps | None = None
    """Most rows taken from each data set, in file order; for trying things out."""
    template: Text = "auto"
    """Chat template: `auto` is the model's own, else a name of `llamatuner list templates` or a .jinja file."""
    cutoff_len: Annotated[int, Field(ge=4, lt=2**31)] = 2048
    """Longest sequence, in tokens; also the length of a packed sequence."""
    overlong: Literal["drop", "truncate", "split", "error"] = "drop"
    """What happens to a row longer than `cutoff_len`: left out and counted, cut behind the last answer that fits,
    split into blocks (plain text only; the default of stage pt), or refused."""
    cut_answers: bool = False
    """With `overlong: truncate`, cut inside an answer as well, which then has no terminator."""
    packing: bool = False
    """Put several rows into one sequence of `cutoff_len` tokens; they never see each other. The default of stage pt."""
    mask_history: bool = False
    """Train on the last answer of a conversation only, instead of on every answer."""
    train_on_prompt: bool = False
    """Train on everything but the leading BOS, instead of on answers only."""
    control_tokens: Literal["plain", "keep", "refuse"] = "plain"
    """What the text of a control token such as `<|im_end|>` in a message becomes: text like any other, a real control
    token (what publishers' own code does), or a refused row."""
    default_system: str | None = None
    """System message of conversations without one; nothing leaves it to the template."""
    enable_thinking: bool | None = None
    """Variable of that name for templates of reasoning models; nothing leaves it to the template."""
    bad_rows: Literal["fail", "skip", "quarantine"] = "fail"
    """What a row that cannot be used does: end the run with every reason, be left out and reported, or be kept in a
    file of its own as well."""
    bad_rows_limit: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest share of rows that may be left out before the run ends with an error."""


class TrainSettings(MethodSettings, LossSettings, OnlineSettings, PpoSettings, GroupSettings):
    """How the weights are moved."""

    stage: str = "sft"
    """Training stage; see `llamatuner list stages`."""
    per_device_train_batch_size: Steps = 1
    """Sequences per process in one forward pass."""
    gradient_accumulation_steps: Steps = 1
    """Forward passes per optimizer step."""
    nproc_per_node: Steps | None = None
    """Training processes on each machine, started by torchrun when more than one; nothing means one per visible CUDA
    device, and 1 without any. A cluster has to be told."""
    nnodes: Steps | None = None
    """Machines that train together, of those that `launcher: slurm` or `kubernetes` has; nothing means 1."""
    deepspeed: Text | None = None
    """DeepSpeed's division of memory among processes: `zero0` to `zero3`, `zero2_offload`, `zero3_offload`, or a
    DeepSpeed JSON file, whose content counts."""
    fsdp: FullShard = False
    """Weights, gradients and optimizer state divided among CUDA devices by PyTorch (FSDP, version 2); `full_shard` is
    another word for true."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training rows; not used when `max_steps` is set."""
    max_steps: Annotated[Steps | None, BeforeValidator(minus_one_is_unset)] = None
    """Optimizer steps to make; -1 or nothing leaves it to `num_train_epochs`."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape of the learning rate over the run."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the optimizer steps over which the learning rate rises to its peak."""
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The same as a number of optimizer steps; above 0 it stands in place of `warmup_ratio`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the optimizer."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of initialisation, order and dropout."""
    eval_steps: Steps | None = None
    """Optimizer steps between two measurements of the held-out loss while training; nothing measures none."""
    early_stopping_steps: Steps | None = None
    """Measurements without a better held-out value after which training ends."""
    load_best_model_at_end: bool = False
    """Keep the weights with the best held-out value, instead of the last ones."""
    metric_for_best_model: Text = "eval_loss"
    """The held-out value that is meant: `eval_loss`, of one of several sets `eval_loss/<set>`; of pairs also
    `eval_rewards/accuracies` and `eval_rewards/margins`, of which more is better."""
    bf16: bool = False
    """Frozen weights and arithmetic in bfloat16; what is trained, and optimizer state, stays float32."""

    def global_batch_size(self) -> int:
        """Sequences per optimizer step of one machine: per device x accumulation x processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * (self.nproc_per_node or 1)

    def resolved(self) -> dict[str, Any]:
        """The settings that others decide when they are not given."""
        own = {"critic_learning_rate": self.critic_learning_rate or self.learning_rate}
        return MethodSettings.resolved(self) | OnlineSettings.resolved(self) | own

    def identity(self) -> dict[str, Any]:
        """The settings that change the weights: derived values filled in, those without effect left out.

        The number of processes is 1 unless it is set: who knows the devices sets it first (`flows.graph`).
        """
        # which models these mean is said by the step's inputs, whatever they are called
        inputs = {"ref_model", "create_new_adapter", "reward_model"}
        machines = {"nnodes": self.nnodes} if (self.nnodes or 1) > 1 else {}
        fields = self.model_dump(mode="json", exclude=inputs | {"use_qlora", "nnodes"}) | self.resolved()
        fields["nproc_per_node"] = self.nproc_per_node or 1
        fields["deepspeed"] = deepspeed_config(self.deepspeed) if self.deepspeed else None
        fields["reward_funcs"] = [short_name(name) for name in self.reward_funcs]
        for name in without_effect(fields):
            fields.pop(name)
        return fields | machines


class RuntimeSettings(Record):
    """What may change without changing the result. Never part of a key."""

    dataset_dir: Text | None = None
    """Folder with `dataset_info.yaml` or `dataset_info.json` and data files; relative to the recipe file."""
    launcher: Literal["local", "slurm", "kubernetes"] = "local"
    """Where the programs that compute with a model run: on this machine, or in jobs of a cluster.
    All its machines have to see LLAMATUNER_HOME at the same place; see docs/machines.md."""
    slurm: dict[str, JsonValue] | None = None
    """Options of sbatch, without the dashes: `{partition: gpu, gres: "gpu:8"}`; true is an option alone."""
    kubernetes: dict[str, JsonValue] | None = None
    """What pods look like: `image`, `claim`, `mount_path`, and if need be `namespace`, `resources`, `secret`, `pod`."""
    force_torchrun: bool = False
    """Start training with torchrun also where one process is enough; FORCE_TORCHRUN=1 in the environment as well."""
    preprocessing_num_workers: Steps | None = None
    """Processes that prepare data; nothing means one per core."""
    preprocessing_dask: Annotated[str, Field(pattern=r"^(tcp|tls)://[^/\s]+:[0-9]+$")] | None = None
    """Address of a Dask scheduler, `tcp://HOST:PORT`, whose workers prepare the data instead; all of them see
    LLAMATUNER_HOME and the data at the same place, and have what this machine has installed."""
    logging_steps: Steps = 1
    """Optimizer steps between two points of the loss curve."""
    report_to: Boards = ()
    """Where training curves go beside MLflow, which has all: `tensorboard`, `wandb`, or both."""
    wandb_project: Text | None = None
    """Project in Weights & Biases; nothing means llamatuner."""
    wandb_run_name: Text | None = None
    """Name of the run there; nothing means the recipe's name and the stage."""
    sample_steps: Steps = 10
    """Steps between two tables of drawn answers, in a stage that draws some."""
    save_steps: Steps = 50
    """Optimizer steps between two checkpoints."""
    save_total_limit: Steps = 2
    """Whole checkpoints kept while training."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass instead of keeping them: less memory, more time, and the
    same weights to the bit."""
    per_device_eval_batch_size: Steps = 8
    """Sequences per forward pass when evaluating; results do not depend on it."""


class RunSettings(Record):
    """What a run as a whole may do. Never part of a key."""

    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    """Longest that a run may take, waiting for devices and for other runs included. Then it is stopped and has failed;
    finished steps and the last checkpoint are kept, and the next run goes on there."""
