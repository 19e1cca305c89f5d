"""Odd inputs drawn by a seed, and what the code must make of each: the right answer, or a named error of one line.

`KINDS` maps the kind of a case to a function of (dice, an empty folder, `World`). It returns when the answer is right,
raises `Refused` after a named error where one is allowed, and raises anything else for a failure. tests/test_fuzz.py
plays a few cases of each kind, `python -m bench.fuzz` thousands.
"""

import csv
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import struct
import tarfile
import tempfile
from contextlib import chdir, contextmanager, nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, PngImagePlugin

from configs import flatten, load_config, read_size, read_yaml
from configs.rules import SIZE_RULES, rule
from data.annotations import load_annotated
from data.downloads import read_shard, read_visual_genome
from data.images import FORMATS, open_image, open_part
from data.index import build_index, read_index
from data.shards import ShardDataset, ShardStream
from data.transforms import EvalTransform, TrainTransform, WholeTransform
from models.blip import BLIP, BLIPConfig
from models.tokenizer import DEC, ENC, Tokenizer
from models.weights.checkpoint import save_checkpoint
from prod import DLIPProd
from utils import ROOT

WORDS = 'a picture of dog cat red blue green star ring above left the on grass two runs'.split()
SCHEMAS = ('pretrain', 'retrieval_flickr', 'caption_flickr')


def random_checkpoint(path: Path, task: str = 'pretrain') -> None:
    """A checkpoint of random weights, so large that different inputs give clearly different outputs."""
    torch.manual_seed(1)
    tokenizer = Tokenizer(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', DEC, ENC, *WORDS])
    model = BLIP(BLIPConfig(image_size=32, patch_size=16, vision_width=32, vision_depth=2, vision_heads=2,
                            text_width=32, text_depth=2, text_heads=2, text_ffn=64, task=task,
                            vocab_size=len(tokenizer.vocab)))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(path, model, tokenizer, {'data': {'max_tokens': 8, 'prompt': 'a picture of '}})


class World:
    """What cases share: a checkpoint at `weight`, its `dlip`, and a folder for theirs."""

    def __init__(self, folder: Path, weight: Path):
        self.folder, self.weight, self.dlip = Path(folder), Path(weight), DLIPProd(None, weight)
        self.image = self.folder / 'shared.jpg'
        Image.effect_noise((40, 30), 60).convert('RGB').save(self.image)


# ---------------------------------------------------------------- outcomes

class Refused(Exception):
    """A named error of one line, where one is allowed."""


class Hang(BaseException):
    """A case took too long. No Exception: code under test may catch those."""


@contextmanager
def refusing(*names: str | tuple[str, ...], errors=(ValueError, TypeError, FileNotFoundError)):
    """Raise `Refused` for an error of the block that is one line of less than 1,000 characters and holds every name,
    or one of each tuple of names; let any other error through."""
    try:
        yield
    except errors as error:
        text = str(error)
        alternatives = [(name,) if isinstance(name, str) else name for name in names]
        named = all(any(name in text for name in either) for either in alternatives)
        if not named or len(text) >= 1000 or len(text.splitlines()) != 1:
            raise
        raise Refused(text) from None


@contextmanager
def within(seconds: float):
    def ring(number, frame):
        raise Hang(f'still running after {seconds} s')
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def play(kind: str, seed: int, number: int, world: World, seconds: float = 60) -> str:
    """One case -> 'right', or the error that named what is wrong.

    Raises:
        BaseException: anything else, which is a failure.
    """
    place = Path(tempfile.mkdtemp(dir=world.folder))
    try:
        with within(seconds):
            KINDS[kind](random.Random(f'{kind} {seed} {number}'), place, world)
        return 'right'
    except Refused as refusal:
        return str(refusal)
    finally:
        shutil.rmtree(place, ignore_errors=True)


# ---------------------------------------------------------------- images

MODES = ('1', 'L', 'LA', 'La', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr', 'HSV', 'LAB', 'I', 'F',
         'I;16', 'I;16L', 'I;16B')
TURN = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1), 6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: x.swapaxes(0, 1)[::-1]}  # what makes it upright
NAMES = ('a', 'ü ñ', '日本', 'a.b', ' a', '-x', 'a"b', "it's", '%s{}', 'x' * 150, os.fsdecode(b'caf\xe9'), 'a\nb',
         '*', '#?')
TIFF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 2, 8, 8, 8, 8)  # bytes of the types of a TIFF tag
# Compressions of TIFF for some modes only: at others Pillow 12 does not write and, later, crashes.
ENCODERS = {'1': ['group3', 'group4', 'tiff_ccitt'], 'L': ['jpeg'], 'RGB': ['jpeg', 'webp'], 'RGBA': ['webp']}
HAVE_EXIF = ('JPEG', 'MPO', 'PNG', 'WEBP')  # to which Pillow writes the block as it is
TURNS = ('TIFF', 'AVIF')  # of which Pillow makes something of its own of it


