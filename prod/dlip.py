"""DLIPProd: a trained checkpoint as a captioner or a retriever.

    from prod import DLIPProd
    caption = DLIPProd(name='caption', weight='save/dlip_caption_flickr.pth', device='cpu')
    caption.generate(image)            # ['...'], one string per image
    retrieval = DLIPProd(name='retrieval', weight='save/dlip_retrieval_flickr.pth', device='cpu')
    retrieval.get_image_feat(image)    # torch.Size([1, 256]), unit norm
    retrieval.get_text_feat('a dog')   # torch.Size([1, 256]), unit norm
"""

import os
from collections.abc import Iterator

import torch
from PIL import Image

from data.transforms import eval_transform
from models.checkpoint import load_model
from models.generation import PROMPT, generate
from models.originals import VOCABULARY
from models.precision import for_inference
from models.tokenizer import DEC, ENC
from models.transformers_format import write_folder
from prod.images import as_list, find_pictures, kind, read_image
from prod.index import PictureIndex
from utils import choose_device, logger, progress

NEEDS = {'caption': 'text_decoder', 'retrieval': 'text_encoder'}
MAX_TOKENS = 35  # of a text, where the checkpoint does not say what it was trained with


class DLIPProd:
    """A checkpoint of this repository, of dlip-v2 or of BLIP, ready for inference (float32, `inference_mode`).

    One object may be used from several threads. Images are a PIL image of any mode, a numpy array (H, W) or
    (H, W, 1|3|4) of uint8, uint16 or float in [0, 1], a torch tensor (1|3|4, H, W) of the same kinds, a path, the bytes
    of a file, or a list or tuple of these. Arrays are RGB; `bgr=True` says that they come from OpenCV. EXIF orientation
    is applied and transparency shown on white. Every method raises TypeError for what is no image (or text) and
    ValueError for a bad one, naming its place in the list. Results are on the CPU.

    Args:
        name: 'caption' or 'retrieval': what the checkpoint must be able to do. One that holds both
            (pre-training) serves both.
            None: whichever it can do.
        weight: path or URL of the checkpoint, a folder of the transformers layout, or the name of one on the Hugging
            Face hub. Of an original file the sizes are read from the tensors.
        device: 'cpu', 'cuda', 'cuda:1', 'mps', or 'auto' (the best one there is).
        tokenizer: vocabulary of an original file: a hub name, a folder or a vocab.txt.
        precision: 'fp32', or 'bf16' where the device is fast at it (features then differ by about 1%).
        backend: 'torch', or 'openvino': on a CPU about twice as fast; each function is compiled at its first use, which
            takes seconds.

    Raises:
        FileNotFoundError: no checkpoint there.
        ImportError: backend 'openvino' without the package.
        ValueError: unknown name, absent device, or a checkpoint that is damaged or lacks what `name` needs.
    """

    def __init__(self, name: str | None, weight: str | os.PathLike, device: str = 'cpu',
                 tokenizer: str | os.PathLike = VOCABULARY, precision: str = 'fp32', backend: str = 'torch'):
        if name not in (None, *NEEDS):
            raise ValueError(f'unknown name {name!r}: choose one of {", ".join(map(repr, NEEDS))}')
        self.name, self.weight, self.device = name, str(weight), choose_device(device)
        self.net, self.tokenizer, self.info = load_model(weight, self.device, tokenizer=tokenizer)
        self.model = for_inference(self.net, precision, backend)
        data = self.info.get('config', {}).get('data', {})
        self.prompt = data.get('prompt', PROMPT)
        self.max_tokens = data.get('max_tokens', MAX_TOKENS)
        evaluated = self.info.get('config', {}).get('eval', {})
        self.generation = {name: evaluated.get(name, default)
                           for name, default in (('num_beams', 3), ('max_length', 30), ('min_length', 10))}
        self.transform = eval_transform(self.model.config.image_size)
        if name is not None:
            self._require(name)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, name: str | None = None, **options) -> 'DLIPProd':
        """What `save_pretrained` wrote, or a BLIP of transformers: a folder or a name on the Hugging Face hub."""
        return cls(name, source, **options)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a folder that `from_pretrained` gives back bit for bit, with a model card; transformers' BLIP classes
        load it too. To publish it: `hf upload USER/NAME FOLDER`."""
        write_folder(folder, self.net, self.tokenizer, self.info)

    def generate(self, images, *, sample: bool = False, num_beams: int | None = None,
                 max_length: int | None = None, min_length: int | None = None, top_p: float = 0.9,
                 repetition_penalty: float = 1.0, seed: int | None = None, batch_size: int = 32, bgr: bool = False,
                 on_error: str = 'raise') -> list[str | None]:
        """Caption images: one string each, without the prompt.

        Args:
            sample: draw from the nucleus of mass `top_p`; otherwise beam search (greedy with one beam).
            num_beams, max_length, min_length: default to what the checkpoint was evaluated with, else 3, 30 and 10;
                lengths in tokens, counting the prompt's.
            seed: makes sampling repeatable.
            batch_size: images per forward pass.
            on_error: 'raise', or 'skip': None in the place of what is no readable picture.
        """
        self._require('caption')
        given = {'num_beams': num_beams, 'max_length': max_length, 'min_length': min_length}
        settings = self.generation | {name: value for name, value in given.items() if value is not None}
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        captions: list[str | None] = [None] * len(as_list(images))
        for places, pixels in self._batches(images, batch_size, bgr, on_error):
            said = generate(self.model, self.tokenizer, pixels, self.prompt, sample=sample, top_p=top_p,
                            repetition_penalty=repetition_penalty, generator=generator, **settings)
            for place, caption in zip(places, said, strict=True):
                captions[place] = caption
        return captions

    def get_image_feat(self, images, *, batch_size: int = 32, bgr: bool = False,
                       on_error: str = 'raise') -> torch.Tensor:
        """Images -> unit-norm float32 embeddings [N, embed_dim] on the CPU.

        on_error: 'raise', or 'skip': a row of NaN in the place of what is no readable picture.
        """
        self._require('retrieval')
        features = torch.full((len(as_list(images)), self.model.config.embed_dim), torch.nan)
        for places, pixels in self._batches(images, batch_size, bgr, on_error):
            with torch.inference_mode():
                features[places] = self.model.image_feat(self.model.encode_image(pixels)).cpu()
        return features  # made outside inference_mode: a plain tensor, fit for a user's autograd

    def get_text_feat(self, texts: str | list[str], *, batch_size: int = 256) -> torch.Tensor:
        """Texts -> unit-norm float32 embeddings [N, embed_dim] on the CPU.

        A text is cut to the token length of training; an empty one gives the embedding of [CLS] [SEP].
        """
        self._require('retrieval')
        with torch.inference_mode():
            parts = [self.model.text_feat(ids, mask).cpu()
                     for ids, mask in self._tokens(texts, batch_size, '[CLS]')]
        return torch.cat(parts)

    def similarity(self, images, texts: str | list[str], *, bgr: bool = False) -> torch.Tensor:
        """Cosine [N, M] in [-1, 1] of the embeddings of N images and M texts: fast, for ranking."""
        text_feat = self.get_text_feat(texts)  # first: a bad text is found before the slow part
        return self.get_image_feat(images, bgr=bgr) @ text_feat.T

    def match(self, images, texts: str | list[str], *, batch_size: int = 32,
              bgr: bool = False) -> torch.Tensor:
        """Probability [N, M] in [0, 1] that text m describes image n, by the matching head.

        Reads every pair together: slower and more exact than `similarity`. `batch_size` counts pairs.
        """
        self._require('retrieval')
        with torch.inference_mode():
            tokens = list(self._tokens(texts, batch_size, ENC))
            count = sum(len(ids) for ids, _ in tokens)
            parts = [self._match_all(pixels, tokens).cpu()
                     for _, pixels in self._batches(images, max(1, batch_size // count), bgr)]
        return torch.cat(parts)

    def caption_scores(self, images, texts: str | list[str], *, batch_size: int = 32,
                       bgr: bool = False) -> torch.Tensor:
        """Mean log-probability [N, M] of the tokens of text m (its end included) as a caption of image n, after the
        prompt: how the captioner itself would rank given captions. `batch_size` counts pairs."""
        self._require('caption')
        decoder = self.model.text_decoder
        prompt = len(self.tokenizer([self.prompt], self.max_tokens, DEC)[0][0]) - 1
        parts = []
        with torch.inference_mode():
            tokens = list(self._tokens(texts, batch_size, DEC, self.prompt))
            count = sum(len(ids) for ids, _ in tokens)
            for _, pixels in self._batches(images, max(1, batch_size // count), bgr):
                image_kv = self.model.project_image(self.model.encode_image(pixels))
                row = []
                for ids, mask in tokens:
                    ids, mask = ids.repeat(len(pixels), 1), mask.repeat(len(pixels), 1)
                    hidden = decoder.bert(ids, mask, causal=True, image_kv=image_kv).hidden[:, prompt - 1:-1]
                    logp = decoder.logits(hidden).float().log_softmax(-1).gather(2, ids[:, prompt:, None])[..., 0]
                    said = mask[:, prompt:]
                    row.append(((logp * said).sum(1) / said.sum(1)).unflatten(0, (len(pixels), -1)))
                parts.append(torch.cat(row, 1).cpu())
        return torch.cat(parts)

    def index(self, pictures: str | os.PathLike | list, folder: str | os.PathLike, *,
              batch_size: int = 32) -> PictureIndex:
        """Embed the pictures of a folder (and the folders in it), or of a list of paths, into an index on disk.

        What the index has already is skipped, so that a run that was cut off goes on, and new pictures are added.
        Files that cannot be read are named in a warning and left out.

        Args:
            folder: where the index is or shall be.
        """
        self._require('retrieval')
        found = PictureIndex(folder, self.get_image_feat(Image.linear_gradient('L'))[0])
        paths = [os.fspath(path) for path in pictures] if isinstance(pictures, list | tuple) else \
            find_pictures(pictures)
        fresh = [path for path in dict.fromkeys(paths) if path not in found]
        for start in progress(range(0, len(fresh), batch_size), desc='indexing'):
            batch = fresh[start:start + batch_size]
            features = self.get_image_feat(batch, batch_size=batch_size, on_error='skip')
            good = ~features[:, 0].isnan()
            for path, read in zip(batch, good.tolist(), strict=True):
                if not read:
                    logger.warning('%s is no readable picture: not in the index', path)
            found.add([path for path, read in zip(batch, good.tolist(), strict=True) if read], features[good])
        return found

    def search(self, query, index: PictureIndex, k: int = 5, *, rerank: int = 0) -> list[tuple[str, float]]:
        """The pictures of an index that fit a query best: [(path, score)], best first.

        Args:
            query: a text (str), or a picture of any other kind that `get_image_feat` takes (a path as pathlib.Path).
            rerank: this many of the nearest are compared again by `match` (texts only), which is slower and better; the
                score then is its probability, otherwise the cosine.
        """
        feature = self.get_text_feat(query) if isinstance(query, str) else self.get_image_feat(query)
        hits = index.search(feature[0], max(k, rerank))
        if rerank and isinstance(query, str):
            scores = self.match([path for path, _ in hits], query)[:, 0].tolist()
            hits = sorted(((path, score) for (path, _), score in zip(hits, scores, strict=True)),
                          key=lambda hit: -hit[1])
        return hits[:k]

    def _match_all(self, pixels: torch.Tensor, tokens: list[tuple]) -> torch.Tensor:
        """Every image of a batch with every text (batches of ids and mask) -> match probability [B, M]"""
        count = len(pixels)
        image_kv = self.model.project_image(self.model.encode_image(pixels))
        logits = [self.model.match_logits(ids.repeat(count, 1), mask.repeat(count, 1), image_kv)
                  .unflatten(0, (count, -1)) for ids, mask in tokens]
        return torch.cat(logits, 1).float().softmax(-1)[..., 1]

    def _require(self, task: str) -> None:
        if getattr(self.model, NEEDS[task]) is None:
            raise ValueError(f'{self.weight} is a {self.model.config.task} checkpoint without the '
                             f'{NEEDS[task]} that {task} needs: load a {task} or a pre-training checkpoint')

    def _batches(self, images, batch_size: int, bgr: bool,
                 on_error: str = 'raise') -> Iterator[tuple[list[int], torch.Tensor]]:
        """Images -> their places and batches [<= batch_size, 3, S, S] on the device, opened as they are needed."""
        check_batch_size(batch_size)
        if on_error not in ('raise', 'skip'):
            raise ValueError(f'on_error is {on_error!r}: raise or skip')
        named = as_list(images)
        for start in range(0, len(named), batch_size):
            places, pixels = [], []
            for place, (name, image) in enumerate(named[start:start + batch_size], start):
                try:
                    pixels.append(self.transform(read_image(image, name, bgr)))
                    places.append(place)
                except (TypeError, ValueError):
                    if on_error == 'raise':
                        raise
            if pixels:
                yield places, torch.stack(pixels).to(self.device)

    def _tokens(self, texts, batch_size: int, start: str,
                prompt: str = '') -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Texts, each after the prompt -> batches of ids and mask [<= batch_size, T] on the device."""
        check_batch_size(batch_size)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list | tuple):
            raise TypeError(f'texts is {kind(texts)}: pass a str or a list of str')
        if not texts:
            raise ValueError('the list of texts is empty: pass at least one text')
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f'texts[{i}] is {kind(text)}: it must be a str')
        texts = [prompt + text.encode('utf-8', 'replace').decode() for text in texts]  # lone surrogates
        for i in range(0, len(texts), batch_size):
            ids, mask = self.tokenizer(texts[i:i + batch_size], self.max_tokens, start)
            yield ids.to(self.device), mask.to(self.device)


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}')
