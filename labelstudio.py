"""Label Studio as the oracle: a person draws the masks in a browser.

The requests are those of the API of Label Studio 1.23. Nothing here knows how a network is trained.
"""

import functools
import itertools
import json
import math
import os
import re
import secrets
import time
from hashlib import blake2b

import numpy as np
import requests
from PIL import Image

from annotations import PersonOracle, Submitted
from brush import Unreadable, encode, join
from pictures import resize_map
from utils import UserError, in_one_line, print_warning, read_csv, segmentation_metrics, whole_file, write_csv

TOKEN = "LABEL_STUDIO_API_KEY"  # the environment variable
LABEL = "Lesion"
LABELLING = f"""\
<View>
  <Header value="$caption" size="5"/>
  <View style="display: flex; align-items: center; gap: 1em">
    <Header value="brush:" size="6"/>
    <BrushLabels name="brush" toName="image"><Label value="{LABEL}" background="#00c8ff"/></BrushLabels>
    <Header value="or polygon:" size="6"/>
    <PolygonLabels name="polygon" toName="image"><Label value="{LABEL}" background="#ffc800"/></PolygonLabels>
  </View>
  <TextArea name="reason" toName="image" rows="1" maxSubmissions="1"
            placeholder="cannot be used? Write why, press Enter, then Skip"/>
  <Image name="image" value="$image" zoom="true" zoomControl="true" brightnessControl="true" contrastControl="true"/>
</View>
"""
MODEL = "CEAL"  # the model_version of all predictions, so that scores of several iterations have one order
VIEW = "Most uncertain first"
PNG = b"\x89PNG"  # the first bytes of such a file


# ----------------------------------------------------------------------------------------------------------- the server


class Unreachable(UserError):
    """The server does not answer now; it may do so later."""


class NotThere(UserError):
    """The server does not have what was asked for."""


class Server:
    """The API of a Label Studio server. The token stays in this object: it is neither stored nor printed."""

    TIMEOUT = 10, 300  # seconds, to connect and for an answer

    def __init__(self, url):
        """url: as in --labelstudio. Raises UserError if the environment variable lacks a token."""
        self.url, self._access, self._session = url.rstrip("/"), None, requests.Session()
        self._token = os.environ.get(TOKEN, "").strip()
        if not re.fullmatch(r"[\x21-\x7e]+", self._token):
            raise UserError(
                f"--oracle labelstudio needs a token in the environment variable {TOKEN}: copy yours from {self.url}, "
                "Account & Settings, and set the variable"
            )
        self._personal = self._token.count(".") == 2  # a personal access token; a legacy token has no dots

    def call(self, method, path, **content):
        """Send a request, with content as of `requests.request`. Returns the JSON of the answer, or None if it is
        empty. Raises Unreachable, NotThere, or UserError for any other refusal."""
        answer = self._send(method, path, auth=self._sign, **content)
        if answer.status_code == 401 and self._personal:  # the access has expired
            self._access = None
            answer = self._send(method, path, auth=self._sign, **content)
        return self._read(answer, method, path)

    def pages(self, path, name, **query):
        """Yield the items of all pages of a list. name: of the list in an answer."""
        found = 0
        for page in itertools.count(1):
            try:
                answer = self.call("GET", path, params={**query, "page": page, "page_size": 100})
            except NotThere:
                if page == 1:
                    raise
                return  # a page past the end
            items = answer[name]
            yield from items
            found += len(items)
            total = answer.get("total", answer.get("count", found))  # a server may allow smaller pages only
            if not items or (len(items) < 100 and found >= total):
                return

    def _sign(self, request):
        """Add the token to a request."""
        if self._personal and self._access is None:
            path = "/api/token/refresh"
            answer = self._send("POST", path, auth=lambda request: request, json={"refresh": self._token})
            self._access = self._read(answer, "POST", path)["access"]
        request.headers["Authorization"] = f"Bearer {self._access}" if self._personal else f"Token {self._token}"
        return request

    def _send(self, method, path, **content):
        # Without redirects, which would turn POST into GET, and with `auth`, or ~/.netrc would replace the token.
        content = {"allow_redirects": False, "timeout": self.TIMEOUT, **content}
        try:
            return self._session.request(method, self.url + path, **content)
        except requests.RequestException as error:
            reason = "it does not answer in time" if isinstance(error, requests.Timeout) else "no connection"
            raise Unreachable(
                f"{self.url}: no Label Studio answers there ({reason}); start it, or correct --labelstudio"
            )

    def _read(self, answer, method, path):
        """The JSON of an answer. An error has a JSON body too, so the status decides."""
        status = answer.status_code
        try:
            body = answer.json() if answer.content else None
        except ValueError:
            body = None
        if 200 <= status < 300:
            if body is None and (answer.content or method == "GET"):
                raise UserError(f"{self.url}: something answers there, but not Label Studio; correct --labelstudio")
            return body
        detail = body.get("detail", body) if isinstance(body, dict) else answer.reason
        extra = body.get("validation_errors") if isinstance(body, dict) else None
        said = f"{method} {path.partition('?')[0]}: {status}, {in_one_line(extra or detail)}"
        said = functools.reduce(lambda text, secret: text.replace(secret, "..."), self._secrets(), said)
        if status in (401, 403):
            raise UserError(
                f"{self.url} refuses the token in {TOKEN} ({said}); copy yours again from Account & Settings (a legacy "
                "token works only if the server allows legacy tokens)"
            )
        if status == 404:
            raise NotThere(f"{self.url} lacks something of this run ({said}); is it the server of this run?")
        if status in (429, 502, 503, 504):
            raise Unreachable(f"{self.url} is not ready ({said}); repeat the command later")
        if status >= 500:
            raise Unreachable(f"{self.url} failed ({said}); look at its log; its disk may be full")
        if 300 <= status < 400:
            where = answer.headers.get("Location", "another address")
            raise UserError(f"{self.url} sends on to {where.partition('?')[0]}; give its own address to --labelstudio")
        raise UserError(f"{self.url} did not accept a request ({said}); is it version 1.23 or later?")

    def _secrets(self):
        return [secret for secret in (self._token, self._access) if secret]


