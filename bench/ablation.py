"""What each part of the distillation is worth, on the demo's scenes: every variant with three seeds, under equal steps.

    make demo                                       # once, for the data
    python -m bench.ablation                        # hours; goes on where it stopped, two runs side by side
    python -m bench.ablation --only 'all' 'no *'    # some of the variants (shell patterns)
    python -m bench.ablation --report               # the table and the plot of the runs there are

A run trains on 1,200 of the demo's pairs unless its row says another number, in one thread, and is measured on the
validation scenes at its end; the variants whose learning curve is drawn, at POINTS points on their way too. Times are
CPU seconds of one core, evaluation and the storing of targets not counted, so that another run beside it matters
little. A finished run is a line of bench/ablation.jsonl and is not repeated; the tables are printed, and the plot is
written to bench/ablation.png.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import fnmatch
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.ablation_plan import PLAN, SEEDS, STUDENTS, Variant
from bench.classifier import train_tower
from configs import load_config, read_yaml
from configs.rules import whole
from data.datasets import ImageTextEval
from data.distributed import progress
from data.transforms import EvalTransform
from eval.caption import evaluate_captions
from eval.retrieval import evaluate_retrieval
from models.engine.curves import pyplot
from models.engine.logs import read_log
from models.weights.checkpoint import load_model
from utils import ROOT, atomic_write, clean_exit, make_output_dir

PAIRS, BATCH, POINTS = 1200, 8, 5  # PAIRS: of finetunes
PINNED = ('model.size=bench/sizes.yaml:micro', 'model.dropout=0.0', 'data.randaugment=false', 'train.precision=fp32')
SCRIPTS = {'pretrain': ('pretrain_dlip.py', 'pretrain'),
           'retrieval': ('train_dlip_retrieval_flickr.py', 'retrieval_flickr'),
           'caption': ('train_dlip_caption_flickr.py', 'caption_flickr')}
MEASURES = {'txt_r1': 'txt R@1', 'img_r1': 'img R@1', 'cosine_txt_r1': 'txt, cosine',
            'cosine_img_r1': 'img, cosine', 'CIDEr': 'CIDEr', 'exact': 'exact %', 'greedy_CIDEr': 'greedy CIDEr'}
RESULTS, PLOT = (ROOT / 'bench' / name for name in ('ablation.jsonl', 'ablation.png'))


@dataclass
class Result:
    """A finished run. `curve` holds a dict of figures a point: steps, seconds (CPU) and the names of `MEASURES`."""

    variant: str
    seed: int
    curve: list[dict]


# ---------------------------------------------------------------- training and measuring

def choose_pairs(path: Path, count: int) -> None:
    """The same pairs for every run of as many."""
    pairs = json.loads((ROOT / read_yaml(ROOT / 'configs/demo/pretrain.yaml')['data']['train']).read_text())
    with atomic_write(path) as file:
        json.dump(random.Random(0).sample(pairs, count), file)


def choose_captioned(root: Path) -> None:
    """A Flickr30K folder with the first PAIRS training captions, for every finetune, and all of the other splits."""
    scenes = ROOT / read_yaml(ROOT / 'configs/demo/caption_flickr.yaml')['data']['root']
    table = json.loads((scenes / 'dataset_flickr30k.json').read_text())
    rows = [row for row in table['images'] if row['split'] == 'train']
    kept = rows[:PAIRS // len(rows[0]['sentences'])] + [row for row in table['images'] if row['split'] != 'train']
    root.mkdir(exist_ok=True)
    for name in ('flickr30k-images', 'scenes.json'):
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(scenes / name)
    with atomic_write(root / 'dataset_flickr30k.json') as file:
        json.dump(table | {'images': kept}, file)


def train(variant: Variant, seed: int, folder: Path, place: Path) -> float:
    """Run the script of a variant in a process of one thread -> its CPU seconds."""
    script, config = SCRIPTS[variant.stage]
    settings = [*PINNED, f'train.batch_size={BATCH}', *variant.settings]
    if variant.stage == 'pretrain':
        settings = [f'data.train={place / f"pairs{variant.pairs}.json"}', 'data.val_fraction=0', 'train.epochs=1',
                    'optim.lr_scheduler=cosine', *settings]
        if variant.plotted:
            settings += [f'train.keep_checkpoints={POINTS}', f'train.save_every={variant.pairs // BATCH // POINTS}']
        if variant.elsewhere:
            settings += [f'model.init_vision={place / "classifier.pth"}', 'model.init_text=null']
    else:
        start = place / variant.start / str(seed) / 'last.pth'
        settings = ['--no_test', f'model.init={start}', f'data.root={place / "flickr30k"}', 'optim.lr=3.0e-4',
                    'train.epochs=1', *(["data.prompt=''"] if variant.stage == 'caption' else []), *settings]
    if variant.stored:
        settings.append(f'teacher.cache={folder / "targets"}')
        launch(script, config, folder, seed, [*settings, '--store_teacher', '1'])
    return launch(script, config, folder, seed, settings)


def launch(script: str, config: str, folder: Path, seed: int, settings: list[str]) -> float:
    """Run a script to its end -> CPU seconds."""
    with open(folder / 'output.txt', 'a', encoding='utf-8') as output:
        process = subprocess.Popen(
            [sys.executable, script, '--config', f'configs/demo/{config}.yaml', '--output_dir', str(folder), '--device',
             'cpu', '--seed', str(seed), *settings], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1'})
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f'the run failed, see {folder / "output.txt"}')
    return usage.ru_utime + usage.ru_stime


def measure(checkpoint: Path, matching: bool) -> dict[str, float]:
    """Validation figures of a pre-trained student: greedy captions, and recalls, with `matching` re-ranked too."""
    model, tokenizer, _ = load_model(checkpoint)
    config = load_config('configs/demo/retrieval_flickr.yaml', 'configs/retrieval_flickr.yaml')
    data, k_test = config['data'], config['eval']['k_test']
    held_out = ImageTextEval(ROOT / data['root'], 'val', EvalTransform(model.config.image_size), data['max_words'])
    said, _ = evaluate_captions(model, tokenizer, held_out, prompt='', num_beams=1, min_length=5)
    figures = {name: said[name] for name in ('CIDEr', 'exact')}
    for prefix, k in (('cosine_', 0), *[('', k_test)] * matching):
        recalls = evaluate_retrieval(model, tokenizer, held_out, max_tokens=data['max_tokens'], k_test=k)
        figures |= {f'{prefix}{name}': recalls[name] for name in ('txt_r1', 'img_r1')}
    return figures


def run(variant: Variant, seed: int, place: Path) -> Result:
    folder = place / variant.folder / str(seed)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    folder.mkdir(parents=True)
    seconds = train(variant, seed, folder, place)
    if variant.stage != 'pretrain':
        logs = folder / 'scst/log.txt', folder / 'log.txt'  # of the self-critical stage, if there was one
        last = read_log(next(filter(Path.exists, logs)))[-1]
        return Result(variant.name, seed, [{'seconds': seconds} | {
            name: last[f'val_{name}'] for name in MEASURES if f'val_{name}' in last}])
    points = []
    kept = sorted(folder.glob('epoch*_batch*.pth'), key=lambda path: path.stat().st_mtime_ns)
    for path in kept if variant.plotted else ():
        epoch, batch = (int(part.strip('epochbat')) for part in path.stem.split('_'))
        points.append((epoch * (variant.pairs // BATCH) + batch, path))
    points.append((variant.epochs * (variant.pairs // BATCH), folder / 'last.pth'))
    curve = [{'steps': steps, 'seconds': seconds * steps / points[-1][0], **measure(path, variant.matching)}
             for steps, path in points]
    for path in kept:
        path.unlink()
    shutil.rmtree(folder / 'targets', ignore_errors=True)
    return Result(variant.name, seed, curve)


def read_results() -> list[Result]:
    return [Result(**row) for row in read_log(RESULTS)]


def work(plan: list[Variant], place: Path, workers: int) -> None:
    """Do what is missing; students that finetunes start from come first."""
    done = {(result.variant, result.seed) for result in read_results()}
    for wave in (True, False):
        jobs = [(variant, seed) for seed in SEEDS for variant in plan if (variant.stage == 'pretrain') is wave
                and ((variant.name, seed) not in done
                     or variant.folder in STUDENTS and not (place / variant.folder / str(seed) / 'last.pth').exists())]
        with ProcessPoolExecutor(workers, get_context('spawn'), torch.set_num_threads, (1,)) as pool:
            futures = [pool.submit(run, variant, seed, place) for variant, seed in jobs]
            for future in progress(as_completed(futures), len(jobs), 'runs'):
                result = future.result()
                if (result.variant, result.seed) not in done:
                    with open(RESULTS, 'a', encoding='utf-8') as file:
                        file.write(json.dumps(asdict(result)) + '\n')


# ---------------------------------------------------------------- the table and the plot

def spread(values: list[float]) -> str:
    """Mean, and half the distance between the extremes where there are several; '' of none."""
    if not values:
        return ''
    half = (max(values) - min(values)) / 2
    return f'{statistics.mean(values):.1f}' + (f' ± {half:.1f}' if len(values) > 1 else '')


def table(results: list[Result], plan: list[Variant]) -> str:
    """A Markdown table for each group of variants: figures at the end of the run, over the seeds."""
    lines: list[str] = []
    group = None
    for variant in plan:
        ends = [result.curve[-1] for result in results if result.variant == variant.name]
        if not ends:
            continue
        if variant.group != group:
            group = variant.group
            members = {other.name for other in plan if other.group == group}
            names = [name for name in MEASURES
                     if any(name in result.curve[-1] for result in results if result.variant in members)]
            lines += ['', f'### {group}', '', '| variant | seeds | ' + ' | '.join(MEASURES[name] for name in names)
                      + ' | CPU s |', '|---|---:|' + '---:|' * (len(names) + 1)]
        cells = [spread([end[name] for end in ends if name in end]) for name in names]
        cells.append(f'{statistics.mean(end["seconds"] for end in ends):.0f}')
        lines.append(f'| {variant.name} | {len(ends)} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines[1:]) + '\n'


def plot(results: list[Result], plan: list[Variant], png: Path) -> None:
    """Exact captions and recall against steps and against CPU time, of the variants that are marked for it."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharey='row')
    for variant in (variant for variant in plan if variant.plotted):
        curves = [result.curve for result in results if result.variant == variant.name]
        if not curves:
            continue
        for row, name in enumerate(('exact', 'cosine_txt_r1')):
            for column, x in enumerate(('steps', 'seconds')):
                points = [[statistics.mean(point[key] for point in at) for key in (x, name)]
                          for at in zip(*curves, strict=True)]
                axes[row, column].plot(*zip(*points, strict=True), marker='o', markersize=3, label=variant.name)
    for row, label in enumerate(('exact captions (%)', 'text R@1 by cosine (%)')):
        axes[row, 0].set_ylabel(label)
    axes[1, 0].set_xlabel(f'steps of {BATCH} pairs')
    axes[1, 1].set_xlabel('CPU seconds of one core')
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    with atomic_write(png, 'wb') as file:
        figure.savefig(file, dpi=110, format='png')
    plt.close(figure)


def report() -> str:
    results = read_results()
    plot(results, PLAN, PLOT)
    return table(results, PLAN)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', metavar='PATTERN', default=['*'], help='names of variants')
    parser.add_argument('--workers', type=whole(1), default=os.cpu_count(),
                        help='runs side by side (default: %(default)s)')
    parser.add_argument('--report', action='store_true', help='train nothing')
    parser.add_argument('--output_dir', default='output/ablation', help='default: %(default)s')
    args = parser.parse_args(argv)
    place = make_output_dir(args.output_dir)
    if not args.report:
        plan = [variant for variant in PLAN if any(fnmatch.fnmatch(variant.name, pattern) for pattern in args.only)]
        if not plan:
            raise ValueError(f'no variant is called {" or ".join(args.only)}: {", ".join(v.name for v in PLAN)}')
        for count in {variant.pairs for variant in plan}:
            choose_pairs(place / f'pairs{count}.json', count)
        if any(variant.elsewhere for variant in plan) and not (place / 'classifier.pth').exists():
            train_tower(place / 'classifier.pth', 'mini_4')
        choose_captioned(place / 'flickr30k')
        work(plan, place, args.workers)
    print(report())


if __name__ == '__main__':
    with clean_exit():
        main()
