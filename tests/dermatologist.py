"""The run of docs/annotating.md: Label Studio, real images, and a robot in a browser in place of the dermatologist.

    PYTHONPATH=. python tests/dermatologist.py isic2017 OUT [photographs]

Takes 60 photographs with masks, in the challenge's layout, as if none had a mask: the robot draws the true outline of
each image that the run asks for as a polygon with the mouse, or submits the proposed mask where it has a Dice of 0.9.
OUT gets the run and screenshots of its page. Needs what `make test-labelstudio` needs.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from browser import Browser
from conftest import ROOT
from PIL import Image
from skimage.measure import approximate_polygon, find_contours, label, regionprops
from test_labelstudio_real import EMAIL, PASSWORD, PLACE, READY, REGIONS, Studio, free_port, start

from brush import join
from utils import segmentation_metrics

CORNERS, APART = 30, 4  # corners of a drawn outline, at most, and their least distance in percent of the image's size
SETTINGS = """
    --preset quick --initial 20 --pool 40 --test 0 --iterations 2 --initial-steps 400 --active-steps 100
    --no-detection 2 --most-uncertain 3 --random 3 --audit 2 --pseudo-start 2 --pseudo-first 4
"""


def true_masks(folder, count):
    """A dict of id to mask, bool (H, W), of every 33rd image, so that they are of several origins."""
    paths = sorted(folder.glob("*GroundTruth/*_segmentation.png"))[::33][:count]
    return {path.stem.removesuffix("_segmentation"): np.array(Image.open(path)) > 0 for path in paths}


def outline(mask):
    """The corners of the outline of the largest part of a mask, in percent of its size: a list of (x, y)."""
    largest = max(regionprops(label(mask)), key=lambda region: region.area)
    lesion = np.zeros(mask.shape, bool)
    lesion[tuple(largest.coords.T)] = True
    contour = max(find_contours(np.pad(lesion, 1).astype(float), 0.5), key=len) - 1
    tolerance = 0.5
    while len(corners := approximate_polygon(contour, tolerance)[:-1]) > CORNERS:
        tolerance *= 1.3
    # Label Studio shows a square photograph a little enlarged, without its outermost pixels.
    points = (100 * (corners[:, ::-1] + 0.5) / mask.shape[::-1]).clip(2.5, 97.5)
    kept = [points[0]]  # a click on another corner would be lost
    for point in points[1:]:
        if min(np.hypot(*(point - kept[-1])), np.hypot(*(point - kept[0]))) >= APART:
            kept.append(point)
    return [tuple(point) for point in kept]


def log_in(studio, folder):
    """A Browser in which the annotator is logged in."""
    browser = Browser(folder, free_port(), (1400, 1500))  # so that a square photograph is seen whole
    browser.open(f"{studio.url}/user/login/")
    browser.type("[name=email]", EMAIL)
    browser.type("[name=password]", PASSWORD)
    browser.click("button[type=submit]")
    browser.wait("return !location.pathname.includes('login')")
    return browser


def annotate(browser, studio, address, masks):
    """Annotate every open task of the project, in the order of the labelling stream. Returns how many were drawn, and
    how many proposals were submitted as they were."""
    drawn = accepted = 0
    browser.open(address)
    while open_tasks := {task["id"]: task for task in studio.tasks() if not task["annotations"]}:
        number = browser.wait(READY)
        if number not in open_tasks:
            time.sleep(0.3)
            continue
        task = open_tasks[number]
        time.sleep(1)
        mask = masks[task["data"]["id"]]
        browser.wait("return document.querySelector('img[alt=image]').getBoundingClientRect().width > 200")
        proposals = [p["result"] for p in task["predictions"] if p["result"]]
        if proposals and dice(join(proposals[0], "Lesion", *mask.shape), mask) >= 0.9:
            accepted += 1
        else:
            drawn += 1
            draw(browser, outline(mask), bool(proposals))
        browser.click("[data-testid=bottombar-submit-button]")
        wait_for(lambda number=number: studio.call("GET", f"/api/tasks/{number}/")["annotations"])
    return drawn, accepted


def dice(mask, other):
    """The Dice of two masks, bool (H, W)."""
    return segmentation_metrics(mask[None], other[None])["dice"][0]


def draw(browser, corners, proposed):
    """Remove the proposed mask, if there is one, and draw a polygon; anew if a click was lost."""
    for _ in range(3):
        if proposed:
            browser.click(".lsf-outliner-item")
            browser.press("\ue003")  # Backspace
            browser.wait(f"{REGIONS} == 0")
        x, y, width, height = browser.run(PLACE)
        browser.press("2")
        points = [(x + width * px / 100, y + height * py / 100) for px, py in corners]
        browser.mouse([*points, points[0]])
        browser.wait(f"{REGIONS} == 1")
        if browser.run("return Htx.annotationStore.selected.regions[0].closed"):
            return
        proposed = True
    raise TimeoutError("the polygon stays open")


def wait_for(found, seconds=60):
    """Wait until `found()` is true."""
    until = time.monotonic() + seconds
    while not found():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.2)


def main(isic, out, count=60):
    masks = true_masks(isic, count)
    (out / "photos").mkdir(parents=True)
    for id in masks:
        (found,) = isic.glob(f"*Training_Data/{id}.jpg")
        (out / "photos" / found.name).write_bytes(found.read_bytes())
    command = ["folder", "photos", "photos.h5", "--height", "96", "--width", "128"]
    subprocess.run([sys.executable, ROOT / "data.py", *command], cwd=out, check=True)
    (out / "studio").mkdir()
    studio, run = Studio((out / "studio").resolve()), out / "run"
    options = ["--data", out / "photos.h5", *SETTINGS.split(), "--oracle", "labelstudio", "--labelstudio", studio.url]
    browser = log_in(studio, out)
    try:
        while True:
            code, log = start(run, *options).wait(), Path(f"{run}.log").read_text()
            assert code == 0, log
            if "done: " in log:
                break
            (address,) = set(re.findall(rf"^({studio.url}/\S+): draw masks", log, re.MULTILINE))
            began = time.monotonic()
            drawn, accepted = annotate(browser, studio, address, masks)
            print(f"{drawn} drawn, {accepted} accepted as proposed, {time.monotonic() - began:.0f} s", flush=True)
            options = []
        browser.open(f"file://{(run / 'report.html').resolve()}")
        time.sleep(2)
        browser.screenshot(out / "report.png")
    except BaseException:
        browser.screenshot(out / "failed.png")
        raise
    finally:
        browser.close()
        studio.kill()
    print((run / "quality.csv").read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