# ----------------------------------------------------------------------------------------------------------- the oracle


class LabelStudioOracle(PersonOracle):
    """Asks a person for masks in a project of a Label Studio server.

    RUN/labelstudio.json holds the project's number, its key, which is in the project's description, and the number of
    each image's task. RUN/labelstudio/ holds every finished annotation as received, and RUN/agreement.csv the Dice of
    the annotators of one image.
    """

    def __init__(self, run, dataset, last, url, **switches):
        """As PersonOracle; url: of the server. Raises UserError also without a token."""
        super().__init__(run, dataset, last, **switches)
        self._file, self._raw = run / "labelstudio.json", run / "labelstudio"
        self._kept = {"key": f"ceal-{secrets.token_hex(8)}", "project": None, "view": None, "tasks": {}}
        if self._file.exists():
            try:
                self._kept.update(json.loads(self._file.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{self._file}: damaged ({error}); restore it from a copy")
        self._met, self._known, self._hashes, self._agreed = False, False, {}, None
        self.server = Server(url) if self._closed < last or os.environ.get(TOKEN) else None

    def collect(self):
        """As PersonOracle. When no iteration is left that could use an answer, a server that is gone is a warning."""
        try:
            return self._patiently(super().collect)
        except UserError as error:
            if self._closed < self.last:
                raise
            print_warning(error)
            return []

    def _patiently(self, work):
        """The result of `work()`. With --wait, a server that has answered before and is gone now is waited for."""
        warned = False
        while True:
            try:
                if self.server is None:
                    raise UserError(f"Label Studio is not asked for answers, because {TOKEN} is not set")
                result, self._met = work(), True
                return result
            except Unreachable as error:
                if not (self.wait and self._met):
                    raise
                if not warned:
                    print_warning(f"{error}; trying again every {self.POLL} seconds")
                warned = True
                time.sleep(self.POLL)

    def _address(self, iteration=None):
        """The page that shows the open tasks one after another, the most uncertain first."""
        return f"{self.server.url}/projects/{self._kept['project']}/data?tab={self._kept['view']}&labeling=1"

    def _place(self, iteration, id):
        task = self._kept["tasks"].get(str(self._positions[id]))
        return f"{self.server.url}/projects/{self._kept['project']}/data?task={task} ({id})"

    def _state(self):
        """The finished annotations and their times."""
        tasks = self._patiently(self._tasks)
        return {(a["id"], a["updated_at"]) for some in tasks.values() for task in some for a in task["annotations"]}

    def _keep(self, **changes):
        """Write changes to labelstudio.json."""
        changed = {**self._kept, **changes}
        if changed != self._kept or not self._file.exists():
            with whole_file(self._file) as partial:
                partial.write_text(json.dumps(changed, indent=1) + "\n")
            self._kept = changed

    # Handing out images. Whatever was done before a crash is found again on the server, and not done twice.

    def _hand_out(self, iteration, asked, propose):
        return self._patiently(lambda: self._upload(iteration, asked, propose))

    def _upload(self, iteration, asked, propose):
        """Make a task of each image that has none for this iteration. Returns whether there were any."""
        project = self._project()
        self._keep(view=self._view())
        tasks, scores = self._tasks(), self._scores(iteration)
        asked = [(id, group, int(at)) for id, group, at in asked if id not in self._answers]
        self._report_deleted(tasks, asked)
        new = [row for row in asked if not any(t["data"].get("iteration") == iteration for t in tasks.get(row[2], []))]
        new.sort(key=lambda row: -scores.get(row[0], 0))
        files = self._uploaded_files() if new else {}
        maps = propose([at for *_, at in new]) if propose else itertools.repeat(None)
        for (id, group, at), proposal in zip(new, maps):
            id = id.encode(errors="replace").decode()  # names of files may hold bytes that are not UTF-8
            data = {"id": id, "position": at, "iteration": iteration, "group": group, "caption": f"{id}, {group}"}
            if (score := scores.get(self.dataset.ids[at])) is not None:
                data |= {"uncertainty": score, "caption": f"{id}, {group}, uncertainty {score:.4g}"}
            self._make_task(data, tasks.get(at), proposal, files)
        if propose and (new or project["model_version"] != MODEL):  # else the scores of the predictions have no effect
            self.server.call("PATCH", f"/api/projects/{self._kept['project']}/", json={"model_version": MODEL})
        if new:
            tasks = self._tasks()
        if asked:
            print(f"{self._address()}: draw masks of {len(asked)} images in Label Studio", flush=True)
        self._keep(tasks={str(at): some[-1]["id"] for at, some in tasks.items()})
        return bool(new)

    def _project(self):
        """The run's project, a dict. It is made if the run has none. Raises UserError if it was deleted."""
        if self._kept["project"] is None:
            self._keep()  # the key first, so that a project is found again that was made but not written down
            fitting = (p for p in self.server.pages("/api/projects/", "results") if self._is_mine(p))
            project = next(fitting, None) or self.server.call(
                "POST",
                "/api/projects/",
                json={
                    "title": f"CEAL {self.run.resolve().name}"[:50],
                    "description": f"Made by train.py for one run. Keep this key: {self._kept['key']}",
                    "label_config": LABELLING,
                    "sampling": "Uncertainty sampling",
                    "skip_queue": "IGNORE_SKIPPED",  # a skipped task is a rejection and does not come again
                    "show_collab_predictions": True,
                },
            )
            self._keep(project=project["id"])
            self._known = True
            return project
        where = f"{self.server.url}/projects/{self._kept['project']}"
        try:
            project = self.server.call("GET", f"/api/projects/{self._kept['project']}/")
        except NotThere:
            raise UserError(
                f"{where}: the project of this run is not there, or was deleted; the accepted answers are safe in "
                f"{self.path}; to ask for the others in a new project, remove {self._file}"
            )
        if not self._is_mine(project):
            raise UserError(f"{where}: its description lacks {self._kept['key']}, so it is not the project of this run")
        self._known = True
        return project

    def _is_mine(self, project):
        return self._kept["key"] in (project.get("description") or "")

    def _view(self):
        """The number of the project's view that sorts the tasks by the scores of their predictions."""
        project = self._kept["project"]
        for view in self.server.call("GET", "/api/dm/views/", params={"project": project}):
            if view["data"].get("title") == VIEW:
                return view["id"]
        data = {"title": VIEW, "type": "list", "target": "tasks", "ordering": ["tasks:predictions_score"]}
        return self.server.call("POST", "/api/dm/views/", json={"project": project, "data": data})["id"]

    def _tasks(self):
        """The tasks on the server with their annotations and predictions: a dict of position to a list of dict."""
        query, tasks = {"project": self._kept["project"], "fields": "all"}, {}
        if query["project"] is None:
            return tasks
        if not self._known:  # another server may have another project of this number
            self._project()
        try:
            for task in self.server.pages("/api/tasks", "tasks", **query):
                if isinstance(at := task["data"].get("position"), int) and 0 <= at < len(self.dataset):
                    tasks.setdefault(at, []).append(task)
        except NotThere:
            self._project()  # says so if it was deleted
            raise
        return tasks

    def _report_deleted(self, tasks, asked):
        """Print which of these images had a task that was deleted."""
        for id, _, at in asked:
            number = self._kept["tasks"].get(str(at))
            if number is not None and at not in tasks:
                print_warning(f"task {number} of {id} was deleted in Label Studio; it is made again")

    def _scores(self, iteration):
        """The score of each image in this iteration's selection: a dict of id to float, empty if nothing was scored."""
        path = self.run / f".queries_{iteration:02d}" / "scores.csv"
        return {row["id"]: float(row["uncertainty"]) for row in read_csv(path)} if path.exists() else {}

    def _uploaded_files(self):
        """The address of each uploaded file by its name without the server's prefix."""
        files = self.server.call("GET", f"/api/projects/{self._kept['project']}/file-uploads", params={"all": "true"})
        return {file["file"].rpartition("/")[2].partition("-")[2]: f"/data/{file['file']}" for file in files}

    def _make_task(self, data, earlier, proposal, files):
        """Make a task with its prediction in one request. If the image had been asked for in an earlier iteration, its
        task gets the new data and the new prediction instead."""
        project, at = self._kept["project"], data["position"]
        picture, content, _ = self._upright(at, kept=("PNG", "JPEG", "MPO"))
        predictions = [] if proposal is None else [self._prediction(picture.size, proposal[0], data)]
        if earlier:
            task = earlier[-1]
            for old in task["predictions"]:
                self.server.call("DELETE", f"/api/predictions/{old['id']}/")
            for prediction in predictions:
                self.server.call("POST", "/api/predictions/", json={**prediction, "task": task["id"]})
            data = {**data, "image": task["data"]["image"]}
            self.server.call("PATCH", f"/api/tasks/{task['id']}/", json={"data": data})
            return
        name = f"{at:07d}.{'png' if content.startswith(PNG) else 'jpg'}"
        if name not in files:
            path = f"/api/projects/{project}/import?commit_to_project=false"
            self.server.call("POST", path, files={"file": (name, content)})
            files.update(self._uploaded_files())
        if name not in files:
            raise UserError(f"{self.server.url} took {name} and does not list it; is it version 1.23 or later?")
        task = {"data": {**data, "image": files[name]}, "predictions": predictions}
        self.server.call("POST", f"/api/projects/{project}/import", json=[task])

    def _prediction(self, size, probabilities, data):
        """A prediction with the network's mask; size: (width, height). The stream goes by rising score."""
        lesion = resize_map(probabilities, size[::-1]) > 0.5
        region = {"id": "proposal", "type": "brushlabels", "from_name": "brush", "to_name": "image"}
        region |= {"original_width": size[0], "original_height": size[1], "image_rotation": 0}
        region["value"] = {"format": "rle", "rle": encode(lesion), "brushlabels": [LABEL]}
        score = -data.get("uncertainty", 0.0)
        score = score if math.isfinite(score) else 0.0
        return {"model_version": MODEL, "score": score, "result": [region] if lesion.any() else []}

    # Reading the answers.

    def _submitted(self, wrong):
        agreement = []
        for at, tasks in self._tasks().items():
            id = self.dataset.ids[at]
            finished = [(annotation, task["id"]) for task in tasks for annotation in task["annotations"]]
            finished.sort(key=lambda pair: (pair[0]["updated_at"], pair[0]["id"]))
            for annotation, _ in finished:
                self._keep_raw(id, annotation)
            agreement += self._agreement(id, [annotation for annotation, _ in finished])
            if finished:
                annotation, task = finished[-1]
                place = f"{self.server.url}/projects/{self._kept['project']}/data?task={task} ({id})"
                try:
                    yield self._identify(id, at, annotation, place)
                except Unreadable as error:
                    wrong.append(f"{place}: {error}")
        self._write_agreement(agreement)

    def _identify(self, id, at, annotation, place):
        """The Submitted of a finished annotation, a dict. Raises Unreadable if it is not a mask."""
        if annotation["was_cancelled"]:
            return Submitted(self._answer(id, "", reason(annotation["result"] or [])), place, "", None)
        version = annotation["id"], annotation["updated_at"]
        if version not in self._hashes:
            self._hashes[version] = blake2b(np.packbits(self._mask(at, annotation)), digest_size=16).hexdigest()
        read = functools.partial(self._read_mask, place, at, annotation)
        return Submitted(self._answer(id, self._hashes[version], ""), place, id, read)

    def _mask(self, at, annotation):
        """The mask of an annotation, bool (h, w), at the size of its image."""
        return join(annotation["result"] or [], LABEL, *map(int, self.dataset.original_sizes[at]))

    def _read_mask(self, place, at, annotation):
        mask = self._mask(at, annotation).astype(np.uint8)
        self._require_fitting(place, Image.fromarray(255 * mask), at, "draw it again")
        return mask

    def _keep_raw(self, id, annotation):
        """Write an annotation as received to RUN/labelstudio/; each change of it is another file."""
        version = re.sub(r"\D", "", annotation["updated_at"])
        path = self._raw / f"annotation_{annotation['id']}_{version}.json"
        if not path.exists():
            with whole_file(path) as partial:
                partial.write_text(json.dumps({"id": id, "annotation": annotation}))

    def _agreement(self, id, finished):
        """Yield (id, annotator, other annotator, Dice) of each pair of annotators of an image who drew a mask."""
        latest = {annotator(annotation): annotation for annotation in finished}
        drawn = {name: annotation for name, annotation in latest.items() if not annotation["was_cancelled"]}
        for one, other in itertools.combinations(sorted(drawn, key=str), 2):
            try:
                masks = [self._mask(self._positions[id], drawn[name])[None] for name in (one, other)]
            except Unreadable:
                continue
            yield id, one, other, float(segmentation_metrics(*masks)["dice"][0])

    def _write_agreement(self, rows):
        """Write agreement.csv and print its mean, if there are images with several annotators and something is new."""
        rows = [(id, one, other, f"{dice:.6f}") for id, one, other, dice in rows]
        if not rows or rows == self._agreed:
            return
        self._agreed, path = rows, self.run / "agreement.csv"
        write_csv(path, ["id", "annotator", "other", "dice"], rows)
        mean = np.mean([float(dice) for *_, dice in rows])
        print(f"{path}: Dice {mean:.3f} between two annotators, mean of {len(rows)} pairs of masks", flush=True)


def annotator(annotation):
    """The number of the person who made an annotation, or None if the account was removed."""
    by = annotation["completed_by"]
    return by["id"] if isinstance(by, dict) else by


def reason(result):
    """The text that a person has written beside a skipped image."""
    texts = [region["value"]["text"] for region in result if region.get("type") == "textarea"]
    texts = itertools.chain.from_iterable([text] if isinstance(text, str) else text for text in texts)
    return "; ".join(filter(None, (text.strip() for text in texts))) or "no reason given"
