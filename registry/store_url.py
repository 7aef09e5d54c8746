"""Where artifacts are shared between machines: `LLAMATUNER_STORE`, a URL of any kind that fsspec knows.

One decision: the URL says where, never as whom. Credentials come from the environment that the library behind the URL
reads, so that a URL can stand in logs, on pages and in unit files.
"""

from __future__ import annotations

import os
import re

from registry.errors import InputError, Problem

VARIABLE = "LLAMATUNER_STORE"
URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>.+)", re.IGNORECASE)
NAMED_BY_USER = ("abfs", "abfss", "az")  # container@account is a place there, not a person


def store_url() -> str | None:
    """The URL of the shared store, without a slash at its end; None: there is none.

    Raises:
        InputError: not a URL, or one with credentials in it. What it repeats of the URL holds none.
    """
    url = os.environ.get(VARIABLE, "").strip()
    if not url:
        return None
    found = URL.fullmatch(url)
    if found is None or "::" in url:
        given = "what it is set to" if "@" in url or "?" in url else repr(url)
        cure = f"Write file://{url}." if url.startswith("/") else "Write for example s3://bucket/folder."
        raise InputError(Problem(VARIABLE, f"{given} is not a URL", cure))
    place, sign, _ = found["rest"].partition("?")
    user, at, _ = place.partition("/")[0].rpartition("@")
    if sign or ":" in user or (at and found["scheme"].lower() not in NAMED_BY_USER):
        rule = f"the URL ({found['scheme']}://…) has credentials in it, which would be shown in logs"
        cure = "Write it without, and give them in the environment, such as AWS_ACCESS_KEY_ID; docs/shared-store.md"
        raise InputError(Problem(VARIABLE, rule, cure))
    return url if url.endswith("://") else url.rstrip("/")
