"""Image files and PIL images of any kind to upright 8-bit RGB: the one place where an image file is opened.

Only raster formats are opened (`FORMATS`), by what a file holds and not by its name: Pillow's other readers include one
that runs Ghostscript. Of a file with several frames or pages the first is read. Of the metadata only EXIF's
orientation counts, not XMP's: the others are cut out of JPEG and PNG files or left unread, so that broken or very large
ones do no harm.
"""

import errno
import io
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as F

from data.folders import open_regular
from data.rgb import ORIENTATION, SAMPLE_FORMAT, SIGNED, orientation, to_rgb
from utils import shorten

FORMATS = ('JPEG', 'PNG', 'GIF', 'WEBP', 'AVIF', 'HEIF', 'TIFF', 'JPEG2000', 'BMP', 'PPM', 'ICO', 'TGA')
HEIF_BRANDS = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'hevm', b'hevs', b'mif1', b'msf1')
MEMORY = 1.0  # GiB that decoding one image may take
# Bytes per pixel that decoding takes beside Pillow's image, at most (measured with Pillow 12), and of its image
DECODER_BYTES = {'WEBP': 13, 'AVIF': 10, 'HEIF': 12, 'JPEG2000': 24, 'TIFF': 8}  # of TIFF: compressed ones
MODE_BYTES = {'1': 1, 'L': 1, 'P': 1, 'I;16': 2, 'I;16L': 2, 'I;16B': 2, 'I;16N': 2}  # all others: 4
READ_WHOLE = ('JPEG', 'PNG', 'WEBP', 'AVIF', 'HEIF')  # formats whose files are held in memory
UNKNOWN_PIXELS = 'unknown pixel mode'  # Pillow's words
END = b'\xff\xd9'  # of a JPEG file
MACHINE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # errors that are not the file's


class BrokenImage(ValueError):
    """A file that no image can be read from.

    Attributes:
        kind: 'not an image', 'damaged' (truncated or corrupt) or 'too large' (decoding it takes too much memory).
    """

    def __init__(self, message: str, kind: str = 'not an image'):
        super().__init__(message)
        self.kind = kind


# ---------------------------------------------------------------- metadata

def plain_jpeg(data: bytes) -> tuple[bytes, bytes, bool, int]:
    """A JPEG file -> (the file without metadata, its EXIF block, whether it has several scans, where the first begins)

    Pillow refuses a file for what stands in its metadata. What cannot be followed is left as it is.
    """
    kept, exif, scans, components, at = [data[:2]], b'', False, 0, 2
    with suppress(struct.error, IndexError):
        while data[at] == 0xFF:
            marker, = struct.unpack_from('>H', data, at)
            if marker == 0xFFFF or marker == 0xFF01 or 0xFFD0 <= marker <= 0xFFD8:  # padding, and markers alone
                kept.append(data[at:at + (1 if marker == 0xFFFF else 2)])
                at += len(kept[-1])
                continue
            size, = struct.unpack_from('>H', data, at + 2)
            segment = data[at:at + 2 + size]
            if marker == 0xFFDA:  # start of scan
                scans |= segment[4] < components
                break
            if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):  # start of frame
                components, scans = segment[9], marker in (0xFFC2, 0xFFCA)
            if marker == 0xFFE1 and segment[4:10] == b'Exif\0\0':
                exif = exif or segment[4:]
            if marker in (0xFFE0, 0xFFEE):  # JFIF's and Adobe's tell the colour space, where they are whole
                needed = size >= (16 if marker == 0xFFE0 else 14)
            else:
                needed = marker != 0xFFFE and marker & 0xFFF0 != 0xFFE0  # neither a comment nor APPn
            if needed:
                kept.append(segment)
            at += 2 + size
    head = b''.join(kept)
    return head + data[at:], exif, scans, len(head)


