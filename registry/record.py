"""What every settings record is made of.

One decision: validators here only read the forms people write (`a,b`, one name, -1 for nothing); what is then wrong is
refused by the type, with the value as it was written.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def one_text(value: Any) -> Any:
    """One text as people write it where a list is meant; commas stay, sentences have them."""
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    return tuple(value) if isinstance(value, list) else value


def split_names(value: Any) -> Any:
    """`a,b` as people write lists in LLaMA-Factory configs, or one name, or a list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def list_of_one(value: Any) -> Any:
    """Data sets as people write them: as names, or one mapping without a list around it."""
    return (value,) if isinstance(value, dict) else split_names(value)


def split_numbers(value: Any) -> Any:
    """`0.7,0.3` as people write shares in LLaMA-Factory configs, or one number, or a list."""
    if not isinstance(value, str):
        return (value,) if isinstance(value, int | float) else split_names(value)
    try:
        return tuple(float(part) for part in value.split(",") if part.strip())
    except ValueError:
        return split_names(value)  # refused below, as it was written


def minus_one_is_unset(value: Any) -> Any:
    return None if value == -1 and not isinstance(value, bool) else value


def full_shard_is_true(value: Any) -> Any:
    """`full_shard` and `full_shard auto_wrap` as people write them for transformers; an empty text is nothing."""
    return (
        {"": False, "full_shard": True, "full_shard auto_wrap": True}.get(value, value)
        if isinstance(value, str)
        else value
    )


FullShard = Annotated[bool, BeforeValidator(full_shard_is_true)]
Shares = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(split_numbers)]
Texts = Annotated[tuple[str, ...], BeforeValidator(one_text)]
Names = Annotated[tuple[str, ...], BeforeValidator(split_names)]
Boards = Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(split_names)]
Steps = Annotated[int, Field(ge=1, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]


class Record(BaseModel):
    """Frozen, no unknown keys, documented fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
