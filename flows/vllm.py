"""What vLLM can serve as it was trained; the rest is refused before it is started.

One decision: whatever vLLM would do otherwise, and whatever a key does not guard there, is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flows.chatting import Partner
from registry.chat_settings import ChatSettings, generation
from registry.errors import InputError, Problem
from tasks.chat_program import LOOPBACK
from tasks.template import ChatTemplate
from tasks.vllm_program import find_vllm

TRANSFORMERS, VLLM = ENGINES = ("transformers", "vllm")
WHERE = "--engine vllm"
CURE = "Leave --engine out: transformers does it."


def require_place(host: str) -> None:
    """Refuse what is wrong before a model is looked at.

    Raises:
        InputError: no vLLM, or a place that others reach.
    """
    find_vllm()
    if host not in LOOPBACK:
        rule = "vLLM asks for the key at /v1 only; others than this machine would reach the rest of it"
        raise InputError(Problem(f"--host {host}", rule, "Leave --host out, and put a server with TLS in front of it."))


def require_servable(partners: Sequence[Partner], folders: Sequence[Path], said: ChatSettings) -> None:
    """Refuse models and settings that vLLM would treat otherwise.

    Args:
        partners, folders: the models and where each lies.
        said: about the chat.

    Raises:
        InputError: everything it would.
    """
    from tasks.answers import stop_ids
    from tasks.tokens import load_tokenizer

    problems = [Problem(WHERE, "holds one model", "Name one.")] if len(partners) > 1 else []
    for partner, folder in zip(partners, folders, strict=True):
        data, train = partner.settings.data, partner.settings.train
        if data.default_system is not None:
            problems.append(Problem("default_system", "vLLM puts no system message of its own in front", CURE))
        if data.control_tokens == "refuse":
            problems.append(Problem("control_tokens", "vLLM does not look for control tokens that are typed", CURE))
        if train.quant_bit:
            problems.append(Problem("quant_bit", "vLLM holds the model in whole numbers of bits of its own", CURE))
        template = ChatTemplate.from_folder(folder, partner.settings.template)
        tokenizer = load_tokenizer(folder)
        end = tokenizer.token_to_id(template.terminator) if template.terminator else None
        if end is not None and end not in stop_ids(folder, tokenizer, None):
            rule = f"vLLM would not stop at {template.terminator}, which no file of the model calls its end"
            problems.append(Problem(partner.name, rule, CURE))
    asked = generation(said.generation)
    for name, neutral in (("num_beams", 1), ("length_penalty", 1.0)):
        if getattr(asked, name) not in (None, neutral):
            problems.append(Problem(name, "is about beams, which vLLM does not follow", CURE))
    if problems:
        raise InputError(problems)
