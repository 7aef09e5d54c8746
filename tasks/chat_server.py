"""The model server: OpenAI's HTTP interface in front of one or several models.

One decision: answers are written one after the other, by one thread, in the order they were asked for: a machine that
writes two at once is slower at both. A client that goes away gives up its place, or its half-written answer.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from registry.errors import InputError, Problem, did_you_mean
from tasks.chat_model import Answered, ChatModel, TooLong
from tasks.chat_program import LOOPBACK
from tasks.chat_requests import ChatRequest, read_request
from tasks.program import classify

GONE = 499  # nobody reads it: the client has closed its connection
MOST_BYTES = 32 << 20  # of a request
Part = str | Answered


class ChatServer:
    """Answers requests.

    Args:
        models: by the names that clients call them.
        defaults: settings of generation where a request has none.
        api_key: what a client has to show; None: nothing.
        loopback: refuse requests for other host names, which only a stranger's page would send to loopback.
    """

    def __init__(
        self, models: Sequence[ChatModel], defaults: Mapping[str, Any], api_key: str | None, loopback: bool
    ) -> None:
        self.models = {model.name: model for model in models}
        self.defaults, self.api_key, self.loopback = defaults, api_key, loopback
        self.started = int(time.time())
        self.writer = ThreadPoolExecutor(1, "answers")  # takes requests in their order

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._list),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={404: _no_such_place, 405: _no_such_place})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _list(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        known = {"object": "model", "created": self.started, "owned_by": "llamatuner"}
        data = [{"id": name, **known, "max_model_len": model.longest} for name, model in self.models.items()]
        return JSONResponse({"object": "list", "data": data})

    async def _complete(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        # a page of a stranger can send anything else than this type without being asked for its permission
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return error_response(415, "the body has to be application/json", param="Content-Type")
        try:
            asked = read_request(await _body(request), self.defaults, secrets.randbelow(2**32))
            if asked.model not in self.models:
                message = f"no model {asked.model!r}. {did_you_mean(asked.model, list(self.models))}"
                return error_response(404, message, "model_not_found", "model")
            model = self.models[asked.model]
            prompt = await asyncio.to_thread(model.prompt, asked.messages, asked.tools)
        except InputError as error:
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            return error_response(400, str(error), code, error.problems[0].where.partition(".")[0] or None)
        parts = self._answer(model, prompt, asked)
        known = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model.name}
        if asked.stream:
            return StreamingResponse(
                _events(parts, known, asked.include_usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        return await _whole(request, parts, known)

    def _refusal(self, request: Request) -> Response | None:
        host = request.url.hostname
        if self.loopback and host not in LOOPBACK:
            return error_response(400, f"{host} is not this server: it answers for {', '.join(LOOPBACK)}", param="Host")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.api_key is None or hmac.compare_digest(given.encode(), self.api_key.encode()):
            return None
        message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
        return error_response(401, message, "invalid_api_key")

    async def _answer(self, model: ChatModel, prompt: list[int], asked: ChatRequest) -> AsyncIterator[Part]:
        """Parts of an answer, and at last what is known of it; given up when nobody takes them any more."""
        loop, parts, unwanted = asyncio.get_running_loop(), asyncio.Queue[Part | BaseException](), threading.Event()

        def put(part: Part | BaseException) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        def tell(text: str) -> None:
            if text:
                put(text)

        def write() -> None:
            if unwanted.is_set():
                return
            try:
                put(model.answer(prompt, asked.settings, asked.stop, tell, unwanted.is_set))
            except Exception as error:  # noqa: BLE001 - the client is told, and the server goes on
                put(error)

        self.writer.submit(write)
        try:
            while True:
                part = await parts.get()
                if isinstance(part, BaseException):
                    raise part
                yield part
                if isinstance(part, Answered):
                    return
        finally:
            unwanted.set()


async def _body(request: Request) -> bytes:
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > MOST_BYTES:
            raise InputError(Problem("", f"the body is longer than {MOST_BYTES} bytes"))
    return bytes(found)


async def _whole(request: Request, parts: AsyncIterator[Part], known: Mapping[str, Any]) -> Response:
    """An answer in one piece; given up when the client goes."""

    async def last() -> Answered:
        async with aclosing(parts) as each:  # type: ignore[type-var]
            async for part in each:
                if isinstance(part, Answered):
                    return part
        raise RuntimeError("an answer ended without its end")

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    answer, leaving = asyncio.ensure_future(last()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=GONE)
        found = answer.result()
    except Exception as error:  # noqa: BLE001 - told to the client
        return error_response(500, _told(error), classify(error)[0])
    finally:
        for task in (answer, leaving):
            task.cancel()
    message = {"role": "assistant", "content": found.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(found)}
    return JSONResponse({**known, "object": "chat.completion", "choices": [choice], "usage": _usage(found)})


async def _events(parts: AsyncIterator[Part], known: Mapping[str, Any], include_usage: bool) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    chunk = {**known, "object": "chat.completion.chunk"} | ({"usage": None} if include_usage else {})

    def event(delta: Mapping[str, str], reason: str | None = None) -> str:
        return _data(chunk | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]})

    async with aclosing(parts) as each:  # type: ignore[type-var]
        yield event({"role": "assistant", "content": ""})
        try:
            async for part in each:
                if isinstance(part, str):
                    yield event({"content": part})
                    continue
                yield event({}, _reason(part))
                if include_usage:
                    yield _data(chunk | {"choices": [], "usage": _usage(part)})
        except Exception as error:  # noqa: BLE001 - told to the client; the answer has begun, so not by a status
            yield _data(_error(_told(error), "server_error", classify(error)[0], None))
            return
        yield "data: [DONE]\n\n"


def _data(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"  # in ASCII: some readers of events end lines at U+2028


def _reason(answer: Answered) -> str:
    return "stop" if answer.stopped else "length"


def _usage(answer: Answered) -> dict[str, int]:
    total = answer.prompt_tokens + answer.tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": total}


def _told(error: BaseException) -> str:
    import traceback

    traceback.print_exception(error)  # into the program's log
    kind, message = classify(error)
    if kind == "out_of_memory":
        import torch

        torch.cuda.empty_cache()
        return f"{message}. Shorten the conversation, or hold the model in fewer bits (quant_bit: 4, bf16: true)."
    return message


def _error(message: str, kind: str, code: str | None, param: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(_error(message, kind, code, param), status)


async def _no_such_place(request: Request, error: Exception) -> Response:
    status = int(getattr(error, "status_code", 404))
    message = f"{request.method} {request.url.path} is not served: GET /v1/models, POST /v1/chat/completions are"
    return error_response(status, message, "not_found" if status == 404 else "method_not_allowed")
