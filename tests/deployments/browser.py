"""Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START_SECONDS = 60.0


class Tab:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection, self.number = connection, 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Have the browser do something; its answer."""
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            said = json.loads(self.connection.recv())
            if said.get("method") == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            if said.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(said["params"]["exceptionDetails"]))
            if said.get("id") == self.number:
                assert "error" not in said, said
                result: dict[str, Any] = said["result"]
                return result

    def run(self, script: str) -> Any:
        """The value of some JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 120.0) -> None:
        """Wait until some JavaScript is true.

        Raises:
            AssertionError: it never was; with what the page shows.
        """
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"{script}\n{self.run('document.body.innerText')}"
            time.sleep(0.1)

    def type(self, text: str) -> None:
        """Type into what has the focus, as a person does."""
        self.call("Input.insertText", text=text)

    def press(self, button: str) -> None:
        """Press the button with this text, as soon as it can be."""
        found = f"[...document.querySelectorAll('button')].find(b => b.innerText.trim() == {json.dumps(button)})"
        self.wait(f"{found} && !{found}.disabled")
        self.run(f"{found}.click()")

    def picture(self, path: Path) -> None:
        """Write what is to be seen as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(folder: Path, width: int = 1280, height: int = 900) -> Iterator[Tab]:
    """A headless Chromium with one empty tab.

    Args:
        folder: for its profile.
        width, height: of the window, in pixels.
    """
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told, deadline = folder / "DevToolsActivePort", time.monotonic() + START_SECONDS
    try:
        while not told.is_file() or "\n" not in told.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.1)
        port, place = told.read_text().splitlines()[:2]
        with connect(f"ws://127.0.0.1:{port}{place}", max_size=None) as whole:
            whole.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            targets = json.loads(whole.recv())["result"]["targetInfos"]
            page = next(target["targetId"] for target in targets if target["type"] == "page")
            with connect(f"ws://127.0.0.1:{port}/devtools/page/{page}", max_size=None) as connection:
                yield Tab(connection)
    finally:
        process.terminate()
        process.wait(20)
