"""Captioning and searching a folder from the command line; what DLIPProd shares with them."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from processes import Python

from data.json_lines import JsonLines
from eval.page import write_page
from models import linear
from models.text import KVCache
from prod import DLIPProd
from prod import caption as caption_tool
from prod import export as export_tool
from prod import search as search_tool
from prod.images import find_images
from utils import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def pictures(tmp_path):
    """Seven images in two folders, a damaged one and a text file."""
    place = tmp_path / 'images'
    (place / 'more').mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(7):
        pixels = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        name = f'more/{i}.png' if i > 3 else f'{i}.png'
        Image.fromarray(pixels).resize((40, 30)).save(place / name)
    (place / 'broken.jpg').write_bytes(b'no image')
    (place / 'notes.txt').write_text('hello')
    return place


def test_skipped_pictures_leave_their_place(caption, retrieval, picture):
    mixed = [picture, b'no image', picture, None]
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
    monkeypatch.setattr(linear, 'has_bf16', lambda device: False)
    plain = DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', precision='bf16')
    assert torch.equal(plain.get_image_feat(picture), retrieval.get_image_feat(picture))
    assert 'no bfloat16 arithmetic' in caplog.text
    monkeypatch.setattr(linear, 'has_bf16', lambda device: True)
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
    """Of nets of all tasks: images alone and in batches, beams that end early, texts of unequal length."""
    pictures, texts = [picture, picture.rotate(90), picture.rotate(180)], ['a dog', 'a red dog and a red dog']
    torch_net, other = (DLIPProd(None, folder / 'save/last.pth', backend=name) for name in ('torch', 'openvino'))
    assert torch.allclose(other.get_image_feat(pictures), torch_net.get_image_feat(pictures), atol=1e-5)
    assert torch.allclose(other.get_text_feat(texts), torch_net.get_text_feat(texts), atol=1e-5)
    assert torch.allclose(other.match(pictures, texts), torch_net.match(pictures, texts), atol=1e-4)
    for settings in ({'num_beams': 1, 'min_length': 5}, {'num_beams': 3, 'min_length': 5}, {'num_beams': 2},
                     {'no_repeat_ngram_size': 2, 'forbid': 'dog', 'prefix': 'a red'}):
        assert other.generate(pictures, **settings) == torch_net.generate(pictures, **settings)
    assert other.generate(picture) == torch_net.generate(picture)
    half = DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', precision='bf16', backend='openvino')
    assert float((half.get_image_feat(picture) * half.get_image_feat(picture)).sum()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="unknown backend 'tvm': choose one of torch, openvino, onnx"):
        DLIPProd(None, folder / 'save/last.pth', backend='tvm')


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity') or os.cpu_count() == 1, reason='no cores to choose from')
def test_openvino_leaves_the_choice_of_cores_to_the_system(folder, picture):
    """Pinned, the threads of two processes of one thread each would share the first core."""
    program = """if True:
        import os, sys, threading, torch
        from PIL import Image
        from prod import DLIPProd
        torch.set_num_threads(1)
        net, seen, done = DLIPProd(None, sys.argv[1], backend='openvino'), set(), threading.Event()
        def watch():
            while not done.is_set():
                seen.add(tuple(os.sched_getaffinity(os.getpid())))  # of the main thread
        images, watcher = [Image.new('RGB', (9, 9))] * 64, threading.Thread(target=watch)
        net.get_image_feat(images)  # compiling visits each core
        watcher.start()
        [net.get_image_feat(images) for _ in range(5)]
        done.set()
        watcher.join()
        print(seen)"""
    done = subprocess.run([sys.executable, '-c', program, str(folder / 'save/last.pth')], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.stdout == f'{ {tuple(os.sched_getaffinity(0))} }\n', done.stderr


def test_a_signal_after_nets_of_openvino_are_gone_does_not_kill_python(folder):
    """prod/openvino_backend.py says when it did."""
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
    pictures = find_images(ROOT / 'prod/examples')
    same = [a == b for a, b in zip(exact.generate(pictures), small.generate(pictures), strict=True)]
    assert sum(same) >= 10
    scores = []
    for net in (exact, small):
        kv = net.model.project_image(exact.model.encode_image(net.transform(Image.open(pictures[0]))[None]))
        scores.append(net.model.next_logits(net.prompt_ids[None], kv, KVCache(exact.model.config.text_depth, 9)))
    assert 1e-4 < float((scores[0] - scores[1]).norm() / scores[0].norm()) < 0.05  # 8 bits, and not more error


@pytest.fixture
def command(folder, pictures, tmp_path):
    return [str(pictures), '--weight', str(folder / 'save/dlip_caption_flickr.pth'), '--out',
            str(tmp_path / 'out/captions.jsonl'), '--device', 'cpu', '--batch_size', '3']


def rows(out) -> dict[str, dict]:
    """The lines by path, each of which must be there once."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line['path'] for line in lines}) == len(lines)
    return {line['path']: line for line in lines}


