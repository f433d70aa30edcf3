"""A headless Chromium that a test asks questions, over the DevTools protocol on a pipe."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def path() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """One tab. `events` holds what the browser said in between: (method, parameters)."""

    def __init__(self, write: int, read: int):
        self.write, self.read = write, read
        self.session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.sent, self.rest = 0, b""

    @classmethod
    @contextmanager
    def open(cls, profile: Path) -> Iterator["Chromium"]:
        """A browser that ends with the block; `profile` is an empty folder for it."""
        their_read, our_write = os.pipe()
        our_read, their_write = os.pipe()
        command = [
            path() or NAMES[0], "--headless=new", "--no-sandbox", "--disable-gpu",
            "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}",
        ]  # fmt: skip

        def as_3_and_4() -> None:
            # where a browser expects its pipe; each end is first moved out of the other's way
            read, write = os.dup2(their_read, 30), os.dup2(their_write, 31)
            os.dup2(read, 3)
            os.dup2(write, 4)

        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=as_3_and_4,
            close_fds=False,
            start_new_session=True,
        )
        os.close(their_read)
        os.close(their_write)
        try:
            browser = cls(our_write, our_read)
            target = browser.call("Target.createTarget", url="about:blank")["targetId"]
            attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
            browser.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                browser.call(f"{domain}.enable")
            yield browser
        finally:
            os.close(our_write)  # a browser without its pipe ends
            os.close(our_read)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self.sent:
            self.events.append((reply["method"], reply["params"]))
        assert "error" not in reply, reply
        return reply["result"]

    def show(self, page: Path, *, width: int, height: int = 844, dark: bool = False) -> None:
        """Load a file in a window of that size; returns when it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            message = self._next()
            self.events.append((message["method"], message["params"]))

    def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page, below the window's edge too."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        taken = self.call(
            "Page.captureScreenshot",
            captureBeyondViewport=True,
            clip={**{k: size[k] for k in ("x", "y", "width", "height")}, "scale": 1},
        )
        file.write_bytes(base64.b64decode(taken["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            read = os.read(self.read, 1 << 20)
            assert read, "the browser has ended"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)
