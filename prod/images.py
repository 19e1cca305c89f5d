"""Whatever a user calls an image -> an upright RGB PIL image, or one clear error."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.transforms import to_rgb

ACCEPTED = ('a PIL image, a numpy array (H, W) or (H, W, 1|3|4), a torch tensor (1|3|4, H, W), a path, '
            'bytes, or a list of these')
FLOAT_SLACK = 1e-3  # resampling in float overshoots [0, 1] a little


def find_pictures(folder: str | os.PathLike) -> list[str]:
    """The picture files of a folder and the folders in it, by their names' endings, in order.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'no folder {str(folder)!r}')
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(str(path) for path in Path(folder).rglob('*') if path.suffix.lower() in endings and path.is_file())
    if not found:
        raise FileNotFoundError(f'no pictures in the folder {str(folder)!r}')
    return found


def named_images(images) -> Iterator[tuple[str, object]]:
    """One image, or a list, tuple or iterator of them -> (name for messages, image), not yet opened.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(images, list | tuple | Iterator):
        yield 'image', images
        return
    i = -1
    for i, image in enumerate(images):
        yield f'images[{i}]', image
    if i < 0:
        raise ValueError('the list of images is empty: pass at least one image')


def read_image(image, name: str = 'image', bgr: bool = False) -> Image.Image:
    """Open one image: any PIL mode, EXIF orientation applied, transparency on white, first frame.

    Args:
        image: PIL image; numpy (H, W) or (H, W, 1|3|4) of uint8, uint16 or float in [0, 1]; torch tensor
            (1|3|4, H, W) of the same kinds; path (str or os.PathLike); encoded file as bytes.
        name: what to call it in an error.
        bgr: numpy arrays are BGR or BGRA, as OpenCV reads them.

    Raises:
        TypeError: a kind of object or a dtype that no image has.
        ValueError: an image by its kind, but missing, damaged, empty, misshaped or out of range.
    """
    if isinstance(image, Image.Image):
        return decode(image, name)
    if isinstance(image, torch.Tensor):
        return decode(array_image(tensor_array(image, name), name), name)
    if isinstance(image, np.ndarray):
        return decode(array_image(image, name, bgr), name)
    if isinstance(image, str | os.PathLike):
        return open_path(os.fsdecode(image), name)
    if isinstance(image, bytes | bytearray | memoryview):
        return open_file(io.BytesIO(image), f'{name} ({len(image)} bytes)')
    raise TypeError(f'{name} is not an image but {kind(image)}: pass {ACCEPTED}')


def decode(image: Image.Image, name: str) -> Image.Image:
    if not all(image.size):
        raise ValueError(f'{name} is empty: {image.width} x {image.height} pixels')
    try:
        if image.mode == 'F' and not np.isfinite(np.asarray(image)).all():
            raise ValueError('it holds NaN or infinite pixels')
        return to_rgb(image)
    except Exception as error:  # pixels are read late, and a decoder may raise anything on a damaged file
        raise ValueError(f'{name} is truncated or damaged: {error}') from error


def open_path(path: str, name: str) -> Image.Image:
    if path.lower().startswith(('http://', 'https://')):
        raise ValueError(f'{name} is the address {path!r}: nothing is fetched from the network, download '
                         f'the file and pass its path')
    if os.path.isdir(path):
        raise ValueError(f'{name} is the folder {path!r}: pass the paths of its pictures')
    if not os.path.isfile(path):
        raise ValueError(f'{name}: no such file {path!r}')
    return open_file(path, f'{name} ({path!r})')


def open_file(file: str | io.BytesIO, name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except Exception as error:  # no picture, a bomb, no permission, or what a decoder stumbles over
        raise ValueError(f'{name} is not a readable picture: {error}') from error
    with image:
        return decode(image, name)


def tensor_array(tensor: torch.Tensor, name: str) -> np.ndarray:
    """(C, H, W) of any device -> (H, W, C)"""
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise ValueError(f'{name} has the shape {tuple(tensor.shape)}: a tensor must be (1|3|4, H, W)'
                         f'{", pass list(batch) for a batch" if tensor.ndim == 4 else ""}')
    tensor = tensor.detach().cpu().movedim(0, -1)
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16


def array_image(array: np.ndarray, name: str, bgr: bool = False) -> Image.Image:
    """(H, W) or (H, W, 1|3|4) of uint8, uint16 or float in [0, 1] -> 8-bit PIL image"""
    if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise ValueError(f'{name} has the shape {array.shape}: an array must be (H, W) or (H, W, 1|3|4)'
                         f'{", pass list(batch) for a batch" if array.ndim == 4 else ""}')
    if array.size == 0:
        raise ValueError(f'{name} is empty: its shape is {array.shape}')
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) + 128) // 257
    elif np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f'{name} holds NaN or infinite pixels')
        if low < -FLOAT_SLACK or high > 1 + FLOAT_SLACK:
            raise ValueError(f'{name} holds values from {low:.3g} to {high:.3g}: float pixels must lie in '
                             f'[0, 1], not in [0, 255] and not normalised')
        array = np.rint(array.clip(0, 1) * 255)
    elif array.dtype != np.uint8:
        raise TypeError(f'{name} is of {array.dtype}: pixels must be uint8, uint16 or float in [0, 1]')
    array = array.astype(np.uint8)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if bgr and array.ndim == 3:
        array = array[..., [2, 1, 0, 3][:array.shape[2]]]
    return Image.fromarray(np.ascontiguousarray(array))


def kind(item) -> str:
    """A short description of an object for a message."""
    return 'None' if item is None else f'of type {type(item).__name__} ({repr(item)[:40]})'
