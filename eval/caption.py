"""Captions of a Flickr30K split and their scores.

    python -m eval.caption --config configs/caption_flickr.yaml --checkpoint output/caption_flickr/best.pth
    python -m torch.distributed.run --nproc_per_node=4 -m eval.caption --checkpoint ...

Prints scores and cost, and writes OUTPUT_DIR/caption_SPLIT.json (for every image its captions, best first, and the
scores of the best) and caption_SPLIT.html. `--teacher` sets another checkpoint beside it; `--export` adds
caption_SPLIT_results.json, which the servers of COCO and NoCaps take. On the embedded scenes there is one more score,
`exact`: the share of captions that are right in every word. Any setting of the config can be overridden, e.g.
`eval.num_beams=1`.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import json
import re
from contextlib import suppress
from pathlib import Path

import torch

from configs import load_config
from data.captions import PROMPT
from data.datasets import ImageTextEval
from data.distributed import gather_objects, is_main
from data.images import open_image
from data.scene_captions import slots_match
from data.scenes import Scene
from data.transforms import EvalTransform
from eval.common import compared, evaluation_parser, hardware, image_batches, shard, write_json
from eval.metrics import caption_metrics
from eval.page import caption_card, grid, section, table, write_page
from eval.speed import NEW_TOKENS, costs
from eval.table import beside, markdown, side_by_side
from models.blip import BLIP
from models.engine.launch import setup_process
from models.generation import generate
from models.tokenizer import Tokenizer
from models.weights.checkpoint import load_model
from utils import clean_exit, logger, make_output_dir

CONFIG = 'configs/caption_flickr.yaml'


def n_best(model: BLIP, tokenizer: Tokenizer, dataset, *, device: torch.device | str = 'cpu', prompt: str = PROMPT,
           num_beams: int = 3, max_length: int = 30, min_length: int = 10, batch_size: int = 64,
           workers: int = 0) -> list[list[str]]:
    """The `num_beams` captions that beam search ends with, best first, of each image of an `ImageTextEval`, without
    the prompt (lengths in tokens, prompt included); one beam is greedy.

    Launched on several processes, each captions its share and all get the result.
    """
    captions = []
    for images in image_batches(dataset, shard(len(dataset)), batch_size, workers, 'captions'):
        said = generate(model, tokenizer, images.to(device), prompt, num_beams=num_beams, max_length=max_length,
                        min_length=min_length, num_captions=num_beams)
        captions += [said[i:i + num_beams] for i in range(0, len(said), num_beams)]
    return [each for part in gather_objects(captions) for each in part]


@torch.inference_mode()
def caption_images(model: BLIP, tokenizer: Tokenizer, paths: list, prompt: str = '') -> list[tuple]:
    """Caption a few image files (paths or open) greedily, to be looked at; those that cannot be read are left out."""
    transform, images = EvalTransform(model.config.image_size), []
    for path in paths:
        with suppress(ValueError, FileNotFoundError):
            images.append((path, transform(open_image(path))))
    if not images:
        return []
    said = generate(model, tokenizer, torch.stack([pixels for _, pixels in images]).to(model.device), prompt,
                    num_beams=1, min_length=1)
    return [(path, caption) for (path, _), caption in zip(images, said, strict=True)]


def scenes_of(dataset) -> dict[str, Scene] | None:
    """File name -> scene, where the images are rendered scenes: by the `scenes.json` beside the annotation, if it is
    ours and no file of the user's."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        states = json.loads((Path(dataset.root) / 'scenes.json').read_text(encoding='utf-8'))
        return {path.name: Scene.from_dict(states[path.name]) for path in map(Path, dataset.paths)}
    return None


def evaluate_captions(model: BLIP, tokenizer: Tokenizer, dataset, *, meteor: bool = False, spice: bool = False,
                      **settings) -> tuple[dict, list[dict]]:
    """Caption every image and score the captions.

    Args:
        meteor, spice: these scores too, where Java is found (see `caption_metrics`).
        settings: those of `n_best`.

    Returns:
        (`caption_metrics` and, for rendered scenes, 'exact' (per cent of captions right in every word);
        a record per image: image, caption, n_best (the captions, best first), references, scores (of the best),
        and for scenes `right`).
    """
    captions = n_best(model, tokenizer, dataset, **settings)
    outcome = score_captions(dataset, captions, meteor, spice) if is_main() else None
    return gather_objects(outcome)[0]


