"""unet.py and sampler.py: the network's shape, the loss by hand, Monte Carlo dropout against a plain loop."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf
from conftest import blobs

import sampler
import unet
from devices import tensorflow_errors
from sampler import _image_seeds, _is_build_unet, _sampler, mc_dropout
from trainer import learning_rate, restart, training_step
from unet import build_unet, dice_coefficient, dice_loss, kept_units, keras, load_unet, save_unet
from utils import UserError


@pytest.fixture(scope="module", params=[(1, False), (3, False), (3, True)], ids=["grey", "RGB", "standardised"])
def network(request):
    keras.utils.set_random_seed(7)
    channels, standardise = request.param
    model = build_unet(48, 64, channels, filters=4, standardise=standardise)
    for variable in model.trainable_variables:  # larger than the initial weights, so that the passes differ
        variable.assign(variable * 1.4)
    return model


@pytest.fixture(scope="module")
def images(network):
    return np.random.default_rng(0).normal(size=(5, *network.input_shape[1:])).astype(np.float32)


def test_it_is_the_papers_network():
    model = build_unet(192, 240)
    assert model.count_params() == 7_846_081
    assert model.output_shape == (None, 192, 240, 1)
    filters = [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    down = [32, 32, 64, 64, 128, 128, 256, 256, 512, 512]
    assert filters == [*down, 256, 256, 128, 128, 64, 64, 32, 32, 1]
    (dropout,) = [layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)]
    assert dropout.rate == 0.5
    assert dropout.input.shape == (None, 12, 15, 512)


@pytest.mark.parametrize(("height", "width"), [(100, 128), (96, 120), (8, 16), (0, 16)])
def test_a_size_that_cannot_be_halved_four_times_is_refused(height, width):
    with pytest.raises(ValueError, match="multiples of 16"):
        build_unet(height, width)


def test_a_standardised_network_does_not_see_light_and_colour_of_the_whole_image(images):
    keras.utils.set_random_seed(7)
    model = build_unet(48, 64, images.shape[-1], filters=4, standardise=True)
    plain = model.predict(images, verbose=0)
    np.testing.assert_allclose(model.predict(2 * images - 3, verbose=0), plain, atol=0.01)
    np.testing.assert_allclose(model.predict(images.mean((1, 2), keepdims=True) + images, verbose=0), plain, atol=1e-5)
    one_colour = model.predict(np.full_like(images, 5), verbose=0)
    np.testing.assert_array_equal(one_colour, model.predict(np.zeros_like(images), verbose=0))
    assert not np.allclose(model.predict(images[:, ::-1], verbose=0), plain, atol=1e-3)


def test_dropout_is_on_in_training_and_off_in_prediction(network, images):
    plain = [network(images, training=False).numpy() for _ in range(2)]
    training = [network(images, training=True).numpy() for _ in range(2)]
    np.testing.assert_array_equal(*plain)
    np.testing.assert_allclose(network.predict(images, verbose=0), plain[0], atol=1e-6)
    assert np.abs(training[0] - training[1]).max() > 1e-3


def test_dice_is_pooled_over_the_batch():
    truth = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.float32)
    prediction = np.array([[0.5, 0, 0.5, 0], [1, 1, 0.5, 0.5]], np.float32)
    # overlap 0.5 + 3 = 3.5; sums 6 and 4: (2 * 3.5 + 1) / (10 + 1)
    assert float(dice_coefficient(truth, prediction)) == pytest.approx(8 / 11)
    assert float(dice_loss(truth, prediction)) == pytest.approx(-8 / 11)
    assert float(dice_coefficient(truth * 0, prediction * 0)) == 1


def test_dice_of_half_precision_maps_does_not_overflow():
    ones = tf.ones((4, 300, 300, 1), tf.float16)  # 360,000 pixels: more than float16 can count
    assert float(dice_coefficient(ones, ones)) == pytest.approx(1)


@pytest.mark.parametrize(("precision", "close"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_half_precision_computes_in_half_and_stays_close(precision, close, unet_weights):
    model, settings = load_unet(unet_weights)
    half, same = load_unet(unet_weights, precision)
    assert same == settings
    assert half.get_layer("decoder_0_b").compute_dtype == precision
    assert half.get_layer("decoder_0_b").kernel.dtype == half.output.dtype == "float32"
    images = blobs(6, 48, 64, seed=5)[0].astype(np.uint8)
    exact, rounded = (mc_dropout(m, images, 8, seed=1, mean=128, std=50)[0] for m in (model, half))
    assert 1e-6 < np.abs(exact - rounded).mean() < close


class KnownMask(keras.layers.Layer):
    """Dropout with rate 0.5 and a mask that the test sets."""

    mask = 1.0

    def call(self, x):
        return x * self.mask * 2


def test_mean_and_variance_are_those_of_the_plain_loop_over_passes(network, images):
    """The reference is the whole network, pass by pass, with dropout masks drawn in this test."""

    def swap(layer):
        known = isinstance(layer, keras.layers.Dropout)
        return KnownMask() if known else layer.__class__.from_config(layer.get_config())

    twin = keras.models.clone_model(network, clone_function=swap)
    twin.set_weights(network.get_weights())
    shape, passes = network.get_layer("dropout").output.shape[1:], []
    for number in range(6):
        masks = [
            tf.random.stateless_uniform(shape, tf.stack([seed, number]), alg="philox") >= 0.5
            for seed in _image_seeds(images, seed=3)
        ]
        KnownMask.mask = tf.cast(tf.stack(masks), tf.float32)
        passes.append(twin(images)[..., 0].numpy().astype(np.float64))
    mean, variance = mc_dropout(network, images, 6, seed=3)
    assert mean.dtype == variance.dtype == np.float32
    assert mean.shape == variance.shape == (5, 48, 64)
    np.testing.assert_allclose(mean, np.mean(passes, 0), atol=1e-5)
    np.testing.assert_allclose(variance, np.var(passes, 0), atol=1e-5)
    assert variance.max() > 1e-3

    def entropy(p):
        return -p * np.log(p) - (1 - p) * np.log(1 - p)

    _, total = mc_dropout(network, images, 6, seed=3, measure="entropy")
    np.testing.assert_allclose(total, entropy(np.mean(passes, 0)), atol=1e-4)
    _, information = mc_dropout(network, images, 6, seed=3, measure="bald")
    expected = entropy(np.mean(passes, 0)) - entropy(np.array(passes)).mean(0)
    np.testing.assert_allclose(information, expected, atol=1e-4)
    assert information.max() > 1e-3
    assert information.min() >= 0


def test_the_combined_loss_adds_the_mean_cross_entropy():
    truth = np.array([[[1.0]], [[0.0]], [[0.3]]], np.float32)[..., None]
    prediction = np.array([[[0.8]], [[0.4]], [[0.5]]], np.float32)[..., None]
    dice = (2 * (0.8 + 0.15) + 1) / (1.3 + 1.7 + 1)
    entropy = -np.mean([np.log(0.8), np.log(0.6), np.log(0.5)])
    assert float(unet.dice_bce_loss(truth, prediction)) == pytest.approx(entropy - dice, rel=1e-5)


@pytest.mark.parametrize(("loss", "positives", "negatives"), [("jaccard_bce", 1, 1), ("tversky_bce", 0.3, 0.7)])
def test_losses_per_image_count_small_and_large_lesions_alike(loss, positives, negatives):
    """On a small and a large lesion, with and without an image that only fills up the batch."""
    truth = np.zeros((3, 4, 4, 1), np.float32)
    truth[0, 0, 0], truth[1, :, :3], truth[2] = 1, 1, 1
    prediction = np.random.default_rng(0).uniform(0.1, 0.9, truth.shape).astype(np.float32)
    expected = []
    for t, p in zip(truth[:2].astype(float), prediction[:2].astype(float)):
        overlap, extra, missed = (t * p).sum(), ((1 - t) * p).sum(), (t * (1 - p)).sum()
        index = (overlap + 1) / (overlap + positives * extra + negatives * missed + 1)
        expected.append(-np.mean(np.log(np.where(t, p, 1 - p))) - index)
    real = np.float32([1, 1, 0]).reshape(3, 1, 1, 1)
    assert float(unet.LOSSES[loss](truth[:2], prediction[:2])) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(unet.LOSSES[loss](truth, prediction, real)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_entropy_and_bald_are_finite_where_the_network_is_certain():
    model = build_unet(16, 16, filters=2)
    model.get_layer("probability").bias.assign([1000.0])
    for measure in "entropy", "bald":
        mean, uncertainty = mc_dropout(model, np.zeros((1, 16, 16, 1)), 3, seed=1, measure=measure)
        assert (mean == 1).all()
        assert (uncertainty == 0).all()


def test_the_cosine_schedule_warms_up_and_ends_at_zero():
    rates = [learning_rate("cosine", step / 1000) for step in range(1000)]
    assert rates[0] < 0.05
    assert rates[49] == pytest.approx(1, abs=0.03)
    assert rates[500] == pytest.approx(0.5)
    assert rates[-1] < 1e-5
    assert {learning_rate("constant", step / 10) for step in range(10)} == {1.0}


def test_a_training_step_is_keras_own():
    """The rearranged step and Keras' step give the same weights after three steps with dropout, up to rounding."""
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(3, 32, 48, 1)).astype("f"), rng.integers(0, 2, (3, 32, 48, 1)).astype("f")
    found = []
    for rearranged in True, False:
        keras.utils.set_random_seed(1)
        model = build_unet(32, 48, filters=4)
        model.compile(keras.optimizers.SGD(0.1), unet.dice_bce_loss, jit_compile=False)
        step = training_step(model) if rearranged else lambda *batch, model=model: model.train_step(batch)
        for number in range(3):
            restart(model.get_layer("dropout").seed_generator, 5, number)
            step(*map(tf.constant, batch))
        found.append(model.get_weights())
    for mine, theirs in zip(*found):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert any(np.abs(w).max() > 1e-4 for w in found[0] if w.ndim == 1)  # the biases began at 0


