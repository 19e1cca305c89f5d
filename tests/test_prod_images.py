"""Every kind of image that DLIPProd takes, and what it says of those it does not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope='module')
def gray(picture):
    return picture.convert('L')


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{'format': 'PNG', **options})
    return buffer.getvalue()


def same(retrieval, image, reference, atol=1e-5, **options):
    feat, expected = retrieval.get_image_feat(image, **options), retrieval.get_image_feat(reference)
    torch.testing.assert_close(feat, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('mode', ['L', 'LA', '1', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I', 'F', 'I;16'])
def test_gray_picture_in_any_mode(retrieval, gray, mode):
    if mode == '1':
        gray = gray.point(lambda value: 255 * (value > 128))
    if mode == 'I;16':
        image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
        assert image.mode == 'I;16'
    else:
        image = gray.convert('RGB').convert(mode) if mode in ('CMYK', 'YCbCr') else gray.convert(mode)
    before = image.tobytes()
    same(retrieval, image, gray.convert('RGB'), atol=0.02 if mode == 'YCbCr' else 1e-5)
    assert image.tobytes() == before


def test_transparency_is_white(retrieval, picture):
    for mode, clear in (('RGBA', (10, 20, 30, 0)), ('LA', (40, 0))):
        same(retrieval, Image.new(mode, (40, 40), clear), Image.new('RGB', (40, 40), 'white'))
    palette = Image.new('P', (40, 40), 1)
    palette.putpalette([0, 0, 0, 250, 10, 10])
    same(retrieval, encoded(palette, transparency=1), Image.new('RGB', (40, 40), 'white'))


def test_sixteen_bit_files(retrieval, gray, tmp_path):
    for name in ('gray.png', 'gray.tiff'):
        Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(tmp_path / name)
        same(retrieval, tmp_path / name, gray)


@pytest.mark.parametrize('orientation', range(2, 9))
def test_exif_orientation(retrieval, picture, tmp_path, orientation):
    """A stored image and the tag that turns it upright give the feature of the upright image."""
    flips = Image.Transpose
    undo = {2: flips.FLIP_LEFT_RIGHT, 3: flips.ROTATE_180, 4: flips.FLIP_TOP_BOTTOM, 5: flips.TRANSPOSE,
            6: flips.ROTATE_90, 7: flips.TRANSVERSE, 8: flips.ROTATE_270}
    stored, exif = picture.transpose(undo[orientation]), Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / 'turned.png', exif=exif)
    same(retrieval, tmp_path / 'turned.png', picture)
    same(retrieval, Image.open(tmp_path / 'turned.png'), picture)
    assert (retrieval.get_image_feat(stored) - retrieval.get_image_feat(picture)).abs().max() > 1e-2


def test_animation_shows_its_first_frame(retrieval, picture):
    frames = [picture.rotate(angle) for angle in (90, 180)]
    same(retrieval, encoded(picture, save_all=True, append_images=frames), picture)


def test_paths_and_bytes(retrieval, picture, tmp_path):
    path = tmp_path / 'an image.png'
    picture.save(path)
    data = path.read_bytes()
    images = [path, str(path), data, bytearray(data), memoryview(data), Image.open(path)]
    same(retrieval, images, [picture] * len(images))


@pytest.mark.parametrize('scale, dtype', [(1, 'uint8'), (257, 'uint16'), (1 / 255, 'float32'),
                                          (1 / 255, 'float64')])
def test_arrays(retrieval, picture, gray, scale, dtype):
    rgb, luminance = ((np.asarray(image) * np.float64(scale)).astype(dtype) for image in (picture, gray))
    alpha = np.full((40, 48, 1), 255 * np.float64(scale)).astype(dtype)
    rgba = np.concatenate([rgb, alpha], -1)
    same(retrieval, [rgb, rgba, rgb[..., ::-1][..., ::-1]], [picture] * 3)
    same(retrieval, [luminance, luminance[..., None]], [gray] * 2)
    same(retrieval, [rgb[..., ::-1], rgba[..., [2, 1, 0, 3]], luminance], [picture, picture, gray], bgr=True)
    assert (retrieval.get_image_feat(rgb[..., ::-1]) - retrieval.get_image_feat(picture)).abs().max() > 1e-3
    same(retrieval, picture, picture, bgr=True)  # says something about arrays only


@pytest.mark.parametrize('scale, dtype', [(1, torch.uint8), (1 / 255, torch.float32),
                                          (1 / 255, torch.float64), (1 / 255, torch.bfloat16)])
def test_tensors(retrieval, picture, gray, scale, dtype):
    tensor = (torch.from_numpy(np.array(picture)).movedim(-1, 0) * scale).to(dtype)
    same(retrieval, tensor, picture, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
    one = (torch.from_numpy(np.array(gray))[None] * scale).to(dtype)
    same(retrieval, one, gray, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
    if tensor.is_floating_point():
        same(retrieval, tensor.requires_grad_(), tensor)


def test_captions_take_the_same_images(caption, picture, tmp_path):
    picture.save(tmp_path / 'image.png')
    pixels = np.asarray(picture)
    assert caption.generate([tmp_path / 'image.png', pixels]) == caption.generate([picture, picture])
    assert caption.generate(pixels[..., ::-1], bgr=True) == caption.generate(picture)


RGB = np.zeros((8, 8, 3), np.uint8)
NO_IMAGE = [
    (None, TypeError, 'is not an image but None: pass a PIL image'),
    (7, TypeError, r'is not an image but of type int \(7\)'),
    ({}, TypeError, 'not an image but of type dict'),
    (RGB.astype(np.int64), TypeError, 'is of int64: pixels must be uint8, uint16 or float'),
    (RGB.astype(bool), TypeError, 'is of bool'),
    (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, 'is of int64'),
    (np.array(['a', 'b'])[None], TypeError, 'is of <U1'),
    (RGB[None], ValueError, r'has the shape \(1, 8, 8, 3\).*pass list\(batch\)'),
    (RGB[..., :2], ValueError, r'has the shape \(8, 8, 2\)'),
    (RGB[0, 0], ValueError, r'has the shape \(3,\)'),
    (RGB[:0], ValueError, 'is empty'),
    (np.full((8, 8), np.nan), ValueError, 'NaN or infinite'),
    (np.full((8, 8), np.inf), ValueError, 'NaN or infinite'),
    (np.full((8, 8), 200.0), ValueError, r'values from 200 to 200: float pixels must lie in \[0, 1\]'),
    (np.full((8, 8), -2.0), ValueError, r'values from -2 to -2'),
    (torch.zeros(2, 3, 8, 8), ValueError, r'has the shape \(2, 3, 8, 8\).*pass list\(batch\)'),
    (torch.zeros(8, 8, 3), ValueError, r'has the shape \(8, 8, 3\): a tensor must be \(1\|3\|4, H, W\)'),
    (torch.zeros(8, 8), ValueError, r'has the shape \(8, 8\): a tensor must be \(1\|3\|4, H, W\)'),
    (torch.full((3, 8, 8), torch.nan), ValueError, 'NaN or infinite'),
    (Image.fromarray(np.full((8, 8), np.nan, np.float32)), ValueError, 'NaN or infinite'),
    (Image.new('RGB', (0, 5)), ValueError, 'is empty: 0 x 5 pixels'),
    ('a dog on the grass', ValueError, "no such file 'a dog on the grass'"),
    ('', ValueError, "no such file ''"),
    ('null\0byte', ValueError, 'no such file'),
    ('x' * 5000, ValueError, 'no such file'),
    ('https://example.com/dog.jpg', ValueError, 'nothing is fetched from the network, download the file'),
    ('HTTP://example.com/dog.jpg', ValueError, 'nothing is fetched from the network, download the file'),
    (b'', ValueError, r'\(0 bytes\) is not a readable image'),
    (b'<html>not found</html>', ValueError, r'\(22 bytes\) is not a readable image'),
]


@pytest.mark.parametrize('bad, error, message', NO_IMAGE, ids=[repr(bad)[:30] for bad, *_ in NO_IMAGE])
def test_what_is_no_image(caption, retrieval, picture, bad, error, message):
    for call in (caption.generate, retrieval.get_image_feat, lambda images: retrieval.match(images, 'a dog')):
        with pytest.raises(error, match='^image.*' + message):
            call(bad)
    with pytest.raises(error, match=r'^images\[2\].*' + message):
        retrieval.get_image_feat([picture, picture, bad])


def test_bad_files(retrieval, picture, tmp_path):
    data = encoded(picture.resize((400, 400)), format='JPEG')
    (tmp_path / 'cut.jpg').write_bytes(data[:len(data) // 2])
    (tmp_path / 'text.jpg').write_text('no image')
    for bad, message in ((tmp_path / 'cut.jpg', 'cut.jpg.*is truncated or damaged'),
                         (Image.open(tmp_path / 'cut.jpg'), 'is truncated or damaged'),
                         (data[:len(data) // 2], 'is truncated or damaged'),
                         (data[:40], 'image|damaged'),
                         (encoded(picture)[:300], 'image|damaged'),
                         (tmp_path / 'text.jpg', 'text.jpg.*is not a readable image'),
                         (tmp_path, 'is the folder'),
                         (tmp_path / 'absent.jpg', 'no such file .*absent.jpg')):
        with pytest.raises(ValueError, match=r'^images\[1\].*(' + message + ')'):
            retrieval.get_image_feat([picture, bad])


def test_a_decompression_bomb(retrieval, picture, monkeypatch):
    data = encoded(picture)
    monkeypatch.setattr(retrieval, 'memory', 1e-6)
    with pytest.raises(ValueError, match='^image .*is too large: .* megapixels, which take .* GiB of memory to decode'):
        retrieval.get_image_feat(data)


def test_no_images_at_all(caption, retrieval, picture):
    for call in (caption.generate, retrieval.get_image_feat, lambda images: retrieval.match(images, 'a dog')):
        with pytest.raises(ValueError, match='list of images is empty'):
            call([])
        with pytest.raises(ValueError, match='list of images is empty'):
            call(iter([]))
        with pytest.raises(TypeError, match=r'images\[0\] is not an image but of type list'):
            call([[picture]])
    with pytest.raises(ValueError, match='batch_size must be at least 1, got 0'):
        caption.generate(picture, batch_size=0)
