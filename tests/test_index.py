"""The index of images: exact, up to date, and whole whatever cuts a writer off or writes beside it."""

import builtins
import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from processes import FORKSERVER

from prod import DLIPProd
from prod import index as index_module
from prod import search as search_tool
from prod.index import ImageIndex

WIDTH = 8


@pytest.fixture
def pictures(tmp_path):
    """Seven images in two folders, a damaged one and a text file."""
    place = tmp_path / 'images'
    (place / 'more').mkdir(parents=True)
    for i in range(7):
        draw(place / (f'more/{i}.png' if i > 3 else f'{i}.png'), i)
    (place / 'broken.jpg').write_bytes(b'no image')
    (place / 'notes.txt').write_text('hello')
    return place


def draw(path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 30)).save(path, 'PNG')


def feature(name: str, version: int = 0) -> torch.Tensor:
    """The made-up embedding of a made-up image."""
    numbers = np.random.default_rng([version, *name.encode()]).standard_normal(WIDTH)
    return torch.nn.functional.normalize(torch.tensor(numbers, dtype=torch.float32), dim=0)


PROBE = feature('probe')


def features(names: list[str], version: int = 0) -> torch.Tensor:
    return torch.stack([feature(name, version) for name in names])


def assert_paired(index: ImageIndex, versions: tuple[int, ...] = (0,)) -> None:
    """Every name finds itself by one of its own embeddings."""
    for name in index.images:
        assert any(index.search(feature(name, version), 1)[0] == (name, pytest.approx(1, abs=1e-5))
                   for version in versions), name


def test_search_is_exact(retrieval, pictures, tmp_path, caplog):
    index = retrieval.index(pictures, tmp_path / 'index')
    assert len(index) == 7 and 'broken.jpg is no readable image' in caplog.text
    features = retrieval.get_image_feat(index.images)
    want = (features @ retrieval.get_text_feat('a dog')[0]).sort(descending=True)
    hits = retrieval.search('a dog', index, 3)
    assert [path for path, _ in hits] == [index.images[i] for i in want.indices[:3]]
    assert [score for _, score in hits] == pytest.approx(want.values[:3].tolist(), abs=1e-5)
    assert retrieval.search(pictures / '2.png', index, 1)[0] == (str(pictures / '2.png'), pytest.approx(1, abs=1e-4))
    matched = retrieval.search('a dog', index, 2, rerank=7)
    best = retrieval.match(index.images, 'a dog')[:, 0].max()
    assert matched[0][1] == pytest.approx(float(best), abs=1e-5) and len(matched) == 2


# ---------------------------------------------------------------- up to date

def test_a_run_brings_the_index_up_to_date(retrieval, pictures, tmp_path, monkeypatch):
    retrieval.index(pictures, tmp_path / 'index')
    draw(pictures / 'new.png', 20)
    draw(pictures / '1.png', 21)  # another image of the same name
    (pictures / '2.png').unlink()
    (pictures / '3.png').write_bytes(b'no image any more')
    shutil.rmtree(pictures / 'more')
    embedded = []
    monkeypatch.setattr(retrieval, 'get_image_feat', lambda images, get=retrieval.get_image_feat, **options:
                        embedded.append(images) or get(images, **options))
    index = retrieval.index(pictures, tmp_path / 'index')
    assert sorted(os.path.basename(path) for path in index.images) == ['0.png', '1.png', 'new.png']
    assert not any(str(pictures / '0.png') in images for images in embedded if isinstance(images, list))
    for path in index.images:
        assert index.search(retrieval.get_image_feat(path)[0], 1)[0] == (path, pytest.approx(1, abs=1e-4))
    before = (tmp_path / 'index/index.jsonl').stat().st_mtime_ns
    retrieval.index(pictures, tmp_path / 'index')
    assert (tmp_path / 'index/index.jsonl').stat().st_mtime_ns == before


def test_a_folder_by_any_other_spelling_is_the_same(retrieval, pictures, tmp_path, monkeypatch):
    retrieval.index(pictures, tmp_path / 'index')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'link').symlink_to(pictures)
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links/one.png').symlink_to(pictures / '1.png')
    for spelled in ('images', './images/', 'images/../images', 'link', 'link/', 'links', pictures / '.'):
        assert len(retrieval.index(spelled, 'index')) == 7
    assert len(retrieval.index(['images/1.png', pictures / '1.png', 'link/more/../1.png'], 'index')) == 7
    (pictures / 'more/4.png').unlink()
    assert len(retrieval.index('link', 'index')) == 6


