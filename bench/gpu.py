"""The parts of bench/gpu.sh, which says how to run them all, and the page that they make.

    python -m bench.gpu step compiled eager --out gpu.jsonl      # a training step: compiled, eager or original
    python -m bench.gpu largest --out gpu.jsonl                 # the largest batches that fit GPUs of 40 and 80 GB
    python -m bench.gpu inference --out gpu.jsonl               # captions and embeddings beside transformers' BLIP
    python -m bench.gpu page gpu.jsonl                          # bench/gpu.json, and the pages that show it

A step is that of configs/pretrain.yaml (or, with `--terms original`, of the loss terms of dlip-v2) with random weights
and data, in bf16; "original" is bench/original_step.py in TF32. Model FLOPs utilisation (MFU) divides the operations of
a step, counted on an eager one, by what the GPU's data sheet gives for dense bf16 products.
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import figures
from bench.hours import hours
from bench.inference import our_work, transformers_base, transformers_work
from bench.original_step import ORIGINAL_TERMS, Reference, ReferenceStep
from bench.train_step import VOCABULARY, OurStep, random_batch
from configs import read_yaml
from configs.rules import whole
from models.blip import BLIP
from models.linear import FLOPS
from models.weights.checkpoint import architecture
from models.weights.sources import load_tokenizer
from prod.precision import for_inference
from utils import ROOT, atomic_write, clean_exit, shorten

PEAKS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}  # dense bf16 FLOP/s by the data sheets of the SXM cards
GIB = 2 ** 30
LIMITS = {'A100 or H100 of 40 GB': 38, 'of 80 GB': 76}  # GiB that a process may take


class Bench:
    """Where the measurements run and are written.

    Args:
        out: file to which results are appended as JSON lines.
    """

    def __init__(self, device: str, out: Path):
        self.device, self.out = device, out
        if device == 'cuda':
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == 'cuda' else 'CPU'

    def wait(self) -> None:
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def seconds(self, function: Callable) -> float:
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - started

    def record(self, part: str, **values) -> None:
        line = {'part': part, 'device': self.name, 'torch': torch.__version__, **values}
        with self.out.open('a') as file:
            file.write(json.dumps(line) + '\n')
        print(json.dumps({key: value for key, value in line.items() if key != 'kernels'}), flush=True)

    def mfu(self, flops_per_second: float) -> float | None:
        peaks = [peak for name, peak in PEAKS.items() if name in self.name]
        return round(flops_per_second / peaks[0], 4) if peaks else None


# ---------------------------------------------------------------- a training step

def make_step(bench: Bench, side: str, terms: str, lengths: list[int], tiny: bool) -> OurStep | ReferenceStep:
    config = read_yaml('configs/pretrain.yaml')
    student, teacher = (architecture(name, 32 if tiny else 224, VOCABULARY)
                        for name in (('mini_4', 'mini') if tiny else ('small', 'base')))
    weights = dict.fromkeys(ORIGINAL_TERMS, 1.0) if terms == 'original' else config['loss']
    shared = (config['ita']['queue_size'], weights, config['optim']['lr'], bench.device)
    torch.manual_seed(0)
    if side == 'original':
        return ReferenceStep(Reference(student), Reference(teacher), *shared)
    return OurStep(BLIP(student), BLIP(teacher).eval(), *shared, lengths, 'bf16')


def make_batches(bench: Bench, size: int, tiny: bool, count: int = 3) -> list[tuple]:
    """Batches whose texts have other lengths each, and their lengths for the host."""
    batches = []
    for number in range(count):
        images, ids, mask, sample_ids = random_batch(size, 32 if tiny else 224, 'cpu')
        keep = (torch.arange(mask.shape[1]) < (mask.sum(1) - number).clamp(min=4)[:, None]).long()
        lengths = keep.sum(1).tolist()
        width = max(lengths)
        batch = images, (ids * keep)[:, :width], keep[:, :width], sample_ids
        batches.append((tuple(x.to(bench.device) for x in batch), lengths))
    return batches


def run_step(step: OurStep | ReferenceStep, batch: tuple, lengths: list[int]) -> None:
    step.lengths = lengths
    step(*batch)


def measure_step(bench: Bench, side: str, terms: str, batch_size: int, rounds: int, tiny: bool) -> None:
    batches = make_batches(bench, batch_size, tiny)
    step = make_step(bench, side, terms, batches[0][1], tiny)
    if side == 'compiled':
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            run_step(step, *batches[0])
        step.compile()
        first = [bench.seconds(lambda batch=batch: run_step(step, *batch)) for batch in batches * 2]
    else:
        first = [bench.seconds(lambda: run_step(step, *batches[0]))]
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            run_step(step, *batches[0])
    flops = counter.get_total_flops()
    if bench.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()

    def several() -> None:  # one after the other, as training hands them over
        for number in range(rounds):
            run_step(step, *batches[number % len(batches)])
    seconds = min(bench.seconds(several) for _ in range(2)) / rounds
    memory = {}
    if bench.device == 'cuda':
        memory = {'peak_GiB': round(torch.cuda.max_memory_allocated() / GIB, 2),
                  'reserved_GiB': round(torch.cuda.max_memory_reserved() / GIB, 2)}
    bench.record('step', side=side, terms=terms, batch=batch_size, ms=round(1000 * seconds, 2),
                 pairs_per_s=round(batch_size / seconds, 1), TFLOP=round(flops / 1e12, 2),
                 TFLOP_per_s=round(flops / seconds / 1e12, 1), mfu=bench.mfu(flops / seconds),
                 first_steps_s=[round(x, 2) for x in first], **memory,
                 gradients_MB=round(sum(4e-6 * x.numel() for group in step.optimizer.param_groups
                                        for x in group['params']), 1))
    if isinstance(step, OurStep):
        step.lengths = batches[0][1]
        parts = step.split(batches[0][0], lambda: None, 3)
        bench.record('split', side=side, terms=terms, batch=batch_size,
                     ms={name.strip(): round(1000 * value, 2) for name, value in parts.items() if 'data' not in name})
    if bench.device == 'cuda':
        bench.record('kernels', side=side, terms=terms, batch=batch_size,
                     **costliest_kernels(lambda: run_step(step, *batches[0])))


def costliest_kernels(function: Callable) -> dict:
    """Of one call: how many kernels run, their milliseconds together, and the costliest by name [ms, count]."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    return {'launched': sum(event.count for event in events),
            'busy_ms': round(sum(event.self_device_time_total for event in events) / 1000, 2),
            'kernels': {event.key[:120]: [round(event.self_device_time_total / 1000, 2), event.count]
                        for event in events[:40]}}


