"""The frozen model that a policy stays close to.

One decision: with LoRA the reference is the policy's own base without its adapter, so nothing is held twice; an adapter
that is continued is copied under another name first, because then the policy does not start at its base. Everything
else is a second model, frozen and in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

ADAPTER, REFERENCE_ADAPTER = "default", "reference"
T = TypeVar("T")


class Reference:
    """Calls a function with the frozen model, without gradients.

    Args:
        policy: the model that is trained, not wrapped.
        frozen: a model of its own; None: the policy without its adapter, or with the copy of it.
    """

    def __init__(self, policy: Any, frozen: Any | None = None) -> None:
        self.policy, self.frozen = policy, frozen
        if frozen is not None:
            frozen.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, function: Callable[[Any], T]) -> T:
        if self.frozen is not None:
            return function(self.frozen)
        with self._as_it_was():
            return function(self.policy)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The policy as it was before the first step."""
        training = self.policy.training
        self.policy.eval()
        try:
            if REFERENCE_ADAPTER in self.policy.peft_config:
                with self._other_adapter():
                    yield
            else:
                with self.policy.disable_adapter():
                    yield
        finally:
            self.policy.train(training)

    @contextmanager
    def _other_adapter(self) -> Iterator[None]:
        self.policy.base_model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
        try:
            yield
        finally:
            self.policy.base_model.set_adapter(ADAPTER)


def keep_adapter(model: Any) -> None:
    """Copy the adapter that is about to be trained, frozen, under the reference's name."""
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config[ADAPTER])
    for name, value in model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name or name.endswith(f".{REFERENCE_ADAPTER}"):
            value.data.copy_(model.get_parameter(name.replace(f".{REFERENCE_ADAPTER}", f".{ADAPTER}")).data)
            value.requires_grad_(False)


def without_dropout(model: nn.Module) -> None:
    """Switch off the dropout of a base model whose policy is compared with a frozen copy of itself.

    With it, policy and reference would differ before the first step. LoRA's own dropout is put in later and stays.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel and its like."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    return model