def test_a_search_outlives_images_that_are_gone_or_broken(retrieval, folder, pictures, tmp_path, capsys):
    index = retrieval.index(pictures, tmp_path / 'index')
    first = [path for path, _ in retrieval.search('a dog', index, 7)]
    os.unlink(first[0])
    assert [path for path, _ in retrieval.search('a dog', index, 2)] == first[1:3]
    with open(first[1], 'wb') as file:
        file.write(b'no image')
    reranked = [path for path, _ in retrieval.search('a dog', index, 7, rerank=7)]
    assert sorted(reranked) == sorted(first[2:])
    for path in first[2:]:
        os.unlink(path)
    assert retrieval.search('a dog', index, 7, rerank=7) == []


def test_a_sheet_is_drawn_of_what_became_unreadable(folder, pictures, tmp_path, monkeypatch):
    def search(self, query, index, k, **options):
        (pictures / '1.png').write_bytes(b'no image')
        return [(str(pictures / '1.png'), 0.5), (str(pictures / 'absent.png'), 0.4)]

    monkeypatch.setattr(DLIPProd, 'search', search)
    search_tool.main([str(pictures), 'a dog', '--weight', str(folder / 'save/dlip_retrieval_flickr.pth'), '--index',
                      str(tmp_path / 'index'), '--sheet', str(tmp_path / 'hits.png'), '--device', 'cpu'])
    assert Image.open(tmp_path / 'hits.png').width == 1600


# ---------------------------------------------------------------- whole, whatever happens

class Killed(BaseException):
    pass


class Faults:
    """The n-th write, fsync, replacement or deletion is cut off: of a write, half is written."""

    def __init__(self, monkeypatch, n: int):
        self.left = n
        for module, name in ((os, 'fsync'), (os, 'replace'), (os, 'unlink'), (os, 'truncate')):
            monkeypatch.setattr(module, name, self.faulty(getattr(module, name)))
        monkeypatch.setattr(builtins, 'open', self.open)

    def faulty(self, function):
        def called(*arguments, **options):
            self.left -= 1
            if self.left == 0:
                raise Killed
            return function(*arguments, **options)
        return called

    def open(self, path, mode='r', *arguments, real=open, **options):
        file = real(path, mode, *arguments, **options)
        return FaultyFile(file, self) if mode != 'rb' and mode != 'r' else file