def measure_largest(bench: Bench, tiny: bool) -> None:
    """By the peaks of two batches, then tried with the process held to the GPU's memory; eager."""
    step = make_step(bench, 'eager', 'config', [], tiny)

    def peak_of(size: int) -> float | None:
        """GiB that PyTorch reserves; None: there are fewer."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            batch, lengths = make_batches(bench, size, tiny, 1)[0]
            for _ in range(2):
                run_step(step, batch, lengths)
            bench.wait()
            return torch.cuda.max_memory_reserved() / GIB
        except torch.OutOfMemoryError:
            step.optimizer.zero_grad()
            return None
    small, large = peak_of(96), peak_of(192)
    whole_memory = torch.cuda.get_device_properties(0).total_memory / GIB
    for card, limit in LIMITS.items():
        if limit > whole_memory:
            continue
        torch.cuda.set_per_process_memory_fraction(limit / whole_memory)
        size = int(96 + 96 * (limit - small) / (large - small)) // 16 * 16
        while size and (found := peak_of(size)) is None:
            size -= 16
        bench.record('largest', card=card, limit_GiB=limit, batch=size, reserved_GiB=found and round(found, 2))


# ---------------------------------------------------------------- inference

def measure_inference(bench: Bench, rounds: int, tiny: bool) -> None:
    """Student beside transformers' BLIP-Base, both in bf16; 20 new tokens forced."""
    tokenizer = load_tokenizer(ROOT / 'tests' / 'vocab.txt')
    torch.manual_seed(0)
    size = 32 if tiny else 224
    student = BLIP(architecture('mini_4' if tiny else 'small', size, len(tokenizer))).eval().to(bench.device)
    theirs = [net.to(bench.device, torch.bfloat16) for net in transformers_base(size)]
    reference = f'transformers, bf16, {theirs[0].config._attn_implementation} attention'  # sdpa where it has it
    ours = for_inference(student, 'bf16')
    found, later = {}, []

    def measure(work: str, batch: int, side: str, function: Callable) -> None:
        function()
        seconds = found[work, batch, side] = statistics.median(bench.seconds(function) for _ in range(rounds))
        bench.record('inference', work=work, batch=batch, side=side, ms=round(1000 * seconds, 2),
                     times_transformers=round(found[work, batch, reference] / seconds, 2))
    with torch.inference_mode():
        for batch in (1, 2 if tiny else 64):
            images = torch.randn(batch, 3, size, size, device=bench.device)
            sides = {reference: transformers_work(*theirs, tokenizer, images.bfloat16()),
                     'DLIP, bf16': our_work(ours, tokenizer, images)}
            for work, function in sides['DLIP, bf16'].items():
                measure(work, batch, reference, sides[reference][work])
                measure(work, batch, 'DLIP, bf16', function)
                if bench.device == 'cuda' and 'caption' not in work:  # a caption's loop asks the GPU when to end
                    later.append((work, batch, function))
        for work, batch, function in later:  # last, as a capture that fails leaves the GPU unusable
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            measure(work, batch, 'DLIP, bf16, CUDA graph', graph.replay)


