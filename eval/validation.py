"""The student's losses and recalls on held-out pairs: the curve beside that of training, and what the best checkpoint
is chosen by where metrics tie."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from data.captions import clean_caption
from data.datasets import ImageTextEval
from data.distributed import gather_objects, rank, world_size
from data.images import BrokenImage, open_image
from data.loader import load
from data.transforms import EvalTransform
from eval.metrics import retrieval_metrics
from models import losses
from models.blip import BLIP
from models.tokenizer import DEC, Tokenizer
from utils import logger

FEW = 50  # images of a validation split: with fewer, recalls and CIDEr tie or hang on single images


class HeldOut(Dataset):
    """(image float32 [3, S, S], caption) of held-out pairs; None in the place of an image that cannot be read.

    Args:
        pairs: (path or open file, raw caption).
    """

    def __init__(self, pairs: list[tuple], transform: EvalTransform, max_words: int):
        self.pairs, self.transform, self.max_words = pairs, transform, max_words

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, str]:
        file, caption = self.pairs[index]
        if not isinstance(file, str | Path):
            file.seek(0)  # it was read before
        try:
            image = self.transform(open_image(file, self.transform.memory))
        except (FileNotFoundError, BrokenImage):
            image = None
        return image, clean_caption(caption, self.max_words)


def first_captions(dataset: ImageTextEval, max_words: int) -> HeldOut:
    """Each image of a validation split with the first of its captions; warns if they are few."""
    if len(dataset) < FEW:
        logger.warning('the validation split has %d images, which is few to choose the best checkpoint by: where its '
                       'metric ties, the validation loss decides; data.split: 0.1 holds out more', len(dataset))
    return HeldOut([(path, texts[0]) for path, texts in zip(dataset.paths, dataset.references, strict=True)],
                   dataset.transform, max_words)


@torch.inference_mode()
def validation(model: BLIP, tokenizer: Tokenizer, held_out: HeldOut, *, max_tokens: int, prompt: str = '',
               batch_size: int = 64, workers: int = 0) -> dict[str, float]:
    """Losses of the tasks that a net in eval mode has, as training computes them without momentum and teacher, and the
    recalls of its features.

    `ita` compares all pairs with each other, `itm` each pair with two hard negatives of its batch, which depend on
    nothing but the net. Launched on several processes, each takes some of the batches and all get the result.

    Returns:
        loss_ita, loss_itm, loss_lm and their sum, loss; txt_r1 ... img_r10 and r_mean in per cent; of a net without
        the task's parts none of them. Nothing if no image can be read.
    """
    batches = [range(i, min(i + batch_size, len(held_out))) for i in range(0, len(held_out), batch_size)]
    found = []
    for items in load(held_out, workers, list, batch_sampler=batches[rank()::world_size()]):
        items = [(image, caption) for image, caption in items if image is not None]
        images, captions = zip(*items, strict=True) if items else ((), ())
        found.append(of_batch(model, tokenizer, torch.stack(images), captions, max_tokens, prompt) if items else {})
    parts = gather_objects(found)  # process i has batches i, i + processes, ...
    found = [part for i in range(len(batches)) if (part := parts[i % len(parts)][i // len(parts)])]
    if not found:
        return {}
    names = dict.fromkeys(name for part in found for name in part if name not in ('image', 'text'))
    totals = {name: [sum(part[name][i] for part in found if name in part) for i in range(2)] for name in names}
    out = {f'loss_{name}': total / count for name, (total, count) in totals.items()}
    if 'image' in found[0]:
        image, text = (torch.cat([part[name] for part in found]) for name in ('image', 'text'))
        cosine, same = image @ text.T, torch.eye(len(image))
        out['loss_ita'] = float(losses.soft_cross_entropy(cosine / model.temp.cpu(), same)
                                + losses.soft_cross_entropy(cosine.T / model.temp.cpu(), same)) / 2
        out |= retrieval_metrics(cosine, cosine.T, [[i] for i in range(len(image))], range(len(image)))
    return {'loss': sum(value for name, value in out.items() if name.startswith('loss_')), **out}


def of_batch(model: BLIP, tokenizer: Tokenizer, images: torch.Tensor, captions: tuple[str, ...], max_tokens: int,
             prompt: str) -> dict:
    """Features 'image' and 'text' [B, embed_dim] on the CPU; 'itm' and 'lm': (sum of the loss, what it is over)."""
    out, device = {}, model.device
    tokens = model.encode_image(images.to(device))
    image_kv = model.project_image(tokens)
    if model.text_encoder is not None:
        ids, mask = (x.to(device) for x in tokenizer(list(captions), max_tokens))
        image, text = model.image_feat(tokens), model.text_feat(ids, mask)
        numbers = torch.arange(len(ids), device=device)
        ids[:, 0] = tokenizer.enc_id
        noise = torch.full((len(ids), len(ids)), 0.5, device=device)  # no chance: the hardest
        text_negative, image_negative = (losses.hard_negatives(similarity / model.temp, numbers, numbers, noise)
                                         for similarity in (image @ text.T, text @ image.T))
        rows, columns = torch.cat([numbers, numbers, text_negative]), torch.cat([numbers, image_negative, numbers])
        if len(ids) > 1:
            logits = model.match_logits(ids[rows], mask[rows], image_kv, columns)
            out['itm'] = float(losses.itm_loss(logits)) * len(ids), len(ids)
        out |= {'image': image.cpu(), 'text': text.cpu()}
    if model.text_decoder is not None:
        ids, mask = (x.to(device) for x in tokenizer([prompt + caption for caption in captions], max_tokens, DEC))
        valid = mask[:, 1:].bool()
        valid[:, :tokenizer([prompt], max_tokens, DEC)[0].shape[1] - 2] = False  # the prompt carries no loss
        count = int(valid.sum())
        logits = model.caption_logits(ids, mask, image_kv)[valid]
        out['lm'] = float(losses.lm_loss(logits, ids[:, 1:][valid])) * count, count
    return out
