"""push: a folder to a repository of the Hugging Face hub.

One decision: the repository is asked for before anything is written, so that a name or a token that is refused costs
nothing; and one commit makes it hold these weights and no others, since a file of an earlier push may be read first.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from registry.errors import InputError, Problem
from tasks.base import HUB_ID
from tasks.hub import HubUnreachable, explain_hub, hub_endpoint

WHERE = "--push-to-hub"
# left by an earlier push of the same name: `model.safetensors` is read before an index, an adapter's config always
REPLACED = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]


class PushFailed(Exception):
    """A folder was not sent; it is as it was, and the message says how to send it."""


def open_repository(repo: str, private: bool) -> None:
    """Make sure that there is a repository and that this person may write to it.

    Args:
        repo: `owner/name`.
        private: make it a private one.

    Raises:
        InputError: the hub says no or cannot be reached, there is no token, or the repository is there and is public
            where a private one is wanted.
    """
    from huggingface_hub import HfApi, get_token

    if not HUB_ID.fullmatch(repo):
        raise InputError(Problem(WHERE, f"{repo!r} is not a repository's name", "Write it as owner/name."))
    if get_token() is None:
        raise InputError(Problem(WHERE, "no token of the hub is there", "Run `hf auth login`, or set HF_TOKEN."))
    api = HfApi(endpoint=hub_endpoint())
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        public = private and not api.model_info(repo).private
    except Exception as error:  # noqa: BLE001 - said in other words, or raised again
        _explain(error, repo)
    if public:
        rule = f"{repo} is there and is public"
        raise InputError(Problem("--private", rule, "Make it private on the hub, or name another repository."))


def _explain(error: Exception, repo: str) -> NoReturn:
    try:
        explain_hub(error, repo, "main", WHERE, WHERE, [])
    except HubUnreachable as unreachable:
        rule = f"the hub cannot be reached ({unreachable})"
        raise InputError(Problem(WHERE, rule, "Check HF_ENDPOINT and the connection.")) from error


def push_folder(folder: Path, repo: str, message: str) -> str:
    """Make a repository hold what a folder holds, in one commit; the address of the commit.

    Args:
        folder: all of its files are sent.
        repo: `owner/name`, opened before.
        message: of the commit.

    Raises:
        PushFailed: with the cause.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi(endpoint=hub_endpoint()).upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=REPLACED
        )
    except Exception as error:  # whatever it was, the folder is there and can be sent again
        cause = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        again = f"The folder is whole; send it with `hf upload {repo} {folder}`."
        raise PushFailed(f"{repo} was not sent: {cause}. {again}") from error
    return str(commit.commit_url)
