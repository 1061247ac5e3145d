"""Foreign, damaged or hostile weights files: refused in one sentence, within seconds, without running their code."""

import json
import pickle
import resource
import time

import h5py
import numpy as np
import pytest

from unet import LARGEST_KERNEL, build_unet, count_parameters, keras, load_unet, save_unet
from utils import UserError


@pytest.fixture
def weights(unet_weights, tmp_path):
    """A copy of good weights, for a test to damage."""
    path = tmp_path / "x.weights.h5"
    path.write_bytes(unet_weights.read_bytes())
    return path


def refusal(path):
    """The error message of `load_unet` for this file, which must take less than 10 s and 300 MB."""
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError) as error:
        load_unet(path)
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


IMPOSSIBLE = {
    "height": [0, -16, 50, 16 * 10**8, 48.0, "48", None, [48], True],
    "width": [0, 4112, 10**400],
    "channels": [0, 2, 3, 10**9, "1"],
    "filters": [0, -8, 9, 10**9, 2**70, 8.5, "8", {}, [[[8]]]],
    "dropout": [1, -0.1, 2.5, float("nan"), "half", None],
    "mean": [[], [1, 2], 128, "x", [None], [float("nan")], [10**400], [[128]]],
    "std": [[], [0], [-50], [float("inf")], {"0": 50}],
}


# Only files of standardised networks have it.
OPTIONAL = {"standardise": [1, "yes", None, [True]]}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in (IMPOSSIBLE | OPTIONAL).items() for value in values]
)
def test_impossible_settings_are_refused(weights, name, value):
    with h5py.File(weights, "r+") as file:
        settings = json.loads(file.attrs["unet"])
        file.attrs["unet"] = json.dumps({**settings, name: value})
    assert "not a weights file of train.py (" in refusal(weights)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_settings_that_are_missing_are_named(weights, name):
    with h5py.File(weights, "r+") as file:
        settings = json.loads(file.attrs["unet"])
        del settings[name]
        file.attrs["unet"] = json.dumps(settings)
    assert name in refusal(weights)


@pytest.mark.parametrize(
    "attribute", ["", "{", "[]", "null", "3", '"x"', 30_000 * "[", 5, [1, 2], np.bytes_(b"\xff\xfe")]
)
def test_an_attribute_that_holds_no_settings_is_refused(weights, attribute):
    with h5py.File(weights, "r+") as file:
        file.attrs["unet"] = attribute
    refusal(weights)


def without(*names):
    def spoil(file):
        for name in names:
            del file[name]

    return spoil


def instead(name, **dataset):
    def spoil(file):
        del file[name]
        file.create_dataset(name, **dataset)

    return spoil


def linked(name, link):
    def spoil(file):
        del file[name]
        file[name] = link

    return spoil


KERNEL = "layers/conv2d/vars/0"
SPOILS = {
    "no attribute": lambda file: file.attrs.__delitem__("unet"),
    "a layer is missing": without("layers/conv2d_3"),
    "a kernel is missing": without(KERNEL),
    "all is missing": without("layers"),
    "a kernel of another shape": instead(KERNEL, data=np.zeros((3, 3, 1, 4), "f4")),
    "a kernel of text": instead(KERNEL, data=["a"], dtype=h5py.string_dtype()),
    "a kernel that claims a terabyte": instead(KERNEL, shape=(10**6, 10**6), dtype="u1", chunks=(1000, 1000)),
    "a kernel of infinity": instead(KERNEL, data=np.full((3, 3, 1, 8), np.inf, "f4")),
    "a group for a kernel": lambda file: (file.__delitem__(KERNEL), file.create_group(KERNEL)),
    "a link to another file": linked(KERNEL, h5py.ExternalLink("/etc/passwd", "x")),
    "a link that goes round": linked(KERNEL, h5py.SoftLink("/" + KERNEL)),
}


@pytest.mark.parametrize("name", SPOILS)
def test_weights_that_are_damaged_or_hostile_inside_are_refused(weights, name):
    with h5py.File(weights, "r+") as file:
        SPOILS[name](file)
    refusal(weights)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.99, 0.9999])
def test_truncated_weights_are_refused(weights, share):
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    refusal(weights)


