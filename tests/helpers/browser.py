"""A real browser without a window: Chromium, spoken to by its DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
TIMEOUT_S = 60


def executable() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser. events: what it told of itself since `open`, in order."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb", 0)
        self._number, self._rest = 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Make a page, and listen to it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its result. Raises RuntimeError if the browser refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer.get("result", {})

    def open(self, page: Path, width: int = 1400, *, dark: bool = False, script: bool = True) -> None:
        """Load a page into a window of a width, and wait until it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.events = []
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression. Raises RuntimeError if it fails."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def html(self) -> str:
        """What is in the window now, without running a script in it."""
        root = self.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        return self.call("DOM.getOuterHTML", nodeId=root)["outerHTML"]

    def screenshot(self, path: Path, *, whole: bool = True, clip: dict[str, float] | None = None) -> None:
        area = {"clip": clip | {"scale": 1}} if clip else {}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **area)["data"]
        path.write_bytes(base64.b64decode(data))

    def errors(self) -> list[str]:
        """Of scripts, and whatever else the browser complained of."""
        kinds = {"Runtime.exceptionThrown": "exceptionDetails", "Log.entryAdded": "entry"}
        return [str(each["params"][kinds[each["method"]]]) for each in self.events if each.get("method") in kinds]

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        asked = [each for each in self.events if each.get("method") == "Network.requestWillBeSent"]
        return [each["params"]["request"]["url"] for each in asked]

    def close(self) -> None:
        self._commands.close()
        self._answers.close()

    def _read(self) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._rest:
            read = self._answers.read(1 << 16)
            if not read:
                raise RuntimeError("the browser is gone")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer


@contextmanager
def running(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own, which is gone afterwards."""
    commands_in, commands_out = os.pipe()
    answers_in, answers_out = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        # the browser reads commands from 3 and writes answers to 4
        line = f'exec "$@" 3<&{commands_in} 4>&{answers_out}'
        command = ["bash", "-c", line, "bash", program, *OPTIONS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            command, pass_fds=(commands_in, answers_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands_in)
        os.close(answers_out)
        started = Browser(commands_out, answers_in)
        try:
            started.begin()
            yield started
        finally:
            started.close()
            process.kill()
            process.wait(TIMEOUT_S)