@pytest.fixture(params=["random", "trained"])
def any_network(request, network, unet_weights):
    """(network, uint8 images of its input size)"""
    model = network if request.param == "random" else load_unet(unet_weights)[0]
    images = blobs(7, 48, 64, seed=4)[0].clip(0, 255).astype(np.uint8)
    return model, np.repeat(images, model.input_shape[-1], -1)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_fast_passes_are_those_of_the_whole_network(any_network, batch_size, monkeypatch):
    model, images = any_network
    options = {"passes": 5, "seed": 3, "batch_size": batch_size, "mean": 128, "std": 50}
    fast = mc_dropout(model, images, **options)
    monkeypatch.setattr(sampler, "_is_build_unet", lambda model: False)
    _sampler.cache_clear()
    plain = mc_dropout(model, images, **options)
    _sampler.cache_clear()
    for a, b in zip(fast, plain):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert plain[1].max() > 1e-3


def test_only_exactly_this_network_is_rearranged(network):
    assert _is_build_unet(network)
    assert _is_build_unet(build_unet(16, 32, 3, filters=2, dropout=0.2, precision="bfloat16"))

    def changed(**changes):
        def change(layer):
            config = layer.get_config()
            return layer.__class__.from_config(config | changes.get(layer.name, {}))

        return keras.models.clone_model(network, clone_function=change)

    assert _is_build_unet(changed())
    assert not _is_build_unet(changed(decoder_1_a={"activation": "tanh"}))
    assert not _is_build_unet(changed(up_2={"interpolation": "bilinear"}))
    outputs = keras.layers.Dropout(0.1, name="another")(network.output)
    assert not _is_build_unet(keras.Model(network.input, outputs))


