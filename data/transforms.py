"""Pictures in: any file or PIL image to RGB, and BLIP's training and evaluation transforms."""

import math
import os
import random
import re
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn.functional import interpolate as resize
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as BLIP
STD = (0.26862954, 0.26130258, 0.27577711)
ASPECT = math.log(4 / 3)  # crops are between 3:4 and 4:3
# White of a grey picture. The modes I and F do not tell theirs: the first of these that no pixel exceeds.
WHITE = {'I;16': (65535,), 'I;16B': (65535,), 'I;16L': (65535,), 'I;16N': (65535,), 'I': (255, 65535),
         'F': (1, 255, 65535)}


class BrokenPicture(ValueError):
    """A file that no picture can be read from.

    Attributes:
        kind: 'not a picture', 'damaged' (truncated or corrupt) or 'too large' (a decompression bomb).
    """

    def __init__(self, message: str, kind: str = 'not a picture'):
        super().__init__(message)
        self.kind = kind


def orientation(image: Image.Image) -> int:
    """EXIF's: 1 is upright, 5 to 8 lie on their side."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data raise anything: struct.error, SyntaxError ...
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> upright 8-bit RGB: EXIF applied, alpha on white, 16 bit scaled, first frame."""
    image.load()
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in WHITE:
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
        white = next((white for white in WHITE[image.mode] if pixels.max() <= white), pixels.max())
        image = Image.fromarray((pixels.clip(0) * (255 / white)).round().astype(np.uint8))
    if image.mode == 'La':  # premultiplied alpha
        image = image.convert('LA')
    if image.mode in ('RGBA', 'LA', 'PA', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image if image.mode == 'RGB' else image.convert('RGB')


def file_name(file: str | os.PathLike | BinaryIO) -> str:
    """A path, or what an open file says of its own: the attribute `name`."""
    return os.fspath(file) if isinstance(file, str | os.PathLike) else getattr(file, 'name', str(file))


@contextmanager
def opened(file: str | os.PathLike | BinaryIO):
    """A picture file as an image that is not decoded yet; an error in the block is the file's.

    Raises:
        FileNotFoundError: no such file.
        BrokenPicture: names the file (see `file_name`) and what is wrong with it.
    """
    name, kind = file_name(file), 'not a picture'
    try:
        with Image.open(file) as image:
            kind = 'damaged'
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f'no picture {name}') from None
    except Exception as error:  # a decoder may raise anything on a damaged file
        if isinstance(error, Image.DecompressionBombError | MemoryError):
            kind = 'too large'
        raise BrokenPicture(f'{name} is not a readable picture: {str(error)[:120]}', kind) from None


