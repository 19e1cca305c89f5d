"""Images of any mode to RGB, damaged files, and BLIP's transforms."""

import io
import random
import re
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor

from data import augment, transforms
from data.augment import rand_augment
from data.images import BrokenImage, open_image, open_part
from data.rgb import to_rgb
from data.transforms import EvalTransform, TrainTransform, normalise, swap_left_right

RED, BLUE = (255, 0, 0), (0, 0, 255)


def noise(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth random image."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def red_left(width: int = 64, height: int = 32) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new('RGB', (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height))
    return image


# ---------------------------------------------------------------- modes

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr',
                                  'HSV', 'LAB', 'I', 'F', 'I;16', 'I;16L', 'I;16B'])
def test_every_mode_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (4, 3)))
    assert image.mode == 'RGB' and image.size == (4, 3)


@pytest.mark.parametrize('mode', ['RGB', 'CMYK', 'YCbCr', 'HSV', 'RGBA'])
def test_colours_survive(mode):
    difference = np.asarray(to_rgb(noise().convert(mode)), int) - np.asarray(noise(), int)
    assert abs(difference).max() <= 12


def test_transparent_pixels_are_white():
    image = Image.new('RGBA', (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 128))
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (227, 127, 127)]
    assert to_rgb(Image.new('LA', (1, 1), (9, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_transparency_of_palette_and_colour_keys(tmp_path):
    palette = red_left().quantize(2)
    key = palette.getpixel((0, 0))
    palette.save(tmp_path / 'p.png', transparency=key)
    palette.save(tmp_path / 'p.gif', transparency=key)
    red_left().save(tmp_path / 'rgb.png', transparency=RED)
    for name in ('p.png', 'p.gif', 'rgb.png'):
        image = open_image(tmp_path / name)
        assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((63, 0)) == BLUE, name


@pytest.mark.parametrize('mode', ['I;16', 'I', 'F'])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    ramp = np.array([[0, 257 * 50, 257 * 200, 65535]])
    image = Image.fromarray(ramp.astype({'I;16': np.uint16, 'I': np.int32, 'F': np.float32}[mode]))
    assert image.mode == mode
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(4)] == [0, 50, 200, 255]


def test_other_ranges_of_integer_and_float_pictures():
    def grey(values, dtype):
        image = to_rgb(Image.fromarray(np.array([values], dtype)))
        return [image.getpixel((x, 0))[0] for x in range(len(values))]
    assert grey([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert grey([0, 100, 255], np.float32) == grey([0, 100, 255], np.int32) == [0, 100, 255]
    assert grey([0, 2 ** 30, 2 ** 31 - 1], np.int32) == [0, 128, 255]
    assert grey([np.nan, -5, 255], np.float32) == [0, 0, 255]
    assert grey([0, 2048, 4095], np.uint16) == grey([0, 2048, 4095], np.int32) == [0, 128, 255]  # 12 bits
    assert grey([0, 16384], np.uint16) == [0, 64]
    assert grey([0, 0.5, 1] * 99 + [1.01], np.float32)[:3] == [0, 128, 255]  # resampled: overshoots
    assert grey([0, 2, 4] * 99 + [900], np.float32)[:3] == pytest.approx([0, 130, 255], abs=5)  # high dynamic range


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored left is the top
    red_left().save(tmp_path / 'turned.png', exif=exif)
    image = open_image(tmp_path / 'turned.png')
    assert image.size == (32, 64) and image.getpixel((16, 2)) == RED and image.getpixel((16, 61)) == BLUE


def test_broken_exif_does_not_cost_the_picture(tmp_path):
    noise().save(tmp_path / 'a.png', exif=b'II*\0\x07')
    with Image.open(tmp_path / 'a.png') as image, pytest.raises(Exception):  # noqa: B017
        ImageOps.exif_transpose(image)
    assert np.array_equal(open_image(tmp_path / 'a.png'), noise())


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new('RGB', (8, 8), colour) for colour in (RED, BLUE)]
    for name in ('a.gif', 'a.png', 'a.webp'):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert open_image(tmp_path / name).getpixel((4, 4)) == pytest.approx(RED, abs=2)


# ---------------------------------------------------------------- files

WHOLE = lambda height, width: (0, 0, height, width)  # noqa: E731


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


READABLE = {
    'png.jpg': saved(noise(), 'PNG'), 'jpeg.png': saved(noise(), 'JPEG'), 'noextension': saved(noise(), 'WEBP'),
    'cmyk.jpg': saved(noise().convert('CMYK'), 'JPEG'), 'grey.jpg': saved(noise().convert('L'), 'JPEG'),
    'progressive.jpg': saved(noise(), 'JPEG', progressive=True), 'palette.png': saved(noise().quantize(64), 'PNG'),
    'palette.gif': saved(noise(), 'GIF'), 'alpha.png': saved(noise().convert('RGBA'), 'PNG'),
    'alpha.webp': saved(noise().convert('RGBA'), 'WEBP'), 'bits.png': saved(noise().convert('1'), 'PNG'),
    '16bit.png': saved(Image.fromarray(np.asarray(noise().convert('L'), np.uint16) * 257), 'PNG'),
    'turned.jpg': saved(noise(32, 48), 'JPEG', exif=turned_exif()), 'bmp.jpg': saved(noise(), 'BMP'),
    'turned.tif': saved(noise(32, 48), 'TIFF', exif=turned_exif()), 'after_the_end.jpg': saved(noise(), 'JPEG') + b'..',
    'exif.jpg': saved(noise(), 'JPEG', exif=b'Exif\0\0II*\0\x07'),
}


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
@pytest.mark.parametrize('name', READABLE)
def test_what_a_browser_shows_is_decoded(tmp_path, name):
    (tmp_path / name).write_bytes(READABLE[name])
    image, part = open_image(tmp_path / name), open_part(tmp_path / name, WHOLE, 999)
    assert image.mode == 'RGB' and image.size == (48, 32) and part.shape == (3, 32, 48)
    assert abs(pil_to_tensor(image).int() - part.int()).max() <= 1
    shape = open_part(tmp_path / name, TrainTransform(16, 0.2, True).crop, 16)
    assert TrainTransform(16, 0.2, True)(shape, '')[0].shape == (3, 16, 16)


@pytest.mark.parametrize('size', [(1, 10_000), (10_000, 1), (1, 1), (3, 2)])
def test_extreme_shapes_are_pictures(tmp_path, size):
    transform = TrainTransform(16, 0.2, False)
    for kind in ('PNG', 'JPEG'):
        (tmp_path / 'a').write_bytes(saved(Image.new('RGB', size, RED), kind))
        image, _ = transform(open_part(tmp_path / 'a', transform.crop, 16), '')
        assert image.shape == (3, 16, 16) and image[0].float().mean() > 200


LARGE, STRIPES = saved(noise(200, 200), 'JPEG'), saved(noise(), 'PNG')
BOMB = saved(Image.new('1', (8, 8)), 'PNG').replace(
    struct.pack('>II', 8, 8), struct.pack('>II', 60_000, 60_000))  # whose header promises 3.6 gigapixels
BOMB = BOMB[:29] + struct.pack('>I', zlib.crc32(BOMB[12:29])) + BOMB[33:]
BROKEN = {
    'not an image': {'empty.jpg': b'', 'text.jpg': b'<html>404</html>'},
    'damaged': {'bad.tif': b'II*\0\xff\xff\xff\xff', 'bad.gif': b'GIF89a', 'bad.webp': b'RIFF\0\0\0\0WEBPVP8 ',
                'header.jpg': LARGE[:20],
                'truncated.jpg': LARGE[:len(LARGE) // 2], 'truncated.png': STRIPES[:200],
                'zeros.png': STRIPES[:100] + bytes(len(STRIPES) - 100), 'turned.jpg': READABLE['turned.jpg'][:800]},
    'too large': {'bomb.png': BOMB}}


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
@pytest.mark.parametrize('kind', BROKEN)
def test_files_that_are_no_picture_are_named_with_the_kind_of_damage(tmp_path, kind):
    for name, content in BROKEN[kind].items():
        path = tmp_path / name
        path.write_bytes(content)
        for read in (open_image, lambda path: open_part(path, WHOLE, 16)):
            with pytest.raises(BrokenImage, match=f'{re.escape(str(path))} is ') as error:
                read(path)
            assert error.value.kind == kind, name


def test_files_that_are_not_there_are_named(tmp_path):
    for read in (open_image, lambda path: open_part(path, WHOLE, 16)):
        with pytest.raises(FileNotFoundError, match='no image .*absent.jpg'):
            read(tmp_path / 'absent.jpg')
        with pytest.raises(BrokenImage, match='is no regular file'):
            read(tmp_path)


def test_open_file_objects(tmp_path):
    noise().save(tmp_path / 'a.png')
    with open(tmp_path / 'a.png', 'rb') as file:
        assert np.array_equal(open_image(file), noise())


@pytest.mark.parametrize('side, size', [(49, (384, 512)), (48, (192, 256)), (24, (96, 128)), (12, (48, 64))])
def test_jpeg_is_decoded_small_where_the_part_stays_large_enough(tmp_path, side, size):
    """A part of 96 pixels at full size; what is seen of the image is the same at every scale."""
    noise(512, 384).save(tmp_path / 'a.jpg', quality=95)
    scale = 384 // size[0]
    part = open_part(tmp_path / 'a.jpg', lambda height, width: (160, 240, 96, 104), side)
    assert part.shape == (3, 96 // scale, 104 // scale)
    small = noise(512, 384).resize(size[::-1], Image.Resampling.BOX)
    box = [value // scale for value in (240, 160, 344, 256)]
    assert abs(part.int() - pil_to_tensor(small.crop(box)).int()).max() < 12


def test_part_of_a_turned_picture_is_of_the_upright_one(tmp_path):
    red_left().save(tmp_path / 'a.jpg', exif=turned_exif(), quality=95)  # upright: 32 x 64, the upper half red
    seen = []
    part = open_part(tmp_path / 'a.jpg', lambda height, width: seen.append((height, width)) or (4, 2, 20, 28), 99)
    assert seen == [(64, 32)] and part.shape == (3, 20, 28)
    assert part[0].min() > 240 and part[2].max() < 15


# ---------------------------------------------------------------- transforms

def test_eval_transform_is_torchvisions():
    normalise = T.Normalize(transforms.MEAN, transforms.STD)
    theirs = T.Compose([T.Resize((24, 24), T.InterpolationMode.BICUBIC), T.ToTensor(), normalise])(noise())
    ours = EvalTransform(24)(noise())
    assert ours.dtype == torch.float32 and ours.shape == (3, 24, 24) and ours.is_contiguous()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_training_pictures_are_normalised_as_evaluated_ones_are():
    pixels = np.array(noise())
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    theirs = T.Compose([T.ToTensor(), T.Normalize(transforms.MEAN, transforms.STD)])(noise())
    assert torch.allclose(normalise(batch), theirs.expand(2, -1, -1, -1), atol=1e-6)
    assert batch.dtype == torch.uint8 and torch.equal(batch[0], pil_to_tensor(noise()))  # left as it was


def test_resizing_is_pils(monkeypatch):
    monkeypatch.setattr(random, 'random', lambda: 1.0)  # no mirror
    for size in ((200, 150), (20, 30)):
        ours, _ = TrainTransform(64, 0.5, False)(pil_to_tensor(noise(*size)), '')
        theirs = noise(*size).resize((64, 64), Image.Resampling.BICUBIC)
        assert ours.dtype == torch.uint8 and abs(ours.int() - pil_to_tensor(theirs).int()).max() <= 1


def test_swap_left_right_is_of_whole_words():
    assert swap_left_right('a dog left of a cat, on the right') == 'a dog right of a cat, on the left'
    assert swap_left_right('Left-most bright leftover') == 'Right-most bright leftover'
    text = 'the left, the right; rightly left.'
    assert swap_left_right(swap_left_right(text)) == text


@pytest.mark.parametrize('randaugment', [False, True])
def test_mirrored_pictures_have_mirrored_captions(randaugment):
    random.seed(0)
    transform, mirrored = TrainTransform(32, 0.9, randaugment), 0
    for _ in range(400):
        image, caption = transform(pil_to_tensor(red_left()), 'red left')
        image = image.float()
        assert image.shape == (3, 32, 32)
        red_is_left = bool(image[0, 8:24, 7:12].mean() > image[0, 8:24, 20:25].mean())
        assert red_is_left == (caption == 'red left')
        mirrored += caption == 'red right'
    assert 160 < mirrored < 240


def test_crops_are_those_of_random_resized_crop():
    """Equal in the distribution of place, area and shape (means over 4,000; a standard error is below 0.01)."""
    def facts(crops):
        values = np.array(crops, float)
        assert (values[:, :2] >= 0).all() and (values[:, :2] + values[:, 2:] <= (90, 130)).all()
        share, shape = values[:, 2] * values[:, 3] / 11700, np.log(values[:, 2] / values[:, 3])
        return [*(values / (90, 130, 90, 130)).mean(0), *np.quantile(share, (0.01, 0.5, 1)), shape.mean(), shape.std()]
    random.seed(0)
    torch.manual_seed(0)
    theirs = [T.RandomResizedCrop.get_params(torch.empty(3, 90, 130), (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    assert facts([TrainTransform(32, 0.2, False).crop(90, 130) for _ in range(4000)]) == pytest.approx(
        facts(theirs), abs=0.03)
    for shape in ((1, 10_000), (10_000, 1), (20, 500)):
        assert TrainTransform(32, 0.9, False).crop(*shape) == T.RandomResizedCrop.get_params(
            torch.empty(3, *shape), (0.9, 1.0), (3 / 4, 4 / 3))


# ---------------------------------------------------------------- RandAugment against OpenCV, which BLIP uses

@pytest.fixture
def positive(monkeypatch):
    monkeypatch.setattr(augment, 'sign', lambda: 1)


@pytest.mark.parametrize('name, matrix', [
    ('ShearX', [[1, 0.15, 0], [0, 1, 0]]), ('ShearY', [[1, 0, 0], [0.15, 1, 0]]),
    ('TranslateX', [[1, 0, 5], [0, 1, 0]]), ('TranslateY', [[1, 0, 0], [0, 1, 5]]), ('Rotate', None)])
def test_geometric_operations_are_blips(name, matrix, positive):
    image = np.array(noise(120, 90))
    matrix = cv2.getRotationMatrix2D((60, 45), 15, 1) if matrix is None else np.array(matrix, float)
    theirs = cv2.warpAffine(image, matrix, (120, 90), borderValue=(128, 128, 128))
    ours = augment.OPERATIONS[name](image)
    assert np.array_equal(ours, theirs) and abs(ours.astype(int) - image).mean() > 5


def test_uncovered_pixels_are_grey(positive):
    white = np.full((32, 32, 3), 255, np.uint8)
    assert augment.OPERATIONS['TranslateX'](white)[16, 0].tolist() == [128] * 3
    assert augment.OPERATIONS['Rotate'](white)[0, 0].tolist() == [128] * 3


@pytest.mark.parametrize('image', [noise(), noise().point(lambda value: 50 + value // 3), Image.new('RGB', (8, 8), RED),
                                   noise().quantize(5).convert('RGB')])
def test_histogram_operations_are_pils(image):
    for name, theirs in (('AutoContrast', ImageOps.autocontrast), ('Equalize', ImageOps.equalize)):
        ours = augment.OPERATIONS[name](np.array(image))
        assert abs(ours.astype(int) - np.asarray(theirs(image))).max() <= 1, name


def test_the_other_of_the_ten_change_nothing():
    for name in ('Identity', 'Brightness', 'Sharpness'):  # the latter two: BLIP's factor at magnitude 5 is 1.0
        assert np.array_equal(augment.OPERATIONS[name](np.array(noise())), noise()), name
    assert len(augment.OPERATIONS) == 10


def test_two_operations_each_with_probability_a_half(monkeypatch):
    random.seed(0)
    drawn = []
    monkeypatch.setattr(augment, 'OPERATIONS', {name: lambda image, name=name: drawn.append(name) or image
                                                for name in augment.OPERATIONS})
    for _ in range(2000):
        rand_augment(np.array(noise()))
    counts = [drawn.count(name) for name in augment.OPERATIONS]
    assert 1850 < sum(counts) < 2150 and min(counts) > 150 and max(counts) < 250