def test_dropout_elsewhere_is_sampled_too():
    """Two dropout layers at the input; the expected output is computed by hand."""
    inputs = keras.Input((4, 4, 1))
    dropped = [keras.layers.Dropout(rate)(inputs) for rate in (0.5, 0.2)]
    x = keras.layers.Concatenate()(dropped)
    model = keras.Model(inputs, keras.layers.Conv2D(1, 1, kernel_initializer="ones")(x))
    mean, variance = mc_dropout(model, np.ones((2, 4, 4, 1)), 400, seed=1)
    # Inverted dropout of the value 1: mean 1, variance rate / (1 - rate). The masks of the two layers are independent.
    np.testing.assert_allclose(mean.mean(), 2, atol=0.05)
    np.testing.assert_allclose(variance.mean(), 1 + 0.25, atol=0.1)


def test_about_half_of_the_bottleneck_is_dropped(images):
    """The network's output is made to be the share of the bottleneck that dropout keeps."""
    model = build_unet(16, 16, filters=8)
    for variable in model.trainable_variables:
        variable.assign(tf.zeros_like(variable))
    model.get_layer("bottleneck_b").bias.assign(tf.ones(128))  # the bottleneck is 1 everywhere
    # Channel 0 of decoder_3_a is the mean of the bottleneck after dropout. The later layers copy it.
    kernel = np.zeros((3, 3, 192, 64), np.float32)
    kernel[1, 1, :128, 0] = 1 / 128
    model.get_layer("decoder_3_a").kernel.assign(kernel)
    for name in ["decoder_3_b", *(f"decoder_{level}_{letter}" for level in (2, 1, 0) for letter in "ab")]:
        layer = model.get_layer(name)
        kernel = np.zeros(layer.kernel.shape, np.float32)
        kernel[1, 1, 0, 0] = 1
        layer.kernel.assign(kernel)
    model.get_layer("probability").kernel.assign(np.eye(8, 1, dtype=np.float32)[None, None])
    mean, variance = mc_dropout(model, np.random.default_rng(0).normal(size=(40, 16, 16, 1)), 20, seed=0)
    logits = np.log(mean / (1 - mean))
    assert logits.mean() == pytest.approx(1, abs=0.02)  # inverted dropout does not change the expectation
    assert variance.max() > 0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_an_images_passes_do_not_depend_on_batch_or_order(network, images, batch_size):
    mean, variance = mc_dropout(network, images, 4, seed=5)
    order = [3, 0, 4]
    other_mean, other_variance = mc_dropout(network, images[order], 4, seed=5, batch_size=batch_size)
    np.testing.assert_allclose(other_mean, mean[order], atol=1e-5)
    np.testing.assert_allclose(other_variance, variance[order], atol=1e-5)