def odd_size(dice: random.Random) -> tuple[int, int]:
    width, height = dice.choice([(1, 1), (dice.randint(1, 64), dice.randint(1, 64)), (dice.randint(1, 3), dice.randint(
        1, 2000)), (dice.randint(64, 300), dice.randint(64, 300)), (dice.randint(1, 64), dice.randint(1, 64))])
    return dice.choice([(width, height), (height, width)])


def draw(dice: random.Random, mode: str, size: tuple[int, int]) -> Image.Image:
    """A smooth image of a mode; a deep one is black to white of 8, 12 or 16 bits, or of floats to 1 or 255."""
    noise = np.random.default_rng(dice.getrandbits(32))
    small = noise.integers(0, 256, (dice.randint(1, 6), dice.randint(1, 8), 4), np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)
    if mode in ('I', 'F') or mode.startswith('I;16'):
        grey = np.array(image.convert('L').resize(size), np.float32) / 255
        grey.flat[0], grey.flat[-1] = 0, 1
        grey *= dice.choice([1, 255] if mode == 'F' else [255, 1023, 4095, 16383, 65535])
        kind = {'I': '<i4', 'F': '<f4', 'I;16B': '>u2'}.get(mode, '<u2')
        return Image.frombytes(mode, size, (grey if mode == 'F' else np.rint(grey)).astype(kind).tobytes())
    try:
        return image.convert(mode)
    except ValueError:  # Pillow converts to it in two steps, or not at all
        with suppress(ValueError):
            return image.convert('RGB' if mode in ('LAB', 'HSV', 'YCbCr') else 'LA').convert(mode)
    return Image.frombytes(mode, size, noise.bytes(size[0] * size[1] * len(Image.new(mode, (1, 1)).tobytes())))