def test_captioning_a_folder_goes_on_where_it_stopped(command, caption, pictures, tmp_path):
    out = tmp_path / 'out/captions.jsonl'
    assert caption_tool.main(command) == 1
    first = rows(out)
    assert list(first) == sorted(first) and len(first) == 8
    scores = caption.generate([pictures / '0.png', pictures / 'more/5.png'], scores=True)
    for path, (_, score) in zip((pictures / '0.png', pictures / 'more/5.png'), scores, strict=True):
        assert first[str(path)]['log_probability'] == pytest.approx(score, abs=1e-5)
    assert 'is not a readable image' in first[str(pictures / 'broken.jpg')]['error']
    assert first[str(pictures / '0.png')]['caption'] == caption.generate(pictures / '0.png')[0]
    assert caption_tool.main([str(pictures / '..' / pictures.name), *command[1:]]) == 1  # the same folder
    assert len(out.read_text().splitlines()) == 8
    out.write_text(''.join(json.dumps(line) + '\n' for line in first.values()))
    whole = out.read_text()
    out.write_text(whole[:whole.rindex('{') + 9])  # cut off in its last line
    assert caption_tool.main(command) == 1 and rows(out) == first
    Image.new('RGB', (9, 9)).save(pictures / 'broken.jpg')  # a failed file is tried again
    assert caption_tool.main(command) == 0
    assert 'caption' in rows(out)[str(pictures / 'broken.jpg')] and len(rows(out)) == 8


def test_captions_of_other_settings_are_not_mixed(command, tmp_path):
    out = tmp_path / 'out/captions.jsonl'
    caption_tool.main(command)
    whole = out.read_text()
    with pytest.raises(ValueError, match='other settings .num_beams 3, now 2.: start over with --overwrite'):
        caption_tool.main([*command, '--num_beams', '2'])
    assert out.read_text() == whole
    caption_tool.main([*command, '--num_beams', '2', '--overwrite'])
    with pytest.raises(ValueError, match='num_beams 2, now 3'):
        caption_tool.main(command)
    (tmp_path / 'out/captions.jsonl.settings.json').unlink()
    with pytest.raises(ValueError, match='unknown settings'):
        caption_tool.main(command)
    out.write_text('{"something": 1}\n')
    with pytest.raises(ValueError, match='holds something else than captions'):
        caption_tool.main(command)


