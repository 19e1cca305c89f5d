"""Pictures in: any file or PIL image to RGB, and BLIP's training and evaluation transforms."""

import math
import os
import random
import re
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as BLIP
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = InterpolationMode.BICUBIC
# White of a grey picture. The modes I and F do not tell theirs: the first of these that no pixel exceeds.
WHITE = {'I;16': (65535,), 'I;16B': (65535,), 'I;16L': (65535,), 'I;16N': (65535,), 'I': (255, 65535),
         'F': (1, 255, 65535)}


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> upright 8-bit RGB: EXIF applied, alpha on white, 16 bit scaled, first frame."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data raise anything (struct.error, SyntaxError), as broken pixels do
        image.load()
    if image.mode in WHITE:
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
        white = next((white for white in WHITE[image.mode] if pixels.max() <= white), pixels.max())
        image = Image.fromarray((pixels.clip(0) * (255 / white)).round().astype(np.uint8))
    if image.mode == 'La':  # premultiplied alpha
        image = image.convert('LA')
    if image.mode in ('RGBA', 'LA', 'PA', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def open_image(file: str | os.PathLike | BinaryIO, min_size: int | None = None) -> Image.Image:
    """Read a picture file as upright RGB.

    Args:
        min_size: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster, so long as both sides keep
            this many pixels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or not a picture; names the file.
    """
    try:
        with Image.open(file) as image:
            if min_size:
                image.draft(None, (min_size, min_size))
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f'no picture {file}') from None
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ValueError(f'{file} is not a readable picture: {str(error)[:120]}') from None


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB PIL image -> normalised float32 [3, H, W]"""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return F.normalize(pixels, MEAN, STD, inplace=True)


MIRRORED = {'left': 'right', 'right': 'left', 'Left': 'Right', 'Right': 'Left'}


def swap_left_right(caption: str) -> str:
    """Exchange the words 'left' and 'right': the caption of the mirrored picture."""
    return re.sub(r'\b([Ll]eft|[Rr]ight)\b', lambda match: MIRRORED[match[0]], caption)


class train_transform:
    """(RGB PIL image, caption) -> (float32 [3, S, S], caption): random crop, mirror, RandAugment, normalise.

    As BLIP, except that a mirrored picture's caption exchanges 'left' and 'right', so that it stays true. Draws from
    python's and torch's global generators.

    Args:
        min_scale: smallest share of the area that the random crop keeps.
        randaugment: apply BLIP's RandAugment(2, 5).

    Attributes:
        min_size: pixels that both sides of a picture need so that no crop is enlarged (see `open_image`).
    """

    def __init__(self, image_size: int, min_scale: float, randaugment: bool):
        self.crop = RandomResizedCrop(image_size, scale=(min_scale, 1.0), interpolation=BICUBIC, antialias=True)
        self.randaugment = randaugment
        self.min_size = math.ceil(image_size / math.sqrt(0.75 * min_scale))  # crops are at most 4:3

    def __call__(self, image: Image.Image, caption: str) -> tuple[torch.Tensor, str]:
        image = self.crop(image)
        if random.random() < 0.5:
            image, caption = ImageOps.mirror(image), swap_left_right(caption)
        if self.randaugment:
            image = rand_augment(image)
        return to_tensor(image), caption


class eval_transform:
    """RGB PIL image -> float32 [3, S, S]: the whole picture, resized (BLIP's test transform)."""

    def __init__(self, image_size: int):
        self.size = (image_size, image_size)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return to_tensor(image.resize(self.size, Image.Resampling.BICUBIC))


class plain_transform(eval_transform):
    """(RGB PIL image, caption) -> (float32 [3, S, S], caption): `eval_transform` in place of a `train_transform`."""

    min_size = None  # decoded at full size, as in evaluation

    def __call__(self, image: Image.Image, caption: str) -> tuple[torch.Tensor, str]:
        return super().__call__(image), caption


# BLIP's ten operations at its magnitude 5 of 10: half of 0.3, 10 pixels and 30 degrees. Its formula for brightness and
# sharpness, 0.1 + 1.8 * magnitude / 10, gives 1.0 there, which changes nothing.
GREY = (128, 128, 128)
SHEAR, TRANSLATE, ROTATE, ENHANCE = 0.15, 5, 15, 1.0


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def sign() -> int:
    return random.choice((-1, 1))


OPERATIONS = {
    'Identity': lambda image: image,
    'AutoContrast': ImageOps.autocontrast,
    'Equalize': ImageOps.equalize,
    'Brightness': lambda image: ImageEnhance.Brightness(image).enhance(ENHANCE),
    'Sharpness': lambda image: ImageEnhance.Sharpness(image).enhance(ENHANCE),
    'ShearX': lambda image: affine(image, 1, sign() * SHEAR, 0, 0, 1, 0),
    'ShearY': lambda image: affine(image, 1, 0, 0, sign() * SHEAR, 1, 0),
    'TranslateX': lambda image: affine(image, 1, 0, sign() * TRANSLATE, 0, 1, 0),
    'TranslateY': lambda image: affine(image, 1, 0, 0, 0, 1, sign() * TRANSLATE),
    'Rotate': lambda image: image.rotate(sign() * ROTATE, Image.Resampling.BILINEAR, fillcolor=GREY),
}


def rand_augment(image: Image.Image, count: int = 2) -> Image.Image:
    """Apply `count` of BLIP's operations, each drawn uniformly, with probability 1/2 each (BLIP's RandAugment)."""
    for name in random.choices(list(OPERATIONS), k=count):
        if random.random() < 0.5:
            image = OPERATIONS[name](image)
    return image
