"""Image files as they are met: every format and mode, broken metadata, huge ones, and what is no image at all."""

import io
import logging
import os
import struct
import subprocess
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile
from torchvision.transforms import functional as F

from data import images, rgb
from data.images import FORMATS, BrokenImage, open_image, open_part, plain_jpeg
from data.rgb import to_rgb
from data.scan import list_images
from prod.images import find_images, named_images, read_image

Image.init()
MODES = ('1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr', 'HSV', 'LAB', 'I', 'F',
         'I;16', 'I;16B', 'I;16L')
LOSSY = {'JPEG': 6, 'MPO': 6, 'WEBP': 12, 'AVIF': 12, 'GIF': 10}  # mean difference that the format may make
CLIPS = ('GIF', 'WEBP', 'AVIF')  # Pillow writes deep images into these formats as white


def colours(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth image."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def in_mode(mode: str) -> Image.Image:
    grey = np.asarray(colours().convert('L'))
    if mode.startswith('I;16'):
        order = '>u2' if mode == 'I;16B' else '<u2'
        return Image.frombytes(mode, (48, 32), (grey * np.uint16(257)).astype(order).tobytes())
    if mode in ('I', 'F'):
        return Image.fromarray(grey.astype(np.int32) * 257 if mode == 'I' else grey.astype(np.float32) / 255)
    if mode == 'LAB':
        return ImageCms.profileToProfile(colours(), ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'),
                                         outputMode='LAB')
    between = {'La': 'LA', 'RGBa': 'RGBA', 'PA': 'P'}.get(mode, mode)
    return colours().convert(between).convert(mode)


def saved(image: Image.Image, kind: str = 'PNG', **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def difference(image: Image.Image, other: Image.Image) -> float:
    assert image.mode == 'RGB' and image.size == other.size
    return np.abs(np.asarray(image, int) - np.asarray(other.convert('RGB'), int)).mean()


def tiff(*entries: bytes, extra: bytes = b'', order: str = '<') -> bytes:
    """A TIFF block of one directory; `extra` follows it."""
    head = {'<': b'II', '>': b'MM'}[order] + struct.pack(order + 'HIH', 42, 8, len(entries))
    return head + b''.join(entries) + struct.pack(order + 'I', 0) + extra


def entry(tag: int, kind: int, count: int, value, order: str = '<') -> bytes:
    value = value if isinstance(value, bytes) else struct.pack(order + {1: 'B', 3: 'H', 4: 'I'}[kind], value)
    return struct.pack(order + 'HHI', tag, kind, count) + value.ljust(4, b'\0')


# ---------------------------------------------------------------- formats and modes

@pytest.mark.parametrize('kind', sorted(Image.SAVE))
def test_every_format_and_mode_is_right_or_refused(kind):
    for mode in MODES if kind != 'ICNS' else ['RGB']:  # which is slow to write
        image = in_mode(mode)
        try:
            data = saved(image, kind)
        except Exception:  # noqa: BLE001 (Pillow cannot write this mode)
            continue
        if kind not in (*FORMATS, 'MPO') or (kind, mode) == ('TIFF', 'YCbCr'):  # Pillow's own reader of it is broken
            with pytest.raises(BrokenImage, match='^x is '):
                open_image(io.BytesIO(data), name='x')
            continue
        found = open_image(io.BytesIO(data))
        if kind == 'ICO':
            assert found.size[0] == 32
        elif not (kind in CLIPS and rgb.is_deep(image)):
            reference = colours() if mode not in ('1', 'L', 'LA', 'La', 'P', 'PA') and not rgb.is_deep(image) else \
                image.convert('RGB') if mode in ('1', 'P', 'PA') else colours().convert('L')
            assert difference(found, reference) <= LOSSY.get(kind, 0) + 2, mode


@pytest.mark.parametrize('mode', MODES)
def test_a_large_image_is_converted_in_bands_to_the_same(mode, monkeypatch):
    whole = to_rgb(in_mode(mode))
    monkeypatch.setattr(rgb, 'BAND', 48 * 5)
    assert np.array_equal(to_rgb(in_mode(mode)), whole)
    small = to_rgb(in_mode(mode), 2)
    assert difference(small, whole.reduce(2)) < 2 and small.size == (24, 16)


def test_nothing_starts_a_program(monkeypatch, tmp_path):
    """An EPS is decoded by Ghostscript, whatever its name."""
    def started(*args, **kwargs):
        raise AssertionError('a program was started')
    for name in ('Popen', 'check_call', 'run'):
        monkeypatch.setattr(subprocess, name, started)
    colours().save(tmp_path / 'a.eps')
    path = (tmp_path / 'a.eps').rename(tmp_path / 'x.jpg')
    for read in (open_image, lambda path: open_part(path, lambda h, w: (0, 0, h, w), 8), read_image,
                 lambda path: read_image(path.read_bytes()), lambda path: read_image(io.BytesIO(path.read_bytes()))):
        with pytest.raises(ValueError, match='is not a readable image: it is none of JPEG, PNG'):
            read(path)
    with pytest.raises(ValueError, match='EPS file.*may run programs'):
        read_image(Image.open(path))


@pytest.mark.parametrize('bits, top', [(12, 4095), (16, 1023), (16, 4095), (16, 16383), (16, 65535)])
@pytest.mark.parametrize('white_is_zero', [False, True])
def test_deep_tiffs_show_their_range(bits, top, white_is_zero):
    ramp = np.arange(0, top + 1, top // 15)[:16]
    if bits == 12:
        if white_is_zero:
            pytest.skip('Pillow does not read it')
        packed = b''.join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in ramp.reshape(-1, 2).tolist())
    else:
        packed = ramp.astype('<u2').tobytes()
    entries = [entry(256, 3, 1, 16), entry(257, 3, 1, 1), entry(258, 3, 1, bits), entry(259, 3, 1, 1),
               entry(262, 3, 1, 0 if white_is_zero else 1), entry(273, 4, 1, 8 + 2 + 9 * 12 + 4), entry(277, 3, 1, 1),
               entry(278, 3, 1, 1), entry(279, 4, 1, len(packed))]
    shades = np.asarray(open_image(io.BytesIO(tiff(*entries, extra=packed))))[0, :, 0]
    expected = np.arange(0, 256, 17)
    assert np.abs(shades.astype(int) - (expected[::-1] if white_is_zero else expected)).max() <= 1


def grey_tiff(kind: str, values: np.ndarray) -> bytes:
    """One row of numpy's `kind`, such as '<i2'."""
    order, code, size = kind[0], {'u': 1, 'i': 2, 'f': 3}[kind[1]], int(kind[2])
    pixels = values.astype(kind).tobytes()
    fields = {256: (3, len(values)), 257: (3, 1), 258: (3, 8 * size), 259: (3, 1), 262: (3, 1),
              273: (4, 8 + 2 + 10 * 12 + 4), 277: (3, 1), 278: (3, 1), 279: (4, len(pixels)), 339: (3, code)}
    entries = [entry(tag, kind, 1, value, order) for tag, (kind, value) in fields.items()]
    return tiff(*entries, extra=pixels, order=order)


@pytest.mark.parametrize('kind, top', [
    ('<u4', 2 ** 32 - 1), ('<u4', 2 ** 31 - 1), ('<i4', 2 ** 31 - 1), ('<i2', 2 ** 15 - 1), ('>i2', 2 ** 15 - 1),
    ('<i2', 4095), ('<f4', 1), ('>f4', 255), ('<i2', 0)])
def test_tiffs_of_any_numbers_show_their_range(kind, top):
    shades = np.asarray(open_image(io.BytesIO(grey_tiff(kind, np.linspace(0, top, 16)))))[0, :, 0]
    assert np.abs(shades.astype(int) - np.arange(0, 256, 17) * bool(top)).max() <= 3


@pytest.mark.parametrize('kind', ['<f8', '>f8', '<f2', '<u8', '>u4', '<i1', '>i1'])
def test_other_tiffs_are_refused_by_their_kind(kind):
    with pytest.raises(ValueError, match='not a readable image: pixels of this kind.*save it with 8 or 16 bits'):
        open_image(io.BytesIO(grey_tiff(kind, np.linspace(0, 100, 16))))


@pytest.mark.parametrize('progressive', [False, True])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read(progressive):
    data = saved(colours(200, 100), 'JPEG', progressive=progressive)
    for cut in (data[:-2], data[:-1], data[:-2] + bytes(3)):
        assert difference(open_image(io.BytesIO(cut)), open_image(io.BytesIO(data))) == 0
        assert difference(F.to_pil_image(open_part(io.BytesIO(cut), lambda h, w: (0, 0, h, w), 999)),
                          open_image(io.BytesIO(data))) == 0
    for end in (0.5, 0.8):
        with pytest.raises(ValueError, match='is truncated or damaged'):
            open_image(io.BytesIO(data[:int(end * len(data))]))


# ---------------------------------------------------------------- metadata

def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


@pytest.mark.parametrize('extra', [
    chunk(b'tEXt', b'a\0' + b'x' * 3_000_000), chunk(b'zTXt', b'a\0\0' + zlib.compress(b'x' * 3_000_000)),
    chunk(b'iTXt', b'a\0\1\0\0\0' + zlib.compress(b'x' * 3_000_000)), 70 * chunk(b'tEXt', b'a\0' + b'x' * 1_000_000),
    chunk(b'iCCP', b'a\0\0' + zlib.compress(b'x' * 3_000_000)), chunk(b'iCCP', b'a\0\0no zlib'),
    chunk(b'zTXt', b'a\0\7?'), chunk(b'tEXt', b'a\0b')[:-1] + b'?', chunk(b'pHYs', b''), chunk(b'eXIf', b'MM\0'),
    chunk(b'eXIf', b'MM\0')[:-1] + b'?', chunk(b'tRNS', b'?'), chunk(b'tRNS', bytes(6))[:-1] + b'?'],
    ids=['tEXt', 'zTXt', 'iTXt', '70 MB', 'iCCP', 'no ICC', 'no method', 'checksum', 'pHYs', 'eXIf', 'eXIf checksum',
         'tRNS', 'tRNS checksum'])
@pytest.mark.parametrize('place', ['before', 'after'])
def test_png_with_any_text_or_profile(extra, place):
    data = saved(colours())
    at = data.index(b'IDAT') - 4 if place == 'before' else data.index(b'IEND') - 4
    assert difference(open_image(io.BytesIO(data[:at] + extra + data[at:])), colours()) == 0


RATIONAL = struct.pack('<I', 8 + 2 + 3 * 12 + 4)  # the place right after a directory of three
EXIFS = {f'resolution {name}': tiff(entry(274, 3, 1, 6), entry(282, kind, 1, RATIONAL), entry(296, 3, 1, 2),
                                    extra=value)
         for name, kind, value in (('0/0', 5, bytes(8)), ('1/0', 5, struct.pack('<II', 1, 0)),
                                   ('negative', 10, struct.pack('<ii', -72, 1)), ('text', 2, b'seventy\0'),
                                   ('NaN', 12, struct.pack('<d', np.nan)), ('infinite', 12, struct.pack('<d', np.inf)),
                                   ('beyond the end', 5, b''), ('of type 77', 77, bytes(8)))}
TURNED = {**EXIFS, 'plain': tiff(entry(274, 3, 1, 6)), 'big-endian': tiff(entry(274, 3, 1, 6, '>'), order='>'),
          'long': tiff(entry(274, 4, 1, 6)), 'header twice': b'Exif\0\0' + tiff(entry(274, 3, 1, 6))}
UPRIGHT = {'0': tiff(entry(274, 3, 1, 0)), '9': tiff(entry(274, 3, 1, 9)), '65535': tiff(entry(274, 3, 1, 65535)),
           'string': tiff(entry(274, 2, 2, b'6\0')), 'rational': tiff(entry(274, 5, 1, RATIONAL), extra=bytes(40)),
           'cut off': tiff(entry(274, 3, 1, 6))[:-12], 'garbage': b'garbage', 'header': b'II*\0\x07', 'nothing': b''}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [*TURNED, *UPRIGHT])
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_only_the_orientation_of_exif_counts(kind, name):
    exif, turned = (TURNED | UPRIGHT)[name], name in TURNED
    if kind == 'PNG':
        data = saved(colours())
        data = data[:33] + chunk(b'eXIf', exif) + data[33:]
    else:
        data = saved(colours(), kind, quality=95, exif=b'Exif\0\0' + exif)
    reference = colours().transpose(Image.Transpose.ROTATE_270) if turned else colours()
    for found in (open_image(io.BytesIO(data)), read_image(data)):
        assert difference(found, reference) < 6
    part = open_part(io.BytesIO(data), lambda height, width: (0, 0, height, width), 999)
    assert part.shape == (3, reference.height, reference.width)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('odd', [entry(34665, 4, 1, 2 ** 31), entry(34853, 4, 1, 8), entry(40965, 2, 4, b'abc'),
                                 entry(700, 4, 1, 5), entry(60_000, 77, 1, b'?'),
                                 entry(305, 2, 99, b'\xff\xff\xff\x0f')])
def test_a_tiff_with_broken_tags(odd):
    """The contents of its EXIF, GPS and other metadata are nowhere, or of the wrong type."""
    pixels = np.asarray(colours()).tobytes()
    entries = [entry(256, 3, 1, 48), entry(257, 3, 1, 32), entry(258, 3, 1, 8), entry(259, 3, 1, 1),
               entry(262, 3, 1, 2), entry(273, 4, 1, 8 + 2 + 11 * 12 + 4), entry(274, 3, 1, 6), entry(277, 3, 1, 3),
               entry(278, 3, 1, 32), entry(279, 4, 1, len(pixels)), odd]
    found = open_image(io.BytesIO(tiff(*entries, extra=pixels)))
    assert difference(found, colours().transpose(Image.Transpose.ROTATE_270)) == 0


def test_jpegs_are_stripped_of_metadata_alone():
    exif = tiff(entry(274, 3, 1, 3))
    data = saved(colours(), 'JPEG', exif=b'Exif\0\0' + exif, icc_profile=b'p' * 200_000, comment=b'c' * 60_000)
    plain, found, scans, _ = plain_jpeg(data)
    assert found == b'Exif\0\0' + exif and not scans and len(plain) < len(data) - 250_000
    assert difference(Image.open(io.BytesIO(plain)), Image.open(io.BytesIO(data))) == 0
    assert plain_jpeg(saved(colours(), 'JPEG', progressive=True))[2]
    for short in (b'\xff\xe0\0\7JFIF\0', b'\xff\xee\0\7Adobe', b'\xff\xe0\0\2'):  # segments that break off
        assert difference(open_image(io.BytesIO(data[:2] + short + data[2:])),
                          open_image(io.BytesIO(data))) == 0
    for cut in range(2, 700, 7):  # whatever is left of a file, it is a file
        assert plain_jpeg(data[:cut])[0][:2] == data[:2]


# ---------------------------------------------------------------- size and memory

def test_a_large_jpeg_is_decoded_small_within_the_memory():
    image = colours(800, 600)
    data = saved(image, 'JPEG', quality=95)
    for memory, scale in ((1, 1), (3e-3, 2), (1e-3, 4), (2e-4, 8)):
        found = open_image(io.BytesIO(data), memory)
        assert found.size == (800 // scale, 600 // scale)
        assert difference(found, image.reduce(scale)) < 2
        part = open_part(io.BytesIO(data), lambda height, width: (0, 0, height, width // 2), 10 ** 6, memory)
        assert part.shape == (3, 600 // scale, 400 // scale)
    with pytest.raises(BrokenImage, match=r'too large: 0 megapixels, which take 0.0 GiB of memory.*memory') as error:
        open_image(io.BytesIO(data), 5e-5)
    assert error.value.kind == 'too large'
    with pytest.raises(BrokenImage):  # its coefficients are all held at once
        open_image(io.BytesIO(saved(image, 'JPEG', progressive=True)), 1e-3)


def test_a_jpeg_of_200_megapixels():
    """A progressive one holds all its coefficients at once: 3 bytes a pixel here."""
    jpeg = SimpleNamespace(format='JPEG', mode='RGB', width=20_000, height=10_000, info={},
                           layer=[(1, 2, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1)])
    assert images.least_scale(jpeg, 1) == 2
    jpeg.info['progressive'] = True
    assert images.least_scale(jpeg, 1) == 4


def test_other_large_images_are_reduced_or_refused():
    data = saved(colours(800, 600))
    for memory, scale in ((1, 1), (3e-3, 2)):
        assert open_image(io.BytesIO(data), memory).size == (800 // scale, 600 // scale)
    with pytest.raises(BrokenImage, match='megapixels, which take .* GiB'):
        open_image(io.BytesIO(data), 1e-3)


def test_what_the_machine_lacks_is_not_the_files_fault(monkeypatch, tmp_path):
    colours().save(tmp_path / 'a.png')
    for error in (MemoryError(), OSError(24, 'Too many open files')):
        def fail(self, *args, error=error):
            raise error
        monkeypatch.setattr(ImageFile.ImageFile, 'load', fail)
        for read in (open_image, read_image, lambda path: read_image(Image.open(path)),
                     lambda path: open_part(path, lambda h, w: (0, 0, h, w), 8)):
            with pytest.raises(type(error)):
                read(tmp_path / 'a.png')


# ---------------------------------------------------------------- what is no image file

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / 'x.jpg')
    (tmp_path / 'link.jpg').symlink_to('x.jpg')
    colours().save(tmp_path / 'a.png')
    (tmp_path / 'good.jpg').symlink_to('a.png')
    assert difference(open_image(tmp_path / 'good.jpg'), colours()) == 0
    for path in (tmp_path / 'x.jpg', tmp_path / 'link.jpg', '/dev/zero', tmp_path):
        caught = []

        def read(path=path, caught=caught):
            try:
                open_image(path)
            except BrokenImage as error:
                caught.append(str(error))
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(10)
        assert caught and 'is not a readable image: it is no regular file' in caught[0]


def test_open_files_and_what_is_none(tmp_path):
    data = saved(colours())
    (tmp_path / 'a.png').write_bytes(data)

    class Pipe:  # can only be read
        def read(self):
            return data
    with open(tmp_path / 'a.png', 'rb') as file:
        file.read(5)
        for item in (io.BytesIO(data), file, Pipe()):
            [(name, same)] = named_images(item)
            assert name == 'image' and same is item and difference(read_image(item), colours()) == 0
    with open(tmp_path / 'a.png') as file, pytest.raises(TypeError, match='opened as text'):
        read_image(file)
    file = open(tmp_path / 'a.png', 'rb')  # noqa: SIM115
    file.close()
    with pytest.raises(ValueError, match='closed file'):
        read_image(file)
    deep = np.asarray(colours()).astype(np.uint32)
    assert difference(read_image((deep * 257).astype('>u2')), colours()) == 0
    assert difference(read_image((deep * 4095 // 255).astype(np.uint16)), colours()) < 1
    tensor = torch.zeros(3, 4, 4)
    for odd in (tensor.to('meta'), tensor.to_sparse(), {'a': 1}, {1}, range(3), object()):
        with pytest.raises(TypeError):
            read_image(odd)


def test_heic_names_the_package(monkeypatch):
    try:
        import pillow_heif
    except ImportError:
        with pytest.raises(BrokenImage, match='HEIC needs the package pillow-heif: pip install pillow-heif'):
            open_image(io.BytesIO(struct.pack('>I', 24) + b'ftypheic' + bytes(100)))
    else:
        pillow_heif.register_heif_opener()
        found = open_image(io.BytesIO(saved(colours(), 'HEIF', quality=95)))
        assert difference(found, colours()) < 6


# ---------------------------------------------------------------- folders

def test_a_folder_scan_takes_images_alone_and_once(tmp_path, caplog):
    root = tmp_path / 'root'
    names = ['a.jpg', 'B.PNG', 'sub/c.webp', 'sub/deep/d.gif', os.fsdecode(b'caf\xe9.jpg')]
    skipped = ['@eaDir/a.jpg', '.thumbs/t.jpg', '._a.jpg', '__MACOSX/._a.jpg', '$RECYCLE.BIN/x.jpg', 'x.mpg', 'x.h5',
               'x.pdf', 'x.eps', 'Thumbs.db', '.DS_Store', 'x.txt', 'noending', 'e.heic' if not heif() else '.e.heic']
    for name in (*names, *skipped):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b'')
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'o.jpg').write_bytes(b'')
    (root / 'linked').symlink_to(other)
    (root / 'again').symlink_to(other)
    (root / 'loop').symlink_to(root)
    (root / 'sub/up').symlink_to('..')
    (root / 'aa.jpg').symlink_to('sub/c.webp')
    (root / 'gone.jpg').symlink_to('nowhere')
    (root / 'self.jpg').symlink_to('self.jpg')
    (root / 'folder.jpg').mkdir()
    with caplog.at_level(logging.INFO):
        found = list_images(root)
    linked = [path for path in found if path.endswith('o.jpg')]
    assert len(linked) == 1 and os.path.dirname(linked[0]) in (str(root / 'linked'), str(root / 'again'))
    assert sorted(set(found) - set(linked)) == sorted(str(root / name) for name in names) and found == sorted(found)
    for said in ('1 .mpg', '1 .h5', '1 .pdf', '2 broken links', '1 without ending', '7 hidden or system'):
        assert said in caplog.text.replace('8 hidden', '7 hidden')
    assert heif() or '1 HEIC files are left out' in caplog.text and 'pip install pillow-heif' in caplog.text


def heif() -> bool:
    return 'HEIF' in images.readers()


def test_a_folder_scan_goes_on_past_what_it_cannot_read(tmp_path, caplog, monkeypatch):
    for name in ('good', 'bad'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.jpg').write_bytes(b'')
    here, name = os.open(tmp_path, os.O_RDONLY), 'n' * 250
    for _ in range(18):  # a path longer than the system takes
        os.mkdir(name, dir_fd=here)
        here, before = os.open(name, os.O_RDONLY, dir_fd=here), here
        os.close(before)
    os.close(here)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('bad'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    assert find_images(tmp_path) == [str(tmp_path / 'good/a.jpg')]
    assert '2 folders cannot be read and are left out' in caplog.text and max(map(len, caplog.text.splitlines())) < 600
    subprocess.run(['rm', '-r', tmp_path / name], check=True)  # the temporary folder's clean-up cannot
    with pytest.raises(FileNotFoundError, match='no folder'):
        list_images(tmp_path / ('x' * 5000))