def score_captions(dataset, captions: list[list[str]], meteor: bool = False, spice: bool = False
                   ) -> tuple[dict, list[dict]]:
    """Metrics and records of the captions (best first) of a dataset's images, in its order."""
    references, best = dict(enumerate(dataset.references)), {i: each[0] for i, each in enumerate(captions)}
    metrics, scores = caption_metrics(best, references, meteor=meteor, spice=spice)
    records = [{'image': str(path), 'caption': best[i], 'n_best': captions[i], 'references': references[i],
                'scores': scores[i]} for i, path in enumerate(dataset.paths)]
    scenes = scenes_of(dataset)
    if scenes is not None:
        for record in records:
            record['right'] = slots_match(record['caption'], scenes[Path(record['image']).name])
        metrics['exact'] = 100 * sum(record['right'] for record in records) / len(records)
    return metrics, records


def server_results(records: list[dict]) -> list[dict]:
    """[{'image_id': int, 'caption': str}, ...] as the servers of COCO and NoCaps take it.

    The id is the number that a file is named by ('COCO_val2014_000000391895.jpg', '391895.jpg'); where one of the
    files is named otherwise, or two alike, it is the image's place in the split, from 0, as NoCaps counts.
    """
    names = [re.fullmatch(r'(?:COCO_\w+_)?(\d+)', Path(record['image']).stem) for record in records]
    ids = [int(name[1]) for name in names if name]
    if len(set(ids)) < len(records):
        ids = range(len(records))
    return [{'image_id': number, 'caption': record['caption']} for number, record in zip(ids, records, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = evaluation_parser(__doc__, CONFIG)
    parser.add_argument('--spice', action='store_true', help='SPICE too (Java, 8 GB of memory, a download)')
    parser.add_argument('--export', action='store_true', help='also write the captions as COCO and NoCaps want them')
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, CONFIG, args.overrides)
    device, output_dir = setup_process(args.device), make_output_dir(args.output_dir)
    data, nets, figures, said = config['data'], {}, {}, {}
    loaded = {name: load_model(checkpoint, device, 'caption', args.tokenizer)[:2]
              for name, checkpoint in compared(args).items()}  # all at once: a bad one ends it before hours of work
    for name, (model, tokenizer) in loaded.items():
        dataset = ImageTextEval.from_config(data, args.split, model.config.image_size)
        figures[name], said[name] = evaluate_captions(
            model, tokenizer, dataset, device=device, meteor=True, spice=args.spice, prompt=data['prompt'],
            workers=data['num_workers'], **config['eval'])
        nets[name] = {'caption': (model, tokenizer)}
    if not is_main():
        return
    num_beams, records = config['eval']['num_beams'], said[name]
    for net, cost in costs(nets, device, num_beams, data['prompt']).items():
        figures[net] |= cost
    setting = (f'{args.split} split: {len(records)} images, {num_beams} beams, words split by the '
               f'{figures[name]["tokenizer"]} tokenizer; ms for one image and {NEW_TOKENS} tokens on '
               f'{hardware(device)}')
    path, rows = output_dir / f'caption_{args.split}', side_by_side(figures)
    write_json(path.with_suffix('.json'), {
        'checkpoint': args.checkpoint, 'split': args.split, 'images': len(records), **config['eval'],
        **beside(figures, args.teacher), 'captions': records})
    if args.export:
        write_json(output_dir / f'{path.name}_results.json', server_results(records))
    cards = [caption_card(record['image'], [(net if args.teacher else '', said[net][i]['caption'],
                                             said[net][i].get('right')) for net in said], record['references'])
             for i, record in enumerate(records[:60])]
    write_page(path.with_suffix('.html'), f'Captions, {args.split} split',
               [section('Scores and cost', table(rows), setting), section('Captions', grid(cards))], args.checkpoint)
    logger.info('%s\n%s\n\n%s', args.checkpoint, setting, markdown(rows))
    logger.info('wrote %s.json and .html%s', path, ' and _results.json' if args.export else '')


if __name__ == '__main__':
    with clean_exit():
        main()
