"""DLIPProd on random checkpoints: what it returns, every kind of image it takes, every error it gives."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from models.blip import BLIP, BLIPConfig
from models.checkpoint import save_checkpoint
from models.tokenizer import DEC, ENC, Tokenizer
from prod import DLIPProd
from prod.memory import picture_bytes

WORDS = 'a picture of dog cat red blue green star ring above left the on grass two runs'.split()
TOLERANCE = {'rtol': 0, 'atol': 1e-5}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder `save/` with one random checkpoint per task."""
    folder = tmp_path_factory.mktemp('prod')
    (folder / 'save').mkdir()
    tokenizer = Tokenizer(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', DEC, ENC, *WORDS])
    names = {'caption': 'dlip_caption_flickr', 'retrieval': 'dlip_retrieval_flickr', 'pretrain': 'last'}
    for task, name in names.items():
        torch.manual_seed(1)
        model = BLIP(BLIPConfig(image_size=32, patch_size=16, vision_width=32, vision_depth=2, vision_heads=2,
                                text_width=32, text_depth=2, text_heads=2, text_ffn=64, task=task,
                                vocab_size=len(tokenizer.vocab)))
        for parameter in model.parameters():  # large weights: different inputs give clearly different outputs
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        save_checkpoint(folder / 'save' / f'{name}.pth', model, tokenizer,
                        {'data': {'max_tokens': 8, 'prompt': 'a picture of '}})
    return folder


@pytest.fixture(scope='module')
def caption(folder):
    return DLIPProd(name='caption', weight=folder / 'save/dlip_caption_flickr.pth', device='cpu')


@pytest.fixture(scope='module')
def retrieval(folder):
    return DLIPProd(name='retrieval', weight=folder / 'save/dlip_retrieval_flickr.pth', device='cpu')


@pytest.fixture(scope='module')
def picture():
    """An RGB picture without symmetry, 48 wide and 40 high."""
    y, x = np.mgrid[:40, :48]
    return Image.fromarray(np.stack([x * 5, y * 6, (x * y) % 256], -1).astype(np.uint8))


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


# ---------------------------------------------------------------- what it returns

def test_an_iterator_is_read_as_it_is_needed_and_batches_fit_the_memory(folder, picture, monkeypatch):
    served = DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', memory=1e-3)
    encode, opened, batches = served.model.encode_image, [], []

    def pictures():
        for i in range(30):
            opened.append(i)
            yield picture

    monkeypatch.setattr(served.model, 'encode_image',
                        lambda pixels: batches.append((len(pixels), len(opened))) or encode(pixels))
    assert served.get_image_feat(pictures()).shape == (30, 256)
    most = int(1e-3 * 2 ** 30 / picture_bytes(served.model.config))
    assert 1 < most < 25 and batches[0] == (most, most) and sum(count for count, _ in batches) == 30
    batches.clear()
    served.get_image_feat(pictures(), batch_size=7)
    assert [count for count, _ in batches] == [7, 7, 7, 7, 2]
    with pytest.raises(ValueError, match='memory must be a positive number of GiB, got 0'):
        DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', memory=0)


def test_the_original_readme_demo(folder, picture, monkeypatch):
    monkeypatch.chdir(folder)
    image = picture
    caption = DLIPProd(name='caption', weight='save/dlip_caption_flickr.pth', device='cpu')
    captions = caption.generate(image)
    assert isinstance(captions, list) and len(captions) == 1 and isinstance(captions[0], str)
    retrieval = DLIPProd(name='retrieval', weight='save/dlip_retrieval_flickr.pth', device='cpu')
    assert retrieval.get_image_feat(image).shape == torch.Size([1, 256])
    assert retrieval.get_text_feat('a dog').shape == torch.Size([1, 256])


def test_captions_one_per_image_and_independent_of_the_batch(caption, picture):
    images = [picture, picture.rotate(90), picture.convert('L'), picture.rotate(180)]
    captions = caption.generate(images)
    assert captions == [caption.generate(image)[0] for image in images]
    assert captions == caption.generate(tuple(images), batch_size=3) == caption.generate(iter(images))
    assert len(set(captions)) > 1, 'the random net must tell these pictures apart'


def test_generation_settings(caption, picture):
    short = caption.generate(picture, max_length=6, min_length=6)[0]  # the prompt is four: [DEC] a picture of
    assert len(short.split()) <= 2 < len(caption.generate(picture, min_length=30)[0].split())
    draws = [caption.generate([picture] * 4, sample=True, top_p=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 1
    assert isinstance(caption.generate(picture, num_beams=1, repetition_penalty=1.5)[0], str)
    several = caption.generate([picture, b'nothing', picture.rotate(90)], num_captions=3, on_error='skip')
    assert several[1] is None and [said[0] for said in several[::2]] == caption.generate([picture, picture.rotate(90)])
    assert len(set(several[0])) == 3
    draws = caption.generate(picture, sample=True, temperature=2.0, top_p=1.0, num_captions=5, num_beams=1, seed=1)
    assert len(set(draws[0])) > 1
    assert caption.generate(picture, sample=True, top_k=1) == caption.generate(picture, num_beams=1)
    with pytest.raises(ValueError, match='top_p'):
        caption.generate(picture, sample=True, top_p=0)


def test_features_unit_norm_float32_and_repeatable(retrieval, picture):
    assert not retrieval.model.training
    for method, inputs in ((retrieval.get_image_feat, [picture, picture.rotate(90)]),
                           (retrieval.get_text_feat, ['a dog', 'two cat'])):
        feat, again = method(inputs), method(inputs)
        assert feat.shape == (2, 256) and feat.dtype == torch.float32 and feat.device.type == 'cpu'
        assert torch.equal(feat, again)
        torch.testing.assert_close(feat.norm(dim=-1), torch.ones(2))
        assert (feat[0] - feat[1]).abs().max() > 1e-2
        feat.requires_grad_().sum().backward()  # usable in a user's own training


def test_features_of_a_list_equal_those_of_its_items(retrieval, picture):
    images = [picture, picture.rotate(90), picture.convert('L')]
    single = torch.cat([retrieval.get_image_feat(image) for image in images])
    for batch_size in (1, 2, 32):
        feat = retrieval.get_image_feat(images, batch_size=batch_size)
        torch.testing.assert_close(feat, single, **TOLERANCE)
    texts = ['a dog', '', 'the red star above the blue ring', 'a cat']
    single = torch.cat([retrieval.get_text_feat(text) for text in texts])
    for batch_size in (1, 3, 32):
        torch.testing.assert_close(retrieval.get_text_feat(texts, batch_size=batch_size), single, **TOLERANCE)


def test_similarity_and_match(retrieval, picture):
    images, texts = [picture, picture.rotate(90), picture.rotate(180)], ['a dog', 'two blue cat on grass']
    similarity = retrieval.similarity(images, texts)
    expected = retrieval.get_image_feat(images) @ retrieval.get_text_feat(texts).T
    torch.testing.assert_close(similarity, expected)
    match = retrieval.match(images, texts)
    assert similarity.shape == match.shape == (3, 2)
    assert match.min() >= 0 and match.max() <= 1 and match.std() > 1e-4
    for batch_size in (1, 4):
        torch.testing.assert_close(retrieval.match(images, texts, batch_size=batch_size), match, **TOLERANCE)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            torch.testing.assert_close(retrieval.match(image, text), match[i:i + 1, j:j + 1], **TOLERANCE)


def test_a_pretraining_checkpoint_serves_both(folder, picture):
    for name in ('caption', 'retrieval'):
        both = DLIPProd(name=name, weight=folder / 'save/last.pth', device='auto')
        assert len(both.generate(picture)) == 1
        assert both.match(picture, 'a dog').shape == (1, 1)


# ---------------------------------------------------------------- texts

def test_texts_of_any_length(retrieval):
    assert retrieval.get_text_feat('').shape == (1, 256)
    assert torch.equal(retrieval.get_text_feat(''), retrieval.get_text_feat(' \n'))
    words = 'a red dog on the grass'  # [CLS], six words, [SEP]: the eight tokens of training
    assert torch.equal(retrieval.get_text_feat(words), retrieval.get_text_feat(words + ' runs' * 5000))
    assert torch.equal(retrieval.get_text_feat('A Dog'), retrieval.get_text_feat('a dog'))
    assert retrieval.get_text_feat(['собака 犬 🐕', '\x00', 'lone \ud800 surrogate']).isfinite().all()


@pytest.mark.parametrize('texts, error, message', [
    (None, TypeError, 'texts is None'),
    (7, TypeError, r'texts is of type int \(7\): pass a str or a list of str'),
    (b'a dog', TypeError, 'texts is of type bytes'),
    (['a dog', None], TypeError, r'texts\[1\] is None'),
    (['a dog', ['a cat']], TypeError, r'texts\[1\] is of type list'),
    ([], ValueError, 'list of texts is empty'),
])
def test_what_is_no_text(retrieval, picture, texts, error, message):
    for call in (retrieval.get_text_feat, lambda texts: retrieval.match(picture, texts),
                 lambda texts: retrieval.similarity(picture, texts)):
        with pytest.raises(error, match=message):
            call(texts)


# ---------------------------------------------------------------- images

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
    """A stored picture and the tag that turns it upright give the feature of the upright picture."""
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
    path = tmp_path / 'a picture.png'
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
    picture.save(tmp_path / 'picture.png')
    pixels = np.asarray(picture)
    assert caption.generate([tmp_path / 'picture.png', pixels]) == caption.generate([picture, picture])
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
    (b'', ValueError, r'\(0 bytes\) is not a readable picture'),
    (b'<html>not found</html>', ValueError, r'\(22 bytes\) is not a readable picture'),
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
    (tmp_path / 'text.jpg').write_text('no picture')
    for bad, message in ((tmp_path / 'cut.jpg', 'cut.jpg.*is truncated or damaged'),
                         (Image.open(tmp_path / 'cut.jpg'), 'is truncated or damaged'),
                         (data[:len(data) // 2], 'is truncated or damaged'),
                         (data[:40], 'picture|damaged'),
                         (encoded(picture)[:300], 'picture|damaged'),
                         (tmp_path / 'text.jpg', 'text.jpg.*is not a readable picture'),
                         (tmp_path, 'is the folder'),
                         (tmp_path / 'absent.jpg', 'no such file .*absent.jpg')):
        with pytest.raises(ValueError, match=r'^images\[1\].*(' + message + ')'):
            retrieval.get_image_feat([picture, bad])


def test_a_decompression_bomb(retrieval, picture, monkeypatch):
    data = encoded(picture)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match='^image .*decompression bomb'):
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


# ---------------------------------------------------------------- checkpoints, names, devices

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_a_gpu_gives_the_same(folder, picture):
    gpu = DLIPProd(name='caption', weight=folder / 'save/last.pth', device='cuda')
    cpu = DLIPProd(name='caption', weight=folder / 'save/last.pth', device='cpu')
    assert gpu.generate(picture) == cpu.generate(picture)
    assert isinstance(gpu.generate(picture, sample=True, seed=1)[0], str)
    for method in ('similarity', 'match'):
        on_gpu = getattr(gpu, method)(picture, 'a dog')
        assert on_gpu.device.type == 'cpu'
        torch.testing.assert_close(on_gpu, getattr(cpu, method)(picture, 'a dog'), rtol=0, atol=1e-3)


def test_construction_errors(folder, tmp_path):
    weights = folder / 'save'
    with pytest.raises(ValueError, match="unknown name 'vqa': choose one of 'caption', 'retrieval'"):
        DLIPProd(name='vqa', weight=weights / 'dlip_caption_flickr.pth')
    with pytest.raises(FileNotFoundError, match='absent.pth'):
        DLIPProd(name='caption', weight=tmp_path / 'absent.pth')
    with pytest.raises(ValueError, match='unknown device'):
        DLIPProd(name='caption', weight=weights / 'dlip_caption_flickr.pth', device='toaster')
    if torch.cuda.device_count() < 10:
        with pytest.raises(ValueError, match="'cuda:9' is not there"):
            DLIPProd(name='caption', weight=weights / 'dlip_caption_flickr.pth', device='cuda:9')
    whole = (weights / 'last.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match='cut.pth'):
        DLIPProd(name='caption', weight=tmp_path / 'cut.pth')


def test_a_checkpoint_that_lacks_what_the_name_needs(folder, caption, retrieval, picture):
    with pytest.raises(ValueError, match='is a retrieval checkpoint without the text_decoder'):
        DLIPProd(name='caption', weight=folder / 'save/dlip_retrieval_flickr.pth')
    with pytest.raises(ValueError, match='is a caption checkpoint without the text_encoder'):
        DLIPProd(name='retrieval', weight=folder / 'save/dlip_caption_flickr.pth')
    with pytest.raises(ValueError, match='that caption needs: load a caption or a pre-training checkpoint'):
        retrieval.generate(picture)
    for call in (lambda: caption.get_image_feat(picture), lambda: caption.get_text_feat('a dog'),
                 lambda: caption.similarity(picture, 'a dog'), lambda: caption.match(picture, 'a dog')):
        with pytest.raises(ValueError, match='that retrieval needs'):
            call()