class FaultyFile:
    def __init__(self, file, faults: Faults):
        self.file, self.faults = file, faults

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        try:
            self.faults.faulty(self.file.write)(content)
        except Killed:
            self.file.write(content[:len(content) // 2])
            raise

    def writelines(self, lines):
        for line in lines:
            self.write(line)


@pytest.mark.slow
@pytest.mark.parametrize('same_object', [True, False])
def test_an_interruption_at_any_write_leaves_right_pairs(tmp_path, monkeypatch, same_object):
    monkeypatch.setattr(index_module, 'UNUSED', 0)

    def work(index):
        index.add(['a', 'b', 'c', 'd'], features(['a', 'b', 'c', 'd']))
        index.add(['b', 'e'], features(['b', 'e'], 1))
        index.remove(['a', 'c', 'd'])
        index.add(['f'], features(['f']))  # most rows are unused by now: a new file of features

    for n in range(1, 200):
        folder, index = tmp_path / str(n), None
        with monkeypatch.context() as patch:
            faults = Faults(patch, n)
            try:
                index = ImageIndex(folder, PROBE)
                work(index)
            except Killed:
                pass
        whole = faults.left > 0
        if (folder / 'index.jsonl').exists():
            assert_paired(ImageIndex(folder, PROBE), (0, 1))
        if index is None or not same_object:
            index = ImageIndex(folder, PROBE)
        work(index)
        for either in (index, ImageIndex(folder, PROBE)):
            assert sorted(either.images) == ['b', 'e', 'f']
            assert_paired(either, (0, 1))
        assert index.search(feature('b', 1), 1)[0][0] == 'b' and len(list(folder.glob('features-*'))) == 1
        if whole:
            break
    assert 20 < n < 199


def write(place, letter: str) -> None:
    index = ImageIndex(place, PROBE)
    (place.parent / letter).touch()
    while not (place.parent / 'go').exists():
        time.sleep(0.01)
    for start in range(0, 240, 3):
        names = [f'{letter}{i}' for i in range(start, start + 3)]
        index.add(names, features(names))


@pytest.mark.slow
def test_writers_readers_and_a_kill_at_once(tmp_path):
    place = tmp_path / 'index'
    writers = {letter: FORKSERVER.Process(target=write, args=(place, letter)) for letter in 'xyz'}
    for writer in writers.values():
        writer.start()
    while not all((tmp_path / letter).exists() for letter in writers):
        time.sleep(0.01)
    (tmp_path / 'go').touch()
    reader, reads = ImageIndex(place, PROBE), 0
    while not any(name.startswith('x') for name in reader.images[30:]):
        reader, reads = ImageIndex(place, PROBE), reads + 1
        assert_paired(reader)
    writers['x'].kill()
    for letter, writer in writers.items():
        writer.join(60)
        assert letter == 'x' or writer.exitcode == 0
    index = ImageIndex(place, PROBE)
    assert {f'{letter}{i}' for letter in 'yz' for i in range(240)} <= set(index.images) and reads
    assert_paired(index)


@pytest.mark.parametrize('others', [0, 1, 2])
def test_an_embedding_may_be_orthogonal_to_the_query(tmp_path, others):
    axes, names = torch.eye(len(PROBE))[:others + 1], ['same', 'b', 'c'][:others + 1]
    index = ImageIndex(tmp_path / 'index', PROBE)
    index.add(names, axes)
    assert dict(index.search(axes[0], 3)) == {name: float(name == 'same') for name in names}


def test_a_reader_that_opened_before_keeps_what_it_saw(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, 'UNUSED', 0)
    writer = ImageIndex(tmp_path / 'index', PROBE)
    writer.add(['a', 'b', 'c'], features(['a', 'b', 'c']))
    reader = ImageIndex(tmp_path / 'index', PROBE)
    writer.remove(['a', 'b'])
    writer.add(['d'], features(['d']))
    assert_paired(reader)
    assert reader.images == ['a', 'b', 'c'] and writer.images == ['c', 'd']
    (tmp_path / 'index').chmod(0o500)
    assert_paired(ImageIndex(tmp_path / 'index', PROBE))


@pytest.mark.parametrize('given, message', [
    (torch.zeros(2, WIDTH + 1), f'2 images need features of 2 x {WIDTH}, got 2 x {WIDTH + 1}'),
    (torch.zeros(3, WIDTH), f'2 images need features of 2 x {WIDTH}, got 3 x {WIDTH}'),
    (torch.full((2, WIDTH), torch.nan), 'NaN or infinite'),
])
def test_features_that_are_none(tmp_path, given, message):
    index = ImageIndex(tmp_path / 'index', PROBE)
    with pytest.raises(ValueError, match=message):
        index.add(['a', 'b'], given)
    assert len(index) == len(ImageIndex(tmp_path / 'index', PROBE)) == 0


def test_damaged_files(tmp_path, caplog):
    place = tmp_path / 'index'
    names = [str(i) for i in range(9)]
    ImageIndex(place, PROBE, 'save/net.pth').add(names, features(names))
    lines, file = (place / 'index.jsonl').read_bytes(), next(place.glob('features-*'))
    content = file.read_bytes()

    with pytest.raises(ValueError, match=r'made with another checkpoint \(save/net.pth\): delete it, or use that'):
        ImageIndex(place, feature('another net'))
    with pytest.raises(ValueError, match='made with another checkpoint'):
        ImageIndex(place, torch.ones(5))
    for garbage in (b'', b'garbage\n', lines[:100] + b'\xff\n' + lines[100:], b'{}\n', b'[1]\n', b'[' * 9999 + b'\n',
                    lines.replace(b'"features-', b'"../features-'), lines.replace(b'"features-', b'"/features-'),
                    lines + b'{"path": "x", "row": "1", "size": 1, "mtime": 1}\n',
                    lines + b'{"path": "x", "row": 3, "size": 1, "mtime": 1}\n',
                    lines + b'{"path": "x", "row": 99999999999999, "size": 1, "mtime": 1}\n',
                    lines + b'{"path": 5, "row": 9, "size": 1, "mtime": 1}\n'):
        (place / 'index.jsonl').write_bytes(garbage)
        with pytest.raises(ValueError, match=r'is damaged \(.*\): delete it, and the next run makes it again'):
            ImageIndex(place, PROBE)
    (place / 'index.jsonl').write_bytes(lines)

    file.write_bytes(np.random.default_rng(0).bytes(len(content)))
    with pytest.raises(ValueError, match='its features are no embeddings'):
        ImageIndex(place, PROBE).search(PROBE, 1)
    for zeros in (bytes(len(content)), content[:-80] + bytes(80)):
        file.write_bytes(zeros)
        for approximate in (False, True):
            with pytest.raises(ValueError, match='its features are no embeddings.*the next run makes it again'):
                ImageIndex(place, PROBE).search(PROBE, 9, approximate=approximate)
    file.write_bytes(content[:-40])  # one row and a part of another are lost
    index = ImageIndex(place, PROBE)
    assert len(index) == 7 and 'lost the end of its features' in caplog.text
    assert_paired(index)
    index.add(names[7:], features(names[7:]))
    assert len(ImageIndex(place, PROBE)) == 9
    assert_paired(ImageIndex(place, PROBE))
    next(place.glob('features-*')).unlink()
    with pytest.raises(ValueError, match='is missing'):
        ImageIndex(place, PROBE)


def test_what_is_no_index_is_refused(retrieval, pictures, tmp_path):
    with pytest.raises(ValueError, match='is a folder of other files, not an index'):
        retrieval.index(pictures, pictures)
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere'"):
        retrieval.index('/nowhere', tmp_path / 'new')
    (tmp_path / 'none').mkdir()
    with pytest.raises(FileNotFoundError, match='no images in the folder'):
        retrieval.index(tmp_path / 'none', tmp_path / 'new')
    with pytest.raises(TypeError, match='images must be a folder or a list of paths, got None among them'):
        retrieval.index([None], tmp_path / 'new')
    with pytest.raises(ValueError, match='is empty: add images'):
        retrieval.search('a dog', retrieval.index([], tmp_path / 'new'))
    (tmp_path / 'old').mkdir()
    for name in ('index.json', 'pictures.txt', 'features.f32'):
        (tmp_path / 'old' / name).touch()
    with pytest.raises(ValueError, match='by an earlier version of this code: delete it'):
        retrieval.index(pictures, tmp_path / 'old')


def test_approximate_search_misses_little_and_follows_the_index(tmp_path, monkeypatch, caplog):
    faiss = pytest.importorskip('faiss')
    monkeypatch.setattr(index_module, 'UNUSED', 0)
    torch.manual_seed(0)
    centres = torch.randn(40, 32)
    features = torch.nn.functional.normalize(centres.repeat(100, 1) + 0.5 * torch.randn(4000, 32), dim=-1)
    index = ImageIndex(tmp_path / 'index', features[0])
    index.add([f'{i}.jpg' for i in range(3900)], features[:3900])
    found = [dict(index.search(feature, 10, approximate=True)) for feature in features[:50]]
    exact = [dict(index.search(feature, 10)) for feature in features[:50]]
    assert sum(len(a.keys() & b.keys()) for a, b in zip(found, exact, strict=True)) > 0.9 * 500
    assert found[0]['0.jpg'] == pytest.approx(1, abs=1e-5)  # its cosines are exact
    index.add([f'{i}.jpg' for i in range(3900, 4000)], features[3900:])  # newer than what faiss was trained with
    again = ImageIndex(tmp_path / 'index', features[0])
    assert again.search(features[3950], 1, approximate=True)[0][0] == '3950.jpg'
    file = next((tmp_path / 'index').glob('*.faiss'))
    assert faiss.read_index(str(file)).ntotal == 3900
    index.remove(['3950.jpg'])
    assert index.search(features[3950], 1, approximate=True)[0][0] != '3950.jpg'
    whole = file.read_bytes()
    for garbage in (b'', b'garbage', whole[:5000], faiss.serialize_index(faiss.IndexFlatIP(7)).tobytes()):
        file.write_bytes(garbage)
        assert ImageIndex(tmp_path / 'index', features[0]).search(features[7], 1, approximate=True)[0][0] == '7.jpg'
        assert 'is damaged and made again' in caplog.text
        caplog.clear()
    index.remove([f'{i}.jpg' for i in range(3000)])
    index.add([f'{i}.jpg' for i in range(4000, 8000)], features)  # to a new file of features
    assert index.search(features[7], 2, approximate=True)[0][0] == '4007.jpg'
    assert faiss.read_index(str(next((tmp_path / 'index').glob('*.faiss')))).ntotal == len(index)
