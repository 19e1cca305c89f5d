"""Pictures of any mode to RGB, damaged files, and BLIP's transforms."""

import random
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms as T

from data import transforms
from data.transforms import eval_transform, open_image, rand_augment, swap_left_right, to_rgb, train_transform

RED, BLUE = (255, 0, 0), (0, 0, 255)


def noise(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth random picture."""
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
    assert grey([0, 255], np.uint16) == [0, 1]  # 16 bit says its range


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

@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_files_that_are_no_picture_are_named(tmp_path):
    noise(200, 200).save(tmp_path / 'whole.jpg')
    whole = (tmp_path / 'whole.jpg').read_bytes()
    noise().save(tmp_path / 'whole.png')
    contents = {'truncated.jpg': whole[:len(whole) // 2], 'header.jpg': whole[:20], 'empty.jpg': b'', 'text.jpg': b'hi',
                'truncated.png': (tmp_path / 'whole.png').read_bytes()[:200], 'bad.tif': b'II*\0\xff\xff\xff\xff',
                'bad.gif': b'GIF89a', 'bad.webp': b'RIFF\0\0\0\0WEBPVP8 '}
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'{re.escape(str(path))} is not a readable picture'):
            open_image(path)
    with pytest.raises(FileNotFoundError, match='no picture .*absent.jpg'):
        open_image(tmp_path / 'absent.jpg')
    with pytest.raises(ValueError, match='is not a readable picture'):
        open_image(tmp_path)


def test_open_file_objects(tmp_path):
    noise().save(tmp_path / 'a.png')
    with open(tmp_path / 'a.png', 'rb') as file:
        assert np.array_equal(open_image(file), noise())


def test_jpeg_is_decoded_small_but_not_below_min_size(tmp_path):
    noise(512, 384).save(tmp_path / 'a.jpg', quality=95)
    assert open_image(tmp_path / 'a.jpg').size == (512, 384)
    assert open_image(tmp_path / 'a.jpg', min_size=193).size == (512, 384)
    small = open_image(tmp_path / 'a.jpg', min_size=90)
    assert small.size == (128, 96)
    whole = noise(512, 384).resize((128, 96), Image.Resampling.BOX)
    assert abs(np.asarray(small, int) - np.asarray(whole, int)).max() < 12


# ---------------------------------------------------------------- transforms

def test_eval_transform_is_torchvisions():
    normalise = T.Normalize(transforms.MEAN, transforms.STD)
    theirs = T.Compose([T.Resize((24, 24), T.InterpolationMode.BICUBIC), T.ToTensor(), normalise])(noise())
    ours = eval_transform(24)(noise())
    assert ours.dtype == torch.float32 and ours.shape == (3, 24, 24) and ours.is_contiguous()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_swap_left_right_is_of_whole_words():
    assert swap_left_right('a dog left of a cat, on the right') == 'a dog right of a cat, on the left'
    assert swap_left_right('Left-most bright leftover') == 'Right-most bright leftover'
    text = 'the left, the right; rightly left.'
    assert swap_left_right(swap_left_right(text)) == text


@pytest.mark.parametrize('randaugment', [False, True])
def test_mirrored_pictures_have_mirrored_captions(randaugment):
    random.seed(0)
    torch.manual_seed(0)
    transform, mirrored = train_transform(32, 0.9, randaugment), 0
    for _ in range(400):
        image, caption = transform(red_left(), 'red left')
        assert image.shape == (3, 32, 32)
        red_is_left = bool(image[0, 8:24, 7:12].mean() > image[0, 8:24, 20:25].mean())
        assert red_is_left == (caption == 'red left')
        mirrored += caption == 'red right'
    assert 160 < mirrored < 240


def test_crops_keep_their_share_of_the_area():
    torch.manual_seed(0)
    crop = train_transform(32, 0.5, False).crop
    crops = [crop.get_params(noise(99, 99), crop.scale, crop.ratio) for _ in range(200)]
    shares = [height * width / 99 ** 2 for _, _, height, width in crops]
    assert 0.45 < min(shares) < 0.6 and 0.9 < max(shares) <= 1


def test_min_size_allows_no_enlarged_crop():
    transform = train_transform(64, 0.5, False)
    side = transform.min_size
    for width, height in ((side, side), (2 * side, side), (side, 3 * side)):
        image = Image.new('RGB', (width, height))
        for _ in range(300):
            _, _, h, w = transform.crop.get_params(image, transform.crop.scale, transform.crop.ratio)
            assert min(h, w) >= 63


# ---------------------------------------------------------------- RandAugment against OpenCV, which BLIP uses

@pytest.fixture
def positive(monkeypatch):
    monkeypatch.setattr(transforms, 'sign', lambda: 1)


def interior(image, margin: int = 22) -> np.ndarray:
    return np.asarray(image, int)[margin:-margin, margin:-margin]


@pytest.mark.parametrize('name, matrix', [
    ('ShearX', [[1, -0.15, 0], [0, 1, 0]]), ('ShearY', [[1, 0, 0], [-0.15, 1, 0]]),
    ('TranslateX', [[1, 0, -5], [0, 1, 0]]), ('TranslateY', [[1, 0, 0], [0, 1, -5]]), ('Rotate', None)])
def test_geometric_operations_are_blips(name, matrix, positive):
    cv2 = pytest.importorskip('cv2')
    image = noise(120, 90)
    matrix = cv2.getRotationMatrix2D((60, 45), 15, 1) if matrix is None else np.array(matrix, float)
    theirs = cv2.warpAffine(np.asarray(image), matrix, (120, 90), borderValue=(128, 128, 128))
    ours = transforms.OPERATIONS[name](image)
    assert abs(interior(ours) - interior(theirs)).mean() < 1.5  # half a pixel of difference in the pixel centres
    assert abs(interior(ours) - interior(image)).mean() > 5


def test_uncovered_pixels_are_grey(positive):
    white = Image.new('RGB', (32, 32), 'white')
    assert transforms.OPERATIONS['TranslateX'](white).getpixel((31, 16)) == (128, 128, 128)
    assert transforms.OPERATIONS['Rotate'](white).getpixel((0, 0)) == (128, 128, 128)


def test_other_operations():
    image = ImageOps.autocontrast(noise()).point(lambda value: 50 + value // 2)
    operate = {name: np.asarray(operation(image)) for name, operation in transforms.OPERATIONS.items()}
    for name in ('Identity', 'Brightness', 'Sharpness'):  # the latter two: BLIP's factor at magnitude 5 is 1.0
        assert np.array_equal(operate[name], image), name
    assert (operate['AutoContrast'].min(), operate['AutoContrast'].max()) == (0, 255)
    assert np.ptp(operate['Equalize']) > np.ptp(np.asarray(image))
    assert len(transforms.OPERATIONS) == 10


def test_two_operations_each_with_probability_a_half(monkeypatch):
    random.seed(0)
    drawn = []
    monkeypatch.setattr(transforms, 'OPERATIONS', {name: lambda image, name=name: drawn.append(name) or image
                                                   for name in transforms.OPERATIONS})
    for _ in range(2000):
        rand_augment(noise())
    counts = [drawn.count(name) for name in transforms.OPERATIONS]
    assert 1850 < sum(counts) < 2150 and min(counts) > 150 and max(counts) < 250
