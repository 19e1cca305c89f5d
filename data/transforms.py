"""BLIP's training and evaluation transforms."""

import math
import random
import re
from functools import cache

import torch
from PIL import Image
from torch.nn.functional import interpolate as resize
from torchvision.transforms import functional as F

from data.images import MEMORY

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as BLIP
STD = (0.26862954, 0.26130258, 0.27577711)
ASPECT = math.log(4 / 3)  # crops are between 3:4 and 4:3


@cache
def mean_and_std(device: torch.device) -> torch.Tensor:
    """[2, 3, 1, 1] on a device, brought there once: torchvision's `normalize` does it at every call, and waits."""
    return torch.tensor([MEAN, STD], dtype=torch.float32, device=device)[..., None, None]


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32 of the same shape, as the vision tower takes it"""
    mean, std = mean_and_std(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB PIL image -> normalised float32 [3, H, W]"""
    return normalise(F.pil_to_tensor(image).contiguous())


MIRRORED = {'left': 'right', 'right': 'left', 'Left': 'Right', 'Right': 'Left'}


def swap_left_right(caption: str) -> str:
    """Exchange the words 'left' and 'right': the caption of the mirrored image."""
    return re.sub(r'\b([Ll]eft|[Rr]ight)\b', lambda match: MIRRORED[match[0]], caption)


def to_square(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 [3, H, W] -> uint8 [3, side, side]"""
    pixels = pixels[None].contiguous(memory_format=torch.channels_last)  # for which the resizing is vectorised
    return resize(pixels, [side, side], mode='bicubic', antialias=True)[0]


class TrainTransform:
    """(what `crop` chose of an image, caption) -> (uint8 [3, S, S], caption): resize, mirror, RandAugment.

    As BLIP, except that a mirrored image's caption exchanges 'left' and 'right', so that it stays true. Draws from
    python's global generator. Pixels stay 8-bit until they are on the device (see `normalise`).

    Args:
        min_scale: smallest share of the area that the random crop keeps.
        randaugment: apply BLIP's RandAugment(2, 5).
        memory: GiB that decoding one image may take (see `data.images`).
    """

    def __init__(self, image_size: int, min_scale: float, randaugment: bool, memory: float = MEMORY):
        self.image_size, self.min_scale, self.memory, self.augment = image_size, min_scale, memory, None
        if randaugment:
            from data.augment import rand_augment  # OpenCV, which only training needs
            self.augment = rand_augment

    def crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """A random part of an image, drawn as torchvision's RandomResizedCrop does -> (top, left, height, width)"""
        for _ in range(10):
            area = height * width * random.uniform(self.min_scale, 1)
            ratio = math.exp(random.uniform(-ASPECT, ASPECT))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return random.randint(0, height - h), random.randint(0, width - w), h, w
        w, h = min(width, round(height * math.exp(ASPECT))), min(height, round(width * math.exp(ASPECT)))
        return (height - h) // 2, (width - w) // 2, h, w  # the middle of a very long image

    def __call__(self, pixels: torch.Tensor, caption: str) -> tuple[torch.Tensor, str]:
        pixels = to_square(pixels, self.image_size)
        if random.random() < 0.5:
            pixels, caption = pixels.flip(-1), swap_left_right(caption)
        if self.augment:
            pixels = torch.from_numpy(self.augment(pixels.permute(1, 2, 0).numpy())).permute(2, 0, 1)
        return pixels, caption


class WholeTransform:
    """In the place of a `TrainTransform`, without its randomness: the whole image, resized, and its caption.

    Pixels are those of `EvalTransform` up to rounding.
    """

    image_size = math.inf  # for `open_part`: a JPEG is decoded at its full size, as for evaluation

    def __init__(self, side: int, memory: float = MEMORY):
        self.side, self.memory = side, memory

    def crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        return 0, 0, height, width

    def __call__(self, pixels: torch.Tensor, caption: str) -> tuple[torch.Tensor, str]:
        return to_square(pixels, self.side), caption


class EvalTransform:
    """RGB PIL image -> float32 [3, S, S]: the whole image, resized (BLIP's test transform)."""

    def __init__(self, image_size: int, memory: float = MEMORY):
        self.size, self.memory = (image_size, image_size), memory

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return to_tensor(image.resize(self.size, Image.Resampling.BICUBIC))
