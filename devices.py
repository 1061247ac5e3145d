"""The devices that TensorFlow computes on: importing it quietly, which ones are used, XLA, and its errors.

Nothing here knows networks or data.
"""

import contextlib
import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from utils import UserError, in_one_line, print_warning


@contextlib.contextmanager
def silent_stderr():
    """Discard all output to the process's stderr, also from C libraries. Exceptions are raised as usual."""
    try:
        kept = os.dup(2)
    except OSError:  # a service may have no stderr
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # set it to 0 to see all that TensorFlow says
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # otherwise it takes the whole memory of every GPU
# The Keras settings of other projects must have no effect: those in the environment, and those in ~/.keras/keras.json,
# which Keras does not find here.
for name in [name for name in os.environ if name.startswith("KERAS_")]:
    del os.environ[name]
os.environ |= {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}
with silent_stderr():  # TensorFlow prints its first messages at any log level
    import keras
    import tensorflow as tf

if keras.config.backend() != "tensorflow":
    raise UserError(f"Keras is in use here with {keras.config.backend()}; restart Python and repeat the command")
# For a notebook that has changed them.
keras.config.set_floatx("float32")
keras.config.set_epsilon(1e-7)
keras.config.set_image_data_format("channels_last")
keras.config.set_dtype_policy("float32")


# --------------------------------------------------------------------------------------------------- what there is


def about_tensorflow():
    """TensorFlow's version, the devices that it found, and the first GPU's name and memory in bytes, a dict."""
    # The module gives the version, because the package may be called tensorflow-cpu.
    about = {"tensorflow": tf.__version__, "devices": [device.name for device in tf.config.list_physical_devices()]}
    if gpus := tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpus[0])
        about |= {"gpu": details.get("device_name"), "gpu_memory": gpu_memory()}
    return about


def use_devices(devices="one"):
    """Choose the devices, `one` GPU or `all`, before TensorFlow takes any of them; print what there is and, in a
    sentence each, why a GPU is not used and why the first steps on one may take long."""
    names = [name.removeprefix("/physical_device:") for name in about_tensorflow()["devices"]]
    print(f"TensorFlow {tf.__version__} found {', '.join(names)}", flush=True)
    gpus = tf.config.list_physical_devices("GPU")
    if devices == "one" and len(gpus) > 1:
        with contextlib.suppress(RuntimeError):  # TensorFlow is in use already, in a notebook
            tf.config.set_visible_devices(gpus[0], "GPU")
            print("one of these GPUs is used; the others stay free")
    for note in (why_no_gpu(), why_a_slow_start()):
        if note:
            print(note, flush=True)


WORDS_ABOUT_GPUS = "cuda", "gpu", "cudnn", "driver", "dlopen"  # in TensorFlow's log
PCI_DEVICES = Path("/sys/bus/pci/devices")


def why_no_gpu():
    """A sentence that says why TensorFlow finds no GPU although there is one of NVIDIA's, or None."""
    if tf.config.list_physical_devices("GPU") or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if not any(is_nvidia_gpu(device) for device in PCI_DEVICES.glob("*")):
        return None
    # In a process of its own, because this one has imported TensorFlow without its log.
    script = "import tensorflow as tf; tf.config.list_physical_devices('GPU')"
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"}
    try:
        command = [sys.executable, "-c", script]
        log = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        log = ""
    lines = [line.split("] ", 1)[-1] for line in log.splitlines()]
    said = [line.strip() for line in lines if any(word in line.lower() for word in WORDS_ABOUT_GPUS)]
    reason = f" ({'; '.join(dict.fromkeys(said))[:600]})" if said else ""
    return (
        f"this machine has an NVIDIA GPU, but TensorFlow cannot use it{reason}: install NVIDIA's driver, and CUDA with "
        "pip install 'tensorflow[and-cuda]'; all goes on on the processor"
    )


def is_nvidia_gpu(device):
    """Whether a folder of PCI_DEVICES is that of a graphics processor of NVIDIA."""
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == "0x10de" and kind.startswith("0x03")


def why_a_slow_start():
    """A sentence for a GPU for which this TensorFlow has no machine code, or None."""
    for gpu in tf.config.get_visible_devices("GPU"):
        capability = tf.config.experimental.get_device_details(gpu).get("compute_capability")
        built = tf.sysconfig.get_build_info().get("cuda_compute_capabilities", [])
        if capability and not has_machine_code(capability, built):
            return (
                "this TensorFlow has no machine code for this GPU (compute capability "
                f"{capability[0]}.{capability[1]}): the driver compiles it at first use, which can take minutes, and "
                "keeps it"
            )
    return None