def end_jpeg(image: Image.Image) -> None:
    """Add the end marker to an opened JPEG file that lacks nothing else: what then stands before it plays no part."""
    data = image.fp.getvalue()
    if data.rfind(END, image.info['scan']) >= 0:
        return
    data, looks = data.rstrip(b'\xff'), []
    for more in (b'', bytes([0b10101010]) * 64):
        with readers()['JPEG'][0](io.BytesIO(data + more + END), '') as look:
            look.draft(None, (look.width // 8, look.height // 8))
            looks.append(look.tobytes())
    if looks[0] == looks[1]:
        image.fp.seek(len(data))
        image.fp.write(END)


def plain_png(data: bytes) -> bytes:
    """A PNG file with the chunks alone that its pixels and orientation need; transparency and orientation only if they
    are undamaged, as browsers take them."""
    kept, at, clear = [data[:8]], 8, {0: 2, 2: 6}.get(data[25] if len(data) > 25 else 0)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at:at + 4], 'big')
        kind = data[at + 4:at + 8]
        if kind in (b'IHDR', b'PLTE', b'IDAT', b'IEND') or kind in (b'tRNS', b'eXIf') and \
                crc32(data[at + 4:end - 4]).to_bytes(4, 'big') == data[end - 4:end] and \
                (kind == b'eXIf' or end - at - 12 == clear or not clear):
            kept.append(data[at:end])
        at = end if kind != b'IEND' else len(data)
    return b''.join(kept)


def forget_tags(image: Image.Image) -> None:
    """Take everything but the orientation out of a TIFF's EXIF data, which Pillow goes through as it decodes."""
    image.info.pop('xmp', None)
    with suppress(Exception):
        exif = image.getexif()
        for tag in [tag for tag in exif if tag != ORIENTATION]:
            del exif[tag]


# ---------------------------------------------------------------- opening

def file_name(file: str | os.PathLike | BinaryIO) -> str:
    """A path, or what an open file says of its own: the attribute `name`."""
    return os.fsdecode(file) if isinstance(file, str | os.PathLike) else str(getattr(file, 'name', file))


