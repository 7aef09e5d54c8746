"""The Hugging Face hub: where it is, and what its errors mean to a person.

One decision: a hub that cannot be reached is one thing (`HubUnreachable`, worth another try), a hub that answers "no"
is another (`InputError`, which a retry would only hide).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NoReturn

from registry.errors import InputError, Problem, did_you_mean

PUBLIC_HUB = "https://huggingface.co"
OUT_OF_REACH = (ConnectionError, TimeoutError, socket.gaierror)  # not every OSError: a full disk is none of these


class HubUnreachable(Exception):
    """The hub gave no answer, or not a hub's answer; the message says which."""


def hub_endpoint() -> str:
    """`$HF_ENDPOINT`, or the public hub."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or PUBLIC_HUB


def explain_hub(
    error: Exception, repo: str, revision: str, where: str, revision_key: str, known: Sequence[str]
) -> NoReturn:
    """Raise what an error of the hub client means.

    Args:
        error: what the client raised.
        repo, revision: what it was asked for.
        where: key of the recipe that named the repository.
        revision_key: key that names a revision.
        known: names that may have been meant.

    Raises:
        HubUnreachable: it failed before, or apart from, the question.
        InputError: the hub's answer is no.
        Exception: the error itself, when it has nothing to do with the hub.
    """
    from huggingface_hub import errors

    hub = hub_endpoint()
    if isinstance(error, errors.GatedRepoError):
        rule, cure = f"{hub} gives {repo} only to people who accepted its licence", "Accept it there and set HF_TOKEN."
    elif isinstance(error, errors.RevisionNotFoundError):
        rule, cure = f"{repo} has no revision {revision!r} on {hub}", f"Check {revision_key}."
    elif isinstance(error, errors.RepositoryNotFoundError | errors.DisabledRepoError | errors.HFValidationError):
        near = did_you_mean(repo, known)
        rule = f"{repo} is not on {hub}, or not for this person"
        cure = near if near.startswith("Did") else "Check the name; for a private one set HF_TOKEN."
    elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (400, 401, 403):
        rule, cure = f"{hub} refuses {repo}: {str(error).splitlines()[0]}", "Check HF_TOKEN and HF_ENDPOINT."
    elif isinstance(error, (*OUT_OF_REACH, errors.HTTPError, errors.LocalEntryNotFoundError, errors.FileMetadataError)):
        raise HubUnreachable(f"{hub}: {_first_line(error)}") from error
    else:
        raise error
    raise InputError(Problem(where, rule, cure)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
