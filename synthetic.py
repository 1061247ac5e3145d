"""Draws synthetic dermoscopy images with exact masks, for the demo and the tests, and artefacts onto photographs, for
training. Nothing here knows files."""

import numpy as np
from scipy import fft, ndimage

# Pigment reduces light by exp(-density * absorbance), so that one range of densities suits every skin tone.
BROWN = np.array([0.50, 0.95, 1.20], "f4")
BLACK, BLUE, RED, PALE = np.array([[1.7, 1.8, 1.9], [1.3, 1.0, 0.7], [0.2, 0.9, 0.8], [0.1, 0.3, 0.3]], "f4")
LIGHT_SKIN, DARK_SKIN, HAIR = np.array([[238, 200, 186], [112, 74, 60], [60, 42, 35]], "f4")
STICKERS = np.array([[40, 90, 190], [240, 200, 50], [60, 150, 90], [225, 120, 50], [120, 60, 140]], "f4")
FAINT_SHARE = 0.13


def smooth_noise(rng, height, width, decay):
    """Noise (height, width) of mean 0 and deviation 1, with an amplitude proportional to frequency ** -decay."""
    frequency = min(height, width) * np.hypot(fft.fftfreq(height)[:, None], fft.rfftfreq(width))
    amplitude = (np.maximum(frequency, 1.0) ** -decay * (frequency > 0)).astype("f4")
    noise = fft.irfft2(fft.rfft2(rng.standard_normal((height, width), "f4")) * amplitude, (height, width))
    return noise / noise.std()


def disc(y, x, radius, softness):
    """Opacity of a round spot at the origin; lengths are fractions of the short side."""
    return np.clip(0.5 + (radius - np.hypot(y, x)) / softness, 0, 1)


def draw_mask(rng, y, x, hidden):
    """One irregular blob that covers 1 % to 60 % of the picture and avoids hidden pixels."""
    cy, cx = rng.normal(0, rng.choice([0.2, 0.45], p=[0.8, 0.2]), 2).clip(-0.8, 0.8) * [y.max(), x.max()]
    angles, order = np.linspace(-np.pi, np.pi, 256), np.arange(2, 9)[:, None]
    phase, weight = rng.uniform(0, 2 * np.pi, (7, 1)), rng.normal(0, rng.uniform(0.1, 0.55), (7, 1))
    outline = (weight / order**1.3 * np.cos(order * angles + phase)).sum(0)
    if rng.random() < 0.2:  # a notch, as in a regressing lesion
        outline -= rng.uniform(0.3, 0.7) * np.exp(-(((angles - rng.uniform(-2, 2)) / 0.25) ** 2))
    # In log radius the shape of the outline and its roughness do not depend on the lesion's size.
    level = np.log(np.hypot(y - cy, x - cx) + 1e-3) - np.interp(np.arctan2(y - cy, x - cx), angles, outline)
    level += rng.uniform(0.02, 0.1) * smooth_noise(rng, *y.shape, 1.4)
    level[hidden] = np.inf
    parts, _ = ndimage.label(level <= np.quantile(level, 0.012 + 0.58 * rng.beta(1.0, 2.5)))
    # Roughness may leave separate parts and holes, but annotators outline a single region.
    return ndimage.binary_fill_holes(parts == np.bincount(parts.ravel())[1:].argmax() + 1) & ~hidden


def pigment(rng, mask):
    """Optical density (height, width, 3) of a lesion of several colours, from almost invisible to nearly black."""
    density = rng.uniform(0.02, 0.05) if rng.random() < FAINT_SHARE else 0.08 + 1.5 * rng.beta(1.2, 2.0)
    hue = BROWN * rng.uniform(0.85, 1.15, 3).astype("f4")
    for patch in rng.choice([BLACK, BLUE, RED, PALE], rng.integers(0, 4), p=[0.4, 0.2, 0.2, 0.2]):
        extent = 1 / (1 + np.exp(4 * (rng.uniform(0, 1) - smooth_noise(rng, *mask.shape, 1.9))))
        hue = hue + rng.uniform(0.4, 0.9) * extent[..., None] * (patch - hue)
    texture = np.exp(rng.uniform(0.1, 0.35) * smooth_noise(rng, *mask.shape, rng.uniform(0.9, 1.6)))
    # Only the image is softened. The mask keeps the sharp outline, around which the pigment fades.
    edge = ndimage.gaussian_filter(mask.astype("f4"), min(mask.shape) * rng.choice([0.006, 0.01, 0.025]))
    return (density * texture * edge)[..., None] * hue


