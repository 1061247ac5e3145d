"""Label Studio 1.23 itself, a person's hand in a headless Chromium, and a run; the run and the server are killed.

`make test-labelstudio` installs Label Studio into .venv-labelstudio and runs this; LONG=1 for 20 kills instead of 5.
SCREENSHOT=path keeps a picture of a task with its proposal.
"""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import requests
from browser import BROWSER, DRIVER, Browser
from conftest import ROOT, blobs
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion
from test_labelstudio import brush
from test_oracle import rows

from brush import fill, join
from labelstudio import TOKEN
from utils import read_csv

KILLS = 20 if os.environ.get("LONG") else 5
STUDIO = ROOT / ".venv-labelstudio" / "bin" / "label-studio"
EMAIL, PASSWORD, LEGACY = "annotator@example.org", "a-password-for-tests", "0123456789abcdef0123456789abcdef01234567"
SIZE = 240, 320
OPTIONS = """
    --preset demo --initial 16 --pool 20 --test 4 --initial-epochs 40 --active-epochs 1 --passes 3 --iterations 1
    --learning-rate 0.001 --no-detection 2 --most-uncertain 2 --random 2 --pseudo-start 1 --pseudo-first 2
    --pseudo-step 0
"""
READY = """return window.Htx && Htx.task && document.querySelector('.konvajs-content canvas')
    && document.querySelector('img[alt=image]').complete && Htx.task.id"""
PLACE = (
    "const r = document.querySelector('img[alt=image]').getBoundingClientRect(); return [r.x, r.y, r.width, r.height]"
)
REGIONS = "return Htx.annotationStore.selected.regions.length"

