"""A headless Chromium for the tests, driven over its debugging pipe with nothing but the standard library."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio",
    "--no-first-run", "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe",
)  # fmt: skip

# The browser reads commands from descriptor 3 and writes to 4.
_LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class BrowserError(RuntimeError):
    """The browser said no, or did not answer."""


class Browser:
    """One browser with one page; ``with Browser(folder) as page``.

    Args:
        folder: For the browser's profile.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, folder, *, timeout=60.0):
        self.folder, self.timeout = folder, timeout
        self.events, self._answers, self._buffer, self._number = [], {}, b"", 0

    def __enter__(self):
        low_in, self._out = os.pipe()
        self._in, low_out = os.pipe()
        theirs = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (low_in, low_out)]
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *map(str, theirs), *command],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (low_in, low_out, *theirs):
            os.close(descriptor)
        self._session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        with contextlib.suppress(BrowserError, OSError):
            self._session = None
            self.send("Browser.close")
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)

    def send(self, method, **params):
        """One command of the DevTools protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.timeout
        while self._number not in self._answers:
            self._read(end, method)
        answer = self._answers.pop(self._number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self, end, waiting_for):
        if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
            raise BrowserError(f"no answer to {waiting_for} within {self.timeout:.0f} seconds")
        part = os.read(self._in, 2**20)
        if not part:
            raise BrowserError(f"the browser ended while waiting for {waiting_for}")
        *whole, self._buffer = (self._buffer + part).split(b"\0")
        for text in whole:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append((message["method"], message["params"]))

    def open(self, url):
        """Load a page from the start and wait for it."""
        for address in ("about:blank", url):  # an address that differs in its fragment only would not load again
            self.events.clear()
            self.send("Page.navigate", url=address)
            end = time.monotonic() + self.timeout
            while not any(name == "Page.loadEventFired" for name, _ in self.events):
                self._read(end, address)

    def run(self, script):
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise BrowserError(result["exceptionDetails"].get("exception", {}).get("description", str(result)))
        return result["result"].get("value")

    def go(self, fragment):
        """Follow a link within the page."""
        self.run(f"new Promise(done => {{ location.hash = {json.dumps(fragment)}; setTimeout(done, 50); }})")

    def resize(self, width, height=900, *, scale=1):
        """Size of the window in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def media(self, **features):
        """Emulate for example prefers_color_scheme="dark"; ``media="print"`` for paper."""
        kind = features.pop("media", "")
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", media=kind, features=named)

    def without_scripts(self, *, disabled=True):
        """Switch JavaScript off."""
        self.send("Emulation.setScriptExecutionDisabled", value=disabled)

    def key(self, name):
        """Press and release a key such as ``Tab``, ``Enter`` or ``ArrowRight``."""
        codes = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowDown": 40, "ArrowLeft": 37, "ArrowUp": 38}
        text = {"Enter": "\r"}.get(name)
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=codes[name], **extra
            )

    def point(self, x, y, *, click=False):
        """Move the mouse, and click."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path, *, whole=False):
        """A PNG of the window, or of the whole page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def pdf(self, path):
        """Print."""
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"]))
        return path

    @property
    def complaints(self):
        """Errors and warnings of the console, uncaught exceptions and refused requests since ``open``."""
        found = []
        for name, params in self.events:
            if name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif name == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
        return found

    @property
    def requests(self):
        """Addresses that were asked for since ``open``, data addresses aside."""
        sent = [params["request"]["url"] for name, params in self.events if name == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]
