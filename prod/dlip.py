"""DLIPProd: a trained checkpoint as a captioner or a retriever. Every method, with examples: prod/README.md."""

import math
import os
from pathlib import Path

import torch
from PIL import Image

from data.transforms import EvalTransform
from models.engine.launch import choose_device
from models.generation import generate
from models.tokenizer import DEC, ENC
from models.weights.originals import VOCABULARY
from models.weights.transformers_format import write_folder
from prod.arguments import checked
from prod.batches import NEEDS, Batches
from prod.defaults import on_its_own_devices
from prod.index import ImageIndex
from prod.precision import net_fingerprint, served
from prod.run_settings import MAX_NEW, MIN_NEW, run_settings
from prod.texts import checked_texts
from utils import shorten

TEXTS = 256  # texts a batch


@on_its_own_devices
@checked
class DLIPProd(Batches):
    """A checkpoint of this repository, of dlip-v2 or of BLIP, ready for inference.

    One object may be used from several threads, and on one thread in a forked process; it serves captions and retrieval
    where the checkpoint holds both.
    Images are a PIL image of any mode, a numpy array (H, W) or (H, W, 1|3|4) of uint8, uint16 or float in [0, 1], a
    torch tensor (1|3|4, H, W) of the same kinds, a path, the bytes of a file, or a list, tuple or iterator of these,
    which is read as it is needed. Arrays are RGB; `bgr=True` says that they come from OpenCV. EXIF orientation is
    applied, transparency is shown on white, an animation is its first frame. Grey images of more than 8 bits are scaled
    by their depth, colour ones are taken to use all 16. Texts are cut to the token length of
    training. Every method raises TypeError for what is no image (or text) and ValueError for a bad one, naming its
    place; with `on_error='skip'` an image of that sort leaves a gap instead. Results are float32 tensors on the CPU.

    Args:
        name: 'caption' or 'retrieval': what the checkpoint must be able to do. None: whatever it can.
        weight: path or URL of the checkpoint, a folder of the transformers layout, or the name of one on the Hugging
            Face hub. Of an original file the sizes are read from the tensors.
        device: 'cpu', 'cuda', 'cuda:1', 'mps', 'auto' (the best one there is), or a torch.device.
        tokenizer: vocabulary of an original file: a hub name, a folder or a vocab.txt.
        precision: 'fp32'; 'bf16' (features then differ by about 1%), which is fp32 on a device without instructions for
            it; 'int8' is bf16 with all matrices in 8 bits (backend openvino; by about 2%). Of graphs it is what they
            were exported with.
        backend: 'torch'; 'openvino': on a CPU about twice as fast; each function is compiled at its first use, which
            takes a second or two; 'onnx': `weight` is a folder that `prod/export.py --format onnx` wrote, run by
            onnxruntime on the CPU.
        memory: GiB that the images of one batch may take at work; sets the batch size where a call does not.

    Raises:
        FileNotFoundError: no checkpoint there.
        ImportError: backend 'openvino' or 'onnx' without its package.
        ValueError: unknown name, absent device, or a checkpoint that is damaged or lacks what `name` needs.

    >>> dlip = DLIPProd(None, 'data/demo_teacher.pth')   # the demo's teacher: 64-pixel images of coloured shapes
    """

    def __init__(self, name: str | None, weight: str | os.PathLike, device: str | torch.device = 'cpu',
                 tokenizer: str | os.PathLike = VOCABULARY, precision: str = 'fp32', backend: str = 'torch',
                 memory: float = 1.0):
        if name not in (None, *NEEDS):
            raise ValueError(f'unknown name {shorten(name)}: choose one of {", ".join(map(repr, NEEDS))}')
        if not memory > 0:
            raise ValueError(f'memory must be a positive number of GiB, got {memory}')
        self.name, self.weight, self.device, self.memory = name, str(weight), choose_device(device), memory
        self.net, self.model, self.tokenizer, self.info = served(weight, self.device, tokenizer, precision, backend)
        self.prompt, self.max_tokens, generation = run_settings(self.info, self.model.config.max_positions, weight)
        self.prompt_ids = self.tokenizer([self.prompt], self.model.config.max_positions, DEC)[0][0, :-1]
        self.generation = {'num_beams': 3, 'max_length': len(self.prompt_ids) + MAX_NEW,
                           'min_length': len(self.prompt_ids) + MIN_NEW, **generation}
        self.transform = EvalTransform(self.model.config.image_size)
        if name is not None:
            self._require(name)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, name: str | None = None, **options) -> 'DLIPProd':
        """Load what `save_pretrained` wrote or a BLIP of transformers, from a folder or by its name on the hub."""
        return cls(name, source, **options)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a folder that `from_pretrained` gives back bit for bit, with a model card; transformers' BLIP classes
        load it too. To publish it: `hf upload USER/NAME FOLDER`."""
        if self.net is None:
            raise ValueError(f'{self.weight} holds graphs: save the checkpoint that they were exported from')
        write_folder(folder, self.net, self.tokenizer, self.info)

    @property
    def fingerprint(self) -> str:
        """A hash of the weights: equal for equal nets, wherever their files lie."""
        return net_fingerprint(self.net, self.info)

    # ------------------------------------------------------------ captions

    def generate(self, images, *, sample: bool = False, num_beams: int | None = None, max_length: int | None = None,
                 min_length: int | None = None, top_k: int = 0, top_p: float = 0.75, temperature: float = 1.0,
                 repetition_penalty: float = 1.0, no_repeat_ngram_size: int = 0, length_penalty: float = 1.0,
                 early_stopping: bool = False, num_captions: int = 1, prefix: str = '',
                 forbid: str | list | tuple = (), seed: int | None = None, scores: bool = False,
                 batch_size: int | None = None, bgr: bool = False, on_error: str = 'raise') -> list:
        """Caption images: a list with one string per image, without the prompt.

        Args:
            sample: draw each token; otherwise beam search, which is greedy with one beam.
            top_k, top_p: draw from the `top_k` likeliest tokens (0: all) and the nucleus of probability `top_p`.
            temperature: of drawing; below 1 likely tokens become likelier.
            num_beams: None: as many as the checkpoint was evaluated with, else 3.
            max_length, min_length: in tokens, counting the prompt's four. None: what the checkpoint was evaluated with,
                else 30 and 10 (of a checkpoint without prompt: 27 and 7).
            repetition_penalty: above 1 the tokens of a caption so far become less likely (CTRL, arXiv 1909.05858).
            no_repeat_ngram_size: no sequence of this many tokens, the prompt's included, appears twice; 0: no limit.
            length_penalty: beams compare by log-probability / length^length_penalty.
            early_stopping: an image is done when it has `num_beams` captions, though a longer one might be better.
            num_captions: above 1: a list of this many captions for each image, the best ones of the beams.
            prefix: how every caption begins; its tokens count in the lengths.
            forbid: a phrase, or a list of them, that captions never contain as whole words. Nor do words appear that
                begin with a forbidden one and are spelled by further tokens.
            seed: makes sampling repeatable.
            scores: give (caption, mean log-probability) in the place of each caption: of its tokens after the prefix,
                by the net alone. The lower, the more doubtful.
            batch_size: images per forward pass; None: as many as `memory` holds.
            on_error: 'raise', or 'skip': None for an image that cannot be read.

        >>> dlip.generate('prod/examples/05.jpg')
        ['within a green square there is a blue star on white']
        >>> dlip.generate('prod/examples/05.jpg', num_captions=2)[0][1]
        'white background with a green square that holds a blue star'
        >>> dlip.generate('prod/examples/05.jpg', prefix='a blue', forbid=['green square'])
        ['a blue star inside a green picture on white']
        >>> [(said, round(score, 1)) for said, score in dlip.generate('prod/examples/05.jpg', scores=True)]
        [('within a green square there is a blue star on white', -0.2)]
        >>> dlip.generate([b'no image'], on_error='skip')
        [None]
        """
        self._require('caption')
        forbid = checked_texts(forbid, 'forbid') if forbid else []
        given = {'num_beams': num_beams, 'max_length': max_length, 'min_length': min_length}
        settings = self.generation | {key: value for key, value in given.items() if value is not None}
        if seed is not None and not -2 ** 63 <= seed < 2 ** 64:
            raise ValueError(f'seed must be from -2^63 to 2^64 - 1, got {shorten(seed)}')
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        batch_size = self._batch_size(batch_size, max(settings['num_beams'], num_captions), settings['max_length'])
        captions = []
        for read, pixels in self._batches(images, batch_size, bgr, on_error):
            said = [] if pixels is None else generate(
                self.model, self.tokenizer, pixels, self.prompt, sample=sample, top_k=top_k, top_p=top_p,
                temperature=temperature, repetition_penalty=repetition_penalty,
                no_repeat_ngram_size=no_repeat_ngram_size, length_penalty=length_penalty,
                early_stopping=early_stopping, num_captions=num_captions, prefix=prefix, forbid=forbid, scores=scores,
                generator=generator, **settings)
            own = iter(said if num_captions == 1 else
                       [said[i:i + num_captions] for i in range(0, len(said), num_captions)])
            captions += [next(own) if good else None for good in read]
        return captions

    def caption_scores(self, images, texts: str | list[str], *, batch_size: int | None = None,
                       bgr: bool = False) -> torch.Tensor:
        """Mean log-probability [N, M] of the tokens of text m (its end included) as a caption of image n, after the
        prompt: how the captioner itself would rank given captions. `batch_size` counts pairs.

        >>> dlip.caption_scores('prod/examples/05.jpg', ['a blue star inside a green square', 'a red ring']).argmax()
        tensor(0)
        """
        self._require('caption')
        prompt, parts = len(self.prompt_ids), []
        with torch.inference_mode():
            for read, image_kv, tokens in self._pairs(images, texts, batch_size, bgr, DEC, self.prompt):
                count, row = len(read), []
                for ids, mask in tokens:
                    ids, mask = ids.repeat(count, 1), mask.repeat(count, 1)
                    logits = self.model.caption_logits(ids, mask, image_kv)[:, prompt - 1:]
                    logp = logits.log_softmax(-1).gather(2, ids[:, prompt:, None])[..., 0]
                    said = mask[:, prompt:]
                    row.append(((logp * said).sum(1) / said.sum(1)).unflatten(0, (count, -1)))
                parts.append(torch.cat(row, 1).cpu())
        return torch.cat(parts)

    # ------------------------------------------------------------ retrieval

    def get_image_feat(self, images, *, batch_size: int | None = None, bgr: bool = False,
                       on_error: str = 'raise') -> torch.Tensor:
        """Images -> unit-norm embeddings [N, embed_dim].

        on_error: 'raise', or 'skip': a row of NaN for an image that cannot be read.

        >>> dlip.get_image_feat('prod/examples/05.jpg').shape
        torch.Size([1, 256])
        """
        self._require('retrieval')
        parts = []
        for read, pixels in self._batches(images, self._batch_size(batch_size), bgr, on_error):
            part = torch.full((len(read), self.model.config.embed_dim), torch.nan, dtype=torch.float32)
            if pixels is not None:
                with torch.inference_mode():
                    part[torch.tensor(read)] = self.model.image_feat(self.model.encode_image(pixels)).cpu()
            parts.append(part)
        return torch.cat(parts)  # made outside inference_mode: a plain tensor, fit for a user's autograd

    def get_text_feat(self, texts: str | list[str], *, batch_size: int = TEXTS) -> torch.Tensor:
        """Texts -> unit-norm embeddings [N, embed_dim]. An empty text gives the embedding of [CLS] [SEP].

        >>> dlip.get_text_feat(['a blue star', 'a red ring']).shape
        torch.Size([2, 256])
        """
        self._require('retrieval')
        with torch.inference_mode():
            parts = [self.model.text_feat(ids, mask).cpu()
                     for ids, mask in self._tokens(texts, batch_size, '[CLS]')]
        return torch.cat(parts)

    def similarity(self, images, texts: str | list[str], *, bgr: bool = False) -> torch.Tensor:
        """Cosine [N, M] in [-1, 1] of the embeddings of N images and M texts: fast, for ranking.

        >>> dlip.similarity('prod/examples/05.jpg', ['a blue star inside a green square', 'a red ring']).argmax()
        tensor(0)
        """
        text_feat = self.get_text_feat(texts)  # first: a bad text is found before the slow part
        return self.get_image_feat(images, bgr=bgr) @ text_feat.T

    def match(self, images, texts: str | list[str], *, batch_size: int | None = None, bgr: bool = False,
              on_error: str = 'raise') -> torch.Tensor:
        """Probability [N, M] in [0, 1] that text m describes image n, by the matching head.

        Reads every pair together: slower and more exact than `similarity`. `batch_size` counts pairs. `on_error` as in
        `get_image_feat`.

        >>> dlip.match('prod/examples/05.jpg', ['a blue star inside a green square on white', 'a red ring']) > 0.5
        tensor([[ True, False]])
        """
        self._require('retrieval')
        parts = []
        with torch.inference_mode():
            for read, image_kv, tokens in self._pairs(images, texts, batch_size, bgr, ENC, on_error=on_error):
                count, texts_given = sum(read), sum(len(ids) for ids, _ in tokens)
                part = torch.full((len(read), texts_given), torch.nan, dtype=torch.float32)
                if count:
                    logits = [self.model.match_logits(ids.repeat(count, 1), mask.repeat(count, 1), image_kv)
                              .unflatten(0, (count, -1)) for ids, mask in tokens]
                    part[torch.tensor(read)] = torch.cat(logits, 1).float().softmax(-1)[..., 1].cpu()
                parts.append(part)
        return torch.cat(parts)

    # ------------------------------------------------------------ search

    def index(self, images: str | os.PathLike | list | None, folder: str | os.PathLike, *,
              batch_size: int | None = None) -> ImageIndex:
        """Bring an index on disk up to date with the images of a folder (and the folders in it), or of a list of paths.

        New and changed images (by size and time) are embedded, those whose file is gone are taken out; a run that was
        cut off goes on. Paths are absolute and without links, however the folder is spelled. Files that cannot be read
        are named in a warning and left out.

        Args:
            images: None opens an existing index as it is.
            folder: of the index; it is created if need be.

        >>> index = dlip.index('prod/examples', 'output/index')
        >>> len(index)
        12
        """
        self._require('retrieval')
        if images is None and not ImageIndex.exists(folder):
            raise FileNotFoundError(f'no index in the folder {shorten(Path(folder))}: make it from images first')
        found = ImageIndex(folder, self.get_image_feat(Image.linear_gradient('L'))[0], self.weight)
        if images is not None:
            batch_size = self._batch_size(batch_size)
            found.update(images, lambda paths: self.get_image_feat(paths, batch_size=batch_size, on_error='skip'),
                         batch_size)
        return found

    def search(self, query, index: ImageIndex, k: int = 5, *, rerank: int = 0, min_score: float | None = None,
               approximate: bool = False) -> list[tuple[str, float]]:
        """The images of an index that fit a query best: [(path, score)], best first. Those whose files are gone since
        the index was made are left out.

        Args:
            query: a text (str), or an image of any other kind that `get_image_feat` takes (a path as pathlib.Path).
            rerank: this many of the nearest are compared again by `match` (texts only), which is slower and better; the
                score then is its probability, otherwise the cosine. Those that cannot be read are left out.
            min_score: leave out what scores less; the list may then be empty.
            approximate: ask faiss (`ImageIndex.search`) instead of comparing with every image.

        >>> dlip.search('a blue star inside a green square', index, k=1, rerank=5)[0][0][-20:]
        'prod/examples/05.jpg'
        >>> dlip.search('a photo of my grandmother', index, rerank=5, min_score=0.5)
        []
        """
        if k < 1 or rerank < 0:
            raise ValueError(f'k must be at least 1 and rerank at least 0, got {k} and {rerank}')
        if min_score is not None and math.isnan(min_score):
            raise ValueError('min_score must be a number, got nan')
        feature = self.get_text_feat(query) if isinstance(query, str) else self.get_image_feat(query)
        wanted = count = max(k, rerank)
        hits = index.search(feature[0], count, approximate=approximate)
        while len(there := [hit for hit in hits if os.path.isfile(hit[0])]) < wanted and count < len(index):
            count *= 2
            hits = index.search(feature[0], count, approximate=approximate)
        hits = there[:wanted]
        if rerank and isinstance(query, str) and hits:
            scores = self.match([path for path, _ in hits], query, on_error='skip')[:, 0].tolist()
            hits = sorted(((path, score) for (path, _), score in zip(hits, scores, strict=True) if score == score),
                          key=lambda hit: -hit[1])
        return [hit for hit in hits[:k] if min_score is None or hit[1] >= min_score]
