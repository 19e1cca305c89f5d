"""Pictures a second of the training transform on one core, beside BLIP's pipeline, and what each step gave.

    python -m bench.data_throughput

JPEGs of 640 x 480 from memory -> RandomResizedCrop(224, scale (0.2, 1), bicubic), mirror, RandAugment(2, 5), normalise.
BLIP's: PIL decodes, torchvision's crop resizes by PIL, RandAugment on OpenCV, ToTensor, Normalize. Then its steps are
exchanged one after the other until ours is left, as the loader runs it (seeding of each item and the caption's cleaning
included). All take turns, round by round; the ratio is the median over the rounds of the times of a round (CPU time).

The pictures are noise with the spectrum of photographs (none is at hand): what a decoder costs depends on the detail.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import io
import itertools
import random
import statistics
import time

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.io import decode_jpeg

from configs.rules import whole
from data.augment import rand_augment
from data.datasets import first_readable, seeded
from data.images import open_part
from data.transforms import MEAN, STD, TrainTransform, normalise
from utils import clean_exit

SIZE, SCALE = 224, (0.2, 1.0)


def photograph(seed: int, quality: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG whose spectrum falls with the frequency."""
    noise = np.fft.rfft2(np.random.default_rng(seed).normal(size=(3, height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    pixels = np.fft.irfft2(noise / np.maximum(frequency, 1 / width) ** 1.2, s=(height, width))
    pixels = pixels - 0.6 * (pixels - pixels.mean(0))  # channels of a photograph are alike
    pixels = 120 + 55 * (pixels - pixels.mean()) / pixels.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, 'JPEG', quality=quality)
    return file.getvalue()


# ---------------------------------------------------------------- BLIP's RandomAugment(2, 5, isPIL=True)

def blip_table(image: np.ndarray, table_of) -> np.ndarray:
    return cv2.merge([table_of(channel)[channel] for channel in cv2.split(image)])


def blip_contrast(channel: np.ndarray) -> np.ndarray:
    low, high = channel.min(), channel.max()
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255 / (high - low)
    return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)


def blip_equal(channel: np.ndarray) -> np.ndarray:
    counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).reshape(-1)
    step = counts[counts != 0][:-1].sum() // 255
    if step == 0:
        return np.arange(256, dtype=np.uint8)
    shifted = np.empty_like(counts)
    shifted[0], shifted[1:] = step // 2, counts[:-1]
    return (np.cumsum(shifted) // step).clip(0, 255).astype(np.uint8)


def blip_brightness(image: np.ndarray) -> np.ndarray:
    return (np.arange(256, dtype=np.float32) * 1.0).clip(0, 255).astype(np.uint8)[image]


def blip_sharpness(image: np.ndarray) -> np.ndarray:
    kernel = np.ones((3, 3), dtype=np.float32)
    kernel[1][1] = 5
    cv2.filter2D(image, -1, kernel / 13)  # computed, and at the factor 1.0 not used
    return image


def blip_warp(image: np.ndarray, matrix) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.warpAffine(image, np.float32(matrix), (width, height), borderValue=(128, 128, 128),
                          flags=cv2.INTER_LINEAR).astype(np.uint8)


def blip_sign() -> int:
    return -1 if np.random.random() > 0.5 else 1


BLIP = {
    'Identity': lambda image: image,
    'AutoContrast': lambda image: blip_table(image, blip_contrast),
    'Equalize': lambda image: blip_table(image, blip_equal),
    'Brightness': blip_brightness, 'Sharpness': blip_sharpness,
    'ShearX': lambda image: blip_warp(image, [[1, blip_sign() * 0.15, 0], [0, 1, 0]]),
    'ShearY': lambda image: blip_warp(image, [[1, 0, 0], [blip_sign() * 0.15, 1, 0]]),
    'TranslateX': lambda image: blip_warp(image, [[1, 0, -blip_sign() * 5], [0, 1, 0]]),
    'TranslateY': lambda image: blip_warp(image, [[1, 0, 0], [0, 1, -blip_sign() * 5]]),
    'Rotate': lambda image: blip_warp(image, cv2.getRotationMatrix2D((112, 112), blip_sign() * 15, 1)),
}


def blip_augment(image: Image.Image) -> np.ndarray:
    pixels = np.array(image)
    for name in np.random.choice(list(BLIP), 2):
        if np.random.random() <= 0.5:
            pixels = BLIP[name](pixels)
    return pixels


# ---------------------------------------------------------------- the sides

CROP = T.RandomResizedCrop(SIZE, scale=SCALE, interpolation=T.InterpolationMode.BICUBIC)
BLIPS = T.Compose([CROP, T.RandomHorizontalFlip(), blip_augment, T.ToTensor(), T.Normalize(MEAN, STD)])
OURS = TrainTransform(SIZE, SCALE[0], randaugment=True)
COUNT = itertools.count()  # items that were seeded


def blips(data: bytes) -> torch.Tensor:
    return BLIPS(Image.open(io.BytesIO(data)).convert('RGB'))


def eight_bit(data: bytes) -> torch.Tensor:
    image = CROP(Image.open(io.BytesIO(data)).convert('RGB'))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(blip_augment(image)).permute(2, 0, 1)


def our_augment(data: bytes) -> torch.Tensor:
    image = CROP(Image.open(io.BytesIO(data)).convert('RGB'))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(rand_augment(np.array(image))).permute(2, 0, 1)


def our_resize(data: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert('RGB')
    top, left, height, width = OURS.crop(image.height, image.width)
    part = np.array(image.crop((left, top, left + width, top + height)))
    return OURS(torch.from_numpy(part).permute(2, 0, 1), '')[0]


def our_decoding(data: bytes) -> torch.Tensor:
    return OURS(open_part(io.BytesIO(data), OURS.crop, SIZE), '')[0]


def whole_item(data: bytes) -> torch.Tensor:
    return first_readable([(io.BytesIO(data), 'a dog left of a cat', 0)], OURS, 30, 42, next(COUNT))['image']


SIDES = {'BLIP': blips, '8 bits until the device': eight_bit, 'RandAugment by tables, no-ops skipped': our_augment,
         'vectorised resizing of the crop (torch)': our_resize,
         'decoded by torchvision, scaled where the crop allows': our_decoding,
         'DLIP: an item of the loader': whole_item}


# ---------------------------------------------------------------- parts of it

PIXELS = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)


def seeding(data: bytes) -> None:
    with seeded(42, 3, len(data)):
        pass


PARTS = {'decoding the whole picture by PIL': lambda data: Image.open(io.BytesIO(data)).load(),
         'by torchvision': lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)),
         'normalising, now on the device': lambda data: normalise(PIXELS), 'seeding an item': seeding}


