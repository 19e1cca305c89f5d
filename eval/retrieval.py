"""Image-text retrieval by BLIP's procedure: cosine of the features, the best `k_test` re-ranked by matching.

    python -m eval.retrieval --config configs/retrieval_flickr.yaml --checkpoint output/retrieval_flickr/best.pth
    python -m torch.distributed.run --nproc_per_node=4 -m eval.retrieval --checkpoint ...

Prints recalls and cost, and writes OUTPUT_DIR/retrieval_SPLIT.json and retrieval_SPLIT.html (queries with their top
five). `--teacher` sets another checkpoint beside it. `eval.k_test=0` ranks by the features alone; any other setting of
the config can be overridden too.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import time
from pathlib import Path

import torch

from configs import load_config
from data.datasets import ImageTextEval
from data.distributed import gather_objects, is_main, progress
from eval.common import compared, evaluation_parser, hardware, image_batches, shard, spread, write_json
from eval.metrics import retrieval_metrics
from eval.page import image_hits, section, table, text_hits, write_page
from eval.speed import costs
from eval.table import beside, markdown, side_by_side
from models.blip import BLIP
from models.engine.launch import setup_process
from models.tokenizer import Tokenizer
from models.weights.checkpoint import load_model
from utils import clean_exit, logger, make_output_dir

CONFIG = 'configs/retrieval_flickr.yaml'
NOT_RANKED = -100.0  # score of what is not among the k_test best, as in BLIP: below every re-ranked score


class ImageTokens:
    """The image tokens of this process's images, encoded once and kept on the CPU up to a memory limit.

    Images beyond the limit are encoded again when they are asked for.
    """

    def __init__(self, model: BLIP, dataset, indices: range, device: torch.device, batch_size: int, workers: int,
                 memory_mb: float):
        self.model, self.dataset, self.indices, self.device = model, dataset, indices, device
        self.kept: list[torch.Tensor] = []
        feats, free = [torch.empty(0, model.config.embed_dim)], memory_mb * 2 ** 20
        for images in image_batches(dataset, indices, batch_size, workers, 'images'):
            tokens = model.encode_image(images.to(device))
            feats.append(model.image_feat(tokens).cpu())
            for row in tokens.cpu():
                free -= row.nbytes
                if free >= 0:
                    self.kept.append(row.clone())  # a copy: a view would keep the whole batch
        self.feats = torch.cat(feats)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Tokens [1, N, width] of this process's i-th image, on the device."""
        if i < len(self.kept):
            return self.kept[i][None].to(self.device)
        return self.model.encode_image(self.dataset[self.indices[i]][None].to(self.device))


class Texts:
    """All captions as token ids, from which batches of near-equal length are cut."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str], max_tokens: int, device: torch.device):
        self.ids, self.mask = (x.to(device) for x in tokenizer(texts, max_tokens))
        self.lengths = self.mask.sum(1).cpu()
        self.enc_id = tokenizer.enc_id

    def batches(self, which: torch.Tensor, batch_size: int):
        """Cut the texts `which` [R] by length into batches -> (places in `which`, ids, mask), little padded."""
        for places in self.lengths[which].argsort(stable=True).split(batch_size):
            rows, width = which[places], int(self.lengths[which[places[-1]]])
            rows = rows.to(self.ids.device)
            yield places, self.ids[rows, :width], self.mask[rows, :width]


def text_feats(model: BLIP, texts: Texts, indices: range, batch_size: int) -> torch.Tensor:
    """Unit-norm embeddings [len(indices), embed_dim] on the CPU."""
    feats = torch.empty(len(indices), model.config.embed_dim)
    for places, ids, mask in texts.batches(torch.arange(indices.start, indices.stop), batch_size):
        feats[places] = model.text_feat(ids, mask).cpu()
    return feats


def nearest(similarity: torch.Tensor, k: int) -> torch.Tensor:
    """[Q, N] -> bool [Q, N]: the k highest of each row, of equals those of lower index."""
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    for rows, out in zip(similarity.split(1024), chosen.split(1024), strict=True):  # an order takes 8 bytes an item
        out.scatter_(1, rows.argsort(dim=1, descending=True, stable=True)[:, :k], True)
    return chosen


def matching_logits(model: BLIP, tokens: ImageTokens, texts: Texts, wanted: torch.Tensor,
                    batch_size: int) -> torch.Tensor:
    """ITM match logits of the pairs wanted [images, texts] bool -> [pairs] in row-major order, on the CPU.

    An image's keys and values are projected once for all its texts, and shared by the rows of a batch.
    """
    out = [torch.empty(0)]
    for i, row in enumerate(progress(wanted, desc='matching')):
        which = row.nonzero()[:, 0]
        logits = torch.empty(len(which))
        image_kv = model.project_image(tokens[i])
        for places, ids, mask in texts.batches(which, batch_size):
            ids[:, 0] = texts.enc_id
            logits[places] = model.match_logits(ids, mask, image_kv)[:, 1].float().cpu()
        out.append(logits)
    return torch.cat(out)


@torch.inference_mode()
def retrieval_scores(model: BLIP, tokenizer: Tokenizer, dataset, *, device: torch.device | str = 'cpu',
                     k_test: int = 128, batch_size: int = 64, max_tokens: int = 35, workers: int = 0,
                     memory_mb: float = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of every caption for every image, and of every image for every caption.

    With k_test > 0 the k_test best of each query by cosine score (match logit + cosine), all others -100, as in BLIP;
    a k_test below 10 therefore says little about R@10. Of equal cosines at the border those of lower index are
    re-ranked. Pairs that are candidates in both directions are matched once. Launched on several processes, each works
    on its share of the images and all get the result.

    Args:
        dataset: an `ImageTextEval`.
        k_test: candidates per query that the matching head re-ranks; 0: scores are the cosines.
        batch_size: images, and pairs, per forward pass.
        max_tokens: a caption is cut to this many tokens.
        workers: processes that load images.
        memory_mb: MiB of image tokens kept per process; the images beyond it are encoded twice.

    Returns:
        (image to text [images, texts], text to image [texts, images]), float32 on the CPU.
    """
    device, count = torch.device(device), len(dataset)
    texts = Texts(tokenizer, dataset.texts, min(max_tokens, model.config.max_positions), device)
    tokens = ImageTokens(model, dataset, shard(count), device, batch_size, workers, memory_mb if k_test else 0)
    image = torch.cat(gather_objects(tokens.feats))
    text = torch.cat(gather_objects(text_feats(model, texts, shard(len(dataset.texts)), 4 * batch_size)))
    cosine = image @ text.T
    if not k_test:
        return cosine, cosine.T
    of_image, of_text = nearest(cosine, k_test), nearest(cosine.T, k_test).T
    either = of_image | of_text
    mine = shard(count)
    logits = matching_logits(model, tokens, texts, either[mine.start:mine.stop], batch_size)
    score = cosine.masked_scatter(either, torch.cat(gather_objects(logits)) + cosine[either])
    return score.masked_fill(~of_image, NOT_RANKED), score.masked_fill(~of_text, NOT_RANKED).T