@cache
def readers() -> dict[str, tuple[Callable, Callable | None]]:
    """Format -> Pillow's (reader, test of a file's first bytes), of those formats that can be read here."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener
        register_heif_opener()
    return {kind: Image.OPEN[kind] for kind in FORMATS if kind in Image.OPEN}


def identified(file: BinaryIO, memory: float) -> Image.Image:
    """An open file as an image that is not decoded yet.

    Raises:
        Exception: whatever Pillow's reader of its format says of it.
    """
    if not (hasattr(file, 'seekable') and file.seekable()):
        file = io.BytesIO(file.read())
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start, problem = file.read(16), None
    for kind, (reader, accepts) in readers().items():
        if accepts and accepts(start) is not True:  # a string says why not
            continue
        if kind in READ_WHOLE and size > memory * 2 ** 30:
            raise BrokenImage(f'a file of {size / 2 ** 30:.1f} GiB, of which {memory:g} are allowed', 'too large')
        file.seek(0)
        try:
            if kind == 'JPEG':
                data, exif, scans, scan = plain_jpeg(file.read())
                image = reader(io.BytesIO(data), '')
                image.info |= {'exif': exif, 'progressive': scans, 'scan': scan}
                return image
            image = reader(io.BytesIO(plain_png(file.read())) if kind == 'PNG' else file, '')
            if kind == 'TIFF':
                if image.mode == 'L' and image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == SIGNED:
                    raise SyntaxError(UNKNOWN_PIXELS)
                forget_tags(image)
            return image
        except Exception as error:  # a reader may raise anything
            if is_machines(error):
                raise
            if UNKNOWN_PIXELS in str(error):
                problem = problem or ValueError('pixels of this kind, such as numbers of 64 bits or colours of 32, '
                                                'cannot be read: save it with 8 or 16 bits')
            elif accepts:  # TGA files have no signature
                error.kind, problem = 'damaged', problem or error
    if start[4:8] == b'ftyp' and start[8:12] in HEIF_BRANDS and 'HEIF' not in readers():
        raise ValueError('HEIC needs the package pillow-heif: pip install pillow-heif')
    if start[4:8] == b'ftyp' and start[8:12] in (b'avif', b'avis'):
        problem = problem or ValueError('AVIF needs Pillow 11.3 or newer')
    raise problem or ValueError(f'it is none of {", ".join(FORMATS)}')


def is_machines(error: Exception) -> bool:
    """Whether an error says nothing about the file: memory or file handles ran out."""
    return isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno in MACHINE


def least_scale(image: Image.Image, memory: float) -> int:
    """The least of 1, 2, 4 and 8 by which an image's sides must be divided for it to be decoded within `memory` GiB.

    A JPEG is divided while it is decoded, of others the decoded image is.

    Raises:
        BrokenImage: it takes more at any scale.
    """
    pixels, decoded, rgb = image.width * image.height, MODE_BYTES.get(image.mode, 4), 8  # RGB, and turned upright
    if image.format == 'JPEG':
        layers = getattr(image, 'layer', [])  # (id, horizontal and vertical sampling, table) of each component
        samples = [layer[1] * layer[2] for layer in layers] or [1]
        whole, rgb = 2 * sum(samples) / max(samples) * bool(image.info.get('progressive')), rgb + decoded
    else:
        whole = decoded + DECODER_BYTES.get(image.format, 0) * getattr(image, 'use_load_libtiff', True)
    for scale in (1, 2, 4, 8):
        needed = pixels * (whole + rgb / scale ** 2) / 2 ** 30
        if needed <= memory:
            return scale
    raise BrokenImage(f'{pixels / 1e6:.0f} megapixels, which take {needed:.1f} GiB of memory to decode, '
                      f'of which {memory:g} are allowed (data.image_memory, DLIPProd\'s memory)', 'too large')


@contextmanager
def opened(file: str | os.PathLike | BinaryIO, memory: float = MEMORY,
           name: str | None = None) -> Iterator[tuple[Image.Image, int]]:
    """An image file -> (image that is not decoded yet, `least_scale`); an error in the block is the file's.

    Args:
        file: path, or file opened for reading bytes.
        memory: GiB that decoding it may take.
        name: what to call it in an error; its own name by default.

    Raises:
        FileNotFoundError: no such file.
        BrokenImage: names the file and what is wrong with it.
        MemoryError, OSError: the machine is out of memory or file handles.
    """
    name, kind = shorten(Path(name or file_name(file)), 600), 'not an image'
    try:
        with open_regular(file) if isinstance(file, str | os.PathLike) else nullcontext(file) as stream, \
                identified(stream, memory) as image:
            scale, kind = least_scale(image, memory), 'damaged'
            if image.format == 'JPEG':
                end_jpeg(image)
            yield image, scale
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f'no image {name}') from None
    except Exception as error:  # a decoder may raise anything on a damaged file
        if is_machines(error):
            raise
        kind = getattr(error, 'kind', kind)
        said = {'damaged': 'is truncated or damaged', 'too large': 'is too large'}.get(kind, 'is not a readable image')
        raise BrokenImage(f'{name} {said}: {str(error)[:160]}', kind) from None


def open_image(file: str | os.PathLike | BinaryIO, memory: float = MEMORY, name: str | None = None) -> Image.Image:
    """Read an image file as upright RGB, at 1/2, 1/4 or 1/8 of its size if it takes more memory otherwise.

    Args, raises: see `opened`.
    """
    with opened(file, memory, name) as (image, scale):
        if image.format == 'JPEG':
            image.draft(None, (image.width // scale, image.height // scale))
            scale = 1
        return to_rgb(image, scale)


def open_part(file: str | os.PathLike | BinaryIO, choose: Callable, side: int, memory: float = MEMORY) -> torch.Tensor:
    """Read a part of an image file -> upright RGB, uint8 [3, h, w]

    Args:
        choose: from the upright image's (height, width) to the (top, left, height, width) that are wanted.
        side: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is faster, where both sides of the part keep this
            many pixels.
        memory: GiB that decoding may take; sets a smaller size if need be.

    Raises: see `opened`.
    """
    with opened(file, memory) as (image, least):
        if image.format != 'JPEG':  # of others the size may be another after decoding
            image, least = to_rgb(image, least), 1
        turn = orientation(image)
        width, height = image.size[::-1] if turn in (5, 6, 7, 8) else image.size
        box = choose(height, width)
        scale = max(least, next((scale for scale in (8, 4, 2) if min(box[2:]) >= scale * side), 1))
        top, left, height, width = (round(value / scale) for value in box)
        if scale == 1 and turn == 1 and image.format == 'JPEG' and image.mode == 'RGB':
            with suppress(RuntimeError):  # faster than PIL, which says better what is wrong with a file
                whole = decode_jpeg(torch.frombuffer(bytearray(image.fp.getbuffer()), dtype=torch.uint8),
                                    ImageReadMode.RGB)
                return whole[:, top:top + height, left:left + width]
        image.draft(None, (image.width // scale, image.height // scale))
        return F.pil_to_tensor(to_rgb(image).crop((left, top, left + width, top + height)))
