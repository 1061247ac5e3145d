"""Work on the machines of a Ray cluster: a pool, a folder of images, runs. All that knows Ray is here.

    python train.py --cluster local ...     # docs/scale.md has all commands

A worker is a Ray actor with one GPU or some cores. It imports this program from its own machine and does pieces of a
Job. A piece gives the same result wherever and however often it is done, so workers may die.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import os
import pickle
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils import UserError, cores, in_one_line, print_warning, progress_bar

INSTALL = "pip install -r requirements-cluster.txt"
FOLDER = Path(__file__).parent.resolve()
START = 300  # seconds without any worker after which a command ends
SILENCE = 60  # seconds after which a worker that does not answer is replaced
SLOW = 600, 20  # a piece is given to another worker after these seconds and this many times the longest piece so far
FIRST = 3600  # the same for the first pieces
TRIES = 5  # failures of a piece after which a command ends
LOSSES = 50  # workers that may die in a piece that takes hours
BLAME = 3  # pieces that failed on a machine and not on another, after which the machine is not used
AHEAD = 2  # pieces that a worker has at a time


@dataclasses.dataclass
class Job:
    """What the workers do, in pieces. A piece has a length, the number of images or runs in it."""

    work: tuple  # module and class of this program: made of `task`; `begin(task)` and `do(*arguments)` of each piece
    task: dict
    described: str  # by the progress bar
    arguments: Callable = lambda worker, piece: (piece,)  # of `do`, for a Hired and a piece
    shared: dict = dataclasses.field(default_factory=dict)  # `stamps` of the paths that each machine must see
    long: bool = False  # a piece is a run of hours: one at a time, and its failure does not end the command


def stamps(*paths):
    """A dict of path to [size, time of change], by which another machine knows whether it sees the same file. They are
    [] for a folder. None in place of them stands for any file."""
    found = {str(path): path.stat() for path in map(Path, paths)}
    return {path: [] if Path(path).is_dir() else [stat.st_size, stat.st_mtime_ns] for path, stat in found.items()}


# --------------------------------------------------------------------------------------------------------- the workers


def code_version(folder):
    """A hash of the program's files in this folder and of the packages that compute scores, a str."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    for package in "keras", "numpy", "scipy":
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()


class Worker:
    """Does pieces of a Job. Its code travels to the other machine as a whole, so that it can compare the program there
    with the driver's before it imports it."""

    def __init__(self, folder, version):
        self.folder, self.version, self.work = folder, version, None

    def ping(self):
        """Answers as long as the process and its machine live."""

    def problem(self, shared):
        """A sentence that says why this machine cannot take part, or None."""
        if not Path(self.folder, "trainer.py").exists():
            return f"there is no {self.folder}/trainer.py: put the program there, or on a shared disk"
        if code_version(self.folder) != self.version:
            return f"{self.folder} or its packages have another version than where the command was given: update them"
        for path, stamp in shared.items():
            try:
                same = stamps(path)[path] == stamp or stamp is None
            except OSError:
                return f"it does not see {path}: put it on a shared disk, at the same path on each machine"
            if not same:
                return f"its {path} is another file than where the command was given: put it on a shared disk"
        return None

    def begin(self, where, packed):
        """Prepare for a Job. where: the driver's folder and Job.shared; packed: Job.work and Job.task. Returns the
        machine's name, its node in Ray, its problem or None, and whether it reads the data file itself."""
        import ray

        machine = socket.gethostname(), ray.get_runtime_context().get_node_id()
        with contextlib.suppress(OSError):  # it is not needed if all paths are absolute
            os.chdir(where[0])
        if problem := self.problem(where[1]):
            return *machine, problem, False
        if self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        (module, name), task = pickle.loads(packed)
        if self.work is None:
            self.work = getattr(importlib.import_module(module), name)(task)
        return *machine, None, self.work.begin(task)

    def do(self, *arguments):
        """Do a piece."""
        return self.work.do(*arguments)


class SentImages:
    """Stands in for a data.Dataset where its file is not: holds the images that were sent. shape: (H, W, C)."""

    def __init__(self, shape, has_mask):
        (self.height, self.width, self.channels), self.has_mask, self.held = shape, has_mask, {}

    def images(self, positions):
        return np.stack([self.held[position][0] for position in positions.tolist()])

    def masks(self, positions):
        return np.stack([self.held[position][1] for position in positions.tolist()])