def test_a_key_names_an_image_whatever_its_pixels(network, images):
    again = images * np.float32(1 + 1e-6)  # for example, normalised on another machine
    first, second = (mc_dropout(network, x, 3, seed=5, keys=[7, 8, 9, 10, 11])[0] for x in (images, again))
    np.testing.assert_allclose(first, second, atol=1e-3)
    other, _ = mc_dropout(network, images, 3, seed=5, keys=[17, 18, 19, 20, 21])
    assert np.abs(first - other).max() > 1e-3


def test_uint8_images_are_normalised_on_the_way(network):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, *network.input_shape[1:]), np.uint8)
    mean, std = [100.0, 120.0, 90.0][: pixels.shape[-1]], 50.0
    expected = mc_dropout(network, (pixels - np.float32(mean)) / std, 3, seed=5, keys=[1, 2])
    found = mc_dropout(network, pixels, 3, seed=5, keys=[1, 2], mean=mean, std=std)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_seeds_and_images_have_dropout_masks_of_their_own(network, images):
    first, again, other = (mc_dropout(network, images[:1], 1, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_the_sampler_sees_new_weights(network, images):
    before, _ = mc_dropout(network, images, 2, seed=1)
    network.get_layer("probability").bias.assign_add([1.0])
    after, _ = mc_dropout(network, images, 2, seed=1)
    network.get_layer("probability").bias.assign_sub([1.0])
    assert (after >= before).all()
    assert after.mean() > before.mean() + 0.01


def test_zero_passes_are_refused_and_zero_images_are_accepted(network, images):
    with pytest.raises(ValueError, match="at least 1, not 0"):
        mc_dropout(network, images, 0, seed=1)
    assert mc_dropout(network, images[:0], 3, seed=1)[0].shape == (0, 48, 64)


def test_saved_weights_bring_all_that_the_network_needs(network, images, tmp_path):
    path = tmp_path / "x.weights.h5"
    channels = images.shape[-1]
    save_unet(network, path, [100.0] * channels, [50.0] * channels)
    model, settings = load_unet(path)
    np.testing.assert_array_equal(model.predict(images, verbose=0), network.predict(images, verbose=0))
    expected = {"height": 48, "width": 64, "channels": channels, "filters": 4, "dropout": 0.5}
    if "standardise" in [layer.name for layer in network.layers]:
        expected["standardise"] = True
    assert settings == {**expected, "mean": [100.0] * channels, "std": [50.0] * channels}
    build_unet(48, 64, channels, filters=4).load_weights(path)  # standard Keras can read it too
    assert [p.name for p in tmp_path.iterdir()] == ["x.weights.h5"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:5000])


def without_attribute(path):
    with h5py.File(path, "a") as file:
        del file.attrs["unet"]


def of_another_network(path):
    with h5py.File(path, "a") as file:
        file.attrs["unet"] = file.attrs["unet"].replace('"filters": 2', '"filters": 3')


def as_text(path):
    path.write_text("no weights")


@pytest.mark.parametrize(
    "spoil", [truncate, without_attribute, of_another_network, as_text, lambda path: path.unlink()]
)
def test_weights_that_cannot_be_used_are_named(tmp_path, spoil):
    path = tmp_path / "x.weights.h5"
    save_unet(build_unet(16, 16, filters=2), path, [0.0], [1.0])
    spoil(path)
    with pytest.raises(UserError, match=r"x\.weights\.h5: "):
        load_unet(path)


# ------------------------------------------------------------------------------------- dropout, on any device, with XLA


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("rate", "shape"), [(0.5, (4, 6, 5, 8)), (0.3, (1, 3, 4, 7)), (0.15, (2, 12, 15, 64))])
def test_the_trainings_dropout_is_keras_own_with_and_without_xla(dtype, rate, shape):
    inputs = tf.cast(tf.random.normal(shape), dtype)
    theirs, seed = keras.random.SeedGenerator(5), 1_234_567_890_123
    layer = unet.Dropout(rate, dtype=dtype)
    for number in range(3):
        restart(theirs, seed, number)
        expected = keras.random.dropout(inputs, rate, seed=theirs)
        for xla in False, True:
            restart(layer.seed_generator, seed, number)
            found = tf.function(lambda x: layer(x, training=True), jit_compile=xla)(inputs)
            np.testing.assert_array_equal(found == 0, expected == 0)
            if not xla:
                np.testing.assert_array_equal(found, expected)
        assert layer(inputs, training=False) is inputs


