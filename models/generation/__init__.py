"""Caption generation. Token ids equal those of the original BLIP for greedy and beam search, or, by `length_rule`,
those of today's transformers.
"""

from collections.abc import Sequence

import torch

from data.captions import PROMPT
from models.blip import BLIP
from models.generation.constraints import Constraints, Forbidden
from models.generation.search import beam_search, extend, filter_top
from models.tokenizer import DEC, Tokenizer
from utils import shorten


@torch.inference_mode()
def generate_scored(model: BLIP, image_tokens: torch.Tensor, prompt_ids: torch.Tensor, eos_id: int, pad_id: int, *,
                    num_beams: int = 3, max_length: int = 30, min_length: int = 10, sample: bool = False,
                    top_k: int = 0, top_p: float = 0.9, temperature: float = 1.0, repetition_penalty: float = 1.0,
                    no_repeat_ngram_size: int = 0, forbidden: Forbidden | None = None, length_penalty: float = 1.0,
                    early_stopping: bool = False, num_captions: int = 1, length_rule: str = 'blip',
                    generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Image tokens [B, N, vision_width] -> token ids [B x num_captions, <= max_length], prompt included, [SEP]-ended,
    padded, the captions of an image side by side; and of each the mean log-probability [B x num_captions], by the net
    alone, of its tokens after the prompt, its [SEP] included.

    Lengths count the prompt's tokens. `sample` draws from the `top_k` (0: all) most likely tokens and the nucleus;
    otherwise beam search, or greedy with one beam. `length_penalty`, `early_stopping` and `length_rule` ('blip' or
    'transformers') belong to `beam_search`, the other settings to `Constraints`.

    Raises:
        ValueError: a setting is out of range.
    """
    if model.text_decoder is None:
        raise ValueError(f'this {model.config.task} model has no text decoder: captions need a caption checkpoint')
    for name, value in (('num_beams', num_beams), ('max_length', max_length), ('min_length', min_length),
                        ('top_k', top_k), ('num_captions', num_captions),
                        ('no_repeat_ngram_size', no_repeat_ngram_size)):
        if not isinstance(value, int):
            raise ValueError(f'generation needs a whole number as {name}, got {shorten(value)}')
    checks = {f'1 <= num_beams <= 1000, got {num_beams}': 1 <= num_beams <= 1000,
              f'{len(prompt_ids)} (prompt and prefix) < max_length <= {model.config.max_positions}, got {max_length}':
                  len(prompt_ids) < max_length <= model.config.max_positions,
              f'min_length <= max_length, got {min_length} > {max_length}': min_length <= max_length,
              f'1e-6 <= temperature <= 1e6, got {temperature}': 1e-6 <= temperature <= 1e6,
              f'0 < top_p <= 1, got {top_p}': 0 < top_p <= 1,
              f'top_k >= 0, got {top_k}': top_k >= 0,
              f'a length_rule blip or transformers, got {shorten(length_rule)}':
                  length_rule in ('blip', 'transformers'),
              f'1e-6 <= repetition_penalty <= 1e6, got {repetition_penalty}': 1e-6 <= repetition_penalty <= 1e6,
              f'no_repeat_ngram_size >= 0, got {no_repeat_ngram_size}': no_repeat_ngram_size >= 0,
              f'-100 <= length_penalty <= 100, got {length_penalty}': -100 <= length_penalty <= 100,
              f'1 <= num_captions <= 1000, and at most num_beams where it does not sample, got {num_captions}':
                  1 <= num_captions <= (1000 if sample else num_beams)}
    for rule, holds in checks.items():
        if not holds:
            raise ValueError(f'generation needs {rule}')
    constraints = Constraints(eos_id, min_length, repetition_penalty, no_repeat_ngram_size, forbidden)
    shared = (model, image_tokens, prompt_ids.to(image_tokens.device), pad_id)
    if sample:
        def pick(logits):
            probabilities = filter_top(logits / temperature, top_k, top_p).softmax(-1)
            return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return extend(*shared, max_length, pick, constraints, num_captions)
    if num_beams == 1:
        return extend(*shared, max_length, lambda logits: logits.argmax(-1), constraints)
    return beam_search(*shared, num_beams, max_length, length_penalty, constraints, length_rule, early_stopping,
                       num_captions)[:2]


def generate_ids(*arguments, **settings) -> torch.Tensor:
    """The token ids of `generate_scored`, which takes the same arguments."""
    return generate_scored(*arguments, **settings)[0]


@torch.inference_mode()
def generate(model: BLIP, tokenizer: Tokenizer, images: torch.Tensor, prompt: str = PROMPT, *, prefix: str = '',
             forbid: Sequence[str] = (), scores: bool = False, **settings) -> list[str] | list[tuple[str, float]]:
    """Normalised images [B, 3, S, S] -> `num_captions` each, side by side and without the prompt.

    Args:
        prefix: how the captions begin.
        forbid: phrases that they do not contain (see `Forbidden`).
        scores: give (caption, mean log-probability of its tokens after the prefix) instead.
        settings: of `generate_scored`.

    Raises:
        ValueError: a setting is out of range, or the prefix holds what is forbidden.
    """
    limit = model.config.max_positions + 1
    prompt_ids = tokenizer([prompt], limit, DEC)[0][0, :-1]
    start = torch.cat([prompt_ids, tokenizer([prefix], limit)[0][0, 1:-1]])
    forbidden = Forbidden(forbid, tokenizer, model.device) if forbid else None
    if forbidden is not None and forbidden.within(start.to(model.device), len(prompt_ids)):
        raise ValueError(f'the prefix {shorten(prefix)} contains a phrase that forbid names')
    ids, means = generate_scored(model, model.encode_image(images.to(model.device)), start, tokenizer.sep_id,
                                 tokenizer.pad_id, forbidden=forbidden, **settings)
    captions = tokenizer.batch_decode(ids[:, len(prompt_ids):])
    return list(zip(captions, means.tolist(), strict=True)) if scores else captions