class PoolScoring:
    """Scores pieces of a pool with its own Trainer. Images come from the data file if it is found at the same path,
    else they are sent."""

    def __init__(self, task):
        """Make the same Trainer as the driver's, on one device."""
        from data import Dataset
        from trainer import Trainer, prepare

        config = dataclasses.replace(task["config"], devices="one")
        prepare(config)
        dataset = SentImages(task["shape"], task["has_mask"])
        with contextlib.suppress(OSError, UserError):
            found = Dataset(task["data"])
            dataset = found if found.stamp() == task["stamp"] else dataset
        self.trainer = Trainer(config, dataset, *task["normalisation"], task["memory"])

    def begin(self, task):
        """Take the weights of an iteration. Returns whether this machine reads the data file itself."""
        self.trainer.model.set_weights(task["weights"])
        self.iteration = task["iteration"]
        return not isinstance(self.trainer.dataset, SentImages)

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


# ---------------------------------------------------------------------------------------------------------- the driver


class Hired:
    """A worker as the driver sees it."""

    def __init__(self, actor):
        self.actor, self.host, self.node, self.ready, self.reads = actor, "a machine", None, False, False
        self.begun = None  # the reference of `begin`, while it runs
        self.pieces = {}  # a reference to the (number of the piece, time)
        self.ping, self.answered = None, time.monotonic()


class Pieces:
    """The pieces of a Job: which are done, which failed, and which comes next."""

    def __init__(self, pieces, long):
        self.pieces, self.long = pieces, long
        self.fresh, self.again = 0, []  # the first piece that nobody has had; numbers of those to be done again
        self.done, self.head = set(), 0  # numbers of pieces done or given up; the first one that is not
        self.failures = {}  # a number to its (node, whether the worker was lost)
        self.blame = Counter()  # of each node, since its last success: pieces that failed there alone

    def next(self, node, others, window):
        """Take a number for a worker of this node, or None: at most `window` after the head, and not one that failed
        on this node and could be done on one of `others`."""
        for number in self.again:
            failed = {place for place, _ in self.failures.get(number, ())}
            if node not in failed or not others - failed:
                self.again.remove(number)
                return number
        if self.fresh == len(self.pieces) or self.fresh >= self.head + window:
            return None
        self.fresh += 1
        return self.fresh - 1

    def give_back(self, number):
        """The piece has to be done again."""
        bisect.insort(self.again, number)

    def finish(self, number, node):
        """Note that the piece was done on this node. Returns whether it is the first time."""
        if number in self.done:
            return False
        self.settle(number)
        self.blame[node] = 0
        self.blame.update({place for place, lost in self.failures.get(number, ()) if not lost} - {node})
        return True

    def fail(self, number, node, lost):
        """Note that the piece failed on this node, or that its worker was lost. It has to be done again, or is given
        up. Returns whether it is given up."""
        failures = self.failures.setdefault(number, [])
        failures.append((node, lost))
        if self.long:
            hopeless = sum(not lost for _, lost in failures) >= 2 or len(failures) >= LOSSES
        else:
            hopeless = len(failures) >= TRIES
        self.settle(number) if hopeless else self.give_back(number)
        return hopeless

    def settle(self, number):
        """The piece needs no worker any more."""
        self.done.add(number)
        while self.head in self.done:
            self.head += 1


@contextlib.contextmanager
def connected(address, worker_cores=1):
    """Yield a Cluster, or None if `address` is None. address: `auto` or that of a Ray cluster, or `local` to start one
    on this machine. Raises UserError if Ray or the cluster is missing."""
    if address is None:
        yield None
        return
    ray = start_ray(address)
    try:
        require_cores(ray, worker_cores)
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
            f"--cluster {address}: no Ray cluster answers there ({in_one_line(error)}); start one, with the same "
            "RAY_AUTH_MODE and token on each machine (docs/scale.md), or give --cluster local"
        )
    # Or Ray prints pages of its own log when a machine is lost.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    dashboard = f", dashboard at http://{found.dashboard_url}" if found.dashboard_url else ""
    print(f"cluster   Ray {ray.__version__}, machines: {len(ray.nodes())}{dashboard}", file=sys.stderr, flush=True)
    return ray


