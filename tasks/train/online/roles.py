"""The roles: who answers, who is stayed close to, who judges, and in stage ppo who expects.

One decision: with LoRA they share one copy of the base weights. The policy is an adapter, the reference the same model
without it, the reward model and the critic are adapters with a head each. It is so wherever the reward model was
trained on the very weights the policy starts from; else, and with full tuning, roles are models of their own.

Legend: b rows, s sequence, h hidden size, n trained positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.program import ProgramError, Spec
from tasks.train.adapters import require_equal
from tasks.train.fast_lora import speed_up
from tasks.train.freezing import freeze
from tasks.train.given import REWARD_ADAPTER, REWARD_MODEL
from tasks.train.likelihood import body_of
from tasks.train.loading import Changes, load_base
from tasks.train.lora import CLASSIFIER_NAMES, Note, check_base, say
from tasks.train.model import build_model, make_reference
from tasks.train.norms import keep_less
from tasks.train.online.inputs import Inputs, reads_lines
from tasks.train.online.reader import Reader
from tasks.train.output import ADAPTER_WEIGHTS
from tasks.train.reference import ADAPTER, Reference, without_dropout
from tasks.train.reward import SCORE_HEAD

REWARD, CRITIC = "reward", "critic"  # names of adapters, beside the policy's
HEAD_IN_FILE = f"base_model.model.{SCORE_HEAD}.weight"


@dataclass
class Judge:
    """A model that gives a number to every position: a body, and a linear head on its last hidden state."""

    model: Any
    """The shared model, or a model with a score head of its own."""
    head: nn.Linear
    """[1, h] float32."""
    adapter: str | None = None
    """Of the shared model; None: the model is its own."""
    moves: bool = False
    """Whether it is trained."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, the judge's own adapter is the model's."""
        if self.adapter is None:
            with _at_hand(self.model, self.moves):
                yield
            return
        self.model.base_model.set_adapter(self.adapter, inference_mode=not self.moves)
        try:
            yield
        finally:
            self.model.base_model.set_adapter(ADAPTER)

    def __call__(self, inputs: Inputs, places: Tensor) -> Tensor:
        """Numbers at some positions; to be called while `active`.

        Args:
            inputs: rows.
            places: [b, s] bool, of the last pass.

        Returns:
            [n] float32, row by row.
        """
        hidden = body_of(self.model)(**inputs.arguments(self.model)).last_hidden_state[places]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained, by name."""
        with self.active():
            found = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        own = {f"{SCORE_HEAD}.weight": self.head.weight} if self.adapter else {}
        return found | own


@dataclass
class Roles:
    """Everybody, on one device."""

    policy: Any
    reference: Reference
    critic: Judge | None
    """None where answers are compared with one another."""
    reward: Judge | None
    """None where only functions judge, or a `reader`."""
    share: bool
    """Rows share what they begin with, and lie in a line, see `inputs`."""
    reader: Reader | None
    """The reward model, where it has a tokenizer of its own."""
    shared: bool
    """Reference, critic and reward model hold no base weights of their own."""

    def refer(self, function: Callable[[Any], Any]) -> Any:
        """What a function gives of the reference, without gradients."""
        frozen = self.reference.frozen
        with _at_hand(frozen, False) if frozen is not None else nullcontext():
            return self.reference(function)

    def sentence(self) -> str:
        """Which case it is."""
        if self.shared:
            judges = (("critic", self.critic), ("reward model", self.reward))
            *names, last = ("policy", "reference", *(name for name, judge in judges if judge))
            return f"{', '.join(names)} and {last} share one copy of the base weights"
        own = [] if self.reference.frozen is None else ["the reference"]
        own += ["the critic"] if self.critic and self.critic.adapter is None else []
        own += ["the reward model"] if self.reward and self.reward.adapter is None else []
        own += ["the reward model, which reads with its own tokenizer"] if self.reader else []
        return f"models of their own beside the policy: {', '.join(own)}"


def make_roles(spec: Spec, changes: Changes, note: Note = say) -> Roles:
    """Load and adapt what a stage is told to use.

    Raises:
        ProgramError: `bad_setting` for the adapter of a reward model that is not for these weights.
    """
    settings, base, digest = spec.settings["train"], spec.inputs["base"], spec.settings["base_digest"]
    policy = build_model(settings, base, digest, spec.inputs.get("adapter"), changes, note)
    reference = make_reference(settings, policy, base, spec.inputs.get("reference"), changes)
    assert reference is not None
    reward, reader = _reward(spec, policy, changes)
    lora = settings["finetuning_type"] == "lora"
    critic = None
    if settings["stage"] == "ppo":
        critic = _critic_adapter(policy, reward) if lora else _critic_model(spec, settings, changes, reward)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in learning(policy, critic):
        if "quant_bit" not in settings:
            model.to(device)
    for judge in filter(None, (reward, critic)):
        judge.head.to(device)
    if lora:
        policy.base_model.set_adapter(ADAPTER)
        speed_up(policy)
        keep_less(policy)
    own = [reference.frozen, *(j.model for j in (critic, reward) if j and j.adapter is None)]
    everybody = [policy, *(model for model in own if model is not None)]
    share = all(reads_lines(model) for model in everybody)
    return Roles(policy, reference, critic, reward, share, reader, shared=len(everybody) == 1 and reader is None)


def learning(policy: Any, critic: Judge | None) -> list[Any]:
    """The models with weights that are trained, each once."""
    return [policy] if critic is None or critic.model is policy else [policy, critic.model]


def _reward(spec: Spec, policy: Any, changes: Changes) -> tuple[Judge | None, Reader | None]:
    """Who judges: one that reads the policy's tokens, one that reads texts, or neither."""
    settings = spec.settings["train"]
    if REWARD_ADAPTER in spec.inputs:
        return _reward_adapter(policy, spec.inputs[REWARD_ADAPTER], spec.settings["base_digest"], changes), None
    if REWARD_MODEL not in spec.inputs:
        return None, None
    folder = spec.inputs[REWARD_MODEL]
    model = load_base(folder, torch.bfloat16 if settings["bf16"] else torch.float32, score=True)
    model.requires_grad_(False).eval()
    rows, known = (each.get_input_embeddings().num_embeddings for each in (model, policy))
    if rows == known and _vocabulary(folder) == _vocabulary(spec.inputs["base"]):
        return Judge(model, getattr(model, SCORE_HEAD)), None
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return None, Reader(model, folder, spec.settings["reading"], spec.inputs["rows"], spec.inputs["shards"])


