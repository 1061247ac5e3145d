"""A server that answers as Label Studio 1.23 does, as far as labelstudio.py asks it, with the traps of the real one."""

import email
import itertools
import json
import re
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

LEGACY = "0123456789abcdef0123456789abcdef01234567"
PERSONAL = "eyJhbGciOi.eyJ0b2tlbl90eXBl.UI9PjhApR"


class Refused(Exception):
    """An answer with an error's status."""


class FakeLabelStudio:
    """The state of a server that listens on 127.0.0.1. The attributes may be changed by a test at any time."""

    def __init__(self):
        self.projects, self.views, self.tasks, self.files, self.stored = {}, {}, {}, {}, {}
        self.numbers, self.log = itertools.count(1), []  # log: (method, path) of each request that was let in
        self.token, self.access, self.seconds = LEGACY, {}, 300
        self.largest_page = 1000  # items
        self.fail = None  # the status of every answer
        self.lose = 0  # the write of this number is done without an answer
        self.start()

    def start(self, port=0):
        handler = type("Handler", (Handler,), {"state": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def restart(self):
        self.start(self.server.server_port)

    # What a person does in the browser.

    def task(self, id):
        """The task of an image, a dict. Fails if there are several."""
        (task,) = (task for task in self.tasks.values() if task["data"].get("id") == id)
        return task

    def annotate(self, id, result, by=1, skipped=False):
        """Submit a new annotation, or skip. Returns the annotation, a dict."""
        made = {"id": next(self.numbers), "result": result, "was_cancelled": skipped, "completed_by": by}
        made |= {"created_ago": "0 minutes", "updated_at": self.now()}
        self.task(id)["annotations"].append(made)
        return made

    def now(self):
        return f"2026-11-26T10:00:00.{next(self.numbers):06d}Z"

    # The API.

    def handle(self, method, path, query, headers, content):
        """Returns (status, JSON)."""
        if path == "/api/token/refresh":
            if content.get("refresh") != self.token:
                raise Refused(401, "Token is invalid")
            access = uuid.uuid4().hex
            self.access[access] = time.monotonic() + self.seconds
            return 200, {"access": access}
        self.require_token(headers.get("Authorization", ""))
        self.log.append((method, path))
        for pattern, function in ROUTES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return function(self, query, content, *map(int, match.groups()))
        raise Refused(404, "no such address")

    def require_token(self, given):
        kind, _, token = given.partition(" ")
        right = kind == "Token" and token == self.token == LEGACY
        right |= kind == "Bearer" and self.access.get(token, 0) > time.monotonic()
        if not right:
            raise Refused(401, f"Invalid token {token}.")

    def page(self, items, query):
        size, page = min(int(query.get("page_size", 30)), self.largest_page), int(query.get("page", 1))
        some = items[(page - 1) * size : page * size]
        if page > 1 and not some:
            raise Refused(404, "Invalid page.")
        return some

    def existing(self, kind, number):
        if number not in kind:
            raise Refused(404, "No object matches the given query.")
        return kind[number]

    def list_projects(self, query, _):
        return 200, {"count": len(self.projects), "results": self.page(list(self.projects.values()), query)}

    def make_project(self, _, content):
        number = next(self.numbers)
        self.projects[number] = {"model_version": "", **content, "id": number}
        return 201, self.projects[number]

    def get_project(self, _, content, number):
        return 200, self.existing(self.projects, number)

    def change_project(self, _, content, number):
        self.existing(self.projects, number).update(content)
        return 200, self.projects[number]

    def list_views(self, query, _):
        if int(query["project"]) not in self.projects:
            raise Refused(400, "Validation error")
        return 200, [view for view in self.views.values() if view["project"] == int(query["project"])]

    def make_view(self, _, content):
        number = next(self.numbers)
        self.views[number] = {**content, "id": number}
        return 201, self.views[number]

    def list_files(self, query, _, project):
        assert query == {"all": "true"}
        return 200, [{"file": file} for file in self.files.get(project, [])]

    def upload(self, query, content, project):
        self.existing(self.projects, project)
        if isinstance(content, list):  # tasks
            return self.make_tasks(project, content)
        assert query == {"commit_to_project": "false"}
        for name, data in content.items():
            if not name.endswith((".png", ".jpg")):
                raise Refused(400, "Validation error")
            file = f"upload/{project}/{uuid.uuid4().hex[:8]}-{name}"
            self.files.setdefault(project, []).append(file)
            self.stored[f"/data/{file}"] = data
        return 201, {"file_upload_ids": [1]}

    def make_tasks(self, project, content):
        for task in content:
            number = next(self.numbers)
            predictions = [{**made, "id": next(self.numbers)} for made in task["predictions"]]  # not validated
            self.tasks[number] = {"id": number, "project": project, "data": task["data"], "annotations": []}
            self.tasks[number] |= {"predictions": predictions, "drafts": []}
        return 201, {"task_count": len(content)}

    def list_tasks(self, query, _):
        project = int(query["project"])
        self.existing(self.projects, project)
        tasks = [task for task in self.tasks.values() if task["project"] == project]
        return 200, {"total": len(tasks), "tasks": self.page(tasks, query)}

    def change_task(self, _, content, number):
        self.existing(self.tasks, number).update(content)
        return 200, self.tasks[number]

    def make_prediction(self, _, content):
        self.existing(self.tasks, content["task"])["predictions"].append({**content, "id": next(self.numbers)})
        return 201, {}

    def remove_prediction(self, _, content, number):
        for task in self.tasks.values():
            task["predictions"] = [made for made in task["predictions"] if made["id"] != number]
        return 204, None

    def stream(self, project):
        """The ids of the images without an answer in the order in which the browser shows them."""
        version = self.projects[project]["model_version"]

        def score(task):
            return next((p["score"] for p in task["predictions"] if version and p["model_version"] == version), 0)

        return [task["data"]["id"] for task in sorted(self.tasks.values(), key=score) if not task["annotations"]]


ROUTES = [
    (r"GET /api/projects/", FakeLabelStudio.list_projects),
    (r"POST /api/projects/", FakeLabelStudio.make_project),
    (r"GET /api/projects/(\d+)/", FakeLabelStudio.get_project),
    (r"PATCH /api/projects/(\d+)/", FakeLabelStudio.change_project),
    (r"GET /api/dm/views/", FakeLabelStudio.list_views),
    (r"POST /api/dm/views/", FakeLabelStudio.make_view),
    (r"GET /api/projects/(\d+)/file-uploads", FakeLabelStudio.list_files),
    (r"POST /api/projects/(\d+)/import", FakeLabelStudio.upload),
    (r"GET /api/tasks", FakeLabelStudio.list_tasks),
    (r"PATCH /api/tasks/(\d+)/", FakeLabelStudio.change_task),
    (r"POST /api/predictions/", FakeLabelStudio.make_prediction),
    (r"DELETE /api/predictions/(\d+)/", FakeLabelStudio.remove_prediction),
]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    lock = threading.Lock()

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content, kind = {}, self.headers.get("Content-Type", "")
        if kind.startswith("multipart"):
            message = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
            content = {part.get_filename(): part.get_payload(decode=True) for part in message.get_payload()}
        elif body:
            content = json.loads(body)
        address = urlsplit(self.path)
        with self.lock:
            self.answer(*self.result(address.path, dict(parse_qsl(address.query)), content))

    def result(self, path, query, content):
        state = self.state
        if state.fail:
            return state.fail, self.error(state.fail, "failed")
        try:
            status, body = state.handle(self.command, path, query, self.headers, content)
        except Refused as refused:
            return refused.args[0], self.error(*refused.args)
        if self.command != "GET" and "token" not in path and state.lose:
            state.lose -= 1
            if not state.lose:
                return None, None
        return status, body

    def error(self, status, detail):
        return {"id": str(uuid.uuid4()), "status_code": status, "detail": detail}

    def answer(self, status, body):
        if status is None:  # done, and not acknowledged
            self.close_connection = True
            self.connection.close()
            return
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PATCH = do_DELETE = do_GET

    def log_message(self, *_):
        """Print nothing."""
