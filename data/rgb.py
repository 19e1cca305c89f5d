"""A PIL image of any mode to upright 8-bit RGB."""

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image

BAND = 1 << 22  # pixels that are converted at a time
# White of integers beyond 8 bits, where the file does not say: the first that none exceeds
WHITE = (255, 1023, 4095, 16383, 65535)
HDR = 64  # floats whose brightest are between 1 and this are taken for high dynamic range, above it for 0 to 255
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF orientation -> what makes the image upright
ORIENTATION, BITS, PHOTOMETRIC, MAX_SAMPLE, SAMPLE_FORMAT = 274, 258, 262, 281, 339  # TIFF tags
SIGNED = 2  # a value of the last one


def exif_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block; 1 (upright) if it holds none that makes sense. Reads nothing else of it."""
    while exif.startswith(b'Exif\0\0'):  # some writers put it twice
        exif = exif[6:]
    order = {b'II': '<', b'MM': '>'}.get(exif[:2])
    if order:
        with suppress(struct.error):
            first, = struct.unpack_from(order + 'I', exif, 4)
            count, = struct.unpack_from(order + 'H', exif, first)
            for place in range(first + 2, first + 2 + 12 * count, 12):
                tag, kind = struct.unpack_from(order + 'HH', exif, place)
                if tag == ORIENTATION and kind in (1, 3, 4):  # the unsigned integers
                    value, = struct.unpack_from(order + {1: 'B', 3: 'H', 4: 'I'}[kind], exif, place + 8)
                    return value if value in TURNS else 1
    return 1


def orientation(image: Image.Image) -> int:
    """EXIF's: 1 is upright, 5 to 8 lie on their side."""
    exif = image.info.get('exif')
    if isinstance(exif, bytes):
        return exif_orientation(exif)
    with suppress(Exception):  # Pillow's reader raises anything on broken data
        value = image.getexif().get(ORIENTATION)
        return value if isinstance(value, int) and value in TURNS else 1
    return 1


def to_rgb(image: Image.Image, scale: int = 1) -> Image.Image:
    """PIL image of any mode -> upright 8-bit RGB: EXIF applied, alpha on white, deep pixels scaled, first frame.

    Args:
        scale: divides the sides, so that a large image takes less memory.
    """
    image.load()
    turn, tags = orientation(image), getattr(image, 'tag_v2', {})
    levels = levels_of(image, tags) if is_deep(image) else None
    if scale == 1 and (image.width * image.height <= BAND or image.mode == 'RGB' and 'transparency' not in image.info):
        rgb = as_rgb(image, levels)
    else:
        rgb = Image.new('RGB', (-(-image.width // scale), -(-image.height // scale)))
        for top, band in bands(image, scale):
            band = as_rgb(band, levels)
            rgb.paste(band.reduce(scale) if scale > 1 else band, (0, top // scale))
    if turn in TURNS:
        rgb = rgb.transpose(TURNS[turn])
        rgb.info = {}  # which says that it lies on its side
    return rgb


def is_deep(image: Image.Image) -> bool:
    """Whether it is grey with more than 8 bits."""
    return image.mode in ('I', 'F') or image.mode.startswith('I;16')


def bands(image: Image.Image, scale: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """(top, part of the full width) of an image, each of some multiple of `scale` rows"""
    rows = max(BAND // image.width // scale, 1) * scale
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


class Levels(NamedTuple):
    """How to read a deep grey image.

    Attributes:
        white: the value that is white.
        inverted: 0 is white, and this value is black.
        unsigned: 32 bits without a sign, which Pillow takes for signed ones.
    """

    white: float
    inverted: bool
    unsigned: bool

    def values(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image)
        return pixels.view(np.uint32) if self.unsigned else pixels


def levels_of(image: Image.Image, tags: dict) -> Levels:
    """By what an image's file says and, where it says nothing, by its pixels."""
    bits, signed = (int(np.ravel(tags.get(tag, 0))[0]) for tag in (BITS, SAMPLE_FORMAT))
    # WhiteIsZero, which Pillow heeds for 8 bits only
    levels = Levels(0, tags.get(PHOTOMETRIC) == 0, image.mode == 'I' and bits == 32 and signed != SIGNED)
    white = white_level(image, levels, tags, bits)
    return levels._replace(white=min(white, 2 ** 15 - 1) if bits == 16 and signed == SIGNED else white)


def white_level(image: Image.Image, levels: Levels, tags: dict, bits: int) -> float:
    declared = np.ravel(tags.get(MAX_SAMPLE, 2 ** bits - 1 if 8 < bits < 16 else 0))[0]
    stride = max(1, image.width * image.height // BAND)
    parts = (levels.values(band).ravel() for _, band in bands(image))
    if image.mode == 'F':  # resampling overshoots, and highlights may be of any value: the brightest but 0.5%
        brightest = np.percentile(np.concatenate([np.nan_to_num(part[::stride]) for part in parts]), 99.5) / 1.02
        if brightest < HDR:
            return max(1.0, brightest)
    else:
        brightest = max(int(part.max()) for part in parts)
    return declared if declared and brightest <= declared else first_white(brightest)


def first_white(brightest: float) -> float:
    """The least of the usual whites that the brightest pixel does not exceed."""
    return next((white for white in WHITE if brightest <= white), brightest)


def as_rgb(image: Image.Image, levels: Levels | None) -> Image.Image:
    if levels:
        pixels = np.nan_to_num(levels.values(image).astype(np.float32)) * np.float32(255 / levels.white)
        pixels = pixels.clip(0, 255).round().astype(np.uint8)
        return Image.fromarray(255 - pixels if levels.inverted else pixels).convert('RGB')
    if image.mode == 'La':  # premultiplied alpha
        image = image.convert('LA')
    if image.mode in ('RGBA', 'LA', 'PA', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image if image.mode == 'RGB' else image.convert('RGB')
