"""prod/shards.py: its rate beside transformers' BLIP-Base in a map_batches of its own, what it costs, what it finds.

    python -m bench.shards rates            # captions/s and embeddings/s, one worker and two; the cost of large sets
    python -m bench.shards filter           # swapped captions found, by output/demo/pretrain/last.pth
    python -m bench.shards training         # training on what the filter keeps beside training on all (half an hour)

`rates`: random weights of the real sizes at 224 px, images of 256 px, beam-3 captions of 20 new tokens; a core for
each worker. Embedding includes the matching probability of the text, on both sides. The first shards, during which
nets are loaded and compiled, do not count. transformers' BLIP-Base is measured again before each setting of ours.
`filter` and `training`: rendered scenes, a fifth of whose captions are another scene's.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import io
import json
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from bench.ablation import launch, measure
from bench.ablation_plan import terms
from bench.inference import NEW_TOKENS, VOCAB, transformers_base
from configs.rules import SHARE, whole
from data.distributed import progress
from data.scene_captions import captions
from data.scenes import render, sample_split
from data.shards import list_shards
from data.tars import caption_of, count_images, image_suffix, read_samples
from models.blip import BLIP
from models.generation import PROMPT
from models.tokenizer import DEC, Tokenizer
from models.weights.checkpoint import architecture, save_checkpoint
from prod import shards
from utils import ROOT, clean_exit

SIZES = {'1 M': 10 ** 6, '100 M': 10 ** 8, '5 B': 5 * 10 ** 9}  # images
STUDENT = 'output/demo/pretrain/last.pth'


# ---------------------------------------------------------------- shards of rendered scenes

def write_scenes(folder: Path, count: int, each: int, swapped: float = 0.0, seed: int = 0, side: int | None = None,
                 split: str = 'train') -> set[str]:
    """Tars of `each` scenes as img2dataset's -> the keys of those whose caption is another scene's.

    Args:
        swapped: share of the captions that are moved on among themselves.
        side: of the images; None: as rendered.
    """
    rng = random.Random(seed)
    scenes = sample_split(split, count * each, seed, distinct=True)
    texts = [rng.choice(captions(scene)) for scene in scenes]
    moved = sorted(rng.sample(range(len(scenes)), round(swapped * len(scenes))))
    for i, text in zip(moved, [texts[i] for i in moved[1:] + moved[:1]], strict=True):
        texts[i] = text
    folder.mkdir(parents=True, exist_ok=True)
    for number in progress(range(count), desc='shards'):
        with tarfile.open(folder / f'{number:05d}.tar', 'w') as tar:
            for i in range(number * each, (number + 1) * each):
                image, file = render(scenes[i], rng), io.BytesIO()
                (image.resize((side, side)) if side else image).save(file, 'JPEG', quality=92)
                record = {'caption': texts[i], 'url': f'scene://{i}', 'status': 'success'}
                for kind, content in (('jpg', file.getvalue()), ('json', json.dumps(record).encode()),
                                      ('txt', texts[i].encode())):
                    member = tarfile.TarInfo(f'{i:09d}.{kind}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {f'{i:09d}' for i in moved}


# ---------------------------------------------------------------- rates

class Transformers:
    """BLIP-Base as Ray's actor: a shard at a time, in batches; 'caption' or 'retrieval'."""

    def __init__(self, task: str, batch_size: int, image_size: int):
        from transformers import BlipImageProcessor
        torch.set_num_threads(1)
        self.task, self.batch_size = task, batch_size
        self.nets = transformers_base(image_size)
        self.tokenizer = Tokenizer.from_file(VOCAB)
        self.processor = BlipImageProcessor(size={'height': image_size, 'width': image_size})

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[float]]:
        """A shard -> when it was finished."""
        from PIL import Image
        samples = [(Image.open(io.BytesIO(parts[image_suffix(parts)])).convert('RGB'), caption_of(parts, ''))
                   for _, parts in read_samples(str(batch['url'][0]))]
        for start in range(0, len(samples), self.batch_size):
            images, texts = zip(*samples[start:start + self.batch_size], strict=True)
            pixels = self.processor(list(images), return_tensors='pt')['pixel_values']
            captioner, retriever = self.nets
            if self.task == 'caption':
                prompt = self.tokenizer([PROMPT], NEW_TOKENS, DEC)[0]
                captioner.generate(pixels, prompt.repeat(len(pixels), 1), num_beams=3, do_sample=False,
                                   min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
            else:
                ids, mask = self.tokenizer(list(texts), 35)
                tokens = retriever.vision_model(pixels)[0]
                retriever.vision_proj(tokens[:, 0])
                retriever.text_proj(retriever.text_encoder(ids, attention_mask=mask)[0][:, 0])
                matched = retriever.text_encoder(ids, attention_mask=mask, encoder_hidden_states=tokens)[0]
                retriever.itm_head(matched[:, 0]).softmax(-1)
        return {'finished': [time.time()]}


def random_student(path: Path, image_size: int) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(VOCAB)
    length = len(tokenizer([PROMPT], NEW_TOKENS, DEC)[0][0, :-1]) + NEW_TOKENS
    config = {'data': {'prompt': PROMPT}, 'eval': {'num_beams': 3, 'min_length': length, 'max_length': length}}
    save_checkpoint(path, BLIP(architecture('small', image_size, len(tokenizer))), tokenizer, config)


def rate(finished: list[float], each: int, first: int) -> float:
    """Images a second of shards that were finished at these times (Ray hands on several at once), without the `first`
    ones."""
    finished = sorted(finished)
    return (len(finished) - first) * each / (finished[-1] - finished[first - 1])


def our_rate(tars: dict[str, str], each: int, out: Path, workers: int, arguments: list) -> float:
    options = shards.parsed(['-', '--out', str(out), '--workers', str(workers), *map(str, arguments)])
    shards.prepared(options)
    for _ in progress(shards.reports(tars, options, 'cpu'), len(tars), 'shards'):
        pass
    return rate([(out / 'captions' / f'{name}.parquet').stat().st_mtime for name in tars], each, 2 * workers)


def their_rate(tars: dict[str, str], each: int, **arguments) -> float:
    ray = shards.started_ray(1)
    try:
        rows = ray.data.from_items([{'url': url} for url in tars.values()], override_num_blocks=len(tars))
        done = rows.map_batches(Transformers, fn_constructor_kwargs=arguments, batch_size=1, num_cpus=1,
                                compute=ray.data.ActorPoolStrategy(size=1)).iter_rows()
        return rate([row['finished'] for row in progress(done, len(tars), 'shards')], each, 1)
    finally:
        ray.shutdown()


def rates(args: argparse.Namespace) -> None:
    measured = {}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write_scenes(place / 'tars', args.shards, args.each, side=256)
        tars = shards.named([str(path) for path in sorted((place / 'tars').iterdir())])
        random_student(place / 'student.pth', args.image_size)
        print(f'{args.shards} shards of {args.each} images, {args.image_size} px, batches of {args.batch_size}, a core '
              f'a worker\n\n| work | side | images/s | times transformers | two workers |\n|---|---|---:|---:|---:|')
        for task, work in (('caption', 'captions'), ('retrieval', 'embeddings and matching')):
            few = dict(list(tars.items())[:args.their_shards])
            for precision, backend in (('fp32', 'torch'), ('bf16', 'openvino')):
                theirs = their_rate(few, args.each, task=task, batch_size=args.batch_size, image_size=args.image_size)
                print(f'| {work} | transformers base, fp32 | {theirs:.2f} | 1.0 | |', flush=True)
                arguments = [f'--{task}', place / 'student.pth', '--precision', precision, '--backend', backend,
                             '--batch_size', args.batch_size]
                one, two = (our_rate(tars, args.each, place / f'{task} {precision} {workers}', workers, arguments)
                            for workers in (1, 2))
                measured[task, precision] = one
                print(f'| {work} | DLIP {precision} {backend} | {one:.2f} | {one / theirs:.1f} | {two / one:.2f} |',
                      flush=True)
    costs(measured)


def costs(measured: dict[tuple[str, str], float]) -> None:
    """Print what sets of images take: at the best rate of a core, and at a GPU's where bench/gpu.json has it."""
    best = {task: max(rate for (of, _), rate in measured.items() if of == task) for task in ('caption', 'retrieval')}
    machines = {'a CPU core': best, '8 CPU cores, if they are 8 times one': {x: 8 * rate for x, rate in best.items()}}
    gpu = ROOT / 'bench' / 'gpu.json'
    if gpu.exists():
        found = json.loads(gpu.read_text())
        largest = max(row['batch'] for row in found['inference'])
        machines[f'{found["device"]}, the net alone'] = {
            task: 1000 * largest / next(row['ms']['DLIP, bf16'] for row in found['inference']
                                        if (row['work'], row['batch']) == (work, largest))
            for task, work in (('caption', 'beam-3 caption'), ('retrieval', 'image embedding'))}
    print(f'\n| work | machine | images/s | {" | ".join(SIZES)} |\n|---|---|---:|{"---:|" * len(SIZES)}')
    for task in best:
        for machine, rates_of in machines.items():
            hours = [size / rates_of[task] / 3600 for size in SIZES.values()]
            print(f'| {task} | {machine} | {rates_of[task]:.1f} | '
                  f'{" | ".join(f"{h:,.1f} h" if h < 48 else f"{h / 24:,.0f} days" for h in hours)} |')


# ---------------------------------------------------------------- what the filter finds

def run(place: Path, out: Path, student: str, *arguments) -> dict[str, dict]:
    """The tool over a folder of tars -> rows of its tables by their keys."""
    code = shards.main([str(place), '--out', str(out), '--retrieval', student, '--device', 'cpu', *map(str, arguments)])
    if code:
        raise ValueError(f'prod.shards ended with exit code {code}')
    return {row['key']: row for path in sorted((out / 'captions').glob('*.parquet'))
            for row in pq.read_table(path).to_pylist()}


def found(rows: dict[str, dict], swapped: set[str], score: str, least: float) -> tuple[float, float]:
    """(precision, recall) of the samples below a score as those whose captions were swapped."""
    low = {key for key, row in rows.items() if row[score] is None or row[score] < least}
    return len(low & swapped) / max(1, len(low)), len(low & swapped) / len(swapped)


def filter_swapped(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        swapped = write_scenes(place / 'tars', args.shards, args.each, args.swapped, seed=7, split='test')
        rows = run(place / 'tars', place / 'out', args.student)
        print(f'{len(rows)} pairs that training has not seen, {len(swapped)} of them swapped; by {args.student}\n\n'
              f'| a pair is dropped where | precision | recall |\n|---|---:|---:|')
        for score, least in (('itm', 0.1), ('itm', 0.5), ('itm', 0.9)):
            print(f'| {score} < {least} | {" | ".join(f"{x:.1%}" for x in found(rows, swapped, score, least))} |')


# ---------------------------------------------------------------- training on what it keeps

def training(args: argparse.Namespace) -> None:
    """The demo's pre-training without a distillation term, from layers of the teacher (from scratch so few pairs teach
    nothing), on all pairs and on those that the filter keeps."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        swapped = write_scenes(place / 'swapped', args.shards, args.each, args.swapped, seed=7)
        filters = {'the pairs that pass': ('--keep', 'web'),
                   'and new captions that pass': ('--keep', 'all', '--caption', args.student)}
        sets = {'all pairs': place / 'swapped'}
        for name, arguments in filters.items():
            sets[name] = place / name / 'filtered'
            run(place / 'swapped', place / name, args.student, '--min_itm', 0.5, *arguments)
        print(f'{args.shards * args.each} pairs, {len(swapped)} of them swapped; {args.epochs} epochs, seeds '
              f'{args.seeds}; filter: {args.student}\n')
        for i, (name, tars) in enumerate(sets.items()):
            results = []
            for seed in args.seeds:
                folder = place / f'{i} {seed}'
                folder.mkdir()
                launch('pretrain_dlip.py', 'pretrain', folder, seed, [
                    f'data.train={tars}', 'data.val_fraction=0', f'train.epochs={args.epochs}', 'train.batch_size=8',
                    'optim.lr_scheduler=cosine', *terms()])
                results.append(measure(folder / 'last.pth', matching=True))
            if not i:
                print(f'| trained on | pairs | {" | ".join(results[0])} |\n|---|---:|{"---:|" * len(results[0])}')
            pairs = sum(map(count_images, list_shards(str(tars))))
            means = (statistics.mean(result[figure] for result in results) for figure in results[0])
            print(f'| {name} | {pairs} | {" | ".join(f"{mean:.1f}" for mean in means)} |', flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=('rates', 'filter', 'training'))
    parser.add_argument('--shards', type=whole(6), default=12, help='default: %(default)s')
    parser.add_argument('--each', type=whole(1), help='images of a shard (default: 32; filter and training: 200)')
    parser.add_argument('--their_shards', type=whole(2), default=3, help='for transformers (default: %(default)s)')
    parser.add_argument('--batch_size', type=whole(1), default=16, help='default: %(default)s')
    parser.add_argument('--image_size', type=whole(32), default=224, help='default: %(default)s')
    parser.add_argument('--student', default=STUDENT, help='what filters (default: %(default)s)')
    parser.add_argument('--swapped', type=SHARE, default=0.2, help='share of the captions (default: %(default)s)')
    parser.add_argument('--epochs', type=whole(1), default=2, help='default: %(default)s')
    parser.add_argument('--seeds', type=whole(0), nargs='+', default=[1, 2, 3], help='default: 1 2 3')
    args = parser.parse_args(argv)
    args.each = args.each or {'rates': 32, 'filter': 200, 'training': 200}[args.part]
    {'rates': rates, 'filter': filter_swapped, 'training': training}[args.part](args)


if __name__ == '__main__':
    from bench import shards as bench  # by its name, by which Ray's workers import it
    with clean_exit():
        bench.main()