def draw_hairs(rng, height, width):
    """Opacity of 0 to 39 thin curved hairs."""
    strokes, short = np.zeros((height, width), "f4"), min(height, width)
    t = np.linspace(0, 1, 2 * short)[:, None]
    for _ in range(rng.choice([0, rng.integers(1, 8), rng.integers(8, 40)], p=[0.45, 0.35, 0.2])):
        heading = rng.uniform(0, 2 * np.pi) + np.array([0, rng.normal(0, 0.4)])
        first, last = rng.uniform(0.2, 0.6) * short * np.stack([np.sin(heading), np.cos(heading)], axis=1)
        path = rng.uniform(-0.1, 1.1, 2) * [height, width] + 2 * t * first + t**2 * (last - first)
        rows, columns = path[((path >= 0) & (path < [height, width])).all(1)].astype(int).T
        strokes[rows, columns] = 1
    thickness = max(0.45, short * rng.uniform(0.003, 0.006))
    return np.clip(2.5 * thickness * ndimage.gaussian_filter(strokes, thickness, truncate=3), 0, 1)


def draw_ruler(rng, image):
    """Draw the dark tick marks of a ruler along one edge of the image, in place."""
    side, short = np.rot90(image, rng.integers(4)), min(image.shape[:2])
    thickness, margin = max(1, round(0.006 * short)), int(rng.uniform(0, 0.04) * short)
    for tick, at in enumerate(np.arange(0, side.shape[1], rng.uniform(0.035, 0.07) * short).astype(int)):
        length = int((0.05 if tick % 5 else 0.09) * short)
        side[margin : margin + length, at : at + thickness] *= 0.3


def draw_lesion(rng, height, width):
    """Draw a dermoscopy-like image, uint8 (height, width, 3), and its exact mask, uint8 0/1 (height, width)."""
    y, x = np.indices((height, width), "f4") / min(height, width)
    y, x = y - y.mean(), x - x.mean()
    field, sticker = np.ones_like(y), np.zeros_like(y)
    if rng.random() < 0.25:  # dark corners of the dermatoscope
        field = disc(y, x, np.hypot(y.max(), x.max()) * rng.uniform(0.78, 0.93), 0.06)
    if rng.random() < 0.12:
        cy, cx = rng.choice([-1, 1], 2) * [y.max(), x.max()] * rng.uniform(0.75, 1)
        sticker = disc(y - cy, x - cx, rng.uniform(0.1, 0.25), 0.01)
    mask = draw_mask(rng, y, x, hidden=(field < 0.5) | (sticker > 0.5))
    skin = LIGHT_SKIN + rng.beta(1.0, 2.0) * (DARK_SKIN - LIGHT_SKIN) + rng.normal(0, 5, 3).astype("f4")
    redness = rng.uniform(0, 0.05) * smooth_noise(rng, height, width, 1.5)[..., None] * RED
    light = 1 + rng.normal(0, 0.1) * y + rng.normal(0, 0.1) * x - rng.uniform(0, 0.3) * (y**2 + x**2)
    image = skin * light[..., None] * np.exp(-redness - pigment(rng, mask))
    image += sticker[..., None] * (rng.choice(STICKERS) - image)
    if rng.random() < 0.25:
        draw_ruler(rng, image)
    image += 0.85 * draw_hairs(rng, height, width)[..., None] * (HAIR * rng.uniform(0.5, 1.5) - image)
    image *= 0.06 + 0.94 * field[..., None]
    image += rng.uniform(1, 4) * rng.standard_normal(image.shape, "f4")
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


# ------------------------------------------------------------------------------------------- artefacts on photographs

PENS = np.array([[95, 60, 150], [60, 70, 160], [40, 40, 60]], "f4")
HIDDEN = 0.05  # the share of a lesion that an artefact may hide


