"""A real browser without a window, driven by Chromium's DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Dict, List

from tornado.websocket import websocket_connect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NO_BROWSER = "needs a browser: no chromium and no google-chrome is installed"
_TIMEOUT_S = 60


class Browser:
    """One tab. `problems` are the messages of the console and errors; `requests` the addresses."""

    def __init__(self, folder: Path) -> None:
        self.problems: List[str] = []
        self.requests: List[str] = []
        self._number = 0
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-extensions"]
        self._process = subprocess.Popen(
            [
                str(CHROMIUM),
                *options,
                f"--user-data-dir={folder}",
                "--remote-debugging-port=0",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._loop = asyncio.new_event_loop()
        port = self._port(folder / "DevToolsActivePort")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = json.load(answer)
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self._socket = self._run(self._connect(address))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _port(self, path: Path) -> str:
        end = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < end and self._process.poll() is None:
            if path.is_file() and path.read_text():
                return path.read_text().splitlines()[0]
            time.sleep(0.05)
        raise RuntimeError("the browser did not start")

    def _run(self, task: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(task, _TIMEOUT_S))

    async def _connect(self, address: str) -> Any:
        return await websocket_connect(address, max_message_size=2**28)

    def close(self) -> None:
        """End the browser."""
        self._socket.close()
        self._process.terminate()
        self._process.wait(_TIMEOUT_S)
        self._loop.close()

    def send(self, method: str, **parameters: Any) -> Dict[str, Any]:
        """Call a method of the protocol; return its result."""
        return self._run(self._answer(method, parameters))

    async def _answer(self, method: str, parameters: Dict[str, Any]) -> Dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.write_message(json.dumps(message))
        while True:
            found = json.loads(await self._socket.read_message())
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]
            self._note(found)

    def _note(self, event: Dict[str, Any]) -> None:
        name, given = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.problems.append(given["exceptionDetails"]["text"])
        elif name == "Runtime.consoleAPICalled":
            self.problems.append(str(given["args"]))
        elif name == "Log.entryAdded":
            self.problems.append(given["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path: Path, width: int = 1400, dark: bool = False) -> None:
        """Open a file in a window of some width, and forget the problems of those before."""
        self.problems.clear()
        self.requests.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + _TIMEOUT_S
        while self.evaluate("document.readyState") != "complete":
            assert time.monotonic() < end, "the page did not load"

    def click(self, selector: str) -> None:
        """Click with the mouse on the middle of an element."""
        x, y = self.evaluate(
            f"""(() => {{
                const found = document.querySelector({json.dumps(selector)});
                found.scrollIntoView({{block: "center"}});
                const box = found.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press_enter(self, selector: str) -> None:
        """Focus an element and press the enter key."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.send("Input.dispatchKeyEvent", type=kind, **key)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """Print the page."""
        found = self.send("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        return base64.b64decode(found["data"])