def test_the_machines_faults_are_no_images(command, tmp_path, monkeypatch):
    def full(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(caption_tool, 'read_image', full)
        with pytest.raises(MemoryError):
            caption_tool.main(command)
    with JsonLines(tmp_path / 'out/captions.jsonl').writing():
        with pytest.raises(ValueError, match='another process is writing .*captions.jsonl'):
            caption_tool.main(command)
    assert caption_tool.main(command) == 1 and len(rows(tmp_path / 'out/captions.jsonl')) == 8


@pytest.mark.parametrize('ending', ['csv', 'parquet'])
def test_tables_of_captions(command, caption, pictures, tmp_path, ending):
    out = pictures / f'metadata.{ending}'
    odd = pictures / os.fsdecode(b'caf\xe9, "x".png')
    Image.new('RGB', (9, 9)).save(odd)
    read = pandas.read_parquet if ending == 'parquet' else lambda path: pandas.read_csv(
        path, encoding_errors='surrogateescape')

    def table(*more: str) -> dict[str, list[str]]:
        assert caption_tool.main([*command, '--out', str(out), *more]) == 1
        found = read(out)
        assert list(found.columns) == ['file_name', 'text', 'log_probability'] and (found.log_probability < 0).all()
        return found.groupby('file_name').text.apply(list).to_dict()

    first = table()
    name = odd.name if ending == 'csv' else json.dumps(odd.name)
    assert set(first) == {*(f'{i}.png' for i in range(4)), *(f'more/{i}.png' for i in range(4, 7)), name}
    assert first['0.png'] == caption.generate(pictures / '0.png')
    assert table() == first
    assert table('--overwrite', '--num_captions', '2')['0.png'] == caption.generate(pictures / '0.png',
                                                                                    num_captions=2)[0]
    (pictures / f'metadata.{ending}.jsonl').unlink()  # as if the table were another program's
    with pytest.raises(ValueError, match='was not made by this command'):
        caption_tool.main([*command, '--out', str(out)])


def test_a_text_file_beside_each_image(command, caption, pictures, capsys):
    beside = [*command[:3], '--device', 'cpu', '--sidecar', '--num_beams', '1']
    said = {name: caption.generate(pictures / name, num_beams=1)[0] for name in ('0.png', '1.png', 'more/5.png')}
    (pictures / '0.txt').write_bytes(b'\r\n\r\nmine \xe9')
    (pictures / '2.bmp').write_bytes((pictures / '2.png').read_bytes())
    (pictures / 'more/6.txt').mkdir()
    odd = pictures / os.fsdecode(b'caf\xe9.png')
    Image.new('RGB', (9, 9)).save(odd)
    for _ in range(2):
        assert caption_tool.main([*beside, '--existing', 'skip']) == 1
        assert (pictures / '0.txt').read_bytes() == b'\r\n\r\nmine \xe9'
        assert (pictures / 'more/5.txt').read_text() == said['more/5.png'] + '\n'
        printed = capsys.readouterr().out
        assert '2.png shares ' in printed and not list(pictures.rglob('*.tmp*'))
    for _ in range(2):
        assert caption_tool.main([*beside, '--existing', 'append']) == 1
        assert (pictures / '0.txt').read_bytes() == b'\r\n\r\nmine \xe9\n' + said['0.png'].encode() + b'\n'
        assert (pictures / '1.txt').read_text() == said['1.png'] + '\n'
        assert '6.txt cannot be written: it is no regular file' in capsys.readouterr().out
    (pictures / 'more/6.txt').rmdir()
    for gone in ('broken.jpg', '2.bmp'):
        (pictures / gone).unlink()
    assert caption_tool.main([*beside, '--existing', 'overwrite', '--num_captions', '1']) == 0
    assert (pictures / '0.txt').read_text() == said['0.png'] + '\n' and odd.with_suffix('.txt').exists()
    with JsonLines(pictures / '.captions').writing(), pytest.raises(ValueError, match='another process is writing'):
        caption_tool.main(beside)
    with pytest.raises(SystemExit):
        caption_tool.main(command[:3])
    assert 'where to? Give --out FILE, --sidecar or both' in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_text_file(command, pictures, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr('utils.os.fsync', full)
        with pytest.raises(OSError, match='No space left on device: .*txt'):
            caption_tool.main([*command[:3], '--device', 'cpu', '--sidecar'])
    assert not [path for path in pictures.rglob('*') if path.name not in ('notes.txt', '.captions.lock')
                and path.suffix not in ('.png', '.jpg', '')]


@pytest.mark.parametrize('separator', [b'\n', b'\r\n', b'\0'])
def test_captions_in_a_pipe(command, caption, pictures, monkeypatch, capsys, separator):
    odd = pictures / os.fsdecode(b'caf\xe9.png')
    Image.new('RGB', (9, 9)).save(odd)
    paths = [str(pictures / 'more/5.png'), str(odd), str(pictures / 'absent.png'), str(pictures / 'old/1.png')]

    def piped(given: bytes, *options: str) -> tuple[int, list[dict]]:
        monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(given)))
        code = caption_tool.main(['-', *command[1:3], '--out', '-', '--device', 'cpu', *options])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    given = b''.join(os.fsencode(path) + separator for path in paths)
    code, lines = piped(given, '--exclude', 'old', '--prefix', 'a red', '--forbid', 'dog', '--forbid', 'a cat',
                        '--no_repeat_ngram_size', '3', '--sample', '--seed', '1', '--top_k', '5')
    assert code == 1 and [line['path'] for line in lines] == paths[:3] and 'no such file' in lines[2]['error']
    assert [line['caption'] for line in lines[:2]] == caption.generate(
        paths[:2], prefix='a red', forbid=['dog', 'a cat'], no_repeat_ngram_size=3, sample=True, seed=1, top_k=5)
    with pytest.raises(FileNotFoundError, match='no path on standard input'):
        piped(b'')
    with pytest.raises(FileNotFoundError, match='no path of an image that --exclude leaves on standard input'):
        piped(given, '--exclude', '*')


