"""The program that shows the chat page.

One decision: it loads no model; everything is asked of the model server, whose key comes in the environment. Nothing
leaves this machine: it listens on loopback, shares nothing and sends no analytics.

Run as `python -m deployments.chat.program SPEC.json`.
"""

from __future__ import annotations

import os
from pathlib import Path

from tasks.chat_client import Client
from tasks.chat_program import API_KEY
from tasks.program import OPTIONAL, Events, Spec, main


def work(spec: Spec, events: Events) -> None:
    """Show the page until the process is ended.

    `settings` has `models`, `generation` and `system`; `runtime` has `server`, `host`, `port` and `votes`. Emits
    `ready` with `url` when the page can be seen.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    events.emit("note", text="loading the page")
    import gradio

    from deployments.chat.page import CSS, make_page
    from deployments.chat.talks import Page

    place = spec.runtime
    page = Page(Client(place["server"], os.environ[API_KEY]), spec.settings["models"], Path(place["votes"]))
    blocks = make_page(page, spec.settings["generation"], spec.settings["system"])
    _, url, _ = blocks.launch(
        server_name=place["host"],
        server_port=place["port"],
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=gradio.themes.Default(),
        css=CSS,
    )
    events.emit("ready", url=url.rstrip("/"))
    blocks.block_thread()


if __name__ == "__main__":
    main(work, lambda spec: OPTIONAL)
