"""Whatever a user calls an image -> an upright RGB PIL image, or one clear error."""

import io
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile

from data.images import FORMATS, MEMORY, is_machines, least_scale, open_image
from data.rgb import first_white, to_rgb
from data.scan import list_images
from utils import shorten

ACCEPTED = ('a PIL image, a numpy array (H, W) or (H, W, 1|3|4), a torch tensor (1|3|4, H, W), a path, '
            'bytes, an open file, or a list of these')
FLOAT_SLACK = 1e-3  # resampling in float overshoots [0, 1] a little


def find_images(folder: str | os.PathLike, exclude: Sequence[str] = ()) -> list[str]:
    """The image files of a folder and the folders in it, by their names' endings, in order.

    Hidden and system files are left out; links are followed, each image is listed once. What is passed over is counted
    in the log.

    Args:
        exclude: patterns such as `*.gif` or `old/*`: files and folders are left out whose name, or path within the
            folder, is of this form.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    listed = list_images(folder)
    found = [path for path in listed if not is_excluded(os.path.relpath(path, folder), exclude)]
    if not found:
        raise FileNotFoundError(f'no images in the folder {shorten(Path(folder))}'
                                f'{f" but the {len(listed)} that are excluded" if listed else ""}')
    return found


def is_excluded(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path, or a folder that it leads through, has a name or a path of one of these forms."""
    parts = os.path.normpath(path).split(os.sep)
    names = {*parts, *(os.sep.join(parts[:i]) for i in range(1, len(parts) + 1))}
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def named_images(images) -> Iterator[tuple[str, object]]:
    """One image, or a list, tuple or iterator of them -> (name for messages, image), not yet opened.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(images, list | tuple | Iterator) or hasattr(images, 'read'):  # a file iterates over its lines
        yield 'image', images
        return
    i = -1
    for i, image in enumerate(images):
        yield f'images[{i}]', image
    if i < 0:
        raise ValueError('the list of images is empty: pass at least one image')


def read_image(image, name: str = 'image', bgr: bool = False, memory: float = MEMORY) -> Image.Image:
    """Open one image: any PIL mode, EXIF orientation applied, transparency on white, first frame.

    Args:
        image: PIL image; numpy (H, W) or (H, W, 1|3|4) of uint8, uint16 or float in [0, 1]; torch tensor
            (1|3|4, H, W) of the same kinds; path (str or os.PathLike); encoded file as bytes; file opened for reading
            bytes.
        name: what to call it in an error.
        bgr: numpy arrays are BGR or BGRA, as OpenCV reads them.
        memory: GiB that decoding may take; a larger image is reduced to 1/2, 1/4 or 1/8 where that suffices.

    Raises:
        TypeError: a kind of object or a dtype that no image has.
        ValueError: an image by its kind, but missing, damaged, empty, misshaped, out of range or too large.
        MemoryError, OSError: the machine is out of memory or file handles.
    """
    if isinstance(image, Image.Image):
        return decode(image, name, memory)
    if isinstance(image, torch.Tensor):
        return array_image(tensor_array(image, name), name)
    if isinstance(image, np.ndarray):
        return array_image(image, name, bgr)
    if isinstance(image, str | os.PathLike):
        return open_path(os.fsdecode(image), name, memory)
    if isinstance(image, bytes | bytearray | memoryview):
        return open_image(io.BytesIO(image), memory, f'{name} ({memoryview(image).nbytes} bytes)')
    if isinstance(image, io.TextIOBase):
        raise TypeError(f'{name} is a file that is opened as text: open it with mode "rb"')
    if hasattr(image, 'read'):
        return open_image(image, memory, name)
    raise TypeError(f'{name} is not an image but {kind(image)}: pass {ACCEPTED}')


def decode(image: Image.Image, name: str, memory: float) -> Image.Image:
    if not all(image.size):
        raise ValueError(f'{name} is empty: {image.width} x {image.height} pixels')
    if isinstance(image, ImageFile.ImageFile) and image.format not in (*FORMATS, 'MPO'):
        raise ValueError(f'{name} is an opened {image.format} file, a format that may run programs as it is decoded: '
                         f'pass image.copy() if you trust it')
    try:
        rgb = to_rgb(image, least_scale(image, memory))
        if image.mode == 'F' and not np.isfinite(image.getextrema()).all():
            raise ValueError('it holds NaN or infinite pixels')
        return rgb
    except Exception as error:  # pixels are read late, and a decoder may raise anything on a damaged file
        if is_machines(error):
            raise
        said = 'is too large' if getattr(error, 'kind', '') == 'too large' else 'is truncated or damaged'
        raise ValueError(f'{name} {said}: {error}') from error


def open_path(path: str, name: str, memory: float) -> Image.Image:
    if path.lower().startswith(('http://', 'https://')):
        raise ValueError(f'{name} is the address {shorten(path, 400)}: nothing is fetched from the network, download '
                         f'the file and pass its path')
    if os.path.isdir(path):
        raise ValueError(f'{name} is the folder {shorten(path, 400)}: pass the paths of its images')
    if not os.path.exists(path):
        raise ValueError(f'{name}: no such file {shorten(path, 400)}')
    return open_image(path, memory, path if name == path else f'{name} ({shorten(path, 400)})')


def tensor_array(tensor: torch.Tensor, name: str) -> np.ndarray:
    """(C, H, W) of any device -> (H, W, C)"""
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise ValueError(f'{name} has the shape {tuple(tensor.shape)}: a tensor must be (1|3|4, H, W)'
                         f'{", pass list(batch) for a batch" if tensor.ndim == 4 else ""}')
    try:
        tensor = tensor.detach().cpu().movedim(0, -1)
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise TypeError(f'{name} is a tensor without plain pixels ({tensor.layout}, {tensor.dtype}, {tensor.device}): '
                        f'pass a dense one') from None


def array_image(array: np.ndarray, name: str, bgr: bool = False) -> Image.Image:
    """(H, W) or (H, W, 1|3|4) of uint8, uint16 or float in [0, 1] -> 8-bit RGB PIL image

    16 bits that hold no value above 16383 (4095, 1023, 255) are taken for 14 (12, 10, 8) bits, as in files.
    """
    if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise ValueError(f'{name} has the shape {array.shape}: an array must be (H, W) or (H, W, 1|3|4)'
                         f'{", pass list(batch) for a batch" if array.ndim == 4 else ""}')
    if array.size == 0:
        raise ValueError(f'{name} is empty: its shape is {array.shape}')
    if np.issubdtype(array.dtype, np.uint16):
        array = np.rint(array.astype(np.float32) * (255 / first_white(array.max())))
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
    return to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def kind(item) -> str:
    """A short description of an object for a message."""
    return 'None' if item is None else f'of type {type(item).__name__} ({repr(item)[:40]})'