def on_white(image: Image.Image) -> np.ndarray | None:
    """uint8 [H, W, 3] of any mode by its definition; None where it is a matter of taste (floats of unclear range)."""
    if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
        values = np.asarray(image, np.float64)
        white = next((white for white in (255, 1023, 4095, 16383, 65535) if values.max() <= white), values.max())
        if image.mode == 'F' and values.max() <= 1:
            white = 1
        elif image.mode == 'F' and np.percentile(values, 99.5) < 130:
            return None
        return np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)[..., None].repeat(3, 2)
    if image.mode == 'La':
        image = image.convert('LA')
    if image.mode in ('LA', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        values = np.asarray(image.convert('RGBA'), np.float64)
        alpha = values[..., 3:] / 255
        return np.rint(values[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.asarray(image.convert('RGB'))


def exif_block(dice: random.Random) -> tuple[bytes, int | None]:
    """An EXIF block with tags of every type, and the orientation if it is stated as the standard says, else None."""
    order, turn, kind = dice.choice('<>'), dice.choice([*range(1, 9), *range(1, 9), 0, 9, 65535]), dice.choice(
        [3, 3, 3, 1, 4, *range(19), 99])
    count = dice.choice([1, 1, 1, 1, 0, 2, 2 ** 31])
    value = {1: 'B3x', 3: 'H2x'}.get(kind, 'I')
    entries = [struct.pack(f'{order}HHI{value}', 274, kind, count, turn % 256 if kind == 1 else turn)]
    for _ in range(dice.choice([0, 0, 1, 5])):
        entries.insert(dice.randrange(len(entries) + 1), struct.pack(
            order + 'HHII', dice.choice([256, 271, 282, 305, 306, 34665, 34853, 37510, 40961, 42033, dice.getrandbits(
                16)]), dice.choice(range(19)), dice.choice([0, 1, 5, 2 ** 32 - 1]), dice.choice([0, 8, 9999, 2 ** 31])))
    block = b'Exif\0\0' + {'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(order + 'IH', 8, len(entries)) + b''.join(
        entries) + dice.choice([bytes(4), b'', b'\xff' * 4])
    return block, turn if kind == 3 and count == 1 and turn in TURN else None


def save_options(dice: random.Random, kind: str, image: Image.Image) -> dict:
    """Some of the options that Pillow's writer of a format takes."""
    info = PngImagePlugin.PngInfo()
    info.add_text('comment', 'x' * dice.choice([1, 10 ** 5]), zip=dice.random() < 0.5)
    info.add_itxt('XML:com.adobe.xmp', '<x:xmpmeta/>')
    more = [draw(dice, dice.choice(['L', 'RGB', image.mode]), image.size) for _ in range(2)]
    frames = {'save_all': True, 'append_images': more}
    profile = {'icc_profile': dice.choice([b'', b'x' * 70_000, b'\0' * 128]), 'dpi': dice.choice([(0, 0), (72, 300)]),
               'comment': b'\xff' * 20, 'xmp': b'<x:xmpmeta>'}
    choices = {
        'JPEG': {'quality': dice.randint(1, 100), 'progressive': True, 'optimize': True, 'keep_rgb': True,
                 'subsampling': dice.choice([0, 1, 2]), 'restart_marker_blocks': 1, **profile},
        'PNG': {'compress_level': dice.randint(0, 9), 'bits': dice.choice([1, 2, 4]), 'pnginfo': info,
                'transparency': dice.choice([0, 1, (0, 0, 0), b'\0\x80\xff']), **frames, 'default_image': True,
                **profile},
        'TIFF': {'compression': dice.choice(['raw', 'tiff_lzw', 'tiff_adobe_deflate', 'packbits', 'zstd', 'lzma',
                                             *ENCODERS.get(image.mode, [])]),
                 'big_tiff': True, 'strip_size': 10 ** 6, **frames, **profile,
                 'tiffinfo': {dice.choice([270, 305, 700, 33432, 65000]): dice.choice(['x', '\xe9', b'\0' * 99, 7])}},
        'WEBP': {'lossless': True, 'quality': dice.randint(0, 100), 'exact': True, 'method': 0, **frames, **profile},
        'GIF': {'interlace': dice.choice([0, 1]), 'transparency': dice.choice([0, 255]), 'disposal': 2, **frames,
                **profile},
        'JPEG2000': {'irreversible': True, 'quality_layers': [dice.randint(1, 60)], 'num_resolutions': 1,
                     'tile_size': (16, 16), 'no_jp2': True, 'progression': 'RPCL', 'quality_mode': 'rates'},
        'AVIF': {'quality': dice.randint(0, 100), 'subsampling': dice.choice(['4:0:0', '4:2:0', '4:4:4']), 'speed': 10,
                 **profile},  # no frames: with them Pillow 12 sometimes crashes
        'ICO': {'sizes': [(16, 16), (dice.randint(1, 64), dice.randint(1, 64))], 'bitmap_format': 'bmp'},
        'TGA': {'compression': 'tga_rle', 'orientation': dice.choice([-1, 1]), 'id_section': b'x' * 255},
        'MPO': {**frames, **profile}}
    chosen = {name: value for name, value in choices.get(kind, {}).items() if dice.random() < 0.25}
    if chosen.get('compression') in itertools.chain(*ENCODERS.values()):
        chosen.pop('append_images', None)  # they are of other modes
    return chosen


def write_image(dice: random.Random, place: Path) -> tuple[Path, str, int | None]:
    """An image as Pillow writes it in some format and mode -> (file, format, orientation or None for unclear)."""
    Image.init()
    while True:
        kind = dice.choice([*FORMATS, *FORMATS, *sorted(Image.SAVE)])
        image, (exif, turn) = draw(dice, dice.choice(MODES), odd_size(dice)), exif_block(dice)
        options, ending = save_options(dice, kind, image), dice.choice([f'.{kind.lower()}', '.jpg', '', '.JPG.png'])
        path = place / f'{dice.choice(NAMES)}{ending}'
        if dice.random() < 0.5 and kind in (*HAVE_EXIF, *TURNS):
            options['exif'] = exif
        else:
            turn = 1
        try:
            with patch.dict(Image.EXTENSION):  # Pillow's SPIDER writer takes the file's ending for its own
                image.save(path, kind, **options)
        except Exception:  # this Pillow cannot
            path.unlink(missing_ok=True)
            continue
        if dice.random() < 0.1:
            with open(path, 'ab') as file:
                file.write(dice.randbytes(dice.choice([1, 1000])))
        return path, kind, turn


def close(found, expected: np.ndarray | None, tolerance: int = 1) -> bool:
    found = np.asarray(found)
    return expected is None or (found.shape == expected.shape
                                and int(np.abs(found.astype(int) - expected.astype(int)).max()) <= tolerance)


def image_file(dice: random.Random, place: Path, world: World) -> None:
    """A file that Pillow wrote, through every reader; formats that may run programs must be refused."""
    path, kind, turn = write_image(dice, place)
    kept = path.read_bytes()
    if kind not in (*FORMATS, 'MPO'):
        with refusing(path.stem[:1]):
            open_image(path)
        raise AssertionError(f'a {kind} file was read')
    try:
        with Image.open(io.BytesIO(kept)) as image:  # of a raw TIFF's path Pillow 12 garbles a turned one
            image.load()
            expected = on_white(image)
    except Exception:  # Pillow cannot read what it wrote
        with refusing(path.stem[:1]):
            open_image(path)
        return
    if turn and kind in TURNS:
        turn = image.getexif().get(274, 1)
    answers = [TURN[number](expected) for number in ([turn] if turn in TURN else TURN)] if expected is not None else []
    found = open_image(path)
    if answers:
        expected = next((answer for answer in answers if close(found, answer)), None)
        assert expected is not None, f'{kind}: {found.size}, not as Pillow shows it (orientation {turn})'
    part = open_part(path, WholeTransform(8).crop, math.inf).movedim(0, -1).numpy()
    assert close(part, expected, 3), f'{kind}: the training reader reads another image'
    train = TrainTransform(16, 0.2, True)
    assert train(open_part(path, train.crop, 16), '')[0].shape == (3, 16, 16)
    assert EvalTransform(16)(found).isfinite().all()
    feature, = world.dlip.get_image_feat(found)
    for given in (path, str(path), kept, io.BytesIO(kept), Image.open(io.BytesIO(kept))):
        if dice.random() < 0.4:
            said, = world.dlip.get_image_feat(given)
            assert float(said @ feature) > 0.9999, f'{kind} as {type(given).__name__}: another image'
    assert path.read_bytes() == kept


def image_object(dice: random.Random, place: Path, world: World) -> None:
    """An image in memory: PIL of any mode, an array or a tensor."""
    image = draw(dice, dice.choice(MODES), odd_size(dice))
    expected, given, bgr = on_white(image), image, False
    if image.mode in ('L', 'RGB') and dice.random() < 0.6:
        array = np.asarray(image)
        given = dice.choice([array, array / 255, array.astype(np.float32) / 255, array.astype(np.uint16) * 257,
                             np.asfortranarray(array),
                             torch.tensor(array.reshape(*array.shape[:2], -1)).movedim(-1, 0)])
        bgr = dice.random() < 0.5
        if bgr and isinstance(given, np.ndarray) and given.ndim == 3:
            given = given[..., ::-1]
    before = image.tobytes()
    found, = world.dlip.get_image_feat(given, bgr=bgr)
    assert found.isfinite().all() and image.tobytes() == before
    if expected is not None:
        wanted, = world.dlip.get_image_feat(Image.fromarray(np.ascontiguousarray(expected)))
        assert float(found @ wanted) > 0.999, f'{image.mode} {type(given).__name__}: another image'


# ---------------------------------------------------------------- settings

YAMLS = ('.nan', '.inf', '-.inf', '-1', '0', '1', '2', '1.5', '-0.0', '1e400', '1e-400', '9' * 50, 'true', 'no',
         'null', '~', '', '""', '" "', "'1'", '[]', '{}', '[1]', '[[1, 2]]', '{a: 1}', '2020-01-01', '0x10', '0o7',
         '1_000', '1:30', '+1', '.5', '1.', '1e3', '1e-3', '!!str 1', '!!int "1"', '!!float 1', '!!binary aGk=',
         '!!set {a}', '!!omap [a: 1]', '!x 1', '&a 1', '*a', 'é', '"\\0"', '|\n    x', '>-\n    1', 'x' * 2000,
         '[' * 15 + ']' * 15, '1 # note', '@', '`', '%', '- 1', '? a', 'cosine', 'teacher', 'small', 'huge', 'bf16',
         '[1, 2', '"', '{', '\t1', '1\x07', '\u2028', '🐕', '<<', '=')


def odd_config(dice: random.Random, place: Path, world: World) -> None:
    """Settings of odd values in a file and on the command line, or a shipped file with its lines in disorder."""
    schema, path = f'configs/{dice.choice(SCHEMAS)}.yaml', place / 'my.yaml'
    shipped = dict(flatten(read_yaml(ROOT / schema)))
    values = {key: dice.choice(YAMLS) for key in dice.sample(sorted(shipped), dice.choice([1, 1, 2, 3]))}
    overrides = [f'{key}={text}' for key, text in values.items() if dice.random() < 0.5]
    sections: dict[str, list[str]] = {}
    for key, text in values.items():
        if f'{key}={text}' not in overrides:
            section, _, leaf = key.rpartition('.')
            sections.setdefault(section, []).append(f'{"  " if section else ""}{leaf}: {text}\n')
    lines = [line for section, entries in sections.items() for line in ([f'{section}:\n'] if section else []) + entries]
    whole = dice.random() < 0.3
    if whole:
        lines, values, overrides = (ROOT / schema).read_text().splitlines(True), shipped, []
        for _ in range(dice.randint(1, 3)):
            at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
            lines[at] = dice.choice([lines[other], lines[at][1:], ' ' + lines[at], lines[at] * 2, '', lines[at].upper(),
                                     dice.choice(YAMLS), lines[at].rstrip() + dice.choice(YAMLS) + '\n'])
    text = ''.join(lines) or 'train: {epochs: 1}'
    values |= {} if lines else {'train.epochs': ''}
    path.write_text(text, encoding=dice.choice(['utf-8', 'utf-8-sig', 'utf-16']))
    keys = {part for key in values for part in (key, key.rpartition('.')[2], key.partition('.')[0]) if part}
    with refusing(('my.yaml', 'command line', 'configs/'), (*keys, 'YAML', 'alias', 'unknown key')):
        found = dict(flatten(load_config(path, schema, overrides)))
    assert found.keys() == shipped.keys()
    for key, value in found.items():
        assert rule(key).read(value) == value and not (isinstance(value, float) and not math.isfinite(value)), key
        assert key in values or value == shipped[key], f'{key} changed'


def odd_size_block(dice: random.Random, place: Path, world: World) -> None:
    """A block of sizes.yaml with an odd value."""
    path, key, value = place / 'sizes.yaml', dice.choice([*SIZE_RULES, 'x', '']), dice.choice(YAMLS)
    blocks = (ROOT / 'configs/sizes.yaml').read_text()
    lines = ['mine:'] + [f'  {name}: {size}' for name, size in read_size('small').items() if name != key]
    path.write_text('\n'.join([*lines, f'  {key}: {value}', '', blocks]))
    with refusing('sizes.yaml', (key, 'YAML', 'alias')):
        block = read_size(f'{path}:mine')
    assert block.keys() == set(SIZE_RULES) and all(isinstance(number, int) for number in block.values())


# ---------------------------------------------------------------- annotations

TEXTS = ('a dog', 'A "quoted" dog, and; more|bars', 'tab\there', 'ünï 日本 🐕', "it's", '  two  blanks ', 'x' * 3000,
         '=1+1', 'null', 'NaN', '1', 'a\u2028b', 'a\x85b', '👨‍👩‍👧', '\u202eright', 'back\\slash', 'a\r\nb', 'a\nb',
         '{"a": 1}', 'é', '☃', "'", 'a#0 b')
FILES = ('a.jpg', 'b c.jpg', 'ü.png', '日本.jpg', 'a,b.jpg', 'a;b.jpg', "it's.jpg", 'A.JPEG', '0001.jpg', '-.jpg',
         'null.jpg', 'x.y.jpg')
ODD = (None, True, -1, 0, 1.5, math.nan, 10 ** 30, '', ' ', 'x', '\ud800', [], [None], [[]], {}, {'a': 1},
       '2020-01-01', 'x' * 5000)
LAYOUTS = ('mine.csv', 'metadata.csv', 'mine.jsonl', 'karpathy', 'blip', 'coco', 'kaggle', 'results', 'token')


def damage(dice: random.Random, data: bytes) -> bytes:
    """A file with a piece changed, missing or repeated."""
    at, end = sorted(dice.choices(range(len(data) + 1), k=2))
    end = min(end, at + dice.choice([1, 4, 1000]))
    piece = dice.choice([b'', dice.randbytes(end - at), data[at:end] * 2, b'\0', b'"', b'\n', b',', b'}', b'\xff'])
    return data[:at] + piece + data[end:]


def odd_leaf(dice: random.Random, value):
    """JSON of which some part is something odd, or gone."""
    if isinstance(value, list | dict) and value and dice.random() < 0.85:
        places = list(value) if isinstance(value, dict) else range(len(value))
        at, value = dice.choice(places), type(value)(value)
        if dice.random() < 0.15:
            del value[at]
        else:
            value[at] = odd_leaf(dice, value[at])
        return value
    return dice.choice(ODD)


def tabled(dice: random.Random, rows: list[tuple], **options) -> str:
    file = io.StringIO(newline='')
    csv.writer(file, lineterminator=dice.choice(['\n', '\r\n']), **options).writerows(rows)
    return file.getvalue()


def annotation(dice: random.Random, layout: str, rows: list[tuple[str, list[str], str]]) -> dict[str, object]:
    """File name -> its text, or its JSON, of an annotation in one of the layouts."""
    flat = [(name, text, split) for name, texts, split in rows for text in texts]
    head = [dice.choice(['image', 'file_name', 'Filename', ' path']), dice.choice(['caption', 'TEXT']), 'split']
    ascii_only, quoting = dice.random() < 0.5, dice.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
    records = [dict(zip(('image', 'caption', 'split'), row, strict=True)) for row in rows]
    by_split = {s: [row for row in rows if row[2] == s] for s in ('train', 'val', 'test')}
    return {
        'mine.csv': lambda: {'mine.csv': tabled(dice, [head, *flat], delimiter=dice.choice(',;\t|'),
                                                 quoting=quoting)},
        'metadata.csv': lambda: {'metadata.csv': tabled(dice, [('file_name', 'text', 'split'), *flat])},
        'mine.jsonl': lambda: {'mine.jsonl': ''.join(
            json.dumps(record, ensure_ascii=ascii_only) + '\n' for record in records)},
        'karpathy': lambda: {'dataset_flickr30k.json': {'images': [
            {'filename': n, 'split': s, 'sentences': [{'raw': t} for t in texts]} for n, texts, s in rows]}},
        'blip': lambda: {f'flickr30k_{s}.json': [{'image': n, 'caption': texts} for n, texts, _ in part]
                         for s, part in by_split.items()},
        'coco': lambda: {f'captions_{year}2017.json': {
            'images': [{'id': n, 'file_name': n} for n, *_ in part],
            'annotations': [{'image_id': n, 'caption': t} for n, texts, _ in part for t in texts]}
            for year, part in (('train', by_split['train']), ('val', by_split['val'] + by_split['test']))},
        'kaggle': lambda: {'captions.txt': tabled(dice, [('image', 'caption'), *[row[:2] for row in flat]])},
        'results': lambda: {'results.csv': 'image_name| comment_number| comment\n' + ''.join(
            f'{n}| {i}| {" ".join(t.split())}\n' for n, texts, _ in rows for i, t in enumerate(texts))},
        'token': lambda: {'Flickr8k.token.txt': ''.join(f'{n}#0\t{" ".join(t.split())}\n' for n, t, _ in flat)},
    }[layout]()


def odd_annotation(dice: random.Random, place: Path, world: World) -> None:
    """A folder of images with an annotation in any layout and encoding, whole or damaged."""
    root = place / dice.choice(['data', 'my data', 'ü'])
    root.mkdir()
    names = dice.sample(FILES, dice.randint(4, 8))
    for name in names:
        os.link(world.image, root / name)
    rows = [(name, dice.choices(TEXTS, k=dice.randint(1, 3)), split)
            for name, split in zip(names, itertools.cycle(('train', 'val', 'test', 'train')))]
    layout = dice.choice(LAYOUTS)
    broken, files = dice.random() < 0.6, annotation(dice, layout, rows)
    for name, content in files.items():
        if not isinstance(content, str):
            content = json.dumps(odd_leaf(dice, content) if broken and dice.random() < 0.7 else content,
                                 ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, 1]))
        data = content.encode(dice.choice(['utf-8', 'utf-8-sig', 'utf-16', 'utf-32']), 'surrogatepass')
        (root / name).write_bytes(damage(dice, data) if broken and dice.random() < 0.7 else data)
    found: dict[str, list[str]] = {}
    with refusing((str(root), *files)) if broken else nullcontext():
        for split in ('train', 'val', 'test'):
            for image in load_annotated(root, split):
                assert all(isinstance(text, str) for text in image.captions)
                found.setdefault(image.path.name, []).extend(' '.join(text.split()) for text in image.captions)
    if not broken:
        assert found == {name: [' '.join(text.split()) for text in texts] for name, texts, _ in rows}, layout


def odd_pairs(dice: random.Random, place: Path, world: World) -> None:
    """An all.json, whole or damaged, as an index of pairs."""
    path, broken = place / 'all.json', dice.random() < 0.6
    records = [{'caption': dice.choice(TEXTS), 'image_root': dice.choice(FILES), 'id': number} for number in range(9)]
    content = odd_leaf(dice, records) if broken else records
    text = json.dumps(content, ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, 1, '\t']))
    data = dice.choice(['', '\n \t']).encode() + text.encode('utf-8', 'surrogatepass') + dice.choice([b'', b'\n\n'])
    path.write_bytes(damage(dice, data) if broken and dice.random() < 0.5 else data)
    with refusing('all.json', 'line') if broken else nullcontext():
        table = read_index(build_index(path)).to_pydict()
    if not broken:
        assert table['caption'] == [record['caption'] for record in records]
        assert [os.fsdecode(name) for name in table['image_root']] == [record['image_root'] for record in records]


