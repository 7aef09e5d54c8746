"""The page for a browser, made with Gradio.

One decision: what the buttons do is in `deployments.chat.talks`; here is only what the page looks like and which parts
of it each state shows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from deployments.chat.talks import Page, State
from deployments.chat.votes import count
from registry.chat_settings import MAX_NEW_TOKENS

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TITLE = "LLamaTuner chat"
CSS = """
.gradio-container {max-width: 1500px !important; margin: 0 auto}
.gradio-container, .gradio-container main {width: 100% !important}
.gradio-container main {max-width: 100% !important}
[id^=chat-] button[aria-label=Clear], [id^=chat-] button[title=Clear] {display: none}
.note p {font-size: 0.85em; opacity: 0.75; margin: 0}
footer {display: none !important}
"""
THINKING = [("<think>", "</think>")]


def make_page(page: Page, defaults: Mapping[str, Any], system: str) -> gr.Blocks:
    """The page.

    Args:
        page: its models, and what its buttons do.
        defaults: settings of generation to begin with.
        system: system message to begin with.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        _connect(blocks, page, _parts(page, defaults, system))
    return blocks


@dataclass(frozen=True)
class _Parts:
    """What is on the page."""

    state: gr.State
    chats: list[gr.Chatbot]
    notes: list[gr.Markdown]
    votes: list[gr.Button]
    """None where there is one model."""
    counted: gr.Markdown
    box: gr.Textbox
    send: gr.Button
    stop: gr.Button
    retry: gr.Button
    undo: gr.Button
    clear: gr.Button
    settings: list[gr.components.Component]
    """What `_given` reads."""

    @property
    def shown(self) -> list[Any]:
        """What `_shown` changes."""
        buttons = (self.stop, self.send, self.retry, self.undo, self.clear)
        return [self.state, *self.chats, *self.notes, *self.votes, *buttons]


def _parts(page: Page, defaults: Mapping[str, Any], system: str) -> _Parts:
    state = gr.State(page.empty())
    gr.Markdown(f"# {TITLE}\n{_subtitle(page)}")
    chats, notes = _talks(page.models)
    votes, counted = _vote_row(page) if len(page.models) > 1 else ([], gr.Markdown(visible=False))
    with gr.Row(equal_height=True):
        box = gr.Textbox(placeholder="Your message", show_label=False, scale=8, autofocus=True, max_lines=12)
        send = gr.Button("Send", variant="primary", scale=1, min_width=90)
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, interactive=False)
    with gr.Row():
        retry = gr.Button("Regenerate", size="sm", interactive=False)
        undo = gr.Button("Undo", size="sm", interactive=False)
        clear = gr.Button("Clear", size="sm")
    settings = _settings(defaults, system)
    return _Parts(state, chats, notes, votes, counted, box, send, stop, retry, undo, clear, settings)


