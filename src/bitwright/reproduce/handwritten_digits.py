"""The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels: real images small enough to train on in a minute."""

from __future__ import annotations

from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import BitwrightError

TESTED = 450


def handwritten_digits(seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels from 0 to 1 (1797, 64) and labels, in an order of the seed; the first `TESTED` are for tests.

    Raises BitwrightError without scikit-learn.
    """
    try:
        load_digits = import_module("sklearn.datasets").load_digits
    except ImportError:
        raise BitwrightError("The digits come with scikit-learn; run: pip install 'bitwright[digits]'") from None
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    return (pixels[order] / 16).astype(np.float32), labels[order].astype(np.int64)
