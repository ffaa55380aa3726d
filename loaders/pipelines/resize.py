"""Bicubic resizing of uint8 images: Pillow's pixels to the bit, at a ninth of its time.

Pillow resizes along rows and rounds to uint8, then along columns; weights are whole multiples of 2^-22. Here both are
one loop over whole rows, which becomes vector instructions: the image is transposed before and after the first. This is
Pillow up to version 12, as for published numbers; 13 goes along columns first for some sizes.
"""

import functools
from typing import NamedTuple, Tuple

import cv2
import numpy as np

from lib.extension import jit

_BITS = 22  # of the weights' fraction
_RADIUS = 2.0  # of the cubic, pixels of the smaller image
_SHARPNESS = -0.5  # the cubic's parameter


class Taps(NamedTuple):
    """Where the pixels of a resized line come from.

    first    int32 [n], first pixel of the source that pixel n is made of
    weights  int32 [n, k], multiples of 2^-22, of the pixels from there on; zeros past the last
    """

    first: np.ndarray
    weights: np.ndarray

    def of(self, start: int, stop: int) -> 'Taps':
        """Those of a stretch of the resized line."""
        return Taps(self.first[start:stop], self.weights[start:stop])

    def span(self) -> Tuple[int, int]:
        """First pixel of the source that is needed, and the one after the last."""
        used = np.arange(self.weights.shape[1]) * (self.weights != 0)
        return int(self.first[0]), int((self.first + used.max(1)).max()) + 1


@functools.lru_cache(maxsize=1024)
def bicubic_taps(length: int, resized: int) -> Taps:
    """A line of ``length`` pixels resized to ``resized``; the cubic widens where it shrinks. Not to be written to."""
    scale = length / resized
    widened = max(scale, 1.0)
    centres = (np.arange(resized) + 0.5) * scale
    first = np.maximum((centres - _RADIUS * widened + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + _RADIUS * widened + 0.5).astype(np.int64), length)
    places = first[:, None] + np.arange((last - first).max())
    weights = _cubic((places - centres[:, None] + 0.5) * (1.0 / widened)) * (places < last[:, None])
    weights = weights * (1.0 / weights.cumsum(axis=1)[:, -1:])  # added up one after the other, as Pillow does
    fixed = np.trunc(weights * (1 << _BITS) + np.copysign(0.5, weights))
    return Taps(first.astype(np.int32), fixed.astype(np.int32))


def _cubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), _SHARPNESS
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < _RADIUS, far, 0.0))


def resize_window(
    image: np.ndarray, resized: Tuple[int, int], rows: Tuple[int, int], columns: Tuple[int, int]
) -> np.ndarray:
    """Part of a resized image; only what it is made of is looked at.

    Args:
        image: uint8 [H, W, C].
        resized: (height, width) of the whole image after resizing.
        rows, columns: (start, stop) of the part, within the resized image.

    Returns:
        uint8 [stop - start of rows, stop - start of columns, C], contiguous.
    """
    down = bicubic_taps(image.shape[0], resized[0]).of(*rows)
    across = bicubic_taps(image.shape[1], resized[1]).of(*columns)
    top, bottom = down.span()
    turned = _blend(cv2.transpose(np.ascontiguousarray(image[top:bottom])), across)
    return _blend(cv2.transpose(turned), Taps(down.first - top, down.weights))


def compile_resizing() -> None:
    """Get the loop ready, in a process whose workers then need not.

    Raises:
        UserError: Numba cannot be used.
    """
    resize_window(np.zeros((2, 2, 3), dtype=np.uint8), (2, 2), (0, 2), (0, 2))


def _blend(image: np.ndarray, taps: Taps) -> np.ndarray:
    """uint8 [L, M, C] -> [n, M, C]: every row of the result is a weighted sum of rows."""
    result = np.empty((len(taps.first),) + image.shape[1:], dtype=np.uint8)
    _compiled()(image.reshape(len(image), -1), taps.first, taps.weights, result.reshape(len(result), -1))
    return result


@functools.lru_cache(maxsize=None)
def _compiled():
    """The loop; compiled when a pipeline asks for it, so that importing this needs no Numba."""
    return jit(_blend_rows)


def _blend_rows(rows, first, weights, result):
    """Row n of ``result`` = sum over k of weights[n, k] * rows[first[n] + k], rounded and limited to 0..255.

    Args:
        rows: uint8 [L, M].
        first: int32 [n].
        weights: int32 [n, k], multiples of 2^-22; those of rows that are not there are zeros.
        result: uint8 [n, M], written to.
    """
    last, taps = len(rows) - 1, weights.shape[1]
    sums = np.empty(rows.shape[1], dtype=np.int32)
    for n in range(len(first)):
        sums[:] = 1 << (_BITS - 1)
        for k in range(0, taps, 3):  # three rows a pass: the sums are read and written less often
            place = first[n] + k
            a, b, c = rows[min(place, last)], rows[min(place + 1, last)], rows[min(place + 2, last)]
            weight_a = weights[n, k]
            weight_b = weights[n, k + 1] if k + 1 < taps else np.int32(0)
            weight_c = weights[n, k + 2] if k + 2 < taps else np.int32(0)
            for i in range(len(sums)):
                sums[i] += weight_a * a[i] + weight_b * b[i] + weight_c * c[i]
        for i in range(len(sums)):
            result[n, i] = min(max(sums[i] >> _BITS, 0), 255)
