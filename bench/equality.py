"""Our BLIP against transformers' BLIP with the same weights, at the real size: every output, and the token ids.

    python -m bench.equality

Random weights of BLIP-Base (nothing to download; spread out enough that captions end and differ) go through an exported
folder, which both sides load. Float32, CPU. Prints a Markdown table: the largest difference relative to the largest
value, and whether greedy and beam-3 ids are the same on 8 images.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from configs.rules import whole
from data.captions import PROMPT
from models.blip import BLIP, BLIPConfig
from models.generation import generate_ids
from models.tokenizer import DEC, ENC, Tokenizer
from models.weights.checkpoint import architecture, load_model
from models.weights.transformers_format import write_folder
from utils import ROOT

TEXTS = ['a picture of a dog', 'two red balls left of a large green box on a table', 'snow']


def random_net(config: BLIPConfig, sep_bias: float = 3.0) -> BLIP:
    """A net whose outputs depend visibly on its inputs: random weights, larger than those a training starts from."""
    torch.manual_seed(0)
    model = BLIP(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('bias'):
                parameter.normal_(std=0.1)
            elif 'norm' in name.lower():
                parameter.normal_(1, 0.1)
            elif 'crossattention' in name:
                parameter.mul_(8)  # captions of different pictures differ
        if model.text_decoder is not None:
            model.text_decoder.bert.embeddings.word_embeddings.weight.mul_((768 / config.text_width) ** 0.5)
            model.text_decoder.cls.predictions.bias[102] += sep_bias  # and end at different lengths
    return model


def random_pictures(count: int, image_size: int) -> torch.Tensor:
    """Coarse patterns: pixel noise would look alike to a net."""
    coarse = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (image_size, image_size), mode='bicubic')


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
def compare_retrieval(config: BLIPConfig, folder: Path, tokenizer: Tokenizer, images: torch.Tensor) -> dict[str, float]:
    """Image tokens, embeddings and matching logits of a folder in both libraries."""
    from transformers import BlipForImageTextRetrieval
    write_folder(folder, random_net(config), tokenizer, {})
    ours, _, _ = load_model(folder)
    theirs, loading = BlipForImageTextRetrieval.from_pretrained(folder, output_loading_info=True)
    check_keys(loading)
    tokens = ours.encode_image(images)
    ids, mask = tokenizer(TEXTS, 35)
    matched, matched_mask = tokenizer(TEXTS, 35, ENC)
    cosine = theirs(input_ids=ids, pixel_values=images[:3], attention_mask=mask, use_itm_head=False)
    matching = theirs(input_ids=matched, pixel_values=images[:3], attention_mask=matched_mask)
    text = F.normalize(theirs.text_proj(theirs.text_encoder(ids, mask, return_dict=True)[0][:, 0]), dim=-1)
    return {'image tokens': difference(tokens, theirs.vision_model(images)[0]),
            'text features': difference(ours.text_feat(ids, mask), text),
            'cosines': difference(ours.image_feat(tokens[:3]) @ ours.text_feat(ids, mask).T, cosine[0]),
            'ITM logits': difference(ours.match_logits(matched, matched_mask, ours.project_image(tokens[:3])),
                                     matching[0])}


@torch.inference_mode()
def compare_caption(config: BLIPConfig, folder: Path, tokenizer: Tokenizer, images: torch.Tensor,
                    sep_bias: float = 3.0) -> dict:
    """Language-model logits, and greedy and beam-3 ids of a folder in both libraries."""
    from transformers import BlipForConditionalGeneration
    write_folder(folder, random_net(config, sep_bias), tokenizer, {})
    ours, _, _ = load_model(folder)
    theirs, loading = BlipForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    check_keys(loading)
    tokens = ours.encode_image(images)
    ids, _ = tokenizer(TEXTS[1:2] * len(images), 35, DEC)
    hidden = ours.text_decoder.bert(ids, causal=True, image_kv=ours.project_image(tokens)).hidden
    logits = theirs.text_decoder(input_ids=ids, encoder_hidden_states=tokens, is_decoder=True).logits
    row = {'LM logits': difference(ours.text_decoder.logits(hidden), logits)}
    prompt = tokenizer([PROMPT], 35, DEC)[0][0]
    for name, beams in (('greedy', 1), ('beam 3', 3)):
        settings = {'num_beams': beams, 'max_length': 24, 'min_length': 6}
        rule = {'length_rule': 'transformers'}
        mine = generate_ids(ours, tokens, prompt[:-1], tokenizer.sep_id, tokenizer.pad_id, **settings, **rule)
        other = theirs.generate(images, prompt.repeat(len(images), 1), do_sample=False, **settings)
        row[f'{name} ids equal'] = sum(a == b for a, b in zip(*(ended(ids, tokenizer) for ids in (mine, other)),
                                                         strict=True))
        row[f'{name} captions'] = len(set(ended(mine, tokenizer)))
        row[f'{name} lengths'] = len({len(ids) for ids in ended(mine, tokenizer)})
    return row


def ended(captions: torch.Tensor, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Ids [N, T] -> each up to its first [SEP]; transformers fills up with more of them."""
    return [tuple(ids[:(ids + [tokenizer.sep_id]).index(tokenizer.sep_id) + 1]) for ids in captions.tolist()]


def check_keys(loading: dict) -> None:
    for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        if loading[kind]:
            raise AssertionError(f'transformers reports {kind}: {sorted(loading[kind])[:5]}')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', default='base',
                        help='a block of configs/sizes.yaml, or FILE:BLOCK (default: %(default)s)')
    parser.add_argument('--image_size', type=whole(1), nargs='+', default=[224, 384], help='default: 224 384')
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(ROOT / 'tests' / 'vocab.txt')
    print(f'{args.size}, 8 images\n\n| px | what | ours and theirs |\n|---:|---|---:|')
    for image_size in args.image_size:
        images = random_pictures(8, image_size)
        row = {}
        for task, compare in (('retrieval', compare_retrieval), ('caption', compare_caption)):
            with tempfile.TemporaryDirectory() as folder:
                row |= compare(architecture(args.size, image_size, len(tokenizer), task), Path(folder), tokenizer,
                               images)
        for name, value in row.items():
            print(f'| {image_size} | {name} | {value if isinstance(value, int) else f"{value:.1e}"} |')


if __name__ == '__main__':
    main()
