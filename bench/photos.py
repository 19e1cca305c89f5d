"""Photographs: which settings train a teacher on one small data set, and what its student should learn from it.

    python -m bench.photos run SOURCE --jobs 4       # train and measure every run of bench/photos_plan.py, resumable
    python -m bench.photos table                     # the figures of those that have ended

SOURCE holds flickr8k_images.tar, flickr8k_captions.csv (image,caption,split), vit_small_patch14_224.safetensors (timm's
names) and minilm/ (a BERT in the layout of transformers). Data, start weights and runs lie in photos/, which is not
part of the repository. All runs are child processes that share one GPU, or the cores of a CPU.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == '__main__':  # run by its path, a script finds its own folder first on the path of modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import pretrain_dlip
from bench.photos_plan import NETS, STUDENTS, Run, plan
from data.datasets import ImageTextEval
from data.images import open_part
from data.transforms import EvalTransform, TrainTransform, normalise
from eval.caption import n_best
from eval.common import hardware, write_json
from eval.metrics import caption_metrics, ranks
from eval.retrieval import retrieval_scores
from eval.table import markdown
from models.blip import BLIP
from models.weights.checkpoint import architecture, load_model
from models.weights.inherit import cut_vision, load_timm
from utils import clean_exit, logger, replacing

ROOT = Path('photos')
DATA, TEACHER, VISION = ROOT / 'data', ROOT / 'teacher.pth', ROOT / 'vision_4.safetensors'
SIDE = 112  # px


def folder(run: Run) -> Path:
    name = '_'.join(filter(None, (run.group, run.start, run.name)))
    return ROOT / 'runs' / f'{"".join(c if c.isalnum() else "-" for c in name)}-{run.seed}'


def prepare(source: Path) -> None:
    """Lay out the data and the start weights, and choose 12,800 training pairs for the runs of alignment alone."""
    if not (DATA / 'captions.csv').exists():
        DATA.mkdir(parents=True)
        with tarfile.open(source / 'flickr8k_images.tar') as tar:
            tar.extractall(DATA, filter='data')
        (DATA / 'captions.csv').write_bytes((source / 'flickr8k_captions.csv').read_bytes())
    for name, target in (('vit_small_patch14_224.safetensors', 'vit.safetensors'), ('minilm', 'minilm')):
        if not (ROOT / target).exists():
            (ROOT / target).symlink_to((source / name).resolve())
    with open(DATA / 'captions.csv', newline='', encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row['split'] == 'train']
    some = random.Random(0).sample(rows, min(12_800, len(rows)))
    write_json(ROOT / 'some.json', [{'caption': row['caption'], 'id': i,  # the captions of a path share an id
                                     'image_root': str((DATA / 'images' / row['image']).resolve())}
                                    for i, row in enumerate(some)])


class TrainingImages(Dataset):
    """uint8 [3, SIDE, SIDE]: the training images, augmented, without captions."""

    def __init__(self):
        self.paths = sorted({row['image_root'] for row in json.loads((ROOT / 'some.json').read_text())})
        self.transform = TrainTransform(SIDE, 0.5, True)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(open_part(self.paths[index], self.transform.crop, SIDE), '')[0]


def train_vision_start(device: str, workers: int, epochs: int = 15) -> None:
    """Write `VISION`, a quarter of the published tower, which the students start from that do not start from their
    teacher: cut from the published one, and trained to give its last states through a linear projection."""
    from safetensors.torch import save_file
    torch.manual_seed(0)
    nets = [BLIP(architecture(f'bench/sizes.yaml:{size}', SIDE, 30524, 'retrieval')) for size in ('photo', 'photo_4')]
    load_timm(nets[0], str(ROOT / 'vit.safetensors'))
    big, small = (net.visual_encoder.to(device) for net in nets)
    small.load_state_dict(cut_vision(big.state_dict(), nets[1].config, nets[0].config, 'spaced'))
    width = nets[0].config.vision_width
    projection = torch.nn.Linear(nets[1].config.vision_width, width).to(device)
    loader = DataLoader(TrainingImages(), 128, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    optimizer = torch.optim.AdamW([*small.parameters(), *projection.parameters()], weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, epochs * len(loader), pct_start=0.1)
    for epoch in range(epochs):
        for images in loader:
            images = normalise(images.to(device))
            with torch.autocast(device, torch.bfloat16):
                with torch.no_grad():
                    wanted = F.layer_norm(big(images).float(), (width,))
                loss = F.mse_loss(F.layer_norm(projection(small(images)).float(), (width,)), wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        logger.info('vision start, epoch %d: loss %.3f', epoch, loss.item())
    with replacing(VISION) as temporary:
        save_file({name: weight.half().cpu().contiguous() for name, weight in small.state_dict().items()}, temporary)


def train_and_measure(run: Run, device: str, workers: int) -> None:
    """Do one run; its result is `result.json` in its folder, and the teacher goes to `TEACHER`."""
    out, began = folder(run), time.time()
    settings = [*run.settings, f'data.num_workers={workers}']
    pretrain_dlip.main(['--config', run.config, '--output_dir', str(out), '--seed', str(run.seed), '--device', device,
                        *settings])
    trained, checkpoint = time.time(), out / 'last.pth'
    if run.group == NETS:
        checkpoint = checkpoint.replace(TEACHER)
    result = measure(checkpoint, run, device, workers)
    steps = [json.loads(line) for line in (out / 'steps.txt').read_text().splitlines()]
    write_json(out / 'result.json', {**result, 'settings': settings, 'train_seconds': trained - began,
                                     'steps': steps, 'hardware': hardware(torch.device(device))})


@torch.inference_mode()
def measure(checkpoint: Path, run: Run, device: str, workers: int) -> dict:
    """Ranks of each query's best right item (0: the first place) and captions, on the run's split."""
    model, tokenizer, _ = load_model(checkpoint, device)
    dataset = ImageTextEval(str(DATA), run.split, EvalTransform(SIDE), 30)
    out = {}
    for kind, k_test in {'cosine': 0, **({'re-ranked': 128} if run.full else {})}.items():
        i2t, t2i = retrieval_scores(model, tokenizer, dataset, device=device, k_test=k_test, batch_size=1024,
                                    workers=workers)
        out[kind] = {'text': ranks(i2t, dataset.image_to_texts).tolist(),
                     'image': ranks(t2i, [[i] for i in dataset.text_to_image]).tolist()}
    if 'loss.lm=0' in run.settings:
        return out
    captions = n_best(model, tokenizer, dataset, device=device, prompt='', num_beams=3 if run.full else 1,
                      max_length=25, min_length=5, batch_size=256, workers=workers)
    return out | {'captions': [best for best, *_ in captions]}


# ---------------------------------------------------------------- running them all

def fork(log: Path, work: Callable[[], None]) -> int:
    """Do some work in a child process, which has all imports done: they take longer than a short run. Returns its
    process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(log, 'w') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ready(run: Run) -> bool:
    """Whether what a run starts from is there."""
    if run.group != STUDENTS:
        return True
    return (run.start != 'elsewhere' or VISION.exists()) and ('teacher.weights=null' in run.settings
                                                              or TEACHER.exists())


