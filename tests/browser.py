"""A headless Chromium, told what to do as the WebDriver protocol says, for the tests with a real page."""

import base64
import shutil
import subprocess
import time

import requests

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name of an element's number in the protocol
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]


class Browser:
    """A browser with one page. Its methods wait up to SECONDS for what they need."""

    SECONDS = 90

    def __init__(self, folder, port, size=(1400, 1100)):
        """folder: for the profile; port: a free one; size: of the window, in pixels."""
        command = [DRIVER, f"--port={port}", f"--log-path={folder / 'driver.log'}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._address = f"http://127.0.0.1:{port}/session"
        options = {"binary": BROWSER, "args": [*OPTIONS, f"--user-data-dir={folder / 'profile'}"]}
        options["args"].append(f"--window-size={size[0]},{size[1]}")
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._wait(lambda: requests.get(self._address.replace("/session", "/status"), timeout=5).ok, "the driver")
        self._address += "/" + self._call("POST", "", wanted)["sessionId"]

    def close(self):
        try:
            self._call("DELETE", "")
        finally:
            self._process.terminate()
            self._process.wait()

    def _call(self, method, path, content=None):
        content = {} if content is None and method == "POST" else content
        answer = requests.request(method, self._address + path, json=content, timeout=120)
        value = answer.json()["value"]
        if not answer.ok:
            raise LookupError(value.get("message", value))
        return value

    def _wait(self, found, what):
        end = time.monotonic() + self.SECONDS
        while True:
            try:
                if result := found():
                    return result
            except (LookupError, requests.ConnectionError) as error:
                what = f"{what}: {error}"[:500]
            if time.monotonic() > end:
                raise TimeoutError(what)
            time.sleep(0.2)

    def open(self, address):
        self._call("POST", "/url", {"url": address})

    def run(self, script):
        """The result of a script, which has `return`."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def wait(self, script):
        """The result of a script as soon as it is true."""
        return self._wait(lambda: self.run(script), script)

    def _find(self, selector):
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def type(self, selector, text):
        """Type into the field that this CSS selector finds."""
        self._wait(
            lambda: self._call("POST", f"/element/{self._find(selector)}/value", {"text": text}) is None, selector
        )

    def click(self, selector):
        self._wait(lambda: self._call("POST", f"/element/{self._find(selector)}/click") is None, selector)

    def press(self, key):
        """Press a key on the page."""
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def mouse(self, points, drag=False):
        """Click at these points of the window, a list of (x, y) in pixels, or drag from the first to the last."""
        steps = []
        for n, (x, y) in enumerate(points):
            steps.append({"type": "pointerMove", "duration": 100, "x": round(x), "y": round(y), "origin": "viewport"})
            if not drag or n == 0:
                steps.append({"type": "pointerDown", "button": 0})
            if not drag or n == len(points) - 1:
                steps += [{"type": "pause", "duration": 50}, {"type": "pointerUp", "button": 0}]
            steps.append({"type": "pause", "duration": 300})  # two clicks, not a double click
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self._call("POST", "/actions", {"actions": [mouse]})

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))