def odd_shard(dice: random.Random, place: Path, world: World) -> None:
    """A shard of img2dataset with its parquet in any Arrow types, or with its side files, whole or damaged."""
    shard, count = place / '00000', dice.randint(1, 6)
    shard.mkdir()
    keys, texts = [f'{number:09d}' for number in range(count)], dice.choices(TEXTS, k=count)
    for key in keys:
        os.link(world.image, shard / f'{key}.jpg')
    kind = dice.choice([pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()),
                        pa.string_view()])
    encoded = [text.encode() for text in texts] if kind == pa.binary() else texts
    columns = {'key': dice.choice([keys, [int(key) for key in keys]]), 'caption': pa.array(texts).dictionary_encode()
               if pa.types.is_dictionary(kind) else pa.array(encoded, kind), 'status': ['success'] * count,
               'url': [f'https://example.com/{number}' for number in range(count)],
               'width': dice.choice([[40] * count, [40.0] * count, ['40'] * count, [None] * count, [math.nan] * count]),
               'height': [30] * count, 'extra': [[1]] * count}
    broken, side = dice.random() < 0.5, dice.random() < 0.3
    if broken:
        name = dice.choice(list(columns))
        if dice.random() < 0.4:
            del columns[name]
        else:
            columns[name] = [dice.choice([None, 1, -1, 10 ** 12]) for _ in keys] if dice.random() < 0.5 else pa.array(
                pd.to_datetime(['2020-01-01'] * count)) if dice.random() < 0.3 else [[{'a': None}]] * count
    if side:
        for key, text in zip(keys, texts, strict=True):
            record = {'caption': text, 'url': 'u', 'width': 4, 'height': 3}
            (shard / f'{key}.json').write_text(json.dumps(odd_leaf(dice, record) if broken else record))
    else:
        path = shard.with_suffix('.parquet')
        pq.write_table(pa.table(columns), path, compression=dice.choice(['snappy', 'zstd', 'none']), row_group_size=2)
        if broken and dice.random() < 0.4:
            path.write_bytes(damage(dice, path.read_bytes()))
    with refusing('00000') if broken else nullcontext():
        part = read_shard(shard)
    records = [json.loads(f'{record}0}}') for record in part.records.to_pylist()]
    assert len(records) == len(part.words) == len(part.sides) == len(part.identity)
    assert all(isinstance(record['caption'], str) and os.path.isfile(record['image_root']) for record in records)
    if not broken:
        assert [' '.join(record['caption'].split()) for record in records] == [' '.join(text.split()) for text in texts]


