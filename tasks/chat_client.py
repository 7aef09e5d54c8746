"""Asking a model server, or any other that speaks OpenAI's interface.

One decision: the standard library does, so that whatever shows answers needs nothing else; closing the connection is
how an answer is given up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

NO_ANSWER = "the model server has ended"
CONNECT_SECONDS = 10.0


class ServerError(Exception):
    """The server refused a request, failed, or is gone."""


@dataclass(frozen=True)
class Ended:
    """What is known of an answer at its end."""

    finish_reason: str
    """`stop`, or `length` when it was cut."""
    tokens: int


@dataclass(frozen=True)
class Client:
    """A model server.

    Args:
        url: `http://127.0.0.1:8000`.
        api_key: for the server.
    """

    url: str
    api_key: str

    def models(self) -> list[str]:
        """Names of the models."""
        connection, answer = self._ask("GET", "/v1/models", None)
        try:
            return [model["id"] for model in json.load(answer)["data"]]
        finally:
            connection.close()

    def answer(
        self, model: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], stop: Sequence[str] = ()
    ) -> Iterator[str | Ended]:
        """Parts of an answer, and at last what is known of it; closed before, the answer is given up.

        Args:
            model: a name of `models`.
            messages: the conversation.
            settings: of generation.
            stop: texts that end the answer.

        Raises:
            ServerError: the request is refused, or the server fails.
        """
        asked = {"stream": True, "stream_options": {"include_usage": True}, "stop": list(stop) or None}
        body = {"model": model, "messages": list(messages), **settings, **asked}
        connection, answer = self._ask("POST", "/v1/chat/completions", body)
        reason = ""
        try:
            for line in answer:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ServerError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    reason = choice["finish_reason"] or reason
                    if choice["delta"].get("content"):
                        yield choice["delta"]["content"]
                if chunk.get("usage"):
                    yield Ended(reason, chunk["usage"]["completion_tokens"])
                    return
            raise ServerError(NO_ANSWER)
        except (OSError, HTTPException) as error:
            raise ServerError(NO_ANSWER) from error
        finally:
            connection.close()

    def _ask(self, method: str, path: str, body: Any) -> tuple[HTTPConnection, HTTPResponse]:
        place = urlsplit(self.url)
        connection = HTTPConnection(str(place.hostname), place.port, timeout=CONNECT_SECONDS)
        headers = {"Authorization": f"Bearer {self.api_key}"} | ({"Content-Type": "application/json"} if body else {})
        try:
            connection.connect()
            connection.sock.settimeout(None)  # a long prompt, or others before it, may take any time
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            raise ServerError(NO_ANSWER) from error
        except BaseException:
            connection.close()
            raise
        if answer.status != 200:
            text = answer.read().decode(errors="replace")
            connection.close()
            raise ServerError(_message(text, answer.status))
        return connection, answer


def _message(text: str, status: int) -> str:
    """What an error says, whatever its form."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}: {text[:200]}"
