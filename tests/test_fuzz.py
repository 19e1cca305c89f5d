"""Whatever DLIPProd is given, it answers or raises one TypeError or ValueError that names the thing and its place."""

import io
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from odd import KINDS, World, play
from PIL import Image

from prod import DLIPProd

pytestmark = pytest.mark.slow

FORMATS = ('PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP', 'PPM', 'ICO', 'TGA', 'JPEG2000')
MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'I;16', 'F')
THOROUGH = settings(max_examples=400, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers())
likely = arrays.arrays(st.sampled_from([np.uint8, np.uint16, np.float32]), st.one_of(
    st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 40)] * 2, st.sampled_from([1, 3, 4]))))
pixels = arrays.arrays(
    dtype=st.one_of(arrays.integer_dtypes(), arrays.unsigned_integer_dtypes(), arrays.floating_dtypes(),
                    arrays.boolean_dtypes(), arrays.complex_number_dtypes(), arrays.unicode_string_dtypes()),
    shape=st.one_of(arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
                    st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from([1, 2, 3, 4]))))
tensors = st.builds(lambda array: torch.tensor(array.tolist()) if array.size else torch.zeros(array.shape),
                    arrays.arrays(st.sampled_from([np.uint8, np.float32, np.int64, np.bool_]),
                                  arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
pictures = st.builds(lambda mode, width, height: Image.new(mode, (width, height)), st.sampled_from(MODES),
                     st.integers(0, 60), st.integers(0, 60))
images = st.one_of(likely, pixels, tensors, pictures)
things = st.one_of(numbers, st.text(max_size=20), st.binary(max_size=60), pixels, tensors, pictures)
nested = st.recursive(things, lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner),
                                                      st.dictionaries(st.text(max_size=3), inner, max_size=2)),
                      max_leaves=5)
counts, shares = st.integers(-1, 6), st.floats(-0.5, 2)
wanted = st.fixed_dictionaries({}, optional={
    'num_beams': counts, 'max_length': st.integers(-1, 40), 'min_length': st.integers(-1, 40), 'top_k': counts,
    'num_captions': counts | st.just(1.5), 'top_p': shares, 'temperature': shares, 'repetition_penalty': shares,
    'length_penalty': st.floats(-3, 3), 'early_stopping': st.booleans()})


@pytest.fixture(scope='module')
def dlip(folder):
    return DLIPProd(None, folder / 'save/last.pth')


def count(items) -> int:
    return len(items) if isinstance(items, list | tuple) else 1


@THOROUGH
@given(st.one_of(nested, images, st.lists(images, max_size=4)))
def test_any_image(dlip, images):
    try:
        features = dlip.get_image_feat(images)
    except (TypeError, ValueError) as error:
        assert re.match(r'images?(\[\d+\])?\b|the list of images is empty', str(error)), error
        return
    assert features.shape == (count(images), 256) and torch.isfinite(features).all()
    assert torch.allclose(features.norm(dim=1), torch.ones(len(features)), atol=1e-4)


@THOROUGH
@given(st.one_of(nested, st.text(), st.lists(st.text(), max_size=4)))
def test_any_text(dlip, texts):
    try:
        features = dlip.get_text_feat(texts)
    except (TypeError, ValueError) as error:
        assert re.match(r'texts(\[\d+\])? is|the list of texts is empty', str(error)), error
        return
    assert features.shape == (count(texts), 256) and torch.isfinite(features).all()


@settings(THOROUGH, max_examples=100)
@given(st.lists(st.one_of(images, things), min_size=1, max_size=4))
def test_what_cannot_be_read_is_skipped_in_its_place(dlip, images):
    features = dlip.get_image_feat(images, on_error='skip')
    captions = dlip.generate(images, on_error='skip', num_beams=1, max_length=7, min_length=5)
    for image, feature, caption in zip(images, features, captions, strict=True):
        try:
            alone = dlip.get_image_feat([image])[0]
        except (TypeError, ValueError):
            assert feature.isnan().all() and caption is None
        else:
            assert torch.allclose(feature, alone, atol=1e-5) and isinstance(caption, str)


@settings(THOROUGH, max_examples=150)
@given(wanted, st.booleans())
def test_any_setting(dlip, wanted, sample):
    image = Image.new('RGB', (9, 9))
    try:
        captions = dlip.generate(image, sample=sample, seed=0, **wanted)
    except (TypeError, ValueError) as error:
        assert re.match('generation needs|num_captions must be a whole number', str(error)), error
        return
    assert len(captions) == 1
    several = wanted.get('num_captions', 1)
    assert isinstance(captions[0], str) if several == 1 else len(captions[0]) == several


@pytest.mark.parametrize('kind', FORMATS)
def test_damaged_files(dlip, kind):
    """Cut off, with bytes changed, with a piece missing or repeated: 40 of each format."""
    noise, whole = random.Random(kind), io.BytesIO()
    Image.effect_noise((48, 40), 60).convert('RGB').save(whole, kind)
    whole, read = whole.getvalue(), 0
    assert dlip.get_image_feat(whole).shape == (1, 256)
    for i in range(40):
        data, at = bytearray(whole), noise.randrange(len(whole))
        if i % 4 == 0:
            del data[at:]
        elif i % 4 == 1:
            for _ in range(noise.randint(1, 20)):
                data[noise.randrange(min(len(data), 200 if i % 8 == 1 else len(data)))] = noise.randrange(256)
        elif i % 4 == 2:
            del data[at:at + noise.randint(1, 100)]
        else:
            data[at:at] = data[:noise.randint(1, 100)]
        try:
            assert torch.isfinite(dlip.get_image_feat(bytes(data))).all()
            read += 1
        except ValueError as error:
            assert str(error).startswith('image '), error
    assert read < 40


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', KINDS)
def test_odd_inputs(folder, tmp_path, kind):
    """Some cases of each kind; `python -m bench.fuzz` plays thousands."""
    world = World(tmp_path, folder / 'save/last.pth')
    outcomes = [play(kind, 0, number, world) for number in range(30 if kind in ('sizes', 'checkpoints') else 60)]
    assert 'right' in outcomes