def draw_bar(rng, height, width):
    """Opacity of a thin straight bar with end marks, as engraved in the glass of some dermatoscopes."""
    strokes, short = np.zeros((height, width), "f4"), min(height, width)
    angle, length = rng.choice([0.0, rng.uniform(-np.pi, np.pi)]), rng.uniform(0.25, 0.6) * short
    along, across = np.array([np.sin(angle), np.cos(angle)]), np.array([np.cos(angle), -np.sin(angle)])
    start = rng.uniform(0.05, 0.95, 2) * [height, width] - along * length / 2
    t = np.linspace(0, 1, 2 * short)[:, None]
    ends = [start + at * length * along + (t - 0.5) * 0.04 * short * across for at in (0, 1)]
    path = np.concatenate([start + t * length * along, *ends])
    rows, columns = path[((path >= 0) & (path < [height, width])).all(1)].astype(int).T
    strokes[rows, columns] = 1
    return np.clip(2 * ndimage.gaussian_filter(strokes, 0.004 * short, truncate=3), 0, 1)


def draw_pen(rng, y, x):
    """Opacity of a pen's stroke, a part of a wavy circle around the lesion. y, x: as for `disc`."""
    angle, distance = np.arctan2(y, x), np.hypot(y, x)
    radius = rng.uniform(0.3, 0.7) * (1 + 0.1 * np.cos(rng.integers(2, 5) * angle + rng.uniform(0, 2 * np.pi)))
    drawn = np.abs((angle - rng.uniform(-np.pi, np.pi)) % (2 * np.pi) - np.pi) < rng.uniform(0.3, np.pi)
    uneven = np.clip(0.8 + 0.4 * smooth_noise(rng, *y.shape, 0.8), 0, 1)
    return np.clip(0.5 + (rng.uniform(0.01, 0.03) - np.abs(distance - radius)) / 0.02, 0, 1) * drawn * uneven


def draw_bubbles(rng, y, x):
    """Opacity of 1 to 11 bright rings."""
    rings = np.zeros_like(y)
    for _ in range(rng.integers(1, 12)):
        cy, cx = rng.uniform(-1, 1, 2) * [y.max(), x.max()]
        edge = np.abs(np.hypot(y - cy, x - cx) - rng.uniform(0.01, 0.07))
        rings = np.maximum(rings, np.clip(1 - edge / 0.012, 0, 1))
    return rng.uniform(0.3, 0.7) * rings


def draw_artefacts(rng, image, mask):
    """Draw some artefacts of real photographs onto an image, uint8 (height, width, C). Returns the new image.

    mask: bool (height, width). What would hide more than HIDDEN of the lesion is left out, so that the mask stays
    true; hairs and bubbles may cross it."""
    (height, width, channels), image = image.shape, image.astype("f4")
    y, x = np.indices((height, width), "f4") / min(height, width)
    y, x = y - y.mean(), x - x.mean()

    def put(opacity, colour, share=1.0, anywhere=False):
        if anywhere or not mask.any() or (opacity[mask] > 0.5).mean() <= HIDDEN:
            colour = colour if channels == 3 else np.dot(colour, [0.299, 0.587, 0.114])
            image[:] += share * opacity[..., None] * (np.asarray(colour, "f4") - image)

    if rng.random() < 0.25:
        put(draw_pen(rng, y, x), rng.choice(PENS), rng.uniform(0.3, 0.9))
    if rng.random() < 0.2:
        cy, cx = rng.choice([-1, 1], 2) * [y.max(), x.max()] * rng.uniform(0.6, 1, 2)
        put(disc(y - cy, x - cx, rng.uniform(0.1, 0.3), 0.01), rng.uniform(0, 255, 3))
    if rng.random() < 0.2:
        put(draw_bar(rng, height, width), np.full(3, rng.uniform(0, 70)), 0.8)
    if rng.random() < 0.2:
        draw_ruler(rng, image)
    put(draw_hairs(rng, height, width), HAIR * rng.uniform(0.3, 2.5), 0.85, anywhere=True)
    if rng.random() < 0.15:
        put(draw_bubbles(rng, y, x), np.full(3, 250), anywhere=True)
    if rng.random() < 0.3:
        cy, cx = rng.normal(0, 0.04, 2)
        field = disc(y - cy, x - cx, np.hypot(y.max(), x.max()) * rng.uniform(0.6, 0.95), rng.choice([0.03, 0.1, 0.3]))
        put(1 - field, np.full(3, rng.uniform(0, 40)))
    return image.clip(0, 255).astype(np.uint8)