def has_machine_code(capability, built):
    """Whether code for one of `built`, such as sm_80, runs on a GPU of this compute capability, (major, minor)."""
    numbers = [int(name.removeprefix("sm_").rstrip("af")) for name in built if name.startswith("sm_")]
    return not built or any(n // 10 == capability[0] and n % 10 <= capability[1] for n in numbers)


def gpu_memory():
    """The memory of the first GPU in bytes; 0 if it is unknown. It costs no memory there, unlike asking TensorFlow."""
    device, size = ctypes.c_int(), ctypes.c_size_t()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
        return 0 if failed or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device) else size.value
    except (OSError, AttributeError):
        return 0


# ----------------------------------------------------------------------------------------------------- a GPU's own ways


def on_gpu():
    """Whether the work is done on a GPU: with batches of one size, images in its memory and, where it pays, XLA."""
    return bool(tf.config.get_visible_devices("GPU"))


def compiled(function, what, xla, **options):
    """A tf.function, compiled by XLA if `xla`. If XLA cannot compile it, the work goes on without, after a warning.
    what: a name for people; options: for tf.function."""
    plain = tf.function(function, **options)
    if not xla:
        return plain
    chosen, lock, called = [tf.function(function, jit_compile=True, **options)], threading.Lock(), []

    def first_call(arguments):
        started = time.monotonic()
        print(f"XLA compiles the {what}: once a start, up to a minute", flush=True)
        try:
            result = chosen[0](*arguments)
        except tf.errors.OpError as error:
            if lacks_memory(error):
                raise
            chosen[0] = plain
            reason = re.sub(r"__inference\S*", "", in_one_line(error)).split(" [[")[0]
            print_warning(f"XLA cannot compile the {what} ({reason[:300]}): going on without it, more slowly")
            result = plain(*arguments)
        else:
            print(f"... in {time.monotonic() - started:.0f} s", flush=True)
        called.append(True)
        return result

    def call(*arguments):
        if not called:
            with lock:  # other threads wait, so that nothing is compiled twice
                if not called:
                    return first_call(arguments)
        return chosen[0](*arguments)

    return call


def share_out(strategy, *batch):
    """Split each array of the batch among the strategy's devices; the shares differ by at most one image."""
    devices = strategy.num_replicas_in_sync
    if devices == 1:
        return batch
    edges = [len(batch[0]) * device // devices for device in range(devices + 1)]

    def share(values):
        def of_device(context):
            device = context.replica_id_in_sync_group
            return tf.constant(values[edges[device] : edges[device + 1]])

        return strategy.experimental_distribute_values_from_function(of_device)

    return tuple(map(share, batch))


# ------------------------------------------------------------------------------------------------- TensorFlow's errors


FREE_MEMORY = "end other programs that use memory (nvidia-smi lists those on a GPU), and give the same command again"
GPU_LIBRARIES = "dnn", "blas", "cuda", "ptxas", "convolution algorithm", "no algorithm worked"  # in error messages
ON_CPU = "or compute on the processor: put CUDA_VISIBLE_DEVICES=-1 before the command"


def lacks_memory(error):
    """Whether one of TensorFlow's errors means that there is not enough memory."""
    short = isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError))
    return short or any(words in str(error).lower() for words in ("out of memory", "out_of_memory", "failed to alloc"))


@contextlib.contextmanager
def tensorflow_errors(remedy=FREE_MEMORY):
    """Turn TensorFlow's errors about memory and a GPU's libraries into a UserError. remedy: for lack of memory."""
    try:
        yield
    except tf.errors.InvalidArgumentError:
        raise
    except (tf.errors.OpError, MemoryError) as error:
        text, reason = str(error).lower(), in_one_line(error)
        if lacks_memory(error):
            raise UserError(f"there is not enough memory; {remedy}")
        if "libdevice" in text:
            raise UserError(f"CUDA's libdevice is missing ({reason}); pip install 'tensorflow[and-cuda]', {ON_CPU}")
        if any(part in text for part in GPU_LIBRARIES):
            raise UserError(
                f"the GPU's libraries failed ({reason}); end other programs on the GPU (nvidia-smi lists them), or "
                f"install the libraries anew (pip install 'tensorflow[and-cuda]'), {ON_CPU}"
            )
        raise
