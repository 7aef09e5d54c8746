"""The one table of settings that need, or exclude, others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from registry.combinations import DERIVED, NEEDS, REFUSALS, SET, UNSET, Need, Refusal, idle, refused, without_effect
from registry.settings_page import settings_page
from registry.stage_settings import FIELDS

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def meeting(condition: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Settings for which a condition holds."""
    samples = {SET: "something", UNSET: None}
    return {name: samples[values] if values in samples else values[0] for name, values in condition.items()}


def test_every_setting_of_the_table_is_one() -> None:
    named = {name for need in NEEDS for name in (*need.settings, *need.where)}
    named |= {name for rule in REFUSALS for name in (rule.setting, *rule.when)}
    assert named <= {*FIELDS, *DERIVED}


@pytest.mark.parametrize("rule", REFUSALS, ids=lambda rule: f"{rule.setting}: {rule.reason[:40]}")
def test_what_cannot_be_together_is_refused_with_its_reason_and_cure(rule: Refusal) -> None:
    assert (rule.setting, rule.reason, rule.cure) in list(refused(meeting(rule.when)))
    assert rule.setting in rule.when
    assert rule.cure.endswith(".")


@pytest.mark.parametrize("need", [need for need in NEEDS if need.refused], ids=lambda need: need.settings[0])
def test_what_has_no_effect_is_said_where_it_is_written_and_enters_no_key(need: Need) -> None:
    for name in need.settings:
        with_effect = meeting(need.where) | {name: 3}
        assert [key for key, *_ in idle(with_effect, {name})] == []
        elsewhere = {
            key: "no such value" if value not in (None, UNSET) else 3 for key, value in meeting(need.where).items()
        }
        elsewhere |= {key: None for key, values in need.where.items() if values == SET}
        assert name in [key for key, *_ in idle(elsewhere | {name: 3}, {name})]
        assert name in without_effect(elsewhere | {name: 3})
        assert list(idle(elsewhere | {name: 3}, set())) == []  # a default says nothing


def test_the_page_of_settings_is_the_one_made_from_them() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "run `make docs`"
