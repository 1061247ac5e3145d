"""Work on the machines of a Ray cluster: scoring a pool. All that knows Ray is here; docs/scale.md has the commands.

A worker is a Ray actor with one GPU or some cores. It reads images from the data file if it finds it at the same path,
else it is sent them. An image's score depends on (seed, position, pass) alone, so workers may die, and pieces may be
done in any order or twice: the results are the same, and come in order, once.
"""

import contextlib
import dataclasses
import hashlib
import heapq
import importlib.metadata
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np

from utils import UserError, cores, in_one_line, print_warning, progress_bar

INSTALL = "pip install -r requirements-cluster.txt"
FOLDER = Path(__file__).parent.resolve()
START = 300  # seconds without any worker after which a command ends
SILENCE = 60  # seconds after which a worker that does not answer is replaced
SLOW = 600, 20  # a piece is given to another worker after these seconds and this many times the longest piece so far
TRIES = 5  # failures of a piece after which a command ends
AHEAD = 2  # pieces that a worker has at a time


# --------------------------------------------------------------------------------------------------------- the workers


def code_version(folder):
    """A hash of the program's files in this folder and of the packages that compute scores, a str."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    for package in "keras", "numpy", "scipy":
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()


class SentImages:
    """Stands in for a data.Dataset where its file is not: holds the images that were sent. shape: (H, W, C)."""

    def __init__(self, shape, has_mask):
        (self.height, self.width, self.channels), self.has_mask, self.held = shape, has_mask, {}

    def images(self, positions):
        return np.stack([self.held[position][0] for position in positions.tolist()])

    def masks(self, positions):
        return np.stack([self.held[position][1] for position in positions.tolist()])


class ScoringWorker:
    """Scores pieces of a pool with its own Trainer. Its code travels to the other machine as a whole, so that it can
    compare the program there with the driver's before it imports it."""

    def __init__(self, folder, version):
        self.folder, self.version, self.trainer = folder, version, None

    def ping(self):
        """Answers as long as the process and its machine live."""

    def problem(self):
        """A sentence that says why this machine cannot take part, or None."""
        if not Path(self.folder, "trainer.py").exists():
            return f"there is no {self.folder}/trainer.py: put the program there, or on a shared disk"
        if code_version(self.folder) != self.version:
            return f"{self.folder} or its packages have another version than where the command was given: update them"
        return None

    def begin(self, task):
        """Take the weights of an iteration. Returns this machine's name, its problem or None, and whether it reads the
        data file itself."""
        if problem := self.problem():
            return socket.gethostname(), problem, False
        if self.trainer is None:
            self.trainer = self.make_trainer(task)
        self.trainer.model.set_weights(task["weights"])
        self.iteration = task["iteration"]
        return socket.gethostname(), None, not isinstance(self.trainer.dataset, SentImages)

    def make_trainer(self, task):
        """The same Trainer as the driver's, on one device."""
        sys.path.insert(0, self.folder)
        from data import Dataset
        from trainer import Trainer, prepare
        from utils import UserError

        config = dataclasses.replace(task["config"], devices="one")
        prepare(config)
        dataset = SentImages(task["shape"], task["has_mask"])
        with contextlib.suppress(OSError, UserError):
            found = Dataset(task["data"])
            dataset = found if found.stamp() == task["stamp"] else dataset
        return Trainer(config, dataset, *task["normalisation"], task["memory"])

    def do(self, positions, *sent):
        """Score the images at these positions: what Trainer.rate yields, a list. sent: images and masks."""
        dataset = self.trainer.dataset
        if sent:
            dataset.held.update(zip(positions.tolist(), zip(*sent)))
        try:
            return list(self.trainer.rate([positions], self.iteration))
        finally:
            for position in positions.tolist() if sent else ():
                dataset.held.pop(position, None)


class Hired:
    """A worker as the driver sees it."""

    def __init__(self, actor):
        self.actor, self.host, self.ready, self.reads = actor, "a machine", False, False
        self.begun = None  # the reference of `begin`, while it runs
        self.pieces = {}  # a reference to the (number of the piece, time)
        self.ping, self.answered = None, time.monotonic()


# ---------------------------------------------------------------------------------------------------------- the driver


@contextlib.contextmanager
def connected(address, worker_cores=1):
    """Yield a Cluster, or None if `address` is None. address: `auto` or that of a Ray cluster, or `local` to start one
    on this machine. Raises UserError if Ray or the cluster is missing."""
    if address is None:
        yield None
        return
    ray = start_ray(address)
    try:
        yield Cluster(ray, worker_cores)
    finally:
        ray.shutdown()