def test_what_is_excluded_and_settings_that_cannot_be(command, pictures, tmp_path):
    out = tmp_path / 'out/captions.jsonl'
    for patterns, left in ((['more', 'b*'], 4), (['more/[45].png', '*.jpg', '0.*'], 4), (['*/5.png'], 7)):
        options = [part for pattern in patterns for part in ('--exclude', pattern)]
        caption_tool.main([*command, '--overwrite', *options])
        assert len(rows(out)) == left
    before = out.read_bytes()
    with pytest.raises(FileNotFoundError, match='no images in the folder .* but the 8 that are excluded'):
        caption_tool.main([*command, '--overwrite', '--exclude', '*'])
    with pytest.raises(ValueError, match='num_captions'):
        caption_tool.main([*command, '--overwrite', '--num_captions', '9'])
    assert out.read_bytes() == before
    with pytest.raises(SystemExit):
        caption_tool.main([*command, '--out', 'captions.xlsx'])


NAMES = [b'caf\xe9.png', 'café.png'.encode(), 'cafe\u0301.png'.encode(), b'two\nlines.png', b'a "quoted"\ttab.png',
         b'-dash.png', '\U0001f600 犬.png'.encode(), b'x' * 251 + b'.png', b'back\\slash.png', b'\x1b[31mred.png']


@pytest.mark.parametrize('encoding', ['utf-8', 'ascii'])
def test_any_file_name_comes_back_the_same(folder, tmp_path, encoding):
    place, weights = tmp_path / os.fsdecode(b'f\xf6lder'), folder / 'save/last.pth'
    place.mkdir()
    for i, name in enumerate(NAMES):
        Image.new('RGB', (9, 9), (20 * i, 0, 0)).save(place / os.fsdecode(name))
    Image.new('RGB', (9, 9)).save(place / 'broken.png')
    (place / os.fsdecode(b'br\xf6ken.png')).write_bytes(b'no image')
    paths = {str(place / os.fsdecode(name)) for name in NAMES}
    environment = {'PYTHONIOENCODING': encoding}
    said = Python('-m', 'prod.caption', place, '--weight', weights, '--out', tmp_path / 'said.jsonl', '--device', 'cpu',
                  **environment).wait()
    assert said.returncode == 1 and paths < rows(tmp_path / 'said.jsonl').keys(), said.stderr
    found = Python('-m', 'prod.search', place, 'a dog', place / os.fsdecode(NAMES[0]), '--weight', weights, '--index',
                   tmp_path / 'index', '--k', '20', '--sheet', tmp_path / 'hits.png', '--device', 'cpu',
                   **environment).wait()
    assert found.returncode == 0, found.stderr
    printed = [line[10:] for line in found.stdout.splitlines() if re.match(r' .{7}  [/"]', line)]
    hits = [json.loads(path) if path.startswith('"') else path for path in printed]
    assert len(hits) == 2 * 11 and paths < set(hits)
    tried = Python('-m', 'prod.try_it', '--caption', weights, '--retrieval', weights, '--', *sorted(paths),
                   **environment).wait()
    assert tried.returncode == 0, tried.stderr


def test_pages_and_exports_take_odd_names_too(folder, tmp_path):
    odd = tmp_path / os.fsdecode(b'caf\xe9')
    write_page(tmp_path / 'page.html', str(odd), [str(odd)])
    assert 'caf\\udce9' in (tmp_path / 'page.html').read_text(encoding='utf-8')
    export_tool.main([str(folder / 'save/last.pth'), str(odd / 'new/net.pth')])
    assert DLIPProd(None, odd / 'new/net.pth').generate(Image.new('RGB', (9, 9)))
    (tmp_path / 'metrics.json').write_text('{"a": ')
    with pytest.raises(ValueError, match='metrics.json is no JSON file'):
        export_tool.main([str(folder / 'save/last.pth'), str(odd / 'x.pth'), '--metrics',
                          str(tmp_path / 'metrics.json')])


