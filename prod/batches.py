"""How DLIPProd's inputs become batches of its net."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from data.distributed import to_device
from models.tokenizer import DEC
from prod.images import named_images, read_image
from prod.memory import check_batch_size, fitting, image_bytes, pair_bytes
from prod.texts import checked_texts
from utils import shorten

NEEDS = {'caption': 'text_decoder', 'retrieval': 'text_encoder'}


class Prepared(NamedTuple):
    """Images that `DLIPProd.transform` has made ready, in the place of images: for callers that decode elsewhere.

    Attributes:
        pixels: [N, 3, S, S].
    """

    pixels: torch.Tensor


class Batches:
    """What DLIPProd's methods share. A subclass sets `model`, `tokenizer`, `transform`, `device`, `memory` (GiB),
    `max_tokens` and `weight`, the name of the checkpoint."""

    def _require(self, task: str) -> None:
        if getattr(self.model, NEEDS[task]) is None:
            raise ValueError(f'{self.weight} is a {self.model.config.task} checkpoint without the '
                             f'{NEEDS[task]} that {task} needs: load a {task} or a pre-training checkpoint')

    def _batch_size(self, given: int | None, rows: int = 0, length: int = 0) -> int:
        if given is not None:
            check_batch_size(given)
            return given
        return fitting(self.memory, image_bytes(self.model.config, rows, length))

    def _batches(self, images, batch_size: int, bgr: bool,
                 on_error: str = 'raise') -> Iterator[tuple[list[bool], torch.Tensor | None]]:
        """Images -> which of the next ones could be read, and those [<= batch_size, 3, S, S] on the device."""
        check_batch_size(batch_size)
        if on_error not in ('raise', 'skip'):
            raise ValueError(f'on_error is {shorten(on_error)}: raise or skip')
        if isinstance(images, Prepared):
            for part in images.pixels.split(batch_size):
                yield [True] * len(part), to_device(part, self.device)
            return
        read, pixels = [], []

        def batch():
            return read, torch.stack(pixels).to(self.device) if pixels else None

        for name, image in named_images(images):
            try:
                pixels.append(self.transform(read_image(image, name, bgr, self.memory)))
                read.append(True)
            except (TypeError, ValueError):
                if on_error == 'raise':
                    raise
                read.append(False)
            if len(read) == batch_size:
                yield batch()
                read, pixels = [], []
        if read:
            yield batch()

    def _pairs(self, images, texts, batch_size: int | None, bgr: bool, start: str, prompt: str = '',
               on_error: str = 'raise'):
        """Images and texts -> (which of the next images could be read, their keys and values, all texts as batches of
        ids and mask)."""
        if batch_size is None:
            batch_size = fitting(self.memory, pair_bytes(self.model.config, self.max_tokens, vocabulary=start == DEC))
        tokens = list(self._tokens(texts, batch_size, start, prompt))
        count = sum(len(ids) for ids, _ in tokens)
        for read, pixels in self._batches(images, max(1, batch_size // count), bgr, on_error):
            yield read, None if pixels is None else self.model.project_image(self.model.encode_image(pixels)), tokens

    def _tokens(self, texts, batch_size: int, start: str,
                prompt: str = '') -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Texts, each after the prompt -> batches of ids and mask [<= batch_size, T] on the device."""
        check_batch_size(batch_size)
        texts = [prompt + text for text in checked_texts(texts)]
        for i in range(0, len(texts), batch_size):
            ids, mask = self.tokenizer(texts[i:i + batch_size], self.max_tokens, start)
            yield ids.to(self.device), mask.to(self.device)