def require_cores(ray, worker_cores):
    """Raise UserError if no machine of the cluster, which has no GPU, has room for a worker."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max((int(machine.get("CPU", 0)) for machine in machines), default=0)
    if 0 < most < worker_cores and not any("GPU" in machine for machine in machines):
        raise UserError(f"--worker-cores {worker_cores}: no machine of the cluster has more than {most}; give fewer")


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
        self.hired, self.begin, self.longest, self.refused = [], (), 0.0, {}
        self.last_sign, self.hire_from, self.last_reason = time.monotonic(), 0.0, "none has begun"

    def rate(self, trainer, chunks, iteration):
        """Yield what trainer.rate(chunks, iteration) yields, computed by the workers."""
        dataset = trainer.dataset
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

        def arguments(worker, positions):
            return (positions,) if worker.reads else (positions, dataset.images(positions), dataset.masks(positions))

        job = Job(("cluster", "PoolScoring"), task, f"iteration {iteration}: scoring the pool", arguments)
        for rated in self.in_order(job, chunks):
            yield from rated

    def in_order(self, job, pieces):
        """Yield the result of each piece in order. Raises UserError as `as_done` does."""
        results, head = {}, 0
        for number, result, _ in self.as_done(job, pieces):
            results[number] = result
            while head in results:
                yield results.pop(head)
                head += 1

    def as_done(self, job, pieces):
        """Yield (number of the piece, result, None) of each piece when it is done, or, if the Job is long,
        (number, None, why it failed). Raises UserError if a piece of another Job fails, or nobody is there."""
        if not pieces:
            return
        self.work, self.last_sign, self.refused = Pieces(pieces, job.long), time.monotonic(), {}
        self.begin = (os.getcwd(), job.shared), self.ray.put(pickle.dumps((job.work, job.task)))
        for worker in self.hired:
            worker.ready, worker.pieces, worker.begun = False, {}, worker.actor.begin.remote(*self.begin)
        count, started = sum(map(len, pieces)), time.monotonic()
        with progress_bar() as progress:
            bar = progress.add_task(job.described, total=count)
            while len(self.work.done) < len(pieces):
                self.hire()
                self.give_out(job)
                for number, result, reason in self.collect():
                    progress.advance(bar, len(pieces[number]))
                    yield number, result, reason
                at_work = sum(worker.ready for worker in self.hired)
                speed = f", {progress.tasks[0].completed / (time.monotonic() - started):.1f} images a second"
                said = f"{job.described}: workers: {at_work}{'' if job.long else speed}"
                progress.update(bar, description=said)
        print(said, file=sys.stderr, flush=True)

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
            actor = self.ray.remote(**resources, **options)(Worker).remote(str(FOLDER), self.version)
            worker = Hired(actor)
            worker.begun = worker.actor.begin.remote(*self.begin)
            self.hired.append(worker)

    def give_out(self, job):
        """Give pieces to the workers that have fewer than AHEAD, the first ones first."""
        ready = [worker for worker in self.hired if worker.ready]
        nodes, window = {worker.node for worker in ready}, 8 * len(self.hired)
        for worker in ready:
            while len(worker.pieces) < (1 if job.long else AHEAD):
                number = self.work.next(worker.node, nodes, window)
                if number is None:
                    break
                reference = worker.actor.do.remote(*job.arguments(worker, self.work.pieces[number]))
                worker.pieces[reference] = number, time.monotonic()

    def collect(self):
        """Wait for a sign of the workers, at most a second. Returns what `as_done` yields."""
        references = {worker.begun: worker for worker in self.hired if worker.begun}
        references |= {reference: worker for worker in self.hired for reference in worker.pieces}
        found = []
        for reference in self.ray.wait(list(references), timeout=1)[0] if references else self.nobody():
            worker = references[reference]
            try:
                value = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                lost = getattr(error, "cause", None) is None
                found += self.dismiss(worker, reason_of(error), lost, reference)
                continue
            self.last_sign = time.monotonic()
            if reference is worker.begun:
                self.welcome(worker, *value)
            elif reference in worker.pieces:  # not of a machine that was refused meanwhile
                number, since = worker.pieces.pop(reference)
                self.longest = max(self.longest, time.monotonic() - since)
                if self.work.finish(number, worker.node):
                    found.append((number, value, None))
        self.refuse()
        return found + self.look_after()

    def nobody(self):
        """Wait a second for the first machine."""
        time.sleep(1)
        return []

    def welcome(self, worker, host, node, problem, reads):
        """Note what a worker's `begin` returned. A refused one keeps its place, so that no other is started there."""
        worker.begun, worker.host, worker.node, worker.reads = None, host, node, reads
        worker.answered = time.monotonic()
        if problem := problem or self.refused.get(node):
            self.turn_away(worker, problem)
            if not any(one.ready or one.begun for one in self.hired) and len(self.hired) >= self.places()[0]:
                raise UserError(f"--cluster: no machine can be used; {host}: {problem}")
            return
        worker.ready = True
        if not reads:
            print_warning(f"{host} is sent the images, because it does not have this data file at the same path")

    def turn_away(self, worker, problem):
        """Give this worker no pieces."""
        worker.ready, pieces, worker.pieces = False, worker.pieces, {}
        for number, _ in pieces.values():
            self.work.give_back(number)
        print_warning(f"{worker.host} is not used: {problem}")

    def refuse(self):
        """Do not use machines any more where pieces failed that others could do."""
        for node in [node for node, count in self.work.blame.items() if count >= BLAME and node not in self.refused]:
            self.refused[node] = f"{BLAME} pieces failed there, and not on another machine"
            for worker in self.hired:
                if worker.node == node and worker.ready:
                    self.turn_away(worker, self.refused[node])

    def look_after(self):
        """Ask the workers for a sign, and dismiss those that give none, or that have had a piece for too long. Returns
        what `as_done` yields. Raises UserError if there has been no worker for START seconds."""
        now, found = time.monotonic(), []
        limit = SLOW[0] + SLOW[1] * self.longest if self.longest else FIRST
        for worker in [worker for worker in self.hired if worker.ready]:
            self.last_sign = now
            if worker.ping and self.ray.wait([worker.ping], timeout=0)[0]:
                worker.ping, worker.answered = None, now
            elif worker.ping is None and now - worker.answered > SILENCE / 6:
                worker.ping = worker.actor.ping.options(concurrency_group="signs").remote()
            if now - worker.answered > SILENCE:
                found += self.dismiss(worker, f"it gave no sign for {SILENCE} seconds")
            elif not self.work.long and any(now - since > limit for _, since in worker.pieces.values()):
                found += self.dismiss(worker, f"it took more than {limit:.0f} seconds for a piece")
        if now - self.last_sign > START:
            raise UserError(
                f"--cluster: there was no worker for {START} seconds ({self.last_reason}); look at `ray status`, and "
                "give the same command again to go on"
            )
        return found

    def dismiss(self, worker, reason, lost=True, failed=None):
        """Forget a worker; its pieces have to be done again. Returns what `as_done` yields, if a piece is given up.
        lost: whether the worker is gone, and not only its piece with the reference `failed`."""
        if worker not in self.hired:  # by an earlier one of its errors
            return []
        self.hired.remove(worker)
        self.last_reason, found = reason, []
        if not worker.ready:  # or workers that cannot start would be started without end
            self.hire_from = time.monotonic() + 10
        with contextlib.suppress(Exception):
            self.ray.kill(worker.actor)
        print_warning(f"{worker.host}: a worker is replaced: {reason}")
        for reference, (number, _) in worker.pieces.items():
            if not (lost or reference is failed):
                self.work.give_back(number)
            elif self.work.fail(number, worker.node, lost):
                if not self.work.long:
                    how_often = f"a piece of the work failed {TRIES} times, at last on {worker.host}"
                    raise UserError(f"--cluster: {how_often}: {reason}")
                found.append((number, None, f"{worker.host}: {reason}"))
        return found


def reason_of(error):
    """Why a call of a worker failed, for people. error: one of Ray's."""
    cause = getattr(error, "cause", None)
    return in_one_line(cause) if cause is not None else f"its process or its machine ended ({type(error).__name__})"