# ---------------------------------------------------------------- results

def failures(row: dict, folder: Path) -> str:
    """What a part's log says of its end: of tests those that failed, of other parts the last lines."""
    log = folder / f'{row["name"]}.log'
    lines = log.read_text(errors='replace').splitlines() if log.exists() else []
    if row['name'] == 'tests':
        passed, failed = sum(' PASSED' in x for x in lines), [x for x in lines if x.startswith(('FAILED', 'ERROR'))]
        return '; '.join([f'{passed} passed', *(shorten(ValueError(x), 400) for x in failed)])
    if row['exit'] in (124, 137):
        return 'out of time'
    return shorten(ValueError(' '.join(lines[-3:])), 600) if row['exit'] else ''


def page(source: Path) -> None:
    """bench/gpu.json from the lines of a run, and the documents that show its figures."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    steps = [row for row in rows if row['part'] == 'step']
    found = {'A pre-training step': [
        {'side': row['side'], 'loss terms': row['terms'], 'batch': row['batch'], 'pairs/s': round(row['pairs_per_s']),
         'ms': row['ms'], 'TFLOP/s': row['TFLOP_per_s'], 'MFU': '' if row['mfu'] is None else f'{row["mfu"]:.1%}',
         'peak, GiB': row.get('peak_GiB', ''), 'first step, s': row['first_steps_s'][0]} for row in steps]}
    whole_run = [row for row in steps if (row['side'], row['terms']) == ('compiled', 'config')][-1:]
    found['The whole run, computed'] = [
        {'GPUs': gpus, 'hours': round(hours(row['batch'], row['ms'] / 1000, row['gradients_MB'] * 1e6, gpus), 1)}
        for row in whole_run for gpus in (1, 4, 8)]
    found['Parts of a step, each waited for'] = [
        {'side': row['side'], 'loss terms': row['terms'], 'part': name, 'ms': value}
        for row in rows if row['part'] == 'split' for name, value in row['ms'].items()]
    found['Largest batch, eager'] = [{'GPU': row['card'], 'GiB': row['limit_GiB'], 'batch': row['batch']}
                                     for row in rows if row['part'] == 'largest']
    found['Inference'] = [
        {'work': row['work'], 'batch': row['batch'], 'side': row['side'], 'ms': row['ms'],
         'times transformers': row['times_transformers']} for row in rows if row['part'] == 'inference']
    found['Parts of the script'] = [
        {'part': row['name'], 'exit code': row['exit'], 'seconds': row['seconds'],
         'how it ended': failures(row, source.parent)} for row in rows if row['part'] == 'ended']
    device, version = next((row['device'], row['torch']) for row in rows if 'device' in row)
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout
    run = {'command': 'bench/gpu.sh', 'date': date.today().isoformat(), 'commit': commit.strip(),
           'machine': f'{device}, torch {version}', 'tables': {title: rows for title, rows in found.items() if rows}}
    with atomic_write(ROOT / 'bench/gpu.json') as file:
        json.dump([run], file, indent=1, ensure_ascii=False)
    figures.main([])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest='part', required=True)
    for name in ('step', 'largest', 'inference'):
        part = parts.add_parser(name)
        if name == 'step':
            part.add_argument('sides', nargs='+', choices=('compiled', 'eager', 'original'))
            part.add_argument('--terms', choices=('config', 'original'), default='config')
            part.add_argument('--batch', type=whole(1), default=288)
        part.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
        part.add_argument('--rounds', type=whole(1), default=12)
        part.add_argument('--out', type=Path, required=True)
    parts.add_parser('page').add_argument('source', type=Path)
    args = vars(parser.parse_args(argv))
    if args['part'] == 'page':
        return page(args['source'])
    part, bench, tiny = args['part'], Bench(args['device'], args['out']), args['device'] == 'cpu'
    if part == 'inference':
        measure_inference(bench, 1 if tiny else args['rounds'], tiny)
    elif part == 'largest' and not tiny:
        measure_largest(bench, tiny)
    elif part == 'step':
        for side in args['sides']:
            size = 6 if tiny else args['batch']
            while size:
                try:
                    measure_step(bench, side, args['terms'], size, 1 if tiny else args['rounds'], tiny)
                    break
                except torch.OutOfMemoryError:
                    bench.record('does not fit', side=side, terms=args['terms'], batch=size)
                    size //= 2


if __name__ == '__main__':
    with clean_exit():
        main()