@pytest.mark.parametrize("rate", [0.5, 0.3, 0.9])
def test_the_samplers_masks_are_the_recorded_ones_with_and_without_xla(rate):
    seeds, number = tf.constant([3, -7, 2**60], tf.int64), tf.constant(4, tf.int64)
    expected = [tf.random.stateless_uniform((3, 4, 9), [seed, number], alg="philox") >= rate for seed in seeds]
    for xla in False, True:
        draw = tf.function(lambda: sampler._dropout_masks((3, 4, 9), rate, seeds, number), jit_compile=xla)
        np.testing.assert_array_equal(draw(), expected)


def test_dropout_keeps_the_share_of_units_that_it_should():
    assert float(tf.reduce_mean(tf.cast(kept_units((200, 200), 0.3, [1, 2]), "float32"))) == pytest.approx(
        0.7, abs=0.01
    )


# --------------------------------------------------------------------------------- TensorFlow's errors, Keras' settings


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("Unknown", "Failed to get convolution algorithm. This is probably because cuDNN failed", "GPU's libraries"),
        ("FailedPrecondition", "DNN library initialization failed. Look at the errors above", "GPU's libraries"),
        ("Unimplemented", "DNN library is not found.", "GPU's libraries"),
        ("NotFound", "No algorithm worked!  Error messages:", "GPU's libraries"),
        ("Internal", "Attempting to perform BLAS operation using StreamExecutor without BLAS", "GPU's libraries"),
        ("Internal", "cudaGetDevice() failed. Status: CUDA driver version is insufficient", "GPU's libraries"),
        ("Internal", "libdevice not found at ./libdevice.10.bc [Op:__inference_step]", "libdevice is missing"),
        ("ResourceExhausted", "OOM when allocating tensor", "not enough memory; free some"),
        ("Internal", "CUDNN_STATUS_ALLOC_FAILED: out of memory", "not enough memory; free some"),
    ],
)
def test_tensorflows_errors_are_one_sentence_with_a_remedy(kind, text, said):
    error = getattr(tf.errors, f"{kind}Error")(None, None, f"{text}\n\t [[node x]]")
    with pytest.raises(UserError, match=said) as refusal, tensorflow_errors("free some"):
        raise error
    assert len(str(refusal.value).splitlines()) == 1
    assert (
        "nvidia-smi" in str(refusal.value) or "pip install" in str(refusal.value) or "free some" in str(refusal.value)
    )