def test_weights_of_another_network_are_refused(weights, tmp_path):
    with h5py.File(weights) as file:
        settings = file.attrs["unet"]
    other = keras.Sequential([keras.Input((48, 64, 1)), keras.layers.Conv2D(800, 9), keras.layers.Conv2D(9, 9)])
    other.save_weights(tmp_path / "other.weights.h5")
    refusal(tmp_path / "other.weights.h5")
    with h5py.File(tmp_path / "other.weights.h5", "r+") as file:
        file.attrs["unet"] = settings
    refusal(tmp_path / "other.weights.h5")
    save_unet(build_unet(48, 64, filters=9), tmp_path / "more.weights.h5", [1.0], [1.0])
    with h5py.File(tmp_path / "more.weights.h5", "r+") as file:
        file.attrs["unet"] = settings
    refusal(tmp_path / "more.weights.h5")


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["x.weights.h5", "x.h5", "x.keras", "x.pkl", "x"])
def test_no_code_in_a_file_is_run(tmp_path, name):
    ran, path = tmp_path / "ran", tmp_path / name
    pickle.loads(pickle.dumps(Malice(ran))).close()
    ran.unlink()  # the attack works without protection

    path.write_bytes(pickle.dumps(Malice(ran)))
    refusal(path)
    layer = keras.layers.Lambda(eval(f"lambda x: (open({str(ran)!r}, 'w'), x)[1]"))
    model = keras.Sequential([keras.Input((48, 64, 1)), layer, keras.layers.Conv2D(1, 1)])
    ran.unlink()  # building the layer made it
    model.save(tmp_path / "lambda.keras")
    model.save(tmp_path / "lambda.h5")
    for kind in "keras", "h5":
        path.write_bytes((tmp_path / f"lambda.{kind}").read_bytes())
        refusal(path)
    with h5py.File(path, "r+") as file:  # the whole model with the attribute
        file.attrs["unet"] = json.dumps({"height": 48, "width": 64, "channels": 1, "filters": 1, "dropout": 0.5})
    refusal(path)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["best.h5", "best.keras", "best", "weights.h5", "x.weights.h5.bak"])
def test_good_weights_with_a_wrong_suffix_are_told_the_right_one(unet_weights, tmp_path, name):
    (tmp_path / name).write_bytes(unet_weights.read_bytes())
    assert "name ends in .weights.h5" in refusal(tmp_path / name)


@pytest.mark.parametrize(("channels", "filters"), [(1, 1), (3, 2), (1, 32), (3, 5)])
def test_weights_are_counted_as_keras_counts_them(channels, filters):
    assert count_parameters(channels, filters) == build_unet(16, 16, channels, filters).count_params()


@pytest.fixture
def half_weights(unet_weights, tmp_path):
    """The same network, stored in half precision."""
    model, settings = load_unet(unet_weights)
    path = tmp_path / "half.weights.h5"
    save_unet(model, path, settings["mean"], settings["std"], dtype="float16")
    return path


def test_half_precision_is_for_the_large_kernels_and_is_loaded_as_float32(unet_weights, half_weights, tmp_path):
    (full, settings), (half, same) = load_unet(unet_weights), load_unet(half_weights)
    save_unet(full, tmp_path / "full.weights.h5", settings["mean"], settings["std"])  # without the optimizer's state
    assert same == settings
    assert {variable.dtype for variable in half.weights} == {"float32"}
    saved = 0
    for layer, twin in zip(full.layers, half.layers, strict=True):
        for a, b in zip(layer.get_weights(), twin.get_weights(), strict=True):
            stored = np.float16 if layer.count_params() > 30_000 else np.float32
            np.testing.assert_array_equal(a.astype(stored).astype(np.float32), b)
            saved += a.nbytes // 2 if stored == np.float16 else 0
    assert saved > 0.65 * 2 * count_parameters(1, 8)
    size = (tmp_path / "full.weights.h5").stat().st_size
    assert half_weights.stat().st_size == pytest.approx(size - saved, abs=4096)


def test_a_file_in_half_precision_cannot_claim_more_weights_than_it_has_room_for(half_weights):
    room = half_weights.stat().st_size
    filters = next(n for n in range(8, 100) if 2 * count_parameters(1, n) > room)
    with h5py.File(half_weights, "r+") as file:
        file.attrs["unet"] = json.dumps({**json.loads(file.attrs["unet"]), "filters": filters})
    assert "too small" in refusal(half_weights)


@pytest.mark.parametrize("dtype", ["u1", "f8", "i2"])
def test_weights_of_another_type_are_refused(weights, dtype):
    with h5py.File(weights, "r+") as file:
        kernel = file[LARGEST_KERNEL][:]
        del file[LARGEST_KERNEL]
        file.create_dataset(LARGEST_KERNEL, data=kernel.astype(dtype))
    assert "weights of type" in refusal(weights)
