"""Images without weights: colours and edges of a 4 x 4 grid, and how often each brightness of a colour occurs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from marsjax.features.signature import Encoded, Encoder, Options

SIDE = 64  # pixels that an image is shrunk to
GRID = 4
LEVELS = 8  # of each colour
ANGLES = 8  # of edges, without a sign
WIDTH = GRID * GRID * (3 + 3 + ANGLES) + 3 * LEVELS
BATCH = 256


def make_colour(options: Options, images: Sequence[Any]) -> Encoder:
    """Means and deviations of the colours of each cell, shares of its edges by direction (weighed by their strength:
    Dalal and Triggs, Histograms of oriented gradients, 2005, without overlapping blocks), and colour histograms.

    All numbers are between 0 and 1.
    """
    facts = {
        "encoder": "colour",
        "revision": "1",  # of this file: a change of what it computes is another encoder
        "pooling": f"{GRID} x {GRID} cells of {SIDE} x {SIDE} pixels",
        "normalisation": "none, values in 0..1",
    }

    def encode(batch: Sequence[Any]) -> Encoded:
        return Encoded(np.stack([_describe(image) for image in batch]), np.zeros(len(batch), bool))

    return Encoder(WIDTH, options.batch or BATCH, facts, encode)


def _describe(image: Any) -> np.ndarray:
    """[F] float32 of one RGB image."""
    pixel_YXC = np.asarray(image.resize((SIDE, SIDE), resample=2), np.float32) / 255  # 2: bilinear, with averaging
    cell_GPC = _cells(pixel_YXC)
    grey_YX = pixel_YXC.mean(axis=2)
    slope_YX, slant_YX = np.gradient(grey_YX)
    strength_YX = np.hypot(slope_YX, slant_YX)
    angle_YX = np.minimum((np.arctan2(slope_YX, slant_YX) % np.pi / np.pi * ANGLES).astype(int), ANGLES - 1)
    edge_YXA = strength_YX[..., None] * (angle_YX[..., None] == np.arange(ANGLES))
    edge_GA = _cells(edge_YXA).sum(axis=1)
    edge_GA = edge_GA / (edge_GA.sum(axis=1, keepdims=True) + 1.0)  # a flat cell has none, not noise blown up
    level_YXC = np.minimum((pixel_YXC * LEVELS).astype(int), LEVELS - 1)
    level_CL = (level_YXC.reshape(-1, 3, 1) == np.arange(LEVELS)).mean(axis=0)
    parts = (cell_GPC.mean(axis=1), cell_GPC.std(axis=1), edge_GA, level_CL)
    return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


def _cells(value_YXC: np.ndarray) -> np.ndarray:
    """[side, side, C] -> [cells, pixels of a cell, C]."""
    step = SIDE // GRID
    value = value_YXC.reshape(GRID, step, GRID, step, -1).swapaxes(1, 2)
    return value.reshape(GRID * GRID, step * step, -1)
