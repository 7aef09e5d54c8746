"""What a run needs to go on to the bit: weights that move, their optimizers' state, and a few numbers.

One decision: there is no random state to keep, because every random number is made from the seed, the step and a place
(`rollout.uniforms`, `update.mini_batches`). Tensors are safetensors, numbers JSON: nothing is unpickled.

Layout of `checkpoint-N`: `policy.safetensors` and `critic.safetensors` (what is trained, by parameter name),
`optimizer.<role>.safetensors` (`<index>.<name>` of each parameter's state; where it is divided one of each process,
`optimizer.<role>-<process>.safetensors`), `numbers.json`, `metrics.jsonl`, `base.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.program import ProgramError
from tasks.train.adapters import require_equal
from tasks.train.online.advantages import RunningScores
from tasks.train.online.moved import Moved

NUMBERS = "numbers.json"


@dataclass
class Numbers:
    """What moves besides weights."""

    step: int = 0
    """Steps made."""
    kl_coef: float = 0.0
    scores: RunningScores = field(default_factory=RunningScores)


def required(roles: dict[str, Moved], ranks: Iterable[int]) -> set[str]:
    """The files of a whole checkpoint.

    Args:
        roles: who is trained.
        ranks: the processes of this machine.
    """
    states = [_optimizer_file(role, moved, rank) for role, moved in roles.items() for rank in ranks]
    return {NUMBERS, *(f"{role}.safetensors" for role in roles), *states}


def _optimizer_file(role: str, moved: Moved, rank: int) -> str:
    return f"optimizer.{role}.safetensors" if moved.owners is None else f"optimizer.{role}-{rank}.safetensors"


def save(folder: Path, roles: dict[str, Moved], numbers: Numbers, first: bool = True) -> None:
    """Write the state of a run behind a step into an empty folder.

    Args:
        folder: of the checkpoint; every process of a machine writes into the same one.
        roles: who is trained.
        numbers: what moves besides weights.
        first: this process is the first of its machine, which writes what all of them have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for role, moved in roles.items():
        if first:
            save_file({name: _plain(value) for name, value in moved.parameters.items()}, folder / f"{role}.safetensors")
        if first or moved.owners is not None:
            state = _optimizer_state(moved.optimizer)
            save_file(state, folder / _optimizer_file(role, moved, moved.ranks.index))
    if first:
        (folder / NUMBERS).write_text(json.dumps(asdict(numbers), indent=1), encoding="utf-8")


def load(folder: Path, roles: dict[str, Moved]) -> Numbers:
    """Put a state back.

    Raises:
        ProgramError: `bad_setting` when a tensor is missing, too many or of another shape.
    """
    for role, moved in roles.items():
        found, own = load_file(folder / f"{role}.safetensors"), moved.parameters
        others = [name for name in own.keys() & found.keys() if own[name].shape != found[name].shape]
        require_equal(folder, sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys()), sorted(others))
        for name, value in own.items():
            value.data.copy_(found[name])
        _load_optimizer(moved.optimizer, load_file(folder / _optimizer_file(role, moved, moved.ranks.index)))
    values: dict[str, Any] = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    return Numbers(values["step"], values["kl_coef"], RunningScores(**values["scores"]))


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if not isinstance(value, Tensor | int | float):
                rule = (
                    f"the state {name} of {type(optimizer).__name__} is a {type(value).__name__}, no number or tensor"
                )
                raise ProgramError("bad_setting", f"{rule}. Use optim: adamw_torch_fused.")
            state[f"{index}.{name}"] = _plain(torch.as_tensor(value))
    return state


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    whole["state"] = {}
    for key, value in state.items():
        index, _, name = key.partition(".")
        whole["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(whole)


def _plain(value: Tensor) -> Tensor:
    """A tensor of its own memory, on the processor: what shares memory cannot be in one file."""
    return value.detach().to("cpu", copy=True).contiguous()