def _connect(blocks: gr.Blocks, page: Page, parts: _Parts) -> None:
    """What happens when something is pressed."""
    state, box, settings, shown = parts.state, parts.box, parts.settings, parts.shown

    def answer(now: State, request: gr.Request, values: Sequence[Any]) -> Iterator[list[Any]]:
        said, generation = _given(values)
        stopped = page.stops[str(request.session_hash)] = threading.Event()
        for changed in page.answers(now, said, generation, stopped):
            yield _shown(changed)

    def sent(now: State, text: str, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        cleared: Any = ""  # once: the next message may be typed while this one is answered
        if text.strip() and not now.running:
            for changed in answer(page.asked(now, text), request, values):
                yield [*changed, cleared]
                cleared = gr.skip()
        else:
            yield [gr.skip() for _ in (*shown, box)]

    def again(now: State, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        if now.said and not now.running:
            yield from answer(page.asked(page.taken_back(now), now.said), request, values)
        else:
            yield [gr.skip() for _ in shown]

    def end(request: gr.Request) -> None:
        if str(request.session_hash) in page.stops:
            page.stops[str(request.session_hash)].set()

    def back(now: State) -> list[Any]:
        return [*_shown(page.taken_back(now)), now.said]

    for event in (box.submit, parts.send.click):
        event(sent, [state, box, *settings], [*shown, box], show_progress="hidden")
    parts.retry.click(again, [state, *settings], shown, show_progress="hidden")
    parts.stop.click(end, None, None, show_progress="hidden", queue=False)
    blocks.unload(end)
    parts.undo.click(back, state, [*shown, box], show_progress="hidden")
    parts.clear.click(lambda: _shown(page.empty()), None, shown, show_progress="hidden")
    for number, button in enumerate(parts.votes):
        # one behind the other: the second of two quick votes sees that there was one
        how: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "votes", "concurrency_limit": 1}
        button.click(_voter(page, number), [state, settings[0]], [*shown, parts.counted], **how)


def _subtitle(page: Page) -> str:
    if len(page.models) == 1:
        return "Enter sends; Shift+Enter begins a new line."
    return "The same message goes to all models. A vote is kept as a row for dpo; the talk goes on from the best."


def _talks(models: Sequence[str]) -> tuple[list[gr.Chatbot], list[gr.Markdown]]:
    """A conversation for each model, and a line below it."""
    chats, notes = [], []
    with gr.Row(equal_height=True):
        for letter, name in zip(LETTERS, models, strict=False):
            with gr.Column(min_width=280):
                label = f"{letter} · {name}" if len(models) > 1 else name
                chat = gr.Chatbot(
                    label=label,
                    elem_id=f"chat-{letter}",
                    height="50vh",
                    buttons=["copy"],
                    feedback_options=None,
                    reasoning_tags=THINKING,
                    allow_tags=False,
                )
                chats.append(chat)
                notes.append(gr.Markdown("&nbsp;", elem_classes="note", elem_id=f"note-{letter}"))
    return chats, notes


def _vote_row(page: Page) -> tuple[list[gr.Button], gr.Markdown]:
    with gr.Row():
        word = "better" if len(page.models) == 2 else "best"
        names = [f"{letter} {word}" for letter, _ in zip(LETTERS, page.models, strict=False)]
        buttons = [gr.Button(name, interactive=False, elem_id=f"vote-{name[0]}") for name in names]
    return buttons, gr.Markdown(_counted(page, count(page.votes)), elem_classes="note", elem_id="votes")


def _counted(page: Page, rows: int) -> str:
    return f"{rows} {'pair' if rows == 1 else 'pairs'} in `{page.votes}`; in a recipe: `dataset: {page.votes}`"


def _settings(defaults: Mapping[str, Any], system: str) -> list[gr.components.Component]:
    """What `_given` reads."""
    temperature = defaults.get("temperature", 1.0 if defaults.get("do_sample") else 0.0)
    with gr.Accordion("Settings", open=False):
        parts: list[gr.components.Component] = [gr.Textbox(system, label="System message", lines=2)]
        with gr.Row():
            parts.append(gr.Slider(0, 2, temperature, step=0.05, label="temperature", info="0: the most likely token"))
            parts.append(gr.Slider(0.05, 1, defaults.get("top_p", 1.0), step=0.05, label="top_p"))
            parts.append(
                gr.Number(defaults.get("top_k", 0), label="top_k", precision=0, minimum=0, info="0: all tokens")
            )
        with gr.Row():
            longest = defaults.get("max_new_tokens", MAX_NEW_TOKENS)
            parts.append(gr.Number(longest, label="max_new_tokens", precision=0, minimum=1))
            penalty = defaults.get("repetition_penalty", 1.0)
            parts.append(gr.Slider(1, 2, penalty, step=0.05, label="repetition_penalty"))
            seed = str(defaults.get("seed", ""))  # a field for numbers shows 0 where there is none
            parts.append(gr.Textbox(seed, label="seed", info="nothing: another one for each answer", max_lines=1))
    return parts


def _given(values: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    """System message and settings of generation, from the values of `_settings`."""
    system, *numbers, seed = values
    names = ("temperature", "top_p", "top_k", "max_new_tokens", "repetition_penalty")
    found: dict[str, Any] = {name: value for name, value in zip(names, numbers, strict=True) if value is not None}
    if seed.strip():
        found["seed"] = int(seed) if seed.strip().isdecimal() else seed
    return system.strip(), found


def _shown(now: State) -> list[Any]:
    """The state, conversations, lines below them, and which buttons can be pressed."""
    notes = ["**voted best**" if now.best == number else note for number, note in enumerate(now.notes)]
    marks = [note or "&nbsp;" for note in notes]  # a line keeps its place
    votes = [now.comparable] * len(now.talks) if len(now.talks) > 1 else []
    idle = not now.running
    begun = idle and bool(now.said)
    buttons = [*votes, now.running, idle, begun, begun, idle]
    return [now, *map(list, now.talks), *marks, *(gr.update(interactive=on) for on in buttons)]


def _voter(page: Page, number: int) -> Any:
    def vote(now: State, system: str) -> list[Any]:
        if not now.comparable:
            return [*_shown(now), gr.skip()]
        try:
            now, rows = page.voted(now, number, system.strip())
        except OSError as error:
            raise gr.Error(f"the vote was not kept: {error}") from error
        return [*_shown(now), _counted(page, rows)]

    return vote