def odd_genome(dice: random.Random, place: Path, world: World) -> None:
    """Visual Genome's regions with odd entries."""
    (place / 'VG_100K').mkdir()
    os.link(world.image, place / 'VG_100K/1.jpg')
    region = {'phrase': 'a dog on the green grass', 'width': 700, 'height': 500, 'x': 0, 'y': 0, 'image_id': 1}
    content = [{'id': number, 'regions': [region, region | {'phrase': 'short'}]} for number in (1, 2)]
    broken = dice.random() < 0.8
    data = json.dumps(odd_leaf(dice, content) if broken else content).encode()
    (place / 'region_descriptions.json').write_bytes(damage(dice, data) if broken and dice.random() < 0.3 else data)
    with refusing('region_descriptions.json') if broken else nullcontext():
        count = sum(len(part.records) for part in read_visual_genome(place))
    assert broken or count == 1


def odd_tar(dice: random.Random, place: Path, world: World) -> None:
    """A tar of samples in any tar format, with odd members, whole or damaged, as training reads it."""
    path, broken = place / dice.choice(['a.tar', 'a.tar.gz', 'my {b}.tar', 'a.tgz']), dice.random() < 0.5
    image = world.image.read_bytes()
    texts = [f'{dice.choice(WORDS)} {number}' for number in range(dice.randint(1, 6))]
    with tarfile.open(path, 'w:gz' if path.suffix in ('.gz', '.tgz') else 'w', format=dice.choice([0, 1, 2])) as tar:
        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.mtime = len(data), kind, dice.choice([0, 2 ** 31])
            tar.addfile(member, io.BytesIO(data))
        for number, text in enumerate(texts):
            key = f'{dice.choice(["", "", "d/", "x" * 60 + "/", "./"])}{number:05d}'
            side = dice.choice([('txt', text.encode()), ('json', json.dumps({'caption': text}).encode())])
            parts = [(f'{key}.{dice.choice(["jpg", "JPG", "jpeg", "png"])}', image), (f'{key}.{side[0]}', side[1])]
            for name, data in dice.sample(parts, 2):
                add(name, data)
            if dice.random() < 0.3:
                add(f'{key}.{dice.choice(["cls", "npy", "x.y.z"])}', dice.randbytes(20))
            if dice.random() < 0.2:
                add(f'._{number:05d}.jpg', b'mac')
            if dice.random() < 0.2:
                add('folder', b'', tarfile.DIRTYPE)
    if broken:
        path.write_bytes(damage(dice, path.read_bytes()))
    names = (path.name, str(path), path.name.replace('{b}', 'b'))
    with refusing(names) if broken or '{' in path.name else nullcontext():
        data = ShardDataset(str(path), TrainTransform(16, 0.5, False), 30)
        items = list(ShardStream(data, 1, len(data), 0, 0))
        assert len(items) == len(data) and all(item['image'].shape == (3, 16, 16) for item in items)
        if not broken:
            assert sorted(item['caption'].split()[-1] for item in items) == sorted(text.split()[-1] for text in texts)