@pytest.mark.parametrize('query, message', [
    ('', 'a query is empty'), (' \n', 'a query is empty'), ('.', 'the query . is a folder'), ('{here}', 'is a folder')])
def test_queries_that_ask_nothing(folder, pictures, tmp_path, query, message):
    with pytest.raises(ValueError, match=message):
        search_tool.main([str(pictures), query.format(here=tmp_path), '--weight', 'unread.pth', '--index',
                          str(tmp_path / 'index'), '--device', 'cpu'])


@pytest.mark.parametrize('name', ['', '{here}', 'a\0b'])
def test_a_file_to_be_written_has_a_name(tmp_path, capsys, name):
    name = name.format(here=tmp_path)
    for tool, option in ((caption_tool, ['--out', name]), (search_tool, ['a dog', '--index', 'i', '--sheet', name])):
        with pytest.raises(SystemExit):
            tool.main([str(tmp_path), *option, '--weight', 'unread.pth'])
        assert 'must name a file' in capsys.readouterr().err


def test_searching_a_folder_draws_the_hits(folder, pictures, tmp_path, capsys):
    sheet = tmp_path / 'new/hits.png'
    search_tool.main([str(pictures), 'a dog', str(pictures / '1.png'), 'a very long query ' * 30, 'nul \0', '--weight',
                      str(folder / 'save/dlip_retrieval_flickr.pth'), '--index', str(tmp_path / 'index'), '--k', '3',
                      '--sheet', str(sheet), '--device', 'cpu'])
    printed = capsys.readouterr().out
    assert printed.count('.png') == 4 * 3 + 2  # hits, the query that is an image, the sheet
    assert Image.open(sheet).width == 1600


def test_hits_as_json_lines_and_what_does_not_fit(folder, retrieval, pictures, tmp_path, capsys):
    odd = pictures / os.fsdecode(b'caf\xe9.png')
    Image.new('RGB', (9, 9)).save(odd)
    command = [str(pictures), 'a dog', str(odd), '--weight', str(folder / 'save/dlip_retrieval_flickr.pth'), '--index',
               str(tmp_path / 'index'), '--device', 'cpu', '--k', '3']
    with pytest.raises(FileNotFoundError, match='no index in the folder .*index: make it from images first'):
        search_tool.main([*command, '--no_update'])
    assert not (tmp_path / 'index').exists()
    capsys.readouterr()

    def asked(*options: str) -> list[dict]:
        search_tool.main([*command, '--json', *options])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    dog, same = asked()
    assert (dog['query'], same['query']) == ('a dog', str(odd)) and same['hits'][0]['path'] == str(odd)
    index = retrieval.index(None, tmp_path / 'index')
    assert [(hit['path'], hit['score']) for hit in dog['hits']] == retrieval.search('a dog', index, 3)
    Image.new('RGB', (9, 9)).save(pictures / 'new.png')
    (pictures / '0.png').unlink()
    assert asked('--no_update') == [dog, same] and len(retrieval.index(None, tmp_path / 'index')) == len(index)
    least = (dog['hits'][0]['score'] + dog['hits'][1]['score']) / 2
    assert [len(each['hits']) for each in asked('--min_score', str(least))] in ([1, 1], [1, 2], [1, 3])
    assert asked('--min_score', '1')[0]['hits'] == []
    search_tool.main([*command, '--min_score', '1', '--sheet', str(tmp_path / 'hits.png')])
    assert 'a dog\n  nothing fits\n' in capsys.readouterr().out
    assert retrieval.search('a dog', index, 3, rerank=5, min_score=1.0) == []


def test_threads_share_one_object(caption, retrieval, picture):
    pictures = [picture, picture.rotate(90), picture.rotate(180)] * 4
    alone = [(caption.generate(one), retrieval.get_image_feat(one)) for one in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: (caption.generate(one), retrieval.get_image_feat(one)), pictures))
    for (said, feature), (want, expected) in zip(together, alone, strict=True):
        assert said == want and torch.equal(feature, expected)