def evaluate_retrieval(model: BLIP, tokenizer: Tokenizer, dataset, **settings) -> dict[str, float]:
    """`retrieval_metrics` of `retrieval_scores`: txt_r1 ... img_r10, their means and r_mean, in per cent."""
    scores = retrieval_scores(model, tokenizer, dataset, **settings)
    return retrieval_metrics(*scores, dataset.image_to_texts, dataset.text_to_image)


def top_images(dataset, scores_t2i: torch.Tensor, text: int, count: int = 5) -> list[tuple[Path, float, bool]]:
    """The best images for a caption: (file, score, whether it is the caption's own)."""
    score, best = scores_t2i[text].topk(min(count, scores_t2i.shape[1]))
    return [(dataset.paths[i], float(s), i == dataset.text_to_image[text])
            for s, i in zip(score, best.tolist(), strict=True)]


def top_texts(dataset, scores_i2t: torch.Tensor, image: int, count: int = 5) -> list[tuple[str, float, bool]]:
    """The best captions for an image: (text, score, whether it is one of the image's own)."""
    score, best = scores_i2t[image].topk(min(count, scores_i2t.shape[1]))
    return [(dataset.texts[i], float(s), i in dataset.image_to_texts[image])
            for s, i in zip(score, best.tolist(), strict=True)]


def main(argv: list[str] | None = None) -> None:
    args = evaluation_parser(__doc__, CONFIG).parse_intermixed_args(argv)
    config = load_config(args.config, CONFIG, args.overrides)
    device, output_dir = setup_process(args.device), make_output_dir(args.output_dir)
    data, nets, figures = config['data'], {}, {}
    loaded = {name: load_model(checkpoint, device, 'retrieval', args.tokenizer)[:2]
              for name, checkpoint in compared(args).items()}  # all at once: a bad one ends it before hours of work
    for name, (model, tokenizer) in loaded.items():
        dataset = ImageTextEval.from_config(data, args.split, model.config.image_size)
        started = time.perf_counter()
        i2t, t2i = retrieval_scores(model, tokenizer, dataset, device=device, max_tokens=data['max_tokens'],
                                    workers=data['num_workers'], **config['eval'])
        figures[name] = {'seconds': round(time.perf_counter() - started, 2),
                         **retrieval_metrics(i2t, t2i, dataset.image_to_texts, dataset.text_to_image)}
        nets[name] = {'image': (model, tokenizer)}
    if not is_main():
        return
    for name, cost in costs(nets, device).items():
        figures[name] |= cost
    setting = (f'{args.split} split: {len(dataset)} images, {len(dataset.texts)} captions, the '
               f'{config["eval"]["k_test"]} best re-ranked by matching; ms for one image on {hardware(device)}')
    name, rows = f'retrieval_{args.split}', side_by_side(figures)
    write_json(output_dir / f'{name}.json', {
        'checkpoint': args.checkpoint, 'split': args.split, 'images': len(dataset), 'captions': len(dataset.texts),
        **config['eval'], **beside(figures, args.teacher)})
    shown = spread(len(dataset), 12)
    by_text = [image_hits(dataset.texts[text], top_images(dataset, t2i, text))
               for text in (dataset.image_to_texts[i][0] for i in shown)]
    by_image = [text_hits(dataset.paths[i], top_texts(dataset, i2t, i)) for i in shown]
    write_page(output_dir / f'{name}.html', f'Retrieval, {args.split} split',
               [section('Recall in % and cost', table(rows), setting), section('Images for a text', ''.join(by_text)),
                section('Texts for an image', ''.join(by_image))], args.checkpoint)
    logger.info('%s\n%s, in %.1f s\n\n%s', args.checkpoint, setting, list(figures.values())[-1]['seconds'],
                markdown(rows))
    logger.info('wrote %s.json and .html', output_dir / name)


if __name__ == '__main__':
    with clean_exit():
        main()
