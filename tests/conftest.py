import os
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # a test that asks the hub would fail slowly without a network

import pytest  # noqa: E402
import torch  # noqa: E402

from models.blip import BLIP, BLIPConfig  # noqa: E402
from models.tokenizer import Tokenizer  # noqa: E402

TESTS = Path(__file__).parent
GOLDEN = TESTS / 'golden'
TINY = dict(image_size=64, patch_size=16, vision_width=64, vision_depth=2, vision_heads=4,
            text_width=64, text_depth=2, text_heads=4, text_ffn=128)
NANO = dict(image_size=32, patch_size=16, vision_width=32, vision_depth=2, vision_heads=2, text_width=32,
            text_depth=2, text_heads=2, text_ffn=64, embed_dim=16, dropout=0.0)
LONGEST = ('test_readme', 'test_recovery', 'test_training', 'test_finetune')  # a worker must not be left alone with one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def golden(name: str) -> dict:
    return torch.load(GOLDEN / name, weights_only=True)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope='session')
def bert_tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(TESTS / 'vocab.txt')


@pytest.fixture(scope='session')
def small_tokenizer() -> Tokenizer:
    letters = list('abcdefghijklmnopqrstuvwxyz')
    return Tokenizer(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters, *(f'##{c}' for c in letters),
                      'picture', 'of', 'red', 'blue', 'dog', 'star'])


@pytest.fixture
def nano(small_tokenizer) -> BLIP:
    torch.manual_seed(0)
    return BLIP(BLIPConfig(**NANO, vocab_size=len(small_tokenizer))).eval()
