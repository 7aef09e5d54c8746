"""The model server, asked over HTTP as OpenAI's API is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from registry.chat_settings import as_drawn
from registry.errors import InputError
from tasks.chat_client import Client, Ended, ServerError
from tasks.chat_model import ChatModel
from tasks.chat_program import listen
from tests.tasks.chat_servers import KEY, ask, chat_model, serving, wait_for
from tests.tiny import tiny_model

HELLO = [{"role": "user", "content": "Hello?"}]
PLACE = "/v1/chat/completions"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ChatModel]:
    folder = tmp_path_factory.mktemp("models")
    return [chat_model(tiny_model(folder / name, seed), name) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def url(models: list[ChatModel]) -> Iterator[str]:
    with serving(models, {"max_new_tokens": 12}) as url:
        yield url


def answer(url: str, **given: Any) -> dict[str, Any]:
    status, found = ask(url, PLACE, {"model": "one", "messages": HELLO, **given})
    assert status == 200, found
    choice: dict[str, Any] = found["choices"][0]
    return choice | {"usage": found["usage"]}


def text(url: str, **given: Any) -> str:
    return str(answer(url, **given)["message"]["content"])


def refusal(url: str, **given: Any) -> dict[str, Any]:
    status, found = ask(url, PLACE, {"model": "one", "messages": HELLO, **given})
    error: dict[str, Any] = found["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error | {"status": status}


def streamed(url: str, model: str = "one", **settings: Any) -> tuple[str, Ended]:
    *parts, end = Client(url, KEY).answer(model, HELLO, settings)
    assert isinstance(end, Ended)
    return "".join(part for part in parts if isinstance(part, str)), end


def test_two_models_answer_in_the_form_of_openai(url: str, models: list[ChatModel]) -> None:
    status, listed = ask(url, "/v1/models")
    assert (status, [model["id"] for model in listed["data"]]) == (200, ["one", "two"])
    assert Client(url, KEY).models() == ["one", "two"]
    status, found = ask(url, PLACE, {"model": "two", "messages": HELLO, "max_tokens": 5})
    assert (found["object"], found["model"]) == ("chat.completion", "two")
    (choice,) = found["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "length", "assistant")
    prompt = len(models[1].prompt(HELLO))
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5}
    assert choice["message"]["content"] != text(url, max_tokens=5)
    assert answer(url)["usage"]["completion_tokens"] == 12
    assert ask(url, "/health", Authorization="") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "given",
    [{}, {"temperature": 1.3, "seed": 4}, {"num_beams": 2}, {"max_completion_tokens": 60}, {"top_k": 3, "seed": 1}],
)
def test_a_streamed_answer_is_the_answer(url: str, given: dict[str, Any]) -> None:
    whole = answer(url, **given)
    found, end = streamed(url, **given)
    assert found == whole["message"]["content"]
    assert (end.finish_reason, end.tokens) == (whole["finish_reason"], whole["usage"]["completion_tokens"])


def test_events_are_those_of_openai(url: str) -> None:
    from http.client import HTTPConnection
    from urllib.parse import urlsplit

    connection = HTTPConnection(urlsplit(url).netloc)
    body = b'{"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": true}'
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", PLACE, body, headers)
    found = connection.getresponse()
    assert found.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in found.read().decode().split("\n\n") if line]
    connection.close()
    assert lines[0].startswith('data: {"id": "chatcmpl-')
    assert '"delta": {"role": "assistant", "content": ""}' in lines[0]
    assert '"delta": {}, "logprobs": null, "finish_reason": "length"' in lines[-2]
    assert lines[-1] == "data: [DONE]"
    assert not any("usage" in line for line in lines)


def test_what_is_drawn_depends_on_the_seed_and_without_one_differs(url: str) -> None:
    assert text(url, temperature=2.0, seed=1) == text(url, temperature=2.0, seed=1)
    assert len({text(url, temperature=2.0) for _ in range(4)}) == 4
    assert len({text(url) for _ in range(2)}) == len({text(url, temperature=0)} | {text(url)}) == 1


def test_stop_words_end_an_answer(url: str) -> None:
    free = text(url, max_tokens=30)
    word = free[8:10]
    found = answer(url, max_tokens=30, stop=word)
    assert (found["message"]["content"], found["finish_reason"]) == (free[: free.index(word)], "stop")
    assert text(url, max_tokens=30, stop=["\x00no", word]) == free[: free.index(word)]


def test_everything_wrong_with_a_request_is_told_at_once_by_name(url: str) -> None:
    error = refusal(url, n=2, foo=1, max_tokens="7", temperature=-1, tool_choice="required")
    assert (error["status"], error["type"]) == (400, "invalid_request_error")
    for words in ("n: 2 is not supported", "foo: unknown field", "'7' should be", "-1 should be", "tool_choice:"):
        assert words in error["message"]
    assert "Did you mean temperature?" in refusal(url, temprature=1)["message"]


@pytest.mark.parametrize(
    ("given", "status", "param", "code"),
    [
        ({"model": "three"}, 404, "model", "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "context_length_exceeded"),
        ({"messages": "hi"}, 400, "messages", None),
        ({"messages": []}, 400, "messages", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", None),
        ({"logprobs": True}, 400, "logprobs", None),
        ({"stop": ["a", ""]}, 400, "stop", None),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_completion_tokens", None),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", None),
    ],
)
def test_what_cannot_be_is_refused_in_the_form_of_openai(
    url: str, given: dict[str, Any], status: int, param: str, code: str | None
) -> None:
    error = refusal(url, **given)
    assert (error["status"], error["param"], error["code"]) == (status, param, code)


def test_what_asks_for_nothing_is_let_through(url: str) -> None:
    nothing = {"n": 1, "presence_penalty": 0.0, "logprobs": False, "user": "me", "seed": None, "tool_choice": "none"}
    assert text(url, **nothing, tools=[{"type": "function", "function": {"name": "f"}}]) == text(url)


def test_strangers_are_kept_out(url: str, models: list[ChatModel]) -> None:
    body = {"model": "one", "messages": HELLO}
    assert ask(url, PLACE, body, Authorization="Bearer another")[0] == 401
    assert ask(url, "/v1/models", Authorization="")[0] == 401
    assert ask(url, "/v1/models", Host="evil.example")[1]["error"]["param"] == "Host"
    assert ask(url, PLACE, body, Content_Type="text/plain")[0] == 415
    assert ask(url, PLACE, b"{")[1]["error"]["message"].startswith("the body is not JSON")
    assert ask(url, "/v1/embeddings", {})[1]["error"]["code"] == "not_found"
    assert ask(url, PLACE)[0] == 405
    with pytest.raises(ServerError, match="the API key is missing or wrong"):
        Client(url, "another").models()
    with serving(models, {}, None) as open_to_all:
        assert ask(open_to_all, "/v1/models", Authorization="")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_gives_up_its_answer_and_its_place(url: str, models: list[ChatModel], stream: bool) -> None:
    import json
    from http.client import HTTPConnection
    from urllib.parse import urlsplit

    tokens = [0]
    hook = models[0].model.register_forward_hook(lambda *_: tokens.__setitem__(0, tokens[0] + 1))
    body = {"model": "one", "messages": HELLO, "max_tokens": 480, "stream": stream}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    try:
        clients = [HTTPConnection(urlsplit(url).netloc) for _ in range(3)]  # two of them wait for their turn
        for client in clients:
            client.request("POST", PLACE, json.dumps(body).encode(), headers)
        wait_for(lambda: tokens[0] > 3)
        for client in clients:
            client.close()
        streamed(url, max_new_tokens=3)  # it comes behind them
        assert tokens[0] < 300
    finally:
        hook.remove()


def test_requests_at_the_same_time_get_the_answers_they_would_have_alone(url: str) -> None:
    wanted = {seed: text(url, temperature=1.5, seed=seed, max_tokens=20) for seed in range(4)}
    found: dict[int, str] = {}

    def client(seed: int) -> None:
        found[seed] = streamed(url, temperature=1.5, seed=seed, max_tokens=20)[0]

    threads = [threading.Thread(target=client, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_a_port_that_is_taken_is_named_with_another_one() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            InputError, match=rf"port {port}: another program listens there. Choose another one \(--port"
        ):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match=r"--host 203\.0\.113\.1: is no address of this machine"):
        listen("203.0.113.1", 0)


def test_a_server_that_is_gone_is_said() -> None:
    with listen("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(ServerError, match="the model server has ended"):
        Client(url, KEY).models()


def test_a_temperature_means_drawing_and_zero_means_the_most_likely_token() -> None:
    assert as_drawn({"temperature": 0.7}) == {"temperature": 0.7, "do_sample": True}
    assert as_drawn({"temperature": 0, "top_p": 0.5}) == {"do_sample": False}
    assert as_drawn({"do_sample": False, "top_k": 5}) == {"do_sample": False, "top_k": 5}
    assert as_drawn({"seed": 1}) == {"seed": 1}
