"""The compose files say what the documents say: pages on loopback, secrets from outside, commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.services import KEPT_LEASES, LEASES

FOLDER = Path(__file__).parents[1] / "deployments" / "docker"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    return found


def test_pages_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:4200:4200", "127.0.0.1:5000:5000"]


def test_no_password_is_in_a_file(services: dict[str, Any]) -> None:
    text = (FOLDER / "compose.yaml").read_text()
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")
    assert set(re.findall(r"llamatuner:([^@\s]+)@", text)) == {"${POSTGRES_PASSWORD}"}
    assert "deployments/docker/.env" in (FOLDER.parents[1] / ".gitignore").read_text()
    assert "deployments/docker/.env" in (FOLDER.parents[1] / ".dockerignore").read_text()


def test_every_service_waits_for_what_it_needs(services: dict[str, Any]) -> None:
    for service in services.values():
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[other]
    assert set(services["worker"]["depends_on"]) == {"prefect", "mlflow"}


def test_the_prefect_server_keeps_what_it_has_lent(services: dict[str, Any]) -> None:
    said = services["prefect"]["environment"]
    assert said[LEASES] == KEPT_LEASES
    kept = [volume.partition(":")[2] for volume in services["prefect"]["volumes"]]
    assert any(said["PREFECT_HOME"].startswith(f"{folder}/") for folder in kept)


def test_options_of_the_mlflow_server_exist(services: dict[str, Any]) -> None:
    from mlflow.cli import server

    known = {name for parameter in server.params for name in parameter.opts}
    words = services["mlflow"]["entrypoint"]
    assert words[:2] == ["mlflow", "server"]
    assert {word for word in words if word.startswith("--")} <= known


def test_the_image_copies_what_the_package_is_made_of() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE) == ["registry", "tasks", "flows", "deployments"]
    assert re.search(r"^USER tuner$", text, re.MULTILINE)
