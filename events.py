"""TensorBoard events of a run, which --tensorboard writes to RUN/tensorboard/.

The viewer is not needed for writing: `pip install tensorboard`, then `tensorboard --logdir runs`.
"""

import io

import numpy as np
from PIL import Image

from devices import tf
from report import draw_outline
from run_folder import HISTORY
from utils import read_csv

EXAMPLES = 4  # images whose masks are shown
Metadata = tf.compat.v1.SummaryMetadata


def write(tag, value, step, plugin, kind):
    """Write what a plugin of TensorBoard shows; tf.summary's own functions for it need TensorBoard."""
    about = Metadata(plugin_data=Metadata.PluginData(plugin_name=plugin), data_class=f"DATA_CLASS_{kind}")
    tf.summary.write(tag, value, step, about)


class Events:
    """Takes the steps and iterations of a run. An interrupted training repeats its last steps, with the same values."""

    BUFFER = 100  # steps: the loss is fetched from the device after so many

    def __init__(self, run, examples):
        """examples: positions, of which the first EXAMPLES are shown."""
        self.writer = tf.summary.create_file_writer(str(run / "tensorboard"))
        self.examples, self.steps = examples[:EXAMPLES], []

    def step(self, number, loss, rate):
        """Take the loss, a scalar tensor, and the learning rate of a training step. number: since the run began."""
        self.steps.append((number, loss, rate))
        if len(self.steps) == self.BUFFER:
            self.write_steps()

    def write_steps(self):
        """Write the steps taken."""
        with self.writer.as_default():
            for number, loss, rate in self.steps:
                write("training/loss", tf.cast(loss, tf.float32), number, "scalars", "SCALAR")
                write("training/learning_rate", tf.constant(rate, tf.float32), number, "scalars", "SCALAR")
        self.writer.flush()
        self.steps = []

    def iteration(self, row, folder, trainer):
        """Write the row of history.csv, a histogram of the scores in the iteration's folder, and the examples' masks by
        the Trainer's network."""
        self.write_steps()
        number = int(row["iteration"])
        with self.writer.as_default():
            for name in HISTORY[1:]:
                if row[name]:
                    write(f"history/{name}", tf.constant(float(row[name])), number, "scalars", "SCALAR")
            if (folder / "scores.csv").exists():
                scores = [float(row["uncertainty"]) for row in read_csv(folder / "scores.csv")]
                counts, edges = np.histogram(scores, 30)
                bins = np.stack([edges[:-1], edges[1:], counts], axis=1)
                write("pool/scores", tf.constant(bins), number, "histograms", "TENSOR")
            if len(self.examples):
                write_pictures(trainer, self.examples, number)
        self.writer.flush()


def write_pictures(trainer, positions, step):
    """Write each image with the outline of its predicted mask, and of the true one, dashed, if there is one."""
    dataset, predicted = trainer.dataset, trainer.predict(positions) > 0.5
    for n, position in enumerate(positions):
        pixels = dataset.images([position])[0]
        values = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).repeat(2, 0).repeat(2, 1)  # TensorBoard smooths
        if dataset.has_mask[position]:
            draw_outline(values, dataset.masks([position])[0].repeat(2, 0).repeat(2, 1) > 0, (255, 255, 0), True)
        draw_outline(values, predicted[n].repeat(2, 0).repeat(2, 1), (0, 255, 255), False)
        Image.fromarray(values).save(file := io.BytesIO(), "PNG")
        height, width = values.shape[:2]
        picture = tf.constant([str(width), str(height), file.getvalue()])
        write(f"examples/{n}", picture, step, "images", "BLOB_SEQUENCE")