def run_all(jobs: int, minutes: float, device: str, workers: int, only: list[str]) -> None:
    """Start the runs without a result in the plan's order, `jobs` at a time, until all have ended or time is up."""
    deadline, running = time.time() + 60 * minutes, {}
    waiting = [run for run in plan() if not (folder(run) / 'result.json').exists()
               and (not only or any(word in f'{run.group} {run.start} {run.name}' for word in only))]
    (ROOT / 'runs').mkdir(exist_ok=True)
    if not VISION.exists() and any(run.start == 'elsewhere' for run in waiting):
        running[fork(ROOT / 'runs' / 'vision.txt', partial(train_vision_start, device, 2 * workers))] = 'vision start'
    while time.time() < deadline:
        while len(running) < jobs and (run := next(filter(ready, waiting), None)):
            waiting.remove(run)
            folder(run).mkdir(parents=True, exist_ok=True)
            process = fork(folder(run) / 'out.txt', partial(train_and_measure, run, device, workers))
            running[process] = folder(run).name
        if not running:
            break
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            logger.info('%s: %s', running.pop(process), 'FAILED' if status else 'done')
        time.sleep(0.2)
    for process, name in running.items():
        logger.info('out of time: %s', name)
        os.kill(process, signal.SIGKILL)


# ---------------------------------------------------------------- figures

def interval(values: np.ndarray, count: int = 1000) -> str:
    """The mean of a figure per image, and its 95% interval by bootstrap over the images."""
    means = values[np.random.default_rng(0).integers(len(values), size=(count, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f'{values.mean():.1f} ({low:.1f} to {high:.1f})'


def figures(run: Run, result: dict, references: list[list[str]], owner: np.ndarray) -> dict[str, str]:
    """Recalls and caption scores in per cent, each but BLEU, which is no mean over captions, with its interval.

    Args:
        references: the captions of each image of the split.
        owner: [texts] the image of each caption.
    """
    out = {}
    for kind in ('re-ranked', 'cosine') if run.full else ('cosine',):
        for way, ranked in result[kind].items():
            for k in (1, 5, 10) if run.full else (1, 10):
                hits = 100.0 * (np.array(ranked) < k)
                if way == 'image':  # its queries are captions; those of an image are drawn together
                    hits = np.bincount(owner, hits) / np.bincount(owner)
                out[f'{way} R@{k}' + f', {kind}' * run.full] = interval(hits)
    if 'captions' in result:
        scores, single = caption_metrics(dict(enumerate(result['captions'])), dict(enumerate(references)),
                                         meteor=run.full)
        for name in filter(scores.get, ('CIDEr', 'METEOR')):
            out[name] = interval(np.array([single[i][name] for i in range(len(references))]))
        out['BLEU-4'] = f'{scores["Bleu_4"]:.1f}'
    return out


def print_tables() -> None:
    """Print a table of each group's runs that have ended."""
    splits, tables = {}, {}
    for run in plan():
        if not (folder(run) / 'result.json').exists():
            continue
        if run.split not in splits:
            data = ImageTextEval(str(DATA), run.split, EvalTransform(SIDE), 30)
            splits[run.split] = data.references, np.array(data.text_to_image)
        result = json.loads((folder(run) / 'result.json').read_text())
        name = f'{run.start}: {run.name}' if run.start else run.name
        seeds = {'seed': str(run.seed)} if run.group == STUDENTS else {}
        title = f'{run.group}; {run.split} split, {result["hardware"]}'
        tables.setdefault(title, []).append({'run': name, **seeds, **figures(run, result, *splits[run.split])})
    for title, rows in tables.items():
        print(f'{title}\n\n{markdown(rows)}')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('run', 'table'))
    parser.add_argument('source', nargs='?', type=Path)
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time (default: %(default)s)')
    parser.add_argument('--minutes', type=float, default=1e6, help='stop after this time; started runs are resumed')
    parser.add_argument('--workers', type=int, default=2, help='processes that read images, per run')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--only', nargs='*', default=[], help='runs whose group, start or name holds one of these')
    args = parser.parse_args(argv)
    if args.what == 'table':
        return print_tables()
    if args.source:
        prepare(args.source)
    run_all(args.jobs, args.minutes, args.device, args.workers, args.only)


if __name__ == '__main__':
    with clean_exit():
        main()
