"""bench.py: the table as a user gets it, and the number of multiplications by hand."""

import json

import numpy as np
import pytest
from conftest import write_blobs

import bench
from bench_scale import in_process
from unet import build_unet


@pytest.mark.slow
def test_the_table_is_printed_and_written(unet_weights, tmp_path, monkeypatch, capsys):
    """Without the rows that start other processes, because they take a minute."""
    write_blobs(tmp_path / "blobs.h5", 20, 48, 64)
    for name in "bench_pools", "bench_folders":
        monkeypatch.setattr(bench, name, lambda *_: [])
    monkeypatch.setattr(bench, "MEGAPIXELS", [(200, 300)])
    arguments = (
        f"bench.py --quick --preset demo --data {tmp_path}/blobs.h5 --weights {unet_weights} --json {tmp_path}/b.json"
    )
    monkeypatch.setattr("sys.argv", arguments.split())
    bench.main()
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["machine"]["cores"] >= 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row["what"] for row in written["table"]]
    values = {row["what"]: row["value"] for row in written["table"]}
    assert all(np.isfinite(value) for value in values.values())
    assert values["bfloat16: rank correlation of 20 scores with float32's"] > 0.5
    assert abs(values["float16: Dice of the mean of the passes minus float32's"]) < 0.05


@pytest.mark.slow
def test_a_pool_of_any_size_takes_the_same_memory(tmp_path):
    rows = bench.bench_pools(tmp_path, [50, 500])
    assert rows[0]["value"] < 1.05


@pytest.mark.slow
def test_weights_need_data(run_script, unet_weights):
    done = run_script("bench.py", "--weights", unet_weights)
    assert done.returncode == 2
    assert "--weights needs --data" in done.stderr


def test_the_multiplications_are_counted():
    model = build_unet(16, 16, filters=1)
    # encoder: 16x16 to 2x2 pixels, 1 to 8 filters; bottleneck: one pixel, 16 filters
    encoder = sum(n * n * 9 * (a * b + b * b) for n, a, b in [(16, 1, 1), (8, 1, 2), (4, 2, 4), (2, 4, 8), (1, 8, 16)])
    skips = sum(n * n * 9 * b * b for n, b in [(16, 1), (8, 2), (4, 4), (2, 8)])
    a_pass = sum(n * n * (4 * 2 * b * b + 9 * b * b) for n, b in [(16, 1), (8, 2), (4, 4), (2, 8)]) + 16 * 16
    assert bench.multiplications(model, 3) == encoder + skips + 3 * a_pass


def test_peak_memory_is_the_scripts_own(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    (tmp_path / "large.py").write_text("x = bytearray(300_000_000); x[::1000] = b'1' * 300_000")
    (tmp_path / "small.py").write_text("pass")
    (tmp_path / "wrong.py").write_text("raise SystemExit('no such thing')")
    ballast = np.ones(30_000_000)  # memory of this process, which must not count
    assert 300 < bench.peak_memory("large.py") < 400
    assert bench.peak_memory("small.py") < 60
    assert ballast.sum() > 0
    with pytest.raises(bench.UserError, match=r"wrong\.py failed: no such thing"):
        bench.peak_memory("wrong.py")


@pytest.mark.slow
def test_a_pool_of_a_million_takes_3_gb_at_most():
    _, memory = in_process("bookkeeping", 1_000_000)
    assert memory < 3e9