pytestmark = [
    pytest.mark.labelstudio,
    pytest.mark.skipif(not STUDIO.exists(), reason="Label Studio is not installed; `make test-labelstudio` does it"),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Studio:
    """A Label Studio server of this test with its data in a folder."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        quiet = {"COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false", "FEATURE_FLAGS_OFFLINE": "true"}
        quiet |= {"SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": ""}
        settings = {"BASE_DATA_DIR": folder, "USERNAME": EMAIL, "PASSWORD": PASSWORD, "USER_TOKEN": LEGACY}
        settings |= {"PORT": self.port, "ENABLE_LEGACY_API_TOKEN": "true"}
        settings = {f"LABEL_STUDIO_{name}": str(value) for name, value in settings.items()}
        self.environment = {**os.environ, **quiet, **settings, "HOME": str(folder)}
        self.start()

    def start(self):
        command = [STUDIO, "start", "--no-browser", "--internal-host", "127.0.0.1"]
        with open(self.folder / "server.log", "a") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        end = time.monotonic() + 600  # a minute, or much more beside other work
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            try:
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            except requests.RequestException:
                time.sleep(0.5)
        raise TimeoutError((self.folder / "server.log").read_text()[-2000:])

    def kill(self):
        self.process.kill()
        self.process.wait()

    def call(self, method, path, **content):
        answer = requests.request(
            method, self.url + path, headers={"Authorization": f"Token {LEGACY}"}, timeout=60, **content
        )
        assert answer.ok, answer.text
        return answer.json() if answer.content else None

    def tasks(self):
        """All tasks of the first project, none if there is no project."""
        projects = self.call("GET", "/api/projects/")["results"]
        assert len(projects) <= 1
        path = f"/api/tasks?project={projects[0]['id']}&fields=all&page_size=100" if projects else None
        return self.call("GET", path)["tasks"] if path else []

    def annotate(self, task, mask):
        self.call("POST", f"/api/tasks/{task['id']}/annotations/", json={"result": [brush(mask)], "lead_time": 1})


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    studio = Studio(tmp_path_factory.mktemp("studio"))
    yield studio
    studio.kill()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A data file of 40 photographs with masks, and a dict of id to mask, bool (240, 320)."""
    folder = tmp_path_factory.mktemp("photos")
    images, masks = blobs(40, *SIZE, seed=11)
    for name in "images", "masks":
        (folder / name).mkdir()
    for n, (image, mask) in enumerate(zip(images[..., 0].clip(0, 255).astype(np.uint8), masks[..., 0])):
        picture = Image.fromarray(image).convert("RGB")
        picture.save(folder / "images" / (f"naevus {n:02d}.tif" if n % 3 else f"naevus {n:02d}.jpg"))
        Image.fromarray(np.uint8(255 * mask)).save(folder / "masks" / f"naevus {n:02d}.png")
    command = ["folder", "images", "photos.h5", "--masks", "masks", "--height", "48", "--width", "64"]
    subprocess.run([sys.executable, ROOT / "data.py", *command], cwd=folder, check=True, capture_output=True)
    return folder / "photos.h5", {f"naevus {n:02d}": mask[..., 0] > 0 for n, mask in enumerate(masks)}


def start(run, *options, token=LEGACY):
    """Start the run, as a Popen; its output goes to RUN.log."""
    environment = {**os.environ, TOKEN: token, "TF_NUM_INTRAOP_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", "--run", run, *map(str, options)]
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def end(process, run):
    """Wait for the end. Returns the exit code and all output so far."""
    code = process.wait(timeout=300)
    return code, Path(f"{run}.log").read_text()


def kill_when(process, ready):
    """Kill the run as soon as `ready()`. Returns whether it was still running."""
    while process.poll() is None and not ready():
        time.sleep(0.05)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def test_a_person_in_a_browser_while_the_run_and_the_server_are_killed(studio, photos, tmp_path):
    if not (BROWSER and DRIVER):
        pytest.skip("there is no Chromium with its driver here: apt-get install chromium chromium-driver")
    (data_file, truths), run = photos, tmp_path / "run"
    options = ["--data", data_file, *OPTIONS.split(), "--oracle", "labelstudio", "--labelstudio", studio.url]

    # Killed while it hands out the images: first the run, then the server.
    kills = kill_when(start(run, *options), lambda: studio.tasks())
    process = start(run)
    before = len(studio.tasks())
    while process.poll() is None and len(studio.tasks()) <= before:
        time.sleep(0.02)
    if process.poll() is None:
        studio.kill()
        kills += 1
        code, log = end(process, run)
        assert code == 2
        assert log.splitlines()[-1].startswith(f"error: {studio.url}: no Label Studio answers there")
        studio.start()
    code, log = end(start(run), run)
    assert code == 0, log
    tasks = studio.tasks()
    assert len({task["data"]["id"] for task in tasks}) == len(tasks) == 6
    kept = json.loads((run / "labelstudio.json").read_text())
    assert len(studio.call("GET", f"/api/projects/{kept['project']}/file-uploads?all=true")) == 6
    (address,) = set(re.findall(rf"^({studio.url}/\S+): draw masks", log, re.MULTILINE)) or {""}

    drawn = work(studio, address, tmp_path)
    studio.kill()
    kills += 1
    studio.start()
    assert {task["data"]["id"] for task in studio.tasks() if task["annotations"]} >= drawn.keys()

    # Killed while it collects, and while it trains; with a personal access token.
    token = studio.call("POST", "/api/token/")["token"]
    kills += kill_when(start(run, token=token), lambda: any((run / "labelstudio").glob("annotation*")))
    for task in studio.tasks():
        if not task["annotations"]:
            drawn[task["data"]["id"]] = truths[task["data"]["id"]]
            studio.annotate(task, truths[task["data"]["id"]])
    accepted, rng = [], random.Random(1)
    while kills < KILLS:
        latest = rng.uniform(2, 20) + time.monotonic()
        killed = kill_when(start(run, token=token), lambda latest=latest: time.monotonic() > latest)
        kills += killed
        if killed and kills % 5 == 0 and kills < KILLS:
            studio.kill()
            studio.start()
            kills += 1
        if (run / "annotations.h5").exists():
            before, accepted = accepted, rows(run)
            assert accepted[: len(before)] == before
        if (run / "iteration_01").exists():
            shutil.rmtree(run / "iteration_01")  # so that there is something left to kill
    code, log = end(start(run, token=token), run)
    assert code == 0, log
    assert "done: " in log
    assert "Traceback" not in log
    print(f"{kills} kills")

    found = {id: (rejection, mask) for id, _, rejection, mask in rows(run)}
    assert len(found) == len(rows(run)) == 6
    assert read_csv(run / "history.csv")[-1]["annotations"] == "21"
    for id, mask in drawn.items():
        if isinstance(mask, str):
            assert found[id] == (mask, None)
        else:
            assert_close(np.array(found[id][1]) > 0, mask)
    for path in [*run.rglob("*"), Path(f"{run}.log")]:
        content = path.read_bytes() if path.is_file() else b""
        assert LEGACY.encode() not in content
        assert token.encode() not in content


def assert_close(found, expected, pixels=2):
    """Assert that the outlines of two masks are at most `pixels` apart."""
    assert not (found & ~binary_dilation(expected, iterations=pixels)).any()
    assert not (binary_erosion(expected, iterations=pixels) & ~found).any()


def work(studio, address, folder):
    """Draw, correct and skip as a person does. Returns a dict of id to the mask, bool (h, w), or the reason."""
    browser, answers = Browser(folder, free_port()), {}
    scores = {task["id"]: task["predictions"][0]["score"] for task in studio.tasks()}
    tasks = {task["id"]: task for task in studio.tasks()}
    order = sorted(scores, key=scores.get)
    corners = [(25, 20), (70, 30), (80, 75), (35, 80)]
    try:
        browser.open(f"{studio.url}/user/login/")
        browser.type("[name=email]", EMAIL)
        browser.type("[name=password]", PASSWORD)
        browser.click("button[type=submit]")
        browser.wait("return !location.pathname.includes('login')")
        browser.open(address)
        for n, how in enumerate(("draw", "add", "accept", "skip")):
            task = tasks[browser.wait(f"{READY} == {order[n]} && {order[n]}")]
            time.sleep(3)
            proposed = join(task["predictions"][0]["result"], "Lesion", *SIZE)
            assert proposed.any()
            assert browser.run(REGIONS) == 1  # the proposal
            if n == 0 and os.environ.get("SCREENSHOT"):
                browser.screenshot(Path(os.environ["SCREENSHOT"]))
            id, polygon = task["data"]["id"], fill(corners, *SIZE)
            if how == "draw":
                browser.click(".lsf-outliner-item")
                browser.press("\ue003")  # Backspace
                browser.wait(f"{REGIONS} == 0")
            if how in ("draw", "add"):
                x, y, width, height = browser.run(PLACE)
                browser.press("2")
                points = [(x + width * px / 100, y + height * py / 100) for px, py in corners]
                browser.mouse([*points, points[0]])
                browser.wait(f"{REGIONS} == {1 + (how == 'add')}")
            answers[id] = {"draw": polygon, "add": polygon | proposed, "accept": proposed, "skip": "not a lesion"}[how]
            if how == "skip":
                browser.type("[name=reason]", "not a lesion\n")
                browser.wait("return document.body.innerText.includes('not a lesion')")
            browser.click(f"[data-testid=bottombar-{'skip' if how == 'skip' else 'submit'}-button]")
            end = time.monotonic() + 60
            while not studio.call("GET", f"/api/tasks/{task['id']}/")["annotations"] and time.monotonic() < end:
                time.sleep(0.2)
    except Exception:
        browser.screenshot(folder / "failed.png")
        raise
    finally:
        browser.close()
    return answers