# ---------------------------------------------------------------- checkpoints

def odd_checkpoint(dice: random.Random, place: Path, world: World) -> None:
    """A checkpoint with a part changed: it serves, or says what is wrong."""
    path, whole = place / dice.choice(['a.pth', 'my net.pt', 'x']), torch.load(world.weight, weights_only=True)
    weights, name = whole['model'], dice.choice(list(whole['model']))
    tensor = weights[name]

    def set_weight():
        weights[name] = dice.choice([
            lambda: tensor.half(), lambda: tensor.double(), lambda: tensor.bfloat16(), lambda: tensor.to(torch.int8),
            lambda: tensor > 0, lambda: tensor.to(torch.complex64), lambda: tensor.flatten(), lambda: tensor[None],
            lambda: tensor * math.nan, lambda: tensor * 1e30, lambda: tensor + math.inf, lambda: tensor[:0],
            lambda: tensor.to_sparse(), lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), lambda: None,
            lambda: tensor.tolist(), lambda: torch.zeros(()).expand(tensor.shape), lambda: tensor.to('meta'), lambda: 7,
            lambda: tensor.repeat(2, *[1] * (tensor.ndim - 1)) if tensor.ndim else tensor, lambda: tensor.mT if
            tensor.ndim > 1 else tensor, lambda: torch.nn.Parameter(tensor), lambda: tensor.to(torch.float8_e4m3fn)])()

    def rename():
        new = dice.choice(['', 'module.' + name, name.upper(), 7, 'x' * 5000, 'a\nb'])
        weights[new] = weights.pop(name) if dice.random() < 0.5 else tensor

    def set_part(part, key=None):
        holder = whole if key is None else whole[part]
        holder[part if key is None else key] = dice.choice([*ODD, 10 ** 9, [1, 'a'], ['a'] * 24])

    change = dice.choice([
        set_weight, set_weight, set_weight, rename, lambda: weights.pop(name),
        lambda: set_part(dice.choice(list(whole))),
        lambda: set_part('architecture', dice.choice([*whole['architecture'], 'x'])),
        lambda: set_part('architecture', dice.choice(list(whole['architecture']))),
        lambda: set_part('config', 'data'), lambda: whole['config']['data'].update(
            {dice.choice(['prompt', 'max_tokens']): dice.choice(ODD)}),
        lambda: whole['config'].update(eval={dice.choice(['num_beams', 'max_length', 'min_length']): dice.choice(ODD)}),
        lambda: whole['vocab'].__setitem__(dice.randrange(len(whole['vocab'])), dice.choice(ODD)),
        lambda: whole.pop(dice.choice(list(whole)))])
    if dice.random() < 0.9:
        change()
    saved = whole if dice.random() < 0.9 else dice.choice([weights, {'state_dict': weights}, [weights], None, tensor])
    torch.save(saved, path, _use_new_zipfile_serialization=dice.random() < 0.8)
    if dice.random() < 0.1:
        path.write_bytes(damage(dice, path.read_bytes()))
    with refusing(str(path)):
        dlip = DLIPProd(None, path, tokenizer=ROOT / 'tests/vocab.txt')
        image = Image.open(world.image)
        if dlip.net.text_decoder is not None:
            assert all(isinstance(text, str) for text in dlip.generate(image, seed=0))
            assert dlip.caption_scores(image, 'a dog').isfinite().all()
        if dlip.net.text_encoder is not None:
            assert dlip.similarity(image, ['a dog', '']).isfinite().all()
            assert dlip.match(image, 'a dog').isfinite().all()


