"""DLIPProd on random checkpoints: what it returns, texts, checkpoints, devices."""

import numpy as np
import pytest
import torch

from prod import DLIPProd
from prod.memory import image_bytes
from utils import ROOT

TOLERANCE = {'rtol': 0, 'atol': 1e-5}


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
    most = int(1e-3 * 2 ** 30 / image_bytes(served.model.config))
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
    assert len(set(captions)) > 1, 'the random net must tell these images apart'


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


@pytest.mark.parametrize('setting, value, error', [
    ('num_beams', 10 ** 6, ValueError), ('num_beams', 2.5, TypeError), ('num_captions', 2 ** 63, ValueError),
    ('temperature', 1e-300, ValueError), ('temperature', 'hot', TypeError), ('repetition_penalty', 1e300, ValueError),
    ('length_penalty', 1e30, ValueError), ('length_penalty', np.array([1, 2]), TypeError),
    ('seed', 2 ** 64, ValueError), ('seed', 'x', TypeError), ('batch_size', 0, ValueError),
    ('batch_size', True, TypeError), ('early_stopping', 'never', TypeError), ('on_error', None, TypeError),
    ('bgr', torch.tensor([1, 0]), TypeError)])
def test_settings_that_cannot_be_are_named(caption, picture, setting, value, error):
    with pytest.raises(error, match=setting):
        caption.generate(picture, sample=setting == 'num_captions', **{setting: value})


def test_numbers_of_numpy_and_the_smallest_nucleus_are_settings(caption, picture):
    assert caption.generate(picture, num_beams=np.int64(2)) == caption.generate(picture, num_beams=2)
    assert caption.generate(picture, sample=True, top_p=1e-300) == caption.generate(picture, num_beams=1)


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


@pytest.mark.slow
@pytest.mark.parametrize('default, backend', [(torch.float64, 'torch'), (torch.bfloat16, 'torch'), ('meta', 'torch'),
                                              (torch.bfloat16, 'openvino')])
def test_what_a_notebook_sets_for_all_of_torch_changes_nothing(folder, picture, tmp_path, default, backend):
    def results(dlip):
        index = dlip.index(ROOT / 'prod/examples', tmp_path / 'index')
        return [dlip.generate(picture), dlip.generate(picture, sample=True, seed=1), *dlip.get_image_feat(picture),
                *dlip.get_text_feat('a dog'), *dlip.match(picture, ['a dog']),
                *dlip.caption_scores(picture, ['a dog']), dlip.search('a dog', index, 3, rerank=6)]

    def made():
        return DLIPProd(None, folder / 'save/last.pth', backend=backend)

    earlier = made()
    want = results(earlier)
    try:
        if default == 'meta':
            torch.set_default_device('meta')
        else:
            torch.set_default_dtype(default)
        got = [results(earlier), results(made())]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for each in got:
        for ours, theirs in zip(each, want, strict=True):
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, theirs, **TOLERANCE)
            else:
                assert ours == theirs
