"""The regions of an annotation in Label Studio as masks, and masks as its brush regions.

A brush region is a list of bytes, a run-length code: a bit stream with the most significant bit first. 32 bits: the
number of values, height * width * 4. 5 bits: the width of a value - 1, here always 8 - 1. Four times 4 bits: the four
widths of a length - 1. Then blocks: a flag; 2 bits, which of the four widths; the length - 1 in that width; one value
(flag 1), which is repeated, or as many values as the length says (flag 0). The values are RGBA, row by row; the mask is
the opacity. A polygon is a list of points in percent of the image's width and height.
"""

import numpy as np
from skimage.draw import polygon2mask

HEAD = 32 + 5 + 4 * 4  # bits before the first block
WIDTHS = 3, 4, 8, 16  # of a length, those of Label Studio's own encoder
LONGEST = 2**16  # a block's length


class Unreadable(ValueError):
    """Raised for a region that is not a mask; its text says why."""


def encode(mask):
    """The run-length code of a mask, bool (h, w), a list of int: 255 in all four channels where the mask is."""
    values = np.asarray(mask, bool).ravel()
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    lengths = 4 * np.diff(starts, append=values.size)
    blocks = -(-lengths // LONGEST)  # for each run
    owner = np.repeat(np.arange(len(starts)), blocks)
    last = np.cumsum(blocks) - 1
    sizes = np.full(len(owner), LONGEST)
    sizes[last] = lengths - (blocks - 1) * LONGEST
    # Each block: flag 1, width number 3 (16 bits), the length - 1, the value.
    numbers = (0b111 << 24) | (sizes - 1) << 8 | np.where(values[starts[owner]], 255, 0)
    bits = numbers[:, None] >> np.arange(26, -1, -1) & 1
    head = 4 * values.size << 21 | 7 << 16 | int("".join(f"{width - 1:04b}" for width in WIDTHS), 2)
    stream = np.concatenate([[head >> n & 1 for n in range(HEAD - 1, -1, -1)], bits.ravel()])
    return np.packbits(stream.astype(np.uint8)).tolist()


def decode(code, height, width):
    """The mask, bool (height, width), of a run-length code, a list of int. The edges of strokes from a browser are
    smooth; they are cut at one half. Raises Unreadable if the code does not fit this size."""
    try:
        content = bytes(code)
    except (TypeError, ValueError):
        raise Unreadable("its code is not a list of bytes")
    count, end = 4 * height * width, 8 * len(content)
    bits = np.unpackbits(np.frombuffer(content, np.uint8))

    def number(at, size):
        first = at >> 3
        five = int.from_bytes(content[first : first + 5].ljust(5, b"\0"), "big")
        return five >> (40 - (at & 7) - size) & ((1 << size) - 1)

    if end < HEAD or number(0, 32) != count:
        raise Unreadable(f"its code is not that of a picture of {height} rows x {width} columns")
    if number(32, 5) != 7:
        raise Unreadable("its code does not have 8 bits a value")
    widths = [number(37 + 4 * n, 4) + 1 for n in range(4)]
    values, done, at = np.empty(count, np.uint8), 0, HEAD
    while done < count:
        repeated, size = number(at, 1), widths[number(at + 1, 2)]
        length = number(at + 3, size) + 1
        at += 3 + size
        stop, after = done + length, at + (8 if repeated else 8 * length)
        if stop > count or after > end:
            raise Unreadable("its code is cut off or damaged")
        values[done:stop] = number(at, 8) if repeated else np.packbits(bits[at:after])
        done, at = stop, after
    return values[3::4].reshape(height, width) > 127


def fill(points, height, width):
    """The pixels with their centres inside a polygon, bool (height, width). points: a list of (x, y) in percent."""
    try:
        x, y = np.array(points, float).reshape(-1, 2).T
    except (TypeError, ValueError):
        raise Unreadable("its points are not pairs of numbers")
    if not np.isfinite([x, y]).all() or len(x) < 3:
        raise Unreadable("a polygon needs three points")
    return polygon2mask((height, width), np.column_stack([y * height / 100 - 0.5, x * width / 100 - 0.5]))


def join(regions, label, height, width):
    """The mask, bool (height, width), of all regions of an annotation's `result` together, a list of dict. Holes stay.

    Other controls than regions, for example a text, are left out. Raises Unreadable for a region with another label, of
    another size, or of a shape that is neither brush nor polygon."""
    mask = np.zeros((height, width), bool)
    for region in regions:
        value = region.get("value", {})
        shape = next((name for name in value if name.endswith("labels")), None)
        if shape is None:  # a text, or a region to which no label was given
            if region.get("type") not in ("textarea", "choices", "rating"):
                raise Unreadable(f"a region has no label; give it the label {label}")
            continue
        if shape not in ("brushlabels", "polygonlabels"):
            raise Unreadable(f"a region of the kind {shape}; use the brush or the polygon")
        if value[shape] != [label]:
            raise Unreadable(f"a region has the label {', '.join(map(str, value[shape]))}, not {label}")
        size = region.get("original_height"), region.get("original_width")
        if size != (height, width) or region.get("image_rotation"):
            raise Unreadable(f"a region was drawn on an image of {size[0]}x{size[1]}, or a turned one")
        mask |= decode(value.get("rle"), height, width) if "rle" in value else fill(value.get("points"), height, width)
    return mask
