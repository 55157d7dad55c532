"""A picture brought to another grid exactly: every new pixel is the mean of the field it covers, to a fraction of a pixel.

    out[j] = sum over k of w[j, k] in[k],    w[j, k] = length of [a_j, a_j + step] within [k, k + 1], over step

for both axes in turn, with a_j = start + j step. Where pixels are magnified (step < 1) they are interpolated linearly.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image
from scipy.sparse import csr_array

CLOSE_PX = 1e-4
"""Two places this near, in pixels, are one: far below what can be seen, far above how micrometres round."""


def resample(
    pixels: UInt8[np.ndarray, "h w 3"], start: tuple[float, float], step: tuple[float, float], size: tuple[int, int]
) -> UInt8[np.ndarray, "new_h new_w 3"]:
    """`size` (width, height) new pixels from `start` on, each `step` old ones wide; pixel k covers k to k + 1."""
    (x, across), (y, down) = (_settled(*axis) for axis in zip(start, step, size, strict=True))
    if all(number == int(number) for number in (x, y, across, down)):
        return _whole(pixels, (int(x), int(y)), (int(across), int(down)), size)
    height, width, _ = pixels.shape
    rows = _weights(height, y, down, size[1]) @ pixels.reshape(height, -1).astype(np.float32)
    columns = _weights(width, x, across, size[0]) @ _turned(rows.reshape(size[1], width, 3)).reshape(width, -1)
    rounded = (columns + np.float32(0.5)).astype(np.uint8)
    return _turned(rounded.reshape(size[0], size[1], 3))


def _whole(
    pixels: UInt8[np.ndarray, "h w 3"], start: tuple[int, int], step: tuple[int, int], size: tuple[int, int]
) -> UInt8[np.ndarray, "new_h new_w 3"]:
    """Where new pixels are whole blocks of old ones: a third of the time, as Pillow has it in C."""
    right, bottom = start[0] + size[0] * step[0], start[1] + size[1] * step[1]
    field = np.ascontiguousarray(pixels[start[1] : bottom, start[0] : right])
    return field if step == (1, 1) else np.asarray(Image.fromarray(field).reduce(step))


def _turned(pixels: Shaped[np.ndarray, "a b 3"]) -> Shaped[np.ndarray, "b a 3"]:
    """Rows for columns; moving three colours as one thing takes numpy half the time of moving each."""
    together = np.dtype((np.void, 3 * pixels.itemsize))
    turned = np.ascontiguousarray(pixels.view(together)[..., 0].T)
    return turned.view(pixels.dtype).reshape(*turned.shape, 3)


def _settled(start: float, step: float, count: int) -> tuple[float, float]:
    """Whole numbers where they are meant: an end that would be off by less than CLOSE_PX is not off."""
    whole = round(step)
    if abs(step - whole) * count < CLOSE_PX:
        step = float(whole)
    return (float(round(start)) if abs(start - round(start)) < CLOSE_PX else start), step


@lru_cache(maxsize=256)  # tiles of one slide share a few grids, and a tile's two axes often one
def _weights(length: int, start: float, step: float, count: int) -> csr_array:
    places, shares = (_averaging if step >= 1 else _interpolating)(start, step, count)
    kept = (shares > 0) & (places >= 0) & (places < length)
    rows = np.broadcast_to(np.arange(count)[:, None], places.shape)
    return csr_array((shares[kept].astype(np.float32), (rows[kept], places[kept])), shape=(count, length))


def _averaging(start: float, step: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    begins = start + step * np.arange(count)[:, None]
    places = np.floor(begins).astype(np.int64) + np.arange(int(np.ceil(step)) + 1)
    within = np.minimum(begins + step, places + 1) - np.maximum(begins, places)
    return places, np.maximum(within, 0) / step


def _interpolating(start: float, step: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    centres = start + step * (np.arange(count)[:, None] + 0.5) - 0.5
    first = np.floor(centres)
    share = centres - first
    return first.astype(np.int64) + np.arange(2), np.concatenate([1 - share, share], axis=1)