def open_image(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Read a picture file as upright RGB.

    Raises:
        FileNotFoundError, BrokenPicture: see `opened`.
    """
    with opened(file) as image:
        return to_rgb(image)


def open_part(file: str | os.PathLike | BinaryIO, choose: Callable, side: int) -> torch.Tensor:
    """Read a part of a picture file -> upright RGB, uint8 [3, h, w]

    Args:
        choose: from the upright picture's (height, width) to the (top, left, height, width) that are wanted.
        side: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is faster, where both sides of the part keep this
            many pixels.

    Raises:
        FileNotFoundError, BrokenPicture: see `opened`.
    """
    with opened(file) as image:
        if image.format != 'JPEG':  # of others the size may be another after decoding
            image = to_rgb(image)
        turn = orientation(image)
        width, height = image.size[::-1] if turn in (5, 6, 7, 8) else image.size
        box = choose(height, width)
        scale = next((scale for scale in (8, 4, 2) if min(box[2:]) >= scale * side), 1)
        top, left, height, width = (round(value / scale) for value in box)
        if scale == 1 and turn == 1 and image.format == 'JPEG' and image.mode == 'RGB':
            with suppress(RuntimeError):  # faster than PIL, which says better what is wrong with a file
                whole = decode_jpeg(file_bytes(image.fp), ImageReadMode.RGB)
                return whole[:, top:top + height, left:left + width]
        image.draft(None, (image.width // scale, image.height // scale))
        return F.pil_to_tensor(to_rgb(image).crop((left, top, left + width, top + height)))


def file_bytes(file: BinaryIO) -> torch.Tensor:
    file.seek(0)
    return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)


@cache
def mean_and_std(device: torch.device) -> torch.Tensor:
    """[2, 3, 1, 1] on a device, brought there once: torchvision's `normalize` does it at every call, and waits."""
    return torch.tensor([MEAN, STD], device=device)[..., None, None]


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32 of the same shape, as the vision tower takes it"""
    mean, std = mean_and_std(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB PIL image -> normalised float32 [3, H, W]"""
    return normalise(F.pil_to_tensor(image).contiguous())


MIRRORED = {'left': 'right', 'right': 'left', 'Left': 'Right', 'Right': 'Left'}


def swap_left_right(caption: str) -> str:
    """Exchange the words 'left' and 'right': the caption of the mirrored picture."""
    return re.sub(r'\b([Ll]eft|[Rr]ight)\b', lambda match: MIRRORED[match[0]], caption)


def to_square(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 [3, H, W] -> uint8 [3, side, side]"""
    pixels = pixels[None].contiguous(memory_format=torch.channels_last)  # for which the resizing is vectorised
    return resize(pixels, [side, side], mode='bicubic', antialias=True)[0]


class train_transform:
    """(what `crop` chose of a picture, caption) -> (uint8 [3, S, S], caption): resize, mirror, RandAugment.

    As BLIP, except that a mirrored picture's caption exchanges 'left' and 'right', so that it stays true. Draws from
    python's global generator. Pixels stay 8-bit until they are on the device (see `normalise`).

    Args:
        min_scale: smallest share of the area that the random crop keeps.
        randaugment: apply BLIP's RandAugment(2, 5).
    """

    def __init__(self, image_size: int, min_scale: float, randaugment: bool):
        self.image_size, self.min_scale, self.augment = image_size, min_scale, None
        if randaugment:
            from data.augment import rand_augment  # OpenCV, which only training needs
            self.augment = rand_augment

    def crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """A random part of a picture, drawn as torchvision's RandomResizedCrop does -> (top, left, height, width)"""
        for _ in range(10):
            area = height * width * random.uniform(self.min_scale, 1)
            ratio = math.exp(random.uniform(-ASPECT, ASPECT))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return random.randint(0, height - h), random.randint(0, width - w), h, w
        w, h = min(width, round(height * math.exp(ASPECT))), min(height, round(width * math.exp(ASPECT)))
        return (height - h) // 2, (width - w) // 2, h, w  # the middle of a very long picture

    def __call__(self, pixels: torch.Tensor, caption: str) -> tuple[torch.Tensor, str]:
        pixels = to_square(pixels, self.image_size)
        if random.random() < 0.5:
            pixels, caption = pixels.flip(-1), swap_left_right(caption)
        if self.augment:
            pixels = torch.from_numpy(self.augment(pixels.permute(1, 2, 0).numpy())).permute(2, 0, 1)
        return pixels, caption


class whole_transform:
    """In the place of a `train_transform`, without its randomness: the whole picture, resized, and its caption.

    Pixels are those of `eval_transform` up to rounding.
    """

    image_size = math.inf  # for `open_part`: a JPEG is decoded at its full size, as for evaluation

    def __init__(self, side: int):
        self.side = side

    def crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        return 0, 0, height, width

    def __call__(self, pixels: torch.Tensor, caption: str) -> tuple[torch.Tensor, str]:
        return to_square(pixels, self.side), caption


class eval_transform:
    """RGB PIL image -> float32 [3, S, S]: the whole picture, resized (BLIP's test transform)."""

    def __init__(self, image_size: int):
        self.size = (image_size, image_size)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return to_tensor(image.resize(self.size, Image.Resampling.BICUBIC))