def start_ray(address):
    """Import Ray and connect to the cluster. Returns the module."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray's makers get a report
    options = {}
    if address == "local":
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all of Ray then listens at 127.0.0.1 alone
        os.environ.setdefault("RAY_worker_niceness", "0")  # else workers are slower than other programs, by nice 15
        options = {"num_cpus": cores(), "object_store_memory": 2**28}
    try:
        import ray
    except ImportError:
        raise UserError(f"--cluster {address} needs Ray: {INSTALL}")
    try:
        require_listener(address)
        found = ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # Ray raises many kinds
        raise UserError(
            f"--cluster {address}: no Ray cluster there ({in_one_line(error)}); start one (ray start --head), or give "
            "--cluster local"
        )
    # Or Ray prints pages of its own log when a machine is lost.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    dashboard = f", dashboard at http://{found.dashboard_url}" if found.dashboard_url else ""
    print(f"cluster   Ray {ray.__version__}, machines: {len(ray.nodes())}{dashboard}", flush=True)
    return ray


def require_listener(address):
    """Raise OSError if nothing listens at the address of a cluster, because Ray itself would try for minutes."""
    if address == "auto":
        noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # `ray start` writes it
        address = os.environ.get("RAY_ADDRESS") or (noted.read_text().strip() if noted.exists() else "")
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()


class Cluster:
    """The workers of one start of a command. They are hired when there is work, and replaced when they die."""

    def __init__(self, ray, worker_cores):
        self.ray, self.worker_cores, self.version = ray, worker_cores, code_version(FOLDER)
        self.hired, self.task, self.longest = [], None, 0.0
        self.last_sign, self.hire_from, self.last_reason = time.monotonic(), 0.0, "none has begun"

    def rate(self, trainer, chunks, iteration):
        """Yield what trainer.rate(chunks, iteration) yields, computed by the workers."""
        dataset, described = trainer.dataset, f"iteration {iteration}: scoring the pool"
        task = {
            "config": trainer.config,
            "data": str(dataset.path.resolve()),
            "stamp": dataset.stamp(),
            "shape": (dataset.height, dataset.width, dataset.channels),
            "has_mask": dataset.has_mask,
            "normalisation": (trainer.mean, trainer.std),
            "memory": trainer.memory or None,
            "weights": trainer.model.get_weights(),
            "iteration": iteration,
        }

        def piece_for(worker, positions):
            return (positions,) if worker.reads else (positions, dataset.images(positions), dataset.masks(positions))

        for rated in self.in_order(task, chunks, piece_for, described):
            yield from rated

    def in_order(self, task, pieces, piece_for, described):
        """Yield the result of each piece in order. piece_for(worker, piece): the arguments of the worker's `do`;
        described: what the progress bar says. Raises UserError if a piece cannot be done, or nobody is there."""
        if not pieces:
            return
        self.task, self.last_sign = self.ray.put(task), time.monotonic()
        for worker in self.hired:
            worker.ready, worker.pieces, worker.begun = False, {}, worker.actor.begin.remote(self.task)
        waiting, results, failures, head, started = list(range(len(pieces))), {}, {}, 0, time.monotonic()
        with progress_bar() as progress:
            bar = progress.add_task(described, total=sum(map(len, pieces)))
            while head < len(pieces):
                self.hire()
                self.give_out(waiting, pieces, piece_for, head)
                for number, result, reason in self.collect():
                    if reason is None:
                        results.setdefault(number, result)
                        continue
                    heapq.heappush(waiting, number)
                    failures[number] = failures.get(number, 0) + 1
                    if failures[number] == TRIES:
                        raise UserError(f"--cluster: a piece of the work failed {TRIES} times, at last so: {reason}")
                while head in results:
                    yield results.pop(head)
                    progress.advance(bar, len(pieces[head]))
                    head += 1
                speed = progress.tasks[0].completed / (time.monotonic() - started)
                at_work = sum(worker.ready for worker in self.hired)
                progress.update(bar, description=f"{described}, workers: {at_work}, {speed:.1f} images a second")
        count, seconds = sum(map(len, pieces)), time.monotonic() - started
        print(f"{described}: workers: {at_work}, {count / seconds:.1f} images a second", flush=True)

    def places(self):
        """The number of workers that the cluster has room for, and the resources of one, options of Ray."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if gpus := int(sum(node.get("GPU", 0) for node in nodes)):
            return gpus, {"num_gpus": 1, "num_cpus": 1}
        return int(sum(node.get("CPU", 0) // self.worker_cores for node in nodes)), {"num_cpus": self.worker_cores}

    def hire(self):
        """Start a worker in each free place, also of machines that came later."""
        count, resources = self.places() if time.monotonic() > self.hire_from else (0, {})
        variables = {name: value for name, value in os.environ.items() if name.startswith(("TF_", "XLA_"))}
        if "num_gpus" not in resources:
            threads = str(self.worker_cores)
            variables |= {"TF_NUM_INTRAOP_THREADS": threads, "TF_NUM_INTEROP_THREADS": threads}
            variables["CUDA_VISIBLE_DEVICES"] = "-1"
        # On a GPU two pieces at a time, so that one is read and rated while the other is in the network.
        options = {"max_concurrency": 1 + ("num_gpus" in resources), "concurrency_groups": {"signs": 1}}
        options["runtime_env"] = {"env_vars": variables}
        for _ in range(count - len(self.hired)):
            actor = self.ray.remote(**resources, **options)(ScoringWorker).remote(str(FOLDER), self.version)
            worker = Hired(actor)
            worker.begun = worker.actor.begin.remote(self.task)
            self.hired.append(worker)

    def give_out(self, waiting, pieces, piece_for, head):
        """Give pieces to the workers that have fewer than AHEAD, the first ones first. waiting: a heap of numbers."""
        for worker in self.hired:
            while worker.ready and len(worker.pieces) < AHEAD and waiting and waiting[0] < head + 8 * len(self.hired):
                number = heapq.heappop(waiting)
                reference = worker.actor.do.remote(*piece_for(worker, pieces[number]))
                worker.pieces[reference] = number, time.monotonic()

    def collect(self):
        """Wait for a sign of the workers, at most a second. Returns a list of (number of a piece, result, None), or
        (number, None, reason) if it has to be done again."""
        references = {worker.begun: worker for worker in self.hired if worker.begun}
        references |= {reference: worker for worker in self.hired for reference in worker.pieces}
        found = []
        for reference in self.ray.wait(list(references), timeout=1)[0] if references else self.nobody():
            worker = references[reference]
            try:
                value = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                found += self.dismiss(worker, reason_of(error))
                continue
            self.last_sign = time.monotonic()
            if reference is worker.begun:
                self.welcome(worker, *value)
            else:
                number, since = worker.pieces.pop(reference)
                self.longest = max(self.longest, time.monotonic() - since)
                found.append((number, value, None))
        return found + self.look_after()

    def nobody(self):
        """Wait a second for the first machine."""
        time.sleep(1)
        return []

    def welcome(self, worker, host, problem, reads):
        """Note what a worker's `begin` returned. A refused one keeps its place, so that no other is started there."""
        worker.begun, worker.host, worker.reads, worker.answered = None, host, reads, time.monotonic()
        worker.ready = problem is None
        if problem:
            print_warning(f"{host} is not used: {problem}")
            refused = [one for one in self.hired if not one.ready and not one.begun]
            if len(refused) == len(self.hired):
                raise UserError(f"--cluster: no machine can be used; {host}: {problem}")
        elif not reads:
            print_warning(f"{host} is sent the images, because it does not have this data file at the same path")

    def look_after(self):
        """Ask the workers for a sign, and dismiss those that give none, or that have had a piece for too long. Returns
        their pieces as `collect` does. Raises UserError if there has been no worker for START seconds."""
        now, found = time.monotonic(), []
        limit = SLOW[0] + SLOW[1] * self.longest
        for worker in [worker for worker in self.hired if worker.ready]:
            if worker.ping and self.ray.wait([worker.ping], timeout=0)[0]:
                worker.ping, worker.answered = None, now
            elif worker.ping is None and now - worker.answered > SILENCE / 6:
                worker.ping = worker.actor.ping.options(concurrency_group="signs").remote()
            if now - worker.answered > SILENCE:
                found += self.dismiss(worker, f"it gave no sign for {SILENCE} seconds")
            elif self.longest and any(now - since > limit for _, since in worker.pieces.values()):
                found += self.dismiss(worker, f"it took more than {limit:.0f} seconds for a piece")
        if not any(worker.ready for worker in self.hired) and now - self.last_sign > START:
            raise UserError(
                f"--cluster: there was no worker for {START} seconds ({self.last_reason}); look at `ray status`, and "
                "give the same command again to go on"
            )
        return found

    def dismiss(self, worker, reason):
        """Forget a worker. Returns its pieces as `collect` does."""
        if worker not in self.hired:  # by an earlier one of its errors
            return []
        self.hired.remove(worker)
        self.last_reason = reason
        if not worker.ready:  # or workers that cannot start would be started without end
            self.hire_from = time.monotonic() + 10
        with contextlib.suppress(Exception):
            self.ray.kill(worker.actor)
        print_warning(f"{worker.host}: a worker is replaced: {reason}")
        return [(number, None, f"{worker.host}: {reason}") for number, _ in worker.pieces.values()]


def reason_of(error):
    """Why a call of a worker failed, for people. error: one of Ray's."""
    cause = getattr(error, "cause", None)
    return in_one_line(cause) if cause is not None else f"its process or its machine ended ({type(error).__name__})"
