"""Machines of a Ray cluster, played by this one."""

import contextlib
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


class Nodes:
    """A Ray cluster on this machine: a head without workers, and nodes of one core."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (else other programs slow the tests down)
        self.memory = {"object_store_memory": 80 * 2**20}
        self.ray = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **self.memory})
        self.nodes = [self.add(), self.add()]

    def add(self):
        return self.ray.add_node(num_cpus=1, **self.memory)

    def kill(self, place):
        """Kill a node and its workers, as if its machine lost power."""
        self.ray.remove_node(self.nodes.pop(place), allow_graceful=False)

    @contextlib.contextmanager
    def odd(self, *mounts):
        """Add nodes of one core that see other disks: a node for each of these `mount` commands, a list."""
        start = f"ray start --address {self.ray.address} --node-ip-address 127.0.0.1 --num-cpus 1 --block"
        start = f"exec {Path(sys.executable).parent}/{start} --object-store-memory {self.memory['object_store_memory']}"
        started, variables = [], {**os.environ, "RAY_raylet_start_wait_time_s": "120"}
        try:
            for mount in mounts:
                mount = shlex.join(["mount", *map(str, mount)])
                if subprocess.run(["unshare", "--mount", "sh", "-c", mount], stderr=subprocess.DEVNULL).returncode:
                    pytest.skip("this process is not permitted to mount disks")
                before, command = self.alive(), ["unshare", "--mount", "sh", "-c", f"{mount} && {start}"]
                started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=variables))
                while not self.alive() - before:
                    assert started[-1].poll() is None
                    time.sleep(0.5)
            yield
        finally:
            for node in started:
                node.terminate()
            for node in started:
                node.wait()

    def alive(self):
        """The ids of the nodes that are thought to live."""
        return {node["NodeID"] for node in self.workers.ray.nodes() if node["Alive"]}