def measure(sides: dict, pictures: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Seconds of this core a picture, by side and round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            with seeded(number):
                np.random.seed(number)
                started = time.process_time()
                for data in pictures:
                    side(data)
                times[name].append((time.process_time() - started) / len(pictures))
    return {name: values[1:] for name, values in times.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=whole(1), default=60, help='(default: %(default)s)')
    parser.add_argument('--pictures', type=whole(1), default=16, help='in a round (default: %(default)s)')
    parser.add_argument('--qualities', type=whole(1), nargs='+', default=[75, 90], help='of the JPEGs (default: 75 90)')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for quality in args.qualities:
        pictures = [photograph(seed, quality) for seed in range(args.pictures)]
        times = measure(SIDES, pictures, args.rounds)
        size = statistics.mean(map(len, pictures)) / 1000
        print(f'\nJPEGs of quality {quality}, {size:.0f} kB each\n')
        print('| step | ms/image | images/s per core | BLIP / this |\n|---|---:|---:|---:|')
        for name, values in times.items():
            middle = statistics.median(values)
            ratio = statistics.median(a / b for a, b in zip(times['BLIP'], values, strict=True))
            print(f'| {name} | {middle * 1e3:.2f} | {1 / middle:.0f} | {ratio:.2f} |')
        parts = measure(PARTS, pictures, args.rounds)
        print(f'\nParts of it, quality {quality}\n\n| part | ms/image |\n|---|---:|')
        for name, values in parts.items():
            print(f'| {name} | {statistics.median(values) * 1e3:.2f} |')


if __name__ == '__main__':
    with clean_exit():
        main()
