"""Captions of a Flickr30K split and their scores.

    python -m eval.caption --config configs/caption_flickr.yaml --checkpoint output/caption_flickr/best.pth
    python -m torch.distributed.run --nproc_per_node=4 -m eval.caption --checkpoint ...

Prints the scores and writes OUTPUT_DIR/caption_SPLIT.json (every caption with its own scores) and
caption_SPLIT.html. On the embedded scenes there is one more score, `exact`: the share of captions that are right
in every word. Any setting of the config can be overridden, e.g. `eval.num_beams=1`.
"""

import json
from contextlib import suppress
from pathlib import Path

import torch

from data.datasets import ImageTextEval
from data.scene_captions import slots_match
from data.scenes import Scene
from data.transforms import eval_transform, open_image
from eval.common import evaluation_arguments, image_batches, shard, write_json
from eval.metrics import caption_metrics
from eval.page import caption_card, grid, section, table, write_page
from models.blip import BLIP
from models.build import count_parameters
from models.checkpoint import load_model
from models.generation import PROMPT, generate
from models.tokenizer import Tokenizer
from utils import clean_exit, gather_objects, is_main, logger, make_output_dir, setup_process


def caption_dataset(model: BLIP, tokenizer: Tokenizer, dataset, *, device: torch.device | str = 'cpu',
                    prompt: str = PROMPT, num_beams: int = 3, max_length: int = 30, min_length: int = 10,
                    batch_size: int = 64, workers: int = 0) -> list[str]:
    """One caption per picture of an `ImageTextEval`, without the prompt (lengths in tokens, prompt included).

    Launched on several processes, each captions its share and all get the result.
    """
    captions = []
    for images in image_batches(dataset, shard(len(dataset)), batch_size, workers, 'captions'):
        captions += generate(model, tokenizer, images.to(device), prompt, num_beams=num_beams, max_length=max_length,
                             min_length=min_length)
    return [caption for part in gather_objects(captions) for caption in part]


@torch.inference_mode()
def caption_pictures(model: BLIP, tokenizer: Tokenizer, paths: list, prompt: str = '') -> list[tuple]:
    """Caption a few picture files (paths or open) greedily, to be looked at; those that cannot be read are left out."""
    transform, pictures = eval_transform(model.config.image_size), []
    for path in paths:
        with suppress(ValueError, FileNotFoundError):
            pictures.append((path, transform(open_image(path))))
    if not pictures:
        return []
    said = generate(model, tokenizer, torch.stack([pixels for _, pixels in pictures]).to(model.device), prompt,
                    num_beams=1, min_length=1)
    return [(path, caption) for (path, _), caption in zip(pictures, said, strict=True)]


def scenes_of(dataset) -> dict[str, Scene] | None:
    """File name -> scene, where the pictures are rendered scenes (`scenes.json` beside the annotation)."""
    path = Path(dataset.root) / 'scenes.json'
    if not path.is_file():
        return None
    return {name: Scene.from_dict(state) for name, state in json.loads(path.read_text(encoding='utf-8')).items()}


def evaluate_captions(model: BLIP, tokenizer: Tokenizer, dataset, *, meteor: bool = False, **settings
                      ) -> tuple[dict, list[dict]]:
    """Caption every picture and score the captions.

    Args:
        meteor: METEOR too, where Java is found (slow).
        settings: those of `caption_dataset`.

    Returns:
        (`caption_metrics` and, for rendered scenes, 'exact' (per cent of captions right in every word);
        a record per picture: image, caption, references, scores, and for scenes `right`).
    """
    captions = caption_dataset(model, tokenizer, dataset, **settings)
    outcome = score_captions(dataset, captions, meteor) if is_main() else None
    return gather_objects(outcome)[0]


def score_captions(dataset, captions: list[str], meteor: bool = False) -> tuple[dict, list[dict]]:
    """Metrics and records of the captions of a dataset's pictures, in its order."""
    references = dict(enumerate(dataset.references))
    metrics, scores = caption_metrics(dict(enumerate(captions)), references, meteor=meteor)
    records = [{'image': str(path), 'caption': caption, 'references': references[i], 'scores': scores[i]}
               for i, (path, caption) in enumerate(zip(dataset.paths, captions, strict=True))]
    scenes = scenes_of(dataset)
    if scenes is not None:
        for record in records:
            record['right'] = slots_match(record['caption'], scenes[Path(record['image']).name])
        metrics['exact'] = 100 * sum(record['right'] for record in records) / len(records)
    return metrics, records


def main(argv: list[str] | None = None) -> None:
    args, config = evaluation_arguments(__doc__, 'configs/caption_flickr.yaml', argv)
    device, output_dir = setup_process(args.device), make_output_dir(args.output_dir)
    model, tokenizer, _ = load_model(args.checkpoint, device, 'caption', args.tokenizer)
    data = config['data']
    dataset = ImageTextEval(data['root'], args.split, eval_transform(model.config.image_size), data['max_words'])
    metrics, records = evaluate_captions(model, tokenizer, dataset, device=device, meteor=True, prompt=data['prompt'],
                                         workers=data['workers'], **config['eval'])
    if not is_main():
        return
    name = f'caption_{args.split}'
    summary = {'checkpoint': args.checkpoint, 'split': args.split, 'pictures': len(records),
               'parameters': count_parameters(model), **config['eval'], **metrics}
    write_json(output_dir / f'{name}.json', {**summary, 'captions': records})
    cards = [caption_card(record['image'], [('', record['caption'], record.get('right'))],
                          record['references']) for record in records[:60]]
    write_page(output_dir / f'{name}.html', f'Captions, {args.split} split',
               [section('Scores', table([metrics])), section('Captions', grid(cards))], args.checkpoint)
    logger.info('%s\n%s', args.checkpoint, '\n'.join(
        f'  {key:<10} {value:.2f}' if isinstance(value, float) else f'  {key:<10} {value}'
        for key, value in metrics.items()))
    logger.info('wrote %s.json and .html', output_dir / name)


if __name__ == '__main__':
    with clean_exit():
        main()