# ---------------------------------------------------------------- arguments

VALUES = (None, True, False, -1, 0, 1, 2, 2.5, math.nan, math.inf, 10 ** 30, '', 'x', 'x' * 10 ** 4, b'', b'x', [],
          {}, (), np.float32(2), np.int64(2), np.array([1, 2]), torch.tensor(2), torch.tensor([1, 2]), Path('x'),
          [None], 1j, range(3), len, 'skip', 'raise', 'bf16', 'cpu', 'cuda:7', '\0', 'a\nb')
LIKELY = (1, 2, 3, 7, 40, 600, 10 ** 6, 2 ** 63, 0.0, 0.3, 0.9, 1.0, 1.7, 1e-30, 1e30, np.int64(3), np.float32(0.5),
          True, False)
OPTIONS = {
    'generate': ('sample', 'num_beams', 'max_length', 'min_length', 'top_k', 'top_p', 'temperature',
                 'repetition_penalty', 'no_repeat_ngram_size', 'length_penalty', 'early_stopping', 'num_captions',
                 'prefix', 'forbid', 'scores', 'seed', 'batch_size', 'bgr', 'on_error'),
    'get_image_feat': ('batch_size', 'bgr', 'on_error'), 'get_text_feat': ('batch_size',),
    'similarity': ('bgr',), 'match': ('batch_size', 'bgr', 'on_error'), 'caption_scores': ('batch_size', 'bgr'),
    'search': ('k', 'rerank', 'min_score', 'query', 'approximate'), 'index': ('images', 'folder', 'batch_size'),
    'DLIPProd': ('name', 'weight', 'device', 'precision', 'backend', 'memory'), 'save_pretrained': ('folder',)}


