import os
import signal
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # a test that asks the hub would fail slowly without a network

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from odd import random_checkpoint  # noqa: E402
from PIL import Image  # noqa: E402
from runs import run, write_config  # noqa: E402

import json_dataset  # noqa: E402
import pretrain_dlip  # noqa: E402
from data import scene_layouts  # noqa: E402
from models.blip import BLIP, BLIPConfig  # noqa: E402
from models.tokenizer import Tokenizer  # noqa: E402
from prod import DLIPProd  # noqa: E402

TESTS = Path(__file__).parent
GOLDEN = TESTS / 'golden'
TINY = dict(image_size=64, patch_size=16, vision_width=64, vision_depth=2, vision_heads=4,
            text_width=64, text_depth=2, text_heads=4, text_ffn=128)
NANO = dict(image_size=32, patch_size=16, vision_width=32, vision_depth=2, vision_heads=2, text_width=32,
            text_depth=2, text_heads=2, text_ffn=64, embed_dim=16, dropout=0.0)
# Started by nohup or in the background, pytest and what it starts would ignore these, which tests send.
for number in (signal.SIGINT, signal.SIGHUP) if os.name == 'posix' else ():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL))
# A worker must not be left alone with one of these.
LONGEST = ('test_readme', 'test_recovery', 'test_distributed', 'test_training', 'test_finetune')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """pytest-xdist cannot send the names of files that are not UTF-8, which tools print."""
    report = yield
    report.sections = [(title, text.encode('utf-8', 'backslashreplace').decode()) for title, text in report.sections]
    return report


def golden(name: str) -> dict:
    return torch.load(GOLDEN / name, weights_only=True)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope='session')
def bert_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(TESTS / 'vocab.txt')


@pytest.fixture(scope='session')
def small_tokenizer() -> Tokenizer:
    letters = list('abcdefghijklmnopqrstuvwxyz')
    return Tokenizer(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters, *(f'##{c}' for c in letters),
                      'picture', 'of', 'red', 'blue', 'dog', 'star'])


@pytest.fixture
def nano(small_tokenizer) -> BLIP:
    torch.manual_seed(0)
    return BLIP(BLIPConfig(**NANO, vocab_size=len(small_tokenizer))).eval()


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> Path:
    """A small scene set with its all.json."""
    root = tmp_path_factory.mktemp('scenes') / 'data'
    scene_layouts.main(['--out', str(root), '--pretrain', '60', '--flickr_train', '8', '--flickr_val', '4',
                        '--flickr_test', '5', '--workers', '1'])
    json_dataset.main(['--root', str(root), '--out', str(root / 'dataloader'), '--workers', '1'])
    return root


@pytest.fixture(scope='session')
def pretrained(scenes, tmp_path_factory) -> tuple[Path, Path]:
    """(config, output folder) of an uninterrupted pre-training run."""
    folder = tmp_path_factory.mktemp('pretrain')
    config = write_config(folder, 'pretrain', scenes)
    run(pretrain_dlip, config, folder / 'out')
    return config, folder / 'out'


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A folder `save/` with one random checkpoint per task."""
    folder = tmp_path_factory.mktemp('prod')
    (folder / 'save').mkdir()
    for task, name in {'caption': 'dlip_caption_flickr', 'retrieval': 'dlip_retrieval_flickr',
                       'pretrain': 'last'}.items():
        random_checkpoint(folder / f'save/{name}.pth', task)
    return folder


@pytest.fixture(scope='session')
def caption(folder):
    return DLIPProd(name='caption', weight=folder / 'save/dlip_caption_flickr.pth', device='cpu')


@pytest.fixture(scope='session')
def retrieval(folder):
    return DLIPProd(name='retrieval', weight=folder / 'save/dlip_retrieval_flickr.pth', device='cpu')


@pytest.fixture(scope='session')
def picture():
    """An RGB image without symmetry, 48 wide and 40 high."""
    y, x = np.mgrid[:40, :48]
    return Image.fromarray(np.stack([x * 5, y * 6, (x * y) % 256], -1).astype(np.uint8))
