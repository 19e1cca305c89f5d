"""Decoding one token at a time, greedy, by beams or by drawing, with one static cache.

The image's keys and values are projected once per image and shared by its beams; finished images leave the batch.
"""

from typing import NamedTuple

import torch

from models.blip import BLIP, select_images
from models.generation.constraints import Constraints
from models.text import KVCache


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


def extend(model: BLIP, image_tokens: torch.Tensor, prompt_ids: torch.Tensor, pad_id: int, max_length: int, pick,
           constraints: Constraints, copies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one token at a time with `pick(logits [R, V]) -> ids [R]`; returns ids [B x copies, <= max_length] and the
    mean log-probability [B x copies] of the tokens after the prompt."""
    batch, length = len(image_tokens) * copies, len(prompt_ids)
    out = torch.full((batch, max_length), pad_id, device=image_tokens.device)
    out[:, :length] = prompt_ids
    total = torch.zeros(batch, dtype=torch.float32, device=out.device)
    rows = torch.arange(batch, device=out.device)  # the unfinished ones
    decoder = Decoder(model, image_tokens, max_length, copies)
    fresh = out[:, :length]
    while length < max_length:
        logits = decoder.logits(fresh)
        normaliser = logits.logsumexp(-1)
        scores = constraints(logits, out[rows, :length])
        tokens = pick(scores)
        out[rows, length] = tokens
        total[rows] += logits.gather(1, tokens[:, None])[:, 0] - normaliser
        length += 1
        unfinished = tokens != constraints.eos_id
        total[rows[~unfinished]] /= length - len(prompt_ids)
        if not unfinished.all():
            decoder.keep_images(unfinished)
            decoder.cache.reorder(unfinished.nonzero()[:, 0])
            rows, tokens = rows[unfinished], tokens[unfinished]
            if not len(rows):
                break
        fresh = tokens[:, None]
    total[rows] /= length - len(prompt_ids)
    return out[:, :length], total


def beam_search(model: BLIP, image_tokens: torch.Tensor, prompt_ids: torch.Tensor, pad_id: int, num_beams: int,
                max_length: int, length_penalty: float, constraints: Constraints, length_rule: str = 'blip',
                early_stopping: bool = False,
                num_captions: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Beam search -> the best `num_captions` of each image, best first: ids [B x num_captions, <= max_length], the mean
    log-probabilities [B x num_captions] of their tokens after the prompt, and scores [B x num_captions]: penalised
    log-probability / length^length_penalty. An image with fewer possible captions repeats its best.

    The length of an ended hypothesis counts, by the rule 'blip', the prompt but not the [SEP] (transformers when BLIP
    was published), and by 'transformers' the [SEP] but not the prompt (transformers today). An image is finished when
    it has `num_beams` ended hypotheses and, without `early_stopping`, none of its running ones can beat the worst of
    them at the present length.
    """
    batch, beams, length, device = len(image_tokens), num_beams, len(prompt_ids), image_tokens.device
    best = Hypotheses.empty(batch, num_captions, max_length, pad_id, device)
    prompt, uncounted = length, 1 if length_rule == 'blip' else length
    rows = torch.arange(batch, device=device)  # the unfinished images
    ended = Hypotheses.empty(batch, beams, max_length, pad_id, device)
    running = Hypotheses.empty(batch, beams, max_length, pad_id, device)  # their means are sums
    running.ids[..., :length] = prompt_ids
    running.scores[:] = torch.tensor([0.0] + [-1e9] * (beams - 1))
    decoder = Decoder(model, image_tokens, max_length)
    logits = decoder.logits(running.ids[:, 0, :length]).repeat_interleave(beams, 0)  # the prompt runs once per image
    decoder.cache.reorder(rows.repeat_interleave(beams))

    while True:
        logp = logits.log_softmax(-1)
        scores = constraints(logp, running.ids.flatten(0, 1)[:, :length])
        vocab = scores.shape[1]
        scores = (scores.unflatten(0, (-1, beams)) + running.scores[..., None]).flatten(1)
        top_scores, top = scores.topk(2 * beams)
        source, tokens = top // vocab, top % vocab
        sums = running.means.gather(1, source) + logp.unflatten(0, (-1, beams)).flatten(1).gather(1, top)
        top = Hypotheses(top_scores, sums, running.take(source).ids)
        top.ids[..., length] = tokens
        length += 1
        ends = tokens == constraints.eos_id
        ended_length = (length - uncounted) ** length_penalty
        cut = length == max_length
        eligible = ends | (cut and length_rule == 'transformers')  # there what is cut off competes with what ends now
        eligible[:, beams:] = False  # an end below the top `beams` candidates does not count
        ended = ended.best_with((top.scores / ended_length).masked_fill(~eligible, -torch.inf),
                                top.means / (length - prompt), top.ids)
        order = ends.int().argsort(dim=1, stable=True)[:, :beams]  # the best candidates that go on
        running, source = top.take(order), source.gather(1, order)

        highest = top.scores[:, 0] if length_rule == 'blip' else running.scores[:, 0]
        done = ended.scores[:, -1] >= (-torch.inf if early_stopping else highest / ended_length)
        done &= ended.scores[:, -1] > -torch.inf
        if cut and length_rule == 'blip':  # what runs on competes where the image is not finished, all of it counting
            ended = ended.best_with((running.scores / length ** length_penalty).masked_fill(done[:, None], -torch.inf),
                                    running.means / (length - prompt), running.ids)
        done |= cut
        if done.any():
            for part, found in zip(best, ended, strict=True):
                part[rows[done]] = found[done, :num_captions]
            if done.all():
                break
            keep = ~done
            decoder.keep_images(keep)
            rows, source = rows[keep], source[keep]
            running, ended = (Hypotheses(*(part[keep] for part in each)) for each in (running, ended))
            offsets = keep.nonzero() * beams
        else:
            offsets = torch.arange(len(rows), device=device)[:, None] * beams
        decoder.cache.reorder((source + offsets).flatten())
        logits = decoder.logits(running.ids.flatten(0, 1)[:, length - 1:length])
    order = torch.arange(num_captions, device=device).expand(batch, -1)
    best = best.take(order.masked_fill(best.scores == -torch.inf, 0))
    scores, means, ids = (part.flatten(0, 1) for part in best)
    return ids[:, :int((ids != pad_id).sum(1).max())], means, scores


class Hypotheses(NamedTuple):
    """Some captions of each image: scores and mean log-probabilities [images, n], ids [images, n, max_length]."""

    scores: torch.Tensor
    means: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def empty(cls, images: int, count: int, max_length: int, pad_id: int, device: torch.device) -> 'Hypotheses':
        scores = torch.full((images, count), -torch.inf, dtype=torch.float32, device=device)
        return cls(scores, torch.zeros_like(scores), torch.full((images, count, max_length), pad_id, device=device))

    def take(self, order: torch.Tensor) -> 'Hypotheses':
        """Those of the places [images, m]."""
        return Hypotheses(self.scores.gather(1, order), self.means.gather(1, order),
                          self.ids.gather(1, order[..., None].expand(-1, -1, self.ids.shape[2])))

    def best_with(self, *others: torch.Tensor) -> 'Hypotheses':
        """The best of these and of others, as many as these are."""
        both = Hypotheses(*(torch.cat(pair, 1) for pair in zip(self, others, strict=True)))
        return both.take(both.scores.topk(self.scores.shape[1]).indices)
