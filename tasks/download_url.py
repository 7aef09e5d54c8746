"""One file by its URL.

One decision: what arrived is kept in a part file with the server's etag beside it, so the next attempt asks for the
rest of the same version, and starts anew when the server has another one.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from registry.errors import InputError, Problem
from tasks.program import Events, ProgramError

BLOCK_BYTES = 1 << 20
SILENT_SECONDS = 60.0  # without a byte, the connection counts as lost
TOLD_BYTES = 8_000_000  # between two progress events
AGAIN = (408, 425, 429)  # refusals that a later attempt may not meet; so may any from 500


def fetch_url(url: str, folder: Path, where: str, events: Events) -> dict[str, Any]:
    """Download one file.

    Args:
        url: http or https; its path ends in the file's name.
        folder: gets the file; keeps what an interrupted attempt got.
        where: what it is downloaded for, for errors.
        events: gets progress in bytes.

    Returns:
        `name`, `size` and `etag` of the file.

    Raises:
        InputError: the server says no, or answers with a web page.
        ProgramError: `network` when the server cannot be reached or the connection broke.
    """
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    part, mark = folder / f"{name}.part", folder / f"{name}.etag"
    have = part.stat().st_size if part.is_file() and mark.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "llamatuner", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", mark.read_text(encoding="utf-8"))
    try:
        with urllib.request.urlopen(request, timeout=SILENT_SECONDS) as answer:
            etag = _receive(answer, part, mark, have, where, events)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is not one of today's file
            part.unlink()
        raise _refusal(error.code, url, where) from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        rule = f"{where}: {shown_url(url)} cannot be reached, or broke off ({reason})"
        raise ProgramError("network", f"{rule}. Check the network, or download the file and name it.") from error
    part.rename(folder / name)
    mark.unlink(missing_ok=True)
    return {"name": name, "size": (folder / name).stat().st_size, "etag": etag}


def _receive(
    answer: http.client.HTTPResponse, part: Path, mark: Path, have: int, where: str, events: Events
) -> str | None:
    """Append what comes to the part file; the etag.

    Raises:
        InputError: it is a web page.
        http.client.IncompleteRead: less came than was announced.
    """
    if answer.headers.get_content_type() == "text/html":
        rule = f"{shown_url(answer.url)} is a web page, not a data file"
        raise InputError(Problem(where, rule, "Name the URL of the file itself, often called raw or resolve."))
    etag = answer.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        mark.write_text(etag, encoding="utf-8")
    else:
        mark.unlink(missing_ok=True)  # nothing to continue by
    begin = have if answer.status == 206 else 0
    length = answer.headers.get("Content-Length")
    total = begin + int(length) if length else 0
    done = told = begin
    with open(part, "ab" if begin else "wb") as file:
        while block := answer.read(BLOCK_BYTES):
            file.write(block)
            done += len(block)
            if done - told >= TOLD_BYTES:
                events.emit("progress", step=done, total=total, unit="bytes")
                told = done
    if total and done != total:
        raise http.client.IncompleteRead(b"", total - done)
    events.emit("progress", step=done, total=done, unit="bytes")
    return etag


def _refusal(status: int, url: str, where: str) -> Exception:
    shown = shown_url(url)
    if status >= 500 or status in (*AGAIN, 416):
        return ProgramError("network", f"{where}: {shown} cannot be had now (HTTP {status}). Try again later.")
    if status in (401, 403):
        rule, cure = f"{shown} is not for everybody (HTTP {status})", "Download the file yourself, and name it."
    elif status in (404, 410):
        rule, cure = f"{shown} does not exist (HTTP {status})", "Check the URL."
    else:
        rule, cure = f"{shown} was refused (HTTP {status})", "Check the URL."
    return InputError(Problem(where, rule, cure))


def shown_url(url: str) -> str:
    """A URL without its query, which can hold a key."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
