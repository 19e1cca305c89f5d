"""Captioning a folder, and searching one by its index."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from models import precision
from models.text import KVCache
from prod import DLIPProd
from prod import caption as caption_tool
from prod import search as search_tool
from prod.images import find_pictures
from prod.index import PictureIndex
from utils import ROOT


@pytest.fixture
def pictures(tmp_path):
    """Seven pictures in two folders, a damaged one and a text file."""
    place = tmp_path / 'pictures'
    (place / 'more').mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(7):
        pixels = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        name = f'more/{i}.png' if i > 3 else f'{i}.png'
        Image.fromarray(pixels).resize((40, 30)).save(place / name)
    (place / 'broken.jpg').write_bytes(b'no picture')
    (place / 'notes.txt').write_text('hello')
    return place


def test_search_is_exact_and_incremental(retrieval, pictures, tmp_path, caplog):
    index = retrieval.index(pictures, tmp_path / 'index')
    assert len(index) == 7 and 'broken.jpg is no readable picture' in caplog.text
    features = retrieval.get_image_feat(index.pictures)
    want = (features @ retrieval.get_text_feat('a dog')[0]).sort(descending=True)
    hits = retrieval.search('a dog', index, 3)
    assert [path for path, _ in hits] == [index.pictures[i] for i in want.indices[:3]]
    assert [score for _, score in hits] == pytest.approx(want.values[:3].tolist(), abs=1e-5)
    assert retrieval.search(pictures / '2.png', index, 1)[0] == (str(pictures / '2.png'), pytest.approx(1, abs=1e-4))
    matched = retrieval.search('a dog', index, 2, rerank=7)
    best = retrieval.match(index.pictures, 'a dog')[:, 0].max()
    assert matched[0][1] == pytest.approx(float(best), abs=1e-5) and len(matched) == 2

    Image.new('RGB', (30, 30), 'red').save(pictures / 'new.png')
    before = (tmp_path / 'index/features.f32').read_bytes()
    again = retrieval.index(pictures, tmp_path / 'index')
    assert len(again) == 8 and again.pictures[:7] == index.pictures
    assert (tmp_path / 'index/features.f32').read_bytes().startswith(before)


def test_an_index_survives_what_cuts_it_off(retrieval, pictures, tmp_path):
    whole = retrieval.index(pictures, tmp_path / 'index')
    names = (tmp_path / 'index/pictures.txt')
    names.write_bytes(names.read_bytes()[:-5])  # the last line was not written whole
    with open(tmp_path / 'index/features.f32', 'ab') as file:
        file.write(b'half a row')
    mended = retrieval.index(pictures, tmp_path / 'index')
    assert sorted(mended.pictures) == sorted(whole.pictures)
    for path in mended.pictures:
        assert retrieval.search(tmp_path / path, mended, 1)[0][0] == path


def test_an_index_of_another_net_or_no_index_is_refused(retrieval, pictures, tmp_path, folder):
    retrieval.index(pictures, tmp_path / 'index')
    other = DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth')
    torch.nn.init.normal_(other.model.vision_proj.weight)
    with pytest.raises(ValueError, match='was made with another checkpoint'):
        other.index(pictures, tmp_path / 'index')
    with pytest.raises(ValueError, match='is a folder of other files, not an index'):
        retrieval.index(pictures, pictures)
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere'"):
        retrieval.index('/nowhere', tmp_path / 'new')
    (tmp_path / 'none').mkdir()
    with pytest.raises(FileNotFoundError, match='no images in the folder'):
        retrieval.index(tmp_path / 'none', tmp_path / 'new')
    with pytest.raises(ValueError, match='is empty: add pictures'):
        retrieval.search('a dog', retrieval.index([], tmp_path / 'new'))


def test_skipped_pictures_leave_their_place(caption, retrieval, picture):
    mixed = [picture, b'no picture', picture, None]
    said = caption.generate(mixed, batch_size=2, on_error='skip')
    assert said[0] == said[2] == caption.generate(picture)[0] and said[1] is said[3] is None
    features = retrieval.get_image_feat(mixed, batch_size=1, on_error='skip')
    assert torch.allclose(features[[0, 2]], retrieval.get_image_feat([picture] * 2), atol=1e-6)
    assert features[[1, 3]].isnan().all()
    with pytest.raises(ValueError, match=r'images\[1\].*is not a readable image'):
        caption.generate(mixed)
    with pytest.raises(ValueError, match="on_error is 'ignore': raise or skip"):
        caption.generate(mixed, on_error='ignore')


def test_caption_scores_are_the_captioners_own_log_probabilities(caption, picture):
    texts = ['a dog', 'a red dog']
    scores = caption.caption_scores([picture, picture.rotate(90)], texts, batch_size=3)
    assert scores.shape == (2, 2) and (scores < 0).all()
    model, tokenizer = caption.model, caption.tokenizer
    ids, _ = tokenizer([f'a picture of {texts[0]}'], 30, '[DEC]')
    prompt = len(tokenizer(['a picture of '], 30, '[DEC]')[0][0]) - 1
    with torch.no_grad():
        tokens = model.encode_image(caption.transform(picture)[None])
        total = 0.0
        for i in range(prompt, ids.shape[1]):  # one step at a time, without a mask or a batch
            hidden = model.text_decoder.bert(ids[:, :i], causal=True, image_kv=model.project_image(tokens)
                                             if model.text_encoder else model.text_decoder.bert.project_image(tokens))
            total += float(model.text_decoder.logits(hidden.hidden[0, -1]).log_softmax(-1)[ids[0, i]])
    assert float(scores[0, 0]) == pytest.approx(total / (ids.shape[1] - prompt), abs=1e-4)


def test_bf16_is_near_fp32(retrieval, folder, picture, monkeypatch, caplog):
    monkeypatch.setattr(precision, 'has_bf16', lambda device: False)
    plain = DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', precision='bf16')
    assert torch.equal(plain.get_image_feat(picture), retrieval.get_image_feat(picture))
    assert 'no bfloat16 arithmetic' in caplog.text
    monkeypatch.setattr(precision, 'has_bf16', lambda device: True)
    half = DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', precision='bf16')
    feature = half.get_image_feat(picture)
    assert feature.dtype == torch.float32 and half.model.visual_encoder.cls_token.dtype == torch.bfloat16
    assert float((feature * retrieval.get_image_feat(picture)).sum()) > 0.99
    assert float((half.get_text_feat('a dog') * retrieval.get_text_feat('a dog')).sum()) > 0.99
    with pytest.raises(ValueError, match="unknown precision 'int4': choose one of fp32, bf16, int8"):
        DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', precision='int4')
    with pytest.raises(ValueError, match="precision 'int8' needs backend='openvino'"):
        DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', precision='int8')


def test_openvino_gives_what_torch_gives(folder, picture):
    """Of nets of all tasks: pictures alone and in batches, beams that end early, texts of unequal length."""
    pictures, texts = [picture, picture.rotate(90), picture.rotate(180)], ['a dog', 'a red dog and a red dog']
    torch_net, other = (DLIPProd(None, folder / 'save/last.pth', backend=name) for name in ('torch', 'openvino'))
    assert torch.allclose(other.get_image_feat(pictures), torch_net.get_image_feat(pictures), atol=1e-5)
    assert torch.allclose(other.get_text_feat(texts), torch_net.get_text_feat(texts), atol=1e-5)
    assert torch.allclose(other.match(pictures, texts), torch_net.match(pictures, texts), atol=1e-4)
    for settings in ({'num_beams': 1, 'min_length': 5}, {'num_beams': 3, 'min_length': 5}, {'num_beams': 2}):
        assert other.generate(pictures, **settings) == torch_net.generate(pictures, **settings)
    assert other.generate(picture) == torch_net.generate(picture)
    half = DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', precision='bf16', backend='openvino')
    assert float((half.get_image_feat(picture) * half.get_image_feat(picture)).sum()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="unknown backend 'onnx': choose one of torch, openvino"):
        DLIPProd(None, folder / 'save/last.pth', backend='onnx')


def test_a_signal_after_nets_of_openvino_are_gone_does_not_kill_python(folder):
    """models/openvino_backend.py says when it did."""
    program = """if True:
        import gc, os, signal, sys
        from PIL import Image
        from prod import DLIPProd
        signal.signal(signal.SIGCHLD, lambda *_: None)
        nets = [DLIPProd(None, sys.argv[1], backend='openvino') for _ in range(2)]
        [net.get_image_feat(Image.new('RGB', (9, 9))) for net in nets]
        while nets:
            nets.pop(0)
            gc.collect()
        os.kill(os.getpid(), signal.SIGCHLD)"""
    done = subprocess.run([sys.executable, '-X', 'faulthandler', '-c', program, str(folder / 'save/last.pth')],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f'{done.returncode}: {done.stderr[-2000:]}'


@torch.inference_mode()
def test_eight_bit_weights_keep_the_captions_of_a_trained_net():
    exact, small = (DLIPProd(None, ROOT / 'data/demo_teacher.pth', backend=backend, precision=precision)
                    for backend, precision in (('torch', 'fp32'), ('openvino', 'int8')))
    pictures = find_pictures(ROOT / 'prod/examples')
    same = [a == b for a, b in zip(exact.generate(pictures), small.generate(pictures), strict=True)]
    assert sum(same) >= 10
    scores = []
    for net in (exact, small):
        kv = net.model.project_image(exact.model.encode_image(net.transform(Image.open(pictures[0]))[None]))
        scores.append(net.model.next_logits(net.prompt_ids[None], kv, KVCache(exact.model.config.text_depth, 9)))
    assert 1e-4 < float((scores[0] - scores[1]).norm() / scores[0].norm()) < 0.05  # 8 bits, and not more error


def test_approximate_search_misses_little_and_follows_a_growing_index(tmp_path):
    faiss = pytest.importorskip('faiss')
    torch.manual_seed(0)
    centres = torch.randn(40, 32)
    features = torch.nn.functional.normalize(centres.repeat(100, 1) + 0.5 * torch.randn(4000, 32), dim=-1)
    index = PictureIndex(tmp_path / 'index', features[0])
    index.add([f'{i}.jpg' for i in range(3900)], features[:3900])
    found = [dict(index.search(feature, 10, approximate=True)) for feature in features[:50]]
    exact = [dict(index.search(feature, 10)) for feature in features[:50]]
    assert sum(len(a.keys() & b.keys()) for a, b in zip(found, exact, strict=True)) > 0.9 * 500
    assert found[0]['0.jpg'] == pytest.approx(1, abs=1e-5)  # its cosines are exact
    index.add([f'{i}.jpg' for i in range(3900, 4000)], features[3900:])  # newer than what faiss was trained with
    again = PictureIndex(tmp_path / 'index', features[0])
    assert again.search(features[3950], 1, approximate=True)[0][0] == '3950.jpg'
    assert faiss.read_index(str(tmp_path / 'index/faiss.ivf')).ntotal == 3900
    index.add([f'{i}.jpg' for i in range(4000, 8000)], features)
    assert index.search(features[7], 2, approximate=True)[1][0] == '4007.jpg'
    assert faiss.read_index(str(tmp_path / 'index/faiss.ivf')).ntotal == 8000


def test_captioning_a_folder_goes_on_where_it_stopped(folder, pictures, tmp_path):
    out = tmp_path / 'out/captions.jsonl'
    command = [str(pictures), '--weight', str(folder / 'save/dlip_caption_flickr.pth'), '--out', str(out), '--device',
               'cpu', '--batch_size', '3']
    caption_tool.main(command)
    whole = out.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == 8 and 'is not a readable image' in next(row['error'] for row in rows if 'error' in row)
    assert [row['path'] for row in rows] == sorted(row['path'] for row in rows)
    out.write_text(whole[:whole.rindex('{') + 9])  # cut off in its last line
    caption_tool.main(command)
    assert out.read_text() == whole
    out.write_text('{"something": 1}\n')
    with pytest.raises(ValueError, match='holds something else than captions'):
        caption_tool.main(command)


def test_searching_a_folder_draws_the_hits(folder, pictures, tmp_path, capsys):
    sheet = tmp_path / 'hits.png'
    search_tool.main([str(pictures), 'a dog', str(pictures / '1.png'), '--weight',
                      str(folder / 'save/dlip_retrieval_flickr.pth'), '--index', str(tmp_path / 'index'), '--k', '3',
                      '--sheet', str(sheet), '--device', 'cpu'])
    printed = capsys.readouterr().out
    assert printed.count('.png') == 2 * 3 + 2  # hits, the query that is a picture, the sheet
    assert Image.open(sheet).width == 1600


def test_threads_share_one_object(caption, retrieval, picture):
    pictures = [picture, picture.rotate(90), picture.rotate(180)] * 4
    alone = [(caption.generate(one), retrieval.get_image_feat(one)) for one in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: (caption.generate(one), retrieval.get_image_feat(one)), pictures))
    for (said, feature), (want, expected) in zip(together, alone, strict=True):
        assert said == want and torch.equal(feature, expected)
