"""Re-ranking by matching beside the loop over queries of the original BLIP, as a ratio.

    python -m bench.retrieval

The small student at 384 px with random weights, float32, k_test 128, a slice of 200 images x 1,000 texts; image tokens
are random, and the texts random words of a length like Flickr30K's captions. The original's side is the evaluation of
BLIP's train_retrieval.py with the same net and weights: for each image, then for each text, one pass over its 128
candidates, the image's tokens repeated for every one and projected again, texts padded to 35 tokens. Both sides take
turns, a round being an image's query of the original, all candidate pairs of that image, of both directions, by
eval/retrieval.py, and a text's query of the original. The whole is projected from that, images + texts queries on one
side and the pairs, many of which are candidates in both directions, on the other; the ratio is the rounds' median.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from bench.inference import with_plain_linear_layers
from configs.rules import whole
from data.distributed import progress
from eval.retrieval import Texts, matching_logits, nearest, text_feats
from models.blip import BLIP
from models.tokenizer import ENC, Tokenizer
from models.weights.checkpoint import architecture
from utils import ROOT, clean_exit

IMAGE_SIZE, MAX_TOKENS, K_TEST, BATCH = 384, 35, 128, 64
WORDS = 12.4, 5.0  # words of a text: mean and standard deviation


def random_texts(tokenizer: Tokenizer, count: int) -> list[str]:
    rng = random.Random(0)
    words = [word for word in tokenizer.vocab if word.isalpha() and word.islower()]
    return [' '.join(rng.choices(words, k=max(4, round(rng.gauss(*WORDS))))) for _ in range(count)]


def original_query(model: BLIP, tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Match logits [k_test] of pairs: tokens [k_test, N, width] of images, ids and mask [k_test, 35] of texts."""
    tower = model.text_encoder
    hidden, attend = tower.embeddings(ids, 0), mask[:, None, None, :].bool()
    for layer in tower.layers:
        hidden, _, _ = layer(hidden, attend, layer.crossattention.keys_values(tokens), want_maps=False, extend=None,
                             first_only=False, texts=None)
    return model.itm_head(hidden[:, 0])[:, 1]


def pairs_of(cosine: torch.Tensor, k_test: int) -> torch.Tensor:
    """[images, texts] bool: candidates of either direction."""
    return nearest(cosine, k_test) | nearest(cosine.T, k_test).T


def timed(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=whole(1), default=200, help='default: %(default)s, with 5 texts each')
    parser.add_argument('--rounds', type=whole(1), default=7, help='default: %(default)s')
    parser.add_argument('--threads', type=whole(1), default=2, help='default: %(default)s')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(ROOT / 'tests' / 'vocab.txt')
    config = architecture('small', IMAGE_SIZE, len(tokenizer), 'retrieval')
    model = BLIP(config).eval()
    plain = with_plain_linear_layers(model)
    tokens = torch.randn(args.images, 1 + (IMAGE_SIZE // config.patch_size) ** 2, config.vision_width)
    captions = random_texts(tokenizer, 5 * args.images)
    texts = Texts(tokenizer, captions, MAX_TOKENS, torch.device('cpu'))
    # images score far too alike with random weights: a little noise stands for what training would tell apart
    cosine = model.image_feat(tokens) @ text_feats(model, texts, range(len(captions)), BATCH).T
    cosine += 0.1 * torch.randn_like(cosine)
    wanted = pairs_of(cosine, K_TEST)

    ids, mask = tokenizer([*captions, 'a ' * MAX_TOKENS], MAX_TOKENS, ENC)  # the last one pads all to 35
    rounds, errors = [], []
    for turn in progress(range(-1, args.rounds), desc='rounds'):
        image, text = turn % args.images, 5 * turn % len(captions)
        of_image, of_text = cosine[image].topk(K_TEST).indices, cosine[:, text].topk(K_TEST).indices
        by_image, for_image = timed(lambda of=of_image, image=image: original_query(
            plain, tokens[image].repeat(K_TEST, 1, 1), ids[of], mask[of]))
        ours, here = timed(lambda image=image: matching_logits(
            model, tokens[image:image + 1, None], texts, wanted[image:image + 1], BATCH))
        _, for_text = timed(lambda of=of_text, text=text: original_query(
            plain, tokens[of], ids[text].repeat(K_TEST, 1), mask[text].repeat(K_TEST, 1)))
        own = torch.zeros(len(captions)).masked_scatter(wanted[image], ours)
        errors.append(float((own[of_image] - by_image).abs().max()))
        if turn >= 0:  # the first round warms up
            rounds.append((for_image, for_text, here / len(ours)))

    for_image, for_text, per_pair = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f'small student, {IMAGE_SIZE} px, k_test {K_TEST}, float32, {args.threads} threads, medians of {args.rounds} '
          f'rounds; {float(texts.lengths.float().mean()):.1f} tokens a text on average\n')
    print(f'| {K_TEST} pairs | seconds |\n|---|---:|\n| original, for an image | {for_image:.2f} |\n'
          f'| original, for a text | {for_text:.2f} |\n| DLIP | {K_TEST * per_pair:.2f} |\n')
    print('| images x texts | side | pairs | minutes | times the original |\n|---|---|---:|---:|---:|')
    for candidates in (wanted, pairs_of(torch.randn(1000, 5000), K_TEST)):
        (images, count), pairs = candidates.shape, int(candidates.sum())
        original = images * for_image + count * for_text
        ratio = statistics.median((images * a + count * b) / (pairs * c) for a, b, c in rounds)
        print(f'| {images:,} x {count:,} | original | {K_TEST * (images + count):,} | {original / 60:.1f} | 1.0 |')
        print(f'| {images:,} x {count:,} | DLIP | {pairs:,} | {pairs * per_pair / 60:.1f} | {ratio:.1f} |')
    print(f'\nThe scores differ by at most {max(errors):.0e}.')


if __name__ == '__main__':
    with clean_exit():
        main()
