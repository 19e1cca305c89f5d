"""How many images or pairs a forward pass may hold within a budget of memory."""

from models.blip import BLIPConfig

MOST = 256  # rows; beyond it a batch gains nothing
FLOAT = 4  # bytes


def image_bytes(config: BLIPConfig, rows: int = 0, length: int = 0) -> int:
    """Bytes at work, at most, for one image: encoding it, its keys and values, and `rows` captions being decoded."""
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    encoding = tokens * (36 * config.vision_width + config.vision_heads * tokens)
    keys_values = 4 * tokens * config.text_depth * config.text_width  # twice: as made, and in one tensor
    cache = 4 * length * config.text_depth * config.text_width
    return FLOAT * (6 * config.image_size ** 2 + encoding + keys_values + rows * (cache + 6 * config.vocab_size))


def pair_bytes(config: BLIPConfig, length: int, vocabulary: bool) -> int:
    """Bytes at work, at most, for one image and one text of `length` tokens, with logits over the vocabulary or not.
    The image is counted as if no other text shared it."""
    text = length * (8 * config.text_width + 2 * config.text_ffn + (2 * config.vocab_size if vocabulary else 0))
    return image_bytes(config) + FLOAT * text


def fitting(budget: float, each: int) -> int:
    """How many rows of `each` bytes a budget in GiB holds: at least one."""
    return min(max(int(budget * 2 ** 30 / each), 1), MOST)


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}')