@pytest.mark.parametrize(
    "error", [tf.errors.InvalidArgumentError(None, None, "cuda"), ValueError("cudnn"), KeyError("x")]
)
def test_a_bug_is_not_taken_for_a_lack_of_memory(error):
    with pytest.raises(type(error)), tensorflow_errors():
        raise error


# Prints what Keras' settings change, after `unet` has set its own.
SETTINGS = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from unet import build_unet, keras
model = build_unet(16, 16, filters=2)
config = keras.config
print(model.predict(np.zeros((3, 16, 16, 1), "float32"), verbose=0).shape, {w.dtype for w in model.weights})
print(config.backend(), config.floatx(), config.epsilon(), config.image_data_format(), config.dtype_policy().name)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        ('{"image_data_format": "channels_first", "floatx": "float16", "epsilon": 0.5, "backend": "jax"}', {}),
        ('{"floatx": "bfloat16", "epsilon": 1}', {}),
        ("[]", {}),
        ('{"broken', {}),
        (None, {"KERAS_BACKEND": "jax", "KERAS_NNX_ENABLED": "true"}),
        (None, {"KERAS_BACKEND": "nonsense", "KERAS_MAX_STEPS_PER_EPOCH": "1"}),
        (None, {"KERAS_MAX_EPOCHS": "none", "KERAS_HOME": "/"}),
    ],
)
def test_keras_settings_of_other_projects_have_no_effect(tmp_path, settings, environment):
    (tmp_path / ".keras").mkdir()
    if settings is not None:
        (tmp_path / ".keras" / "keras.json").write_text(settings)
    command = [sys.executable, "-c", SETTINGS, str(Path(unet.__file__).parent)]
    environment = {**os.environ, "HOME": str(tmp_path), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        "(3, 16, 16, 1) {'float32'}",
        "tensorflow float32 1e-07 channels_last float32",
    ]
    found = {path.name: path.read_text() for path in (tmp_path / ".keras").iterdir()}
    assert found == ({} if settings is None else {"keras.json": settings})
