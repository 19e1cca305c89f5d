"""What may not follow in a caption: repetitions, phrases that are forbidden, an end that comes too early.

`Constraints` equals the logits processors of transformers that have the same names, on the same scores.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from models.tokenizer import Tokenizer
from utils import shorten


class Forbidden:
    """Phrases that a caption must not contain as whole words, whichever pieces the words are made of.

    Equals transformers' NoBadWordsLogitsProcessor, given every way to split the phrases into tokens; a token is banned
    as soon as it completes a phrase, so that no longer word begins with its last pieces either.

    Args:
        phrases: compared as the tokenizer normalises them: case and accents do not matter.

    Raises:
        ValueError: a phrase has no words.
    """

    def __init__(self, phrases: Sequence[str], tokenizer: Tokenizer, device: torch.device | str = 'cpu'):
        ids = {token: i for i, token in enumerate(tokenizer.vocab)}
        longest, self._vocabulary = max(map(len, ids)), len(ids)
        # A place is a number of letters of a phrase that have been said; a step leads from one to another by a token.
        steps, begins, ends, place = [], [], [], 0
        for phrase in phrases:
            words = tokenizer.words(phrase)
            if not words:
                raise ValueError(f'forbid names {shorten(phrase)}, which holds no word')
            begins.append(place)
            for word in words:
                for i in range(len(word)):
                    for j in range(i + 1, min(len(word), i + longest) + 1):
                        token = ids.get(f'##{word[i:j]}' if i else word[:j])
                        if token is not None:
                            steps.append((token, place + i, place + j))
                place += len(word)
            ends.append(place)
            if phrase in ids:  # the name of a token, such as [UNK]
                steps.append((ids[phrase], begins[-1], place))
            place += 1

        def tensor(numbers):
            return torch.tensor(numbers, dtype=torch.long, device=device)

        self._tokens, self._starts, self._stops = tensor(steps).reshape(-1, 3).T
        self._places = place
        self._begun = torch.zeros(place, dtype=torch.bool, device=device)
        self._begun[tensor(begins)] = True
        self._last = torch.isin(self._stops, tensor(ends))
        self._unseen = tensor(sorted(tokenizer.special))  # tokens that a caption's text does not show

    def __call__(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Scores [R, V] of the tokens after ids [R, T] -> the same with -inf for those that complete a phrase"""
        begun = said = self._begun.expand(len(ids), -1)
        for column in ids.T[:, :, None]:
            steps = said[:, self._starts] & (column == self._tokens)
            reached = marked(self._stops.expand(len(ids), -1), steps, self._places)
            said = torch.where(torch.isin(column, self._unseen), said, begun | reached)
        completes = said[:, self._starts[self._last]]
        banned = marked(self._tokens[self._last].expand(len(ids), -1), completes, scores.shape[1])
        return scores.masked_fill(banned, -torch.inf)

    def within(self, ids: torch.Tensor, start: int) -> bool:
        """Whether a token of ids [T] from `start` on completes a phrase."""
        scores = torch.zeros(1, self._vocabulary, device=ids.device)
        return any(self(scores, ids[None, :i])[0, ids[i]] < 0 for i in range(start, len(ids)))


class Constraints(NamedTuple):
    """What may not follow the tokens of a caption so far, the prompt included.

    Args:
        min_length: tokens before the end may come, the prompt's included.
        repetition_penalty: see `penalise_repeats`.
        no_repeat_ngram_size: no sequence of so many tokens appears twice (0: any may).
        forbidden: phrases that never appear.
    """

    eos_id: int
    min_length: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    forbidden: Forbidden | None = None

    def __call__(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Scores or logits [R, V] of the tokens after ids [R, T] -> the same, -inf where a token must not follow; a row
        that nothing may follow ends. The scores may be changed in place."""
        scores = penalise_repeats(scores, ids, self.repetition_penalty)
        scores = ban_ngrams(scores, ids, self.no_repeat_ngram_size)
        if self.forbidden is not None:
            scores = self.forbidden(scores, ids)
        if ids.shape[1] < self.min_length:
            scores[:, self.eos_id] = -torch.inf
        if self.no_repeat_ngram_size or self.forbidden is not None:
            stuck = scores.amax(1) == -torch.inf
            scores[:, self.eos_id] = scores[:, self.eos_id].masked_fill(stuck, 0.0)
        return scores


def penalise_repeats(scores: torch.Tensor, ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive and multiply negative scores [R, V] of the tokens in ids [R, T] (CTRL, Keskar et al.)."""
    if penalty == 1.0:
        return scores
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def ban_ngrams(scores: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Set to -inf the scores [R, V] of tokens that would end a sequence of `size` tokens which ids [R, T] have already
    (0: none)."""
    if not 0 < size <= ids.shape[1]:
        return scores
    sequences = ids.unfold(1, size, 1)  # [R, T - size + 1, size]
    repeated = (sequences[..., :-1] == ids[:, None, ids.shape[1] - size + 1:]).all(-1)
    return scores.masked_fill(marked(sequences[..., -1], repeated, scores.shape[1]), -torch.inf)


def marked(places: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Places [R, K] from 0 to count - 1 -> bool [R, count]: True at those that are chosen [R, K]."""
    marks = torch.zeros(len(places), count + 1, dtype=torch.bool, device=places.device)
    return marks.scatter_(1, torch.where(chosen, places, count), True)[:, :count]