def _vocabulary(folder: str) -> dict[str, int]:
    from tasks.tokens import load_tokenizer

    found: dict[str, int] = load_tokenizer(Path(folder)).get_vocab(with_added_tokens=True)
    return found


def _reward_adapter(policy: Any, folder: str, base_digest: str, changes: Changes) -> Judge:
    from peft import LoraConfig
    from safetensors.torch import load_file

    if check_base(folder, base_digest) != changes:
        raise ProgramError(
            "bad_setting", "reward_model was trained with other positions. Set rope_scaling and cutoff_len as there."
        )
    config = LoraConfig.from_pretrained(folder)
    whole = [name for name in config.modules_to_save or () if name not in CLASSIFIER_NAMES]
    if whole:
        raise ProgramError(
            "bad_setting",
            f"reward_model: it trained {', '.join(whole)} whole, which the policy cannot share. "
            "Merge it first (llamatuner export), and name that folder.",
        )
    config.modules_to_save, config.task_type, config.lora_dropout = None, None, 0.0
    state = load_file(Path(folder) / ADAPTER_WEIGHTS)
    if HEAD_IN_FILE not in state:
        raise ProgramError("bad_setting", f"reward_model: {folder} has no {HEAD_IN_FILE}; it is no reward model.")
    head = _head(state.pop(HEAD_IN_FILE))
    policy.add_adapter(REWARD, config)
    put = {_in_model(name, REWARD): value for name, value in state.items()}
    _fill(policy, REWARD, put, Path(folder))
    return Judge(policy, head, REWARD)


def _critic_adapter(policy: Any, reward: Judge | None) -> Judge:
    """The critic beside the policy: a copy of the reward model where that shares the base, else new, expecting 0."""
    import copy

    like = REWARD if reward is not None and reward.adapter else ADAPTER
    config = copy.deepcopy(policy.peft_config[like])
    config.modules_to_save, config.lora_dropout = None, 0.0
    policy.add_adapter(CRITIC, config)
    if like == REWARD:
        assert reward is not None
        names = dict(policy.named_parameters())
        put = {name.replace(f".{REWARD}", f".{CRITIC}"): v for name, v in names.items() if _belongs(name, REWARD)}
        _fill(policy, CRITIC, put, Path(REWARD))
        head = _head(reward.head.weight.data.clone())
    else:
        head = _head(torch.zeros(1, policy.config.get_text_config().hidden_size))
    for name, value in policy.named_parameters():
        if _belongs(name, CRITIC):
            value.data = value.data.float()
    head.requires_grad_(True)
    return Judge(policy, head, CRITIC, moves=True)


def _critic_model(spec: Spec, settings: dict[str, Any], changes: Changes, reward: Judge | None) -> Judge:
    """A critic of its own: the reward model again, or the base with a head that expects 0."""
    folder = spec.inputs.get(REWARD_MODEL) if reward is not None else None
    model = load_base(folder or spec.inputs["base"], torch.float32, True, None if folder else changes)
    without_dropout(model)
    head = getattr(model, SCORE_HEAD)
    if folder is None:
        head.weight.data.zero_()
    if settings["finetuning_type"] == "freeze":
        freeze(model, settings)
        head.requires_grad_(True)
    else:
        model.requires_grad_(True)
    return Judge(model, head, moves=True)


def _head(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], 1, bias=False)
    head.weight.data = weight.float()
    return head.requires_grad_(False)


def _belongs(name: str, adapter: str) -> bool:
    """Whether a parameter is of an adapter: `…q_proj.lora_A.reward.weight` is of `reward`."""
    return f".{adapter}." in name or name.endswith(f".{adapter}")


def _in_model(name: str, adapter: str) -> str:
    """The parameter that a tensor of an adapter's file is.

    >>> _in_model("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "reward")
    'base_model.model.model.layers.0.self_attn.q_proj.lora_A.reward.weight'
    """
    if name.endswith(".lora_magnitude_vector"):
        return f"{name}.{adapter}.weight"
    return name.removesuffix(".weight") + f".{adapter}.weight"


def _fill(model: Any, adapter: str, put: dict[str, Tensor], folder: Path) -> None:
    """Give an adapter its values, all of them."""
    own = {name: value for name, value in model.named_parameters() if _belongs(name, adapter)}
    others = [name for name in own.keys() & put.keys() if own[name].shape != put[name].shape]
    require_equal(folder, sorted(own.keys() - put.keys()), sorted(put.keys() - own.keys()), sorted(others))
    for name, value in own.items():
        value.data.copy_(put[name])


@contextmanager
def _at_hand(model: Any, stays: bool) -> Iterator[None]:
    """A frozen model of its own is on the device only while it is used: it waits in the processor's memory."""
    moves = torch.cuda.is_available() and not stays and not getattr(model, "is_quantized", False)
    if moves:
        model.to("cuda")
    try:
        yield
    finally:
        if moves:
            model.to("cpu")