def odd_arguments(dice: random.Random, place: Path, world: World) -> None:
    """A public method with one or two odd arguments."""
    method, image, text = dice.choice([*OPTIONS, 'generate', 'generate']), Image.open(world.image), 'a red dog'
    names = dice.sample(OPTIONS[method], min(len(OPTIONS[method]), dice.choice([1, 1, 2])))
    given = {name: dice.choice(dice.choice([VALUES, LIKELY, LIKELY])) for name in names}
    os.link(world.image, place / 'a.jpg')
    with chdir(place), refusing((*given, 'image', 'text', 'no checkpoint', 'cannot get', 'device', 'folder'),
                  errors=(TypeError, ValueError, FileNotFoundError, ImportError, PermissionError)):
        if method == 'DLIPProd':
            DLIPProd(**{'name': None, 'weight': world.weight} | given).get_text_feat(text)
        elif method == 'search':
            index = world.dlip.index(place, place / 'index')
            assert isinstance(world.dlip.search(**{'query': text, 'index': index} | given), list)
        elif method == 'index':
            assert len(world.dlip.index(**{'images': place, 'folder': place / 'index'} | given)) <= 1
        elif method == 'save_pretrained':
            world.dlip.save_pretrained(**given)
        else:
            inputs = {'generate': (image,), 'get_image_feat': (image,), 'get_text_feat': (text,)}
            answer = getattr(world.dlip, method)(*inputs.get(method, (image, text)), **given)
            assert len(answer) == 1 and (method == 'generate' or answer.isfinite().all())


KINDS = {'images': image_file, 'objects': image_object, 'configs': odd_config, 'sizes': odd_size_block,
         'annotations': odd_annotation, 'pairs': odd_pairs, 'shards': odd_shard, 'genome': odd_genome, 'tars': odd_tar,
         'checkpoints': odd_checkpoint, 'arguments': odd_arguments}
