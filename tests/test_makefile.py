"""Makefile: which versions of Python it takes, and that it replaces a .venv of another one."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

# Stands in for Python: prints its version, and makes a .venv that logs what it is asked to do.
PYTHON = """#!/bin/sh
version={version}
case "$1" in
-c) echo $version;;
-m) [ "$3" = --clear ] && rm -rf .venv
    mkdir -p .venv/bin .venv/lib/python$version
    printf '#!/bin/sh\\necho %s "$@" >> log\\n' $version > .venv/bin/python
    chmod +x .venv/bin/python;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """A function (version) that runs `make demo` in a folder of its own, with a python3 of this version."""
    for name in "Makefile", "requirements.txt", "requirements-dev.txt":
        shutil.copy(ROOT / name, tmp_path)

    def run(version, *arguments):
        python = tmp_path / "bin" / "python3"
        python.parent.mkdir(exist_ok=True)
        python.write_text(PYTHON.format(version=version))
        python.chmod(0o755)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "MAKEFLAGS": "", "MAKELEVEL": "0"}
        command = ["make", "demo", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.14", "3.1", "4.0", ""])
def test_a_python_without_tensorflow_is_refused_before_anything_is_made(make, tmp_path, version):
    done = make(version)
    assert done.returncode == 2
    assert f"python3 has version {version or 'unknown'}, and TensorFlow needs one of 3.10 3.11 3.12 3.13" in done.stderr
    assert "make demo PYTHON3=python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_a_python_with_tensorflow_is_taken_and_installs_once(make, tmp_path, version):
    for _ in range(2):
        assert make(version).returncode == 0
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[1] for line in log] == ["-m", "train.py", "train.py"]


def test_a_venv_of_another_version_is_replaced(make, tmp_path):
    for version in "3.11", "3.12", "3.11":
        assert make(version).returncode == 0
        assert [path.name for path in (tmp_path / ".venv" / "lib").iterdir()] == [f"python{version}"]
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[:2] for line in log] == [[v, m] for v in ("3.11", "3.12", "3.11") for m in ("-m", "train.py")]


def test_a_venv_of_an_older_makefile_is_kept(make, tmp_path):
    assert make("3.11").returncode == 0
    (tmp_path / ".venv" / "installed-3.11").rename(tmp_path / ".venv" / "installed")
    (tmp_path / ".venv" / "mine").touch()
    assert make("3.11").returncode == 0
    assert (tmp_path / ".venv" / "mine").exists()


# Stands in for Python in tests/gpu.sh: logs what it is asked to do; bench.py fails; train.py writes a run.
GPU_PYTHON = """#!/bin/sh
echo "$@" >> log
case "$1" in
bench.py) echo "no memory"; exit 2;;
train.py) mkdir -p gpu/run/iteration_00
    printf 'iteration,seconds_scoring,seconds_training\\n0,0.0,5.0\\n1,2.0,3.0\\n' > gpu/run/history.csv
    echo weights > gpu/run/iteration_00/model.weights.h5; echo figure > gpu/run/dice.png;;
esac
"""


@pytest.mark.parametrize("dry", ["", "1"])
def test_make_gpu_does_all_parts_and_packs_what_is_small(tmp_path, dry):
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "gpu.sh", tmp_path / "tests")
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / "python"
    python.write_text(GPU_PYTHON)
    python.chmod(0o755)
    command = ["make", "gpu", f"PYTHON={python}", f"DRY={dry}", "ISIC=my_pictures"]
    environment = {**os.environ, "MAKEFLAGS": "", "MAKELEVEL": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "failed: bench\n" in done.stdout
    assert "no memory" in done.stdout
    assert "of the run: 2 s scoring, 8 s training" in done.stdout
    log = (tmp_path / "log").read_text().splitlines()
    made = ["data.py isic my_pictures datasets/isic2017.h5"]
    assert log[: len(log) - 3] == ([] if dry else made)
    assert [line.split()[:3] for line in log[-3:]] == [
        ["-m", "pytest", "tests/test_gpu.py"],
        ["bench.py", "--quick", "--preset" if dry else "--json"],
        ["train.py", "--preset", "demo" if dry else "tuned"],
    ]
    packed = subprocess.run(["tar", "-tzf", "gpu.tar.gz"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert "gpu/run/history.csv" in packed
    assert "gpu/run/dice.png" in packed
    assert "gpu/bench.log" in packed
    assert "weights" not in packed
    assert not (tmp_path / ".venv").exists()
