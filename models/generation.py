"""Caption generation: greedy, beam search and nucleus sampling with one static cache.

The image's keys and values are projected once per image and shared by its beams; finished images leave the
batch. Token ids equal those of the original BLIP for greedy and beam search, or, by `length_rule`, those of today's
transformers.
"""

import torch

from data.captions import PROMPT
from models.blip import BLIP, select_images
from models.text import KVCache
from models.tokenizer import DEC, Tokenizer
from utils import shorten


class Decoder:
    """The rows being decoded: `images` x `group` rows side by side, with their cache and image keys/values.

    Args:
        copies: of each image's keys and values, for rows that end one by one.
    """

    def __init__(self, model: BLIP, image_tokens: torch.Tensor, capacity: int, copies: int = 1):
        self.model = model
        self.image_kv = model.project_image(image_tokens)
        if copies > 1:
            rows = torch.arange(len(image_tokens), device=image_tokens.device)
            self.image_kv = select_images(self.image_kv, rows.repeat_interleave(copies))
        self.cache = KVCache(model.config.text_depth, capacity)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed ids [R, T] after the cached positions -> float32 logits [R, V] of the next token."""
        return self.model.next_logits(ids, self.image_kv, self.cache)

    def keep_images(self, keep: torch.Tensor) -> None:
        """Drop images: keep [images] bool. The cache rows are dropped by the next `cache.reorder`."""
        self.image_kv = select_images(self.image_kv, keep.nonzero()[:, 0])


def penalise_repeats(scores: torch.Tensor, ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive and multiply negative scores [R, V] of the tokens in ids [R, T] (CTRL, Keskar et al.)."""
    if penalty == 1.0:
        return scores
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def filter_top(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set logits [R, V] outside the k largest (0: all) and outside the nucleus of mass top_p to -inf."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[1])).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        outside[:, 0] = False  # the most likely token stays, however small top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits


def extend(model: BLIP, image_tokens: torch.Tensor, prompt_ids: torch.Tensor, eos_id: int, pad_id: int,
           max_length: int, min_length: int, pick, repetition_penalty: float, copies: int = 1) -> torch.Tensor:
    """Decode one token at a time with `pick(logits [R, V]) -> ids [R]`; returns ids [B x copies, <= max_length]."""
    batch, length = len(image_tokens) * copies, len(prompt_ids)
    out = torch.full((batch, max_length), pad_id, device=image_tokens.device)
    out[:, :length] = prompt_ids
    rows = torch.arange(batch, device=out.device)  # the unfinished ones
    decoder = Decoder(model, image_tokens, max_length, copies)
    fresh = out[:, :length]
    while length < max_length:
        scores = penalise_repeats(decoder.logits(fresh), out[rows, :length], repetition_penalty)
        if length < min_length:
            scores[:, eos_id] = -torch.inf
        tokens = pick(scores)
        out[rows, length] = tokens
        length += 1
        unfinished = tokens != eos_id
        if not unfinished.all():
            decoder.keep_images(unfinished)
            decoder.cache.reorder(unfinished.nonzero()[:, 0])
            rows, tokens = rows[unfinished], tokens[unfinished]
            if not len(rows):
                break
        fresh = tokens[:, None]
    return out[:, :length]


def beam_search(model: BLIP, image_tokens: torch.Tensor, prompt_ids: torch.Tensor, eos_id: int, pad_id: int,
                num_beams: int, max_length: int, min_length: int, length_penalty: float, repetition_penalty: float,
                length_rule: str = 'blip', early_stopping: bool = False,
                num_captions: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search -> the best `num_captions` of each image, best first: ids [B x num_captions, <= max_length] and
    scores [B x num_captions], log-probability / length^length_penalty.

    The length of an ended hypothesis counts, by the rule 'blip', the prompt but not the [SEP] (transformers when BLIP
    was published), and by 'transformers' the [SEP] but not the prompt (transformers today). An image is finished when
    it has `num_beams` ended hypotheses and, without `early_stopping`, none of its running ones can beat the worst of
    them at the present length.
    """
    batch, beams, length, device = len(image_tokens), num_beams, len(prompt_ids), image_tokens.device
    best_ids = torch.full((batch, num_captions, max_length), pad_id, device=device)
    best_scores = torch.zeros(batch, num_captions, dtype=torch.float32, device=device)
    uncounted = 1 if length_rule == 'blip' else length
    rows = torch.arange(batch, device=device)  # the unfinished images
    running = best_ids[:, :1].repeat(1, beams, 1)  # [images, beams, max_length]
    running[..., :length] = prompt_ids
    running_scores = torch.tensor([0.0] + [-1e9] * (beams - 1), dtype=torch.float32, device=device).repeat(batch, 1)
    ended, ended_scores = running.clone(), running_scores.new_full((batch, beams), -torch.inf)
    decoder = Decoder(model, image_tokens, max_length)
    logits = decoder.logits(running[:, 0, :length]).repeat_interleave(beams, 0)  # the prompt runs once per image
    decoder.cache.reorder(rows.repeat_interleave(beams))

    def merge(ids, scores, more_ids, more_scores):
        """The best `beams` of two sets of hypotheses."""
        scores, order = torch.cat([scores, more_scores], 1).topk(beams)
        return torch.cat([ids, more_ids], 1).gather(1, order[..., None].expand(-1, -1, max_length)), scores

    while True:
        scores = penalise_repeats(logits.log_softmax(-1), running.flatten(0, 1)[:, :length], repetition_penalty)
        if length < min_length:
            scores[:, eos_id] = -torch.inf
        vocab = scores.shape[1]
        scores = (scores.unflatten(0, (-1, beams)) + running_scores[..., None]).flatten(1)
        top_scores, top = scores.topk(2 * beams)
        source, tokens = top // vocab, top % vocab
        ids = running.gather(1, source[..., None].expand(-1, -1, max_length))
        ids[..., length] = tokens
        length += 1
        ends = tokens == eos_id
        ended_length = (length - uncounted) ** length_penalty
        cut = length == max_length
        eligible = ends | (cut and length_rule == 'transformers')  # there what is cut off competes with what ends now
        eligible[:, beams:] = False  # an end below the top `beams` candidates does not count
        ended, ended_scores = merge(ended, ended_scores, ids,
                                    (top_scores / ended_length).masked_fill(~eligible, -torch.inf))
        order = ends.int().argsort(dim=1, stable=True)[:, :beams]  # the best candidates that go on
        running = ids.gather(1, order[..., None].expand(-1, -1, max_length))
        running_scores, source = top_scores.gather(1, order), source.gather(1, order)

        best = top_scores[:, 0] if length_rule == 'blip' else running_scores[:, 0]
        done = ended_scores[:, -1] >= (-torch.inf if early_stopping else best / ended_length)
        done &= ended_scores[:, -1] > -torch.inf
        if cut and length_rule == 'blip':  # what runs on competes where the image is not finished, all of it counting
            scores = (running_scores / length ** length_penalty).masked_fill(done[:, None], -torch.inf)
            ended, ended_scores = merge(ended, ended_scores, running, scores)
        done |= cut
        if done.any():
            best_ids[rows[done]] = ended[done, :num_captions]
            best_scores[rows[done]] = ended_scores[done, :num_captions]
            if done.all():
                break
            keep = ~done
            decoder.keep_images(keep)
            rows, running, running_scores = rows[keep], running[keep], running_scores[keep]
            ended, ended_scores, source = ended[keep], ended_scores[keep], source[keep]
            offsets = keep.nonzero() * beams
        else:
            offsets = torch.arange(len(rows), device=device)[:, None] * beams
        decoder.cache.reorder((source + offsets).flatten())
        logits = decoder.logits(running.flatten(0, 1)[:, length - 1:length])
    best_ids = best_ids.flatten(0, 1)
    return best_ids[:, :int((best_ids != pad_id).sum(1).max())], best_scores.flatten()


@torch.inference_mode()
def generate_ids(model: BLIP, image_tokens: torch.Tensor, prompt_ids: torch.Tensor, eos_id: int, pad_id: int, *,
                 num_beams: int = 3, max_length: int = 30, min_length: int = 10, sample: bool = False,
                 top_k: int = 0, top_p: float = 0.9, temperature: float = 1.0, repetition_penalty: float = 1.0,
                 length_penalty: float = 1.0, early_stopping: bool = False, num_captions: int = 1,
                 length_rule: str = 'blip', generator: torch.Generator | None = None) -> torch.Tensor:
    """Image tokens [B, N, vision_width] -> token ids [B x num_captions, <= max_length], prompt included, [SEP]-ended,
    padded, the captions of an image side by side.

    Lengths count the prompt's tokens. `sample` draws from the `top_k` (0: all) most likely tokens and the nucleus;
    otherwise beam search, or greedy with one beam. `length_penalty`, `early_stopping` and `length_rule` ('blip' or
    'transformers') belong to `beam_search`.

    Raises:
        ValueError: a setting is out of range.
    """
    if model.text_decoder is None:
        raise ValueError(f'this {model.config.task} model has no text decoder: captions need a caption checkpoint')
    for name, value in (('num_beams', num_beams), ('max_length', max_length), ('min_length', min_length),
                        ('top_k', top_k), ('num_captions', num_captions)):
        if not isinstance(value, int):
            raise ValueError(f'generation needs a whole number as {name}, got {shorten(value)}')
    checks = {f'1 <= num_beams <= 1000, got {num_beams}': 1 <= num_beams <= 1000,
              f'{len(prompt_ids)} (prompt) < max_length <= {model.config.max_positions}, got {max_length}':
                  len(prompt_ids) < max_length <= model.config.max_positions,
              f'min_length <= max_length, got {min_length} > {max_length}': min_length <= max_length,
              f'1e-6 <= temperature <= 1e6, got {temperature}': 1e-6 <= temperature <= 1e6,
              f'0 < top_p <= 1, got {top_p}': 0 < top_p <= 1,
              f'top_k >= 0, got {top_k}': top_k >= 0,
              f'a length_rule blip or transformers, got {shorten(length_rule)}':
                  length_rule in ('blip', 'transformers'),
              f'1e-6 <= repetition_penalty <= 1e6, got {repetition_penalty}': 1e-6 <= repetition_penalty <= 1e6,
              f'-100 <= length_penalty <= 100, got {length_penalty}': -100 <= length_penalty <= 100,
              f'1 <= num_captions <= 1000, and at most num_beams where it does not sample, got {num_captions}':
                  1 <= num_captions <= (1000 if sample else num_beams)}
    for rule, holds in checks.items():
        if not holds:
            raise ValueError(f'generation needs {rule}')
    prompt_ids = prompt_ids.to(image_tokens.device)
    shared = (model, image_tokens, prompt_ids, eos_id, pad_id)
    if sample:
        def pick(logits):
            probabilities = filter_top(logits / temperature, top_k, top_p).softmax(-1)
            return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return extend(*shared, max_length, min_length, pick, repetition_penalty, num_captions)
    if num_beams == 1:
        return extend(*shared, max_length, min_length, lambda logits: logits.argmax(-1), repetition_penalty)
    return beam_search(*shared, num_beams, max_length, min_length, length_penalty, repetition_penalty, length_rule,
                       early_stopping, num_captions)[0]


@torch.inference_mode()
def generate(model: BLIP, tokenizer: Tokenizer, images: torch.Tensor, prompt: str = PROMPT, **settings) -> list[str]:
    """Normalised images [B, 3, S, S] -> `num_captions` each, side by side and without the prompt (settings:
    `generate_ids`)."""
    prompt_ids = tokenizer([prompt], max_length=model.config.max_positions, start=DEC)[0][0, :-1]
    ids = generate_ids(model, model.encode_image(images.to(model.device)), prompt_ids, tokenizer.sep_id,
                       tokenizer.pad_id, **settings)
    return tokenizer.batch_decode(ids[:, len(prompt_ids):])
