"""BLIP's RandAugment(2, 5): its ten operations at its strength, on images as OpenCV has them (uint8 [H, W, 3])."""

import random
from collections.abc import Callable

import cv2
import numpy as np

cv2.setNumThreads(0)  # the loader's processes share the cores already

# Magnitude 5 of 10: half of 0.3, 10 pixels and 30 degrees. BLIP's formula for brightness and sharpness,
# 0.1 + 1.8 * magnitude / 10, gives the factor 1.0 there, which changes nothing.
GREY = (128, 128, 128)
SHEAR, TRANSLATE, ROTATE = 0.15, 5, 15
VALUES = np.arange(256)


def sign() -> int:
    return random.choice((-1, 1))


def warp(image: np.ndarray, matrix) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.warpAffine(image, np.asarray(matrix, float), (width, height), borderValue=GREY)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    height, width = image.shape[:2]
    return warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1))


def by_tables(image: np.ndarray, table: Callable) -> np.ndarray:
    """Replace the values of each channel by `table` of its histogram (256 counts)."""
    counts = (cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel() for channel in range(3))
    return cv2.LUT(image, np.stack([table(count).clip(0, 255).astype(np.uint8) for count in counts], axis=-1)[None])


def contrast_table(counts: np.ndarray) -> np.ndarray:
    """The darkest value becomes 0, the lightest 255."""
    low, high = np.flatnonzero(counts)[[0, -1]]
    return (VALUES - low) * (255 / (high - low)) if high > low else VALUES


def equal_table(counts: np.ndarray) -> np.ndarray:
    """Every value becomes as frequent as the others."""
    step = counts[counts > 0][:-1].sum() // 255
    return np.cumsum([step // 2, *counts[:-1]]) // step if step else VALUES


def same(image: np.ndarray) -> np.ndarray:
    return image


OPERATIONS = {
    'Identity': same,
    'AutoContrast': lambda image: by_tables(image, contrast_table),
    'Equalize': lambda image: by_tables(image, equal_table),
    'Brightness': same,
    'Sharpness': same,
    'ShearX': lambda image: warp(image, [[1, sign() * SHEAR, 0], [0, 1, 0]]),
    'ShearY': lambda image: warp(image, [[1, 0, 0], [sign() * SHEAR, 1, 0]]),
    'TranslateX': lambda image: warp(image, [[1, 0, sign() * TRANSLATE], [0, 1, 0]]),
    'TranslateY': lambda image: warp(image, [[1, 0, 0], [0, 1, sign() * TRANSLATE]]),
    'Rotate': lambda image: rotate(image, sign() * ROTATE),
}


def rand_augment(image: np.ndarray, count: int = 2) -> np.ndarray:
    """Apply `count` of the operations, each drawn uniformly, with probability 1/2 each; uint8 [H, W, 3] in and out."""
    for name in random.choices(list(OPERATIONS), k=count):
        if random.random() < 0.5:
            image = OPERATIONS[name](image)
    return image
