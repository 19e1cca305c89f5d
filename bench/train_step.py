"""One pre-training step of the real size beside the original's algorithm, as ratios.

    python -m bench.train_step                                # CPU, batch 8
    python -m bench.train_step --device cuda --batch 288      # bf16 and torch.compile on our side

Teacher BLIP-Base, student ViT-S + BERT-Small, 224 px, 30 tokens, queue 57600, the original's loss terms, random
weights and pictures; the reference is `bench/original_step.py`. Both sides take turns on the same batch; medians of
whole steps (forward, backward, clipping, AdamW, momentum), with the share of this machine's fastest matrix product that
their counted operations reach and, on a GPU, the most memory of each side; then where ours spends its time. The data's
part is that of one loader without workers: JPEGs of 640 x 480 decoded and augmented, captions made tokens, both brought
to the device.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import io
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.original_step import CLS, DEC, ENC, ORIGINAL_TERMS, Reference, ReferenceStep
from configs import read_yaml
from configs.rules import whole
from data.datasets import first_readable
from data.distributed import progress, to_device
from data.transforms import TrainTransform, normalise
from models.blip import BLIP
from models.distill.batch import Batch
from models.distill.objective import Objective
from models.distill.terms import TEACHER_FEATURES
from models.engine.logs import memory_used
from models.engine.optim import parameter_groups
from models.linear import FLOPS, Linear, unpadded
from models.momentum import MomentumQueue
from models.tokenizer import Tokenizer
from models.weights.checkpoint import architecture
from utils import ROOT, clean_exit

VOCABULARY, TOKENS = 30524, 30


def data(batch: int, image_size: int, device: str) -> Callable:
    """A function that makes a batch of JPEGs and captions, as the loader and the run do."""
    from bench.data_throughput import photograph  # it needs OpenCV
    files = [photograph(seed, 75) for seed in range(batch)]
    transform, tokenizer = TrainTransform(image_size, 0.2, True), Tokenizer.from_file(ROOT / 'tests/vocab.txt')

    def make() -> None:
        items = [first_readable([(io.BytesIO(file), 'two dogs run after a red ball on the beach', i)], transform, 30, i)
                 for i, file in enumerate(files)]
        ids, mask = tokenizer([item['caption'] for item in items], TOKENS)
        images = to_device(torch.stack([item['image'] for item in items]), device)
        normalise(images), to_device(ids, device), to_device(mask, device)
    return make


def random_batch(batch: int, image_size: int, device: str) -> tuple[torch.Tensor, ...]:
    """images, ids, mask and sample ids; captions of 8 to 30 tokens."""
    images = torch.randn(batch, 3, image_size, image_size)
    lengths = torch.linspace(8, TOKENS, batch).long()
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, (batch, TOKENS)) * mask
    return tuple(x.to(device) for x in (images, ids, mask, torch.arange(batch)))


class OurStep:
    """The step of pretrain_dlip.py, its parts timed.

    Args:
        lengths: tokens of each text of the batch, as the tokenizer tells a run.
        precision: 'fp32' or 'bf16' (autocast).
    """

    def __init__(self, student: BLIP, teacher: BLIP, queue_size: int, weights: dict[str, float], lr: float,
                 device: str, lengths: list[int], precision: str):
        momentum = MomentumQueue(student, queue_size, 0.995, teacher.config.embed_dim)
        self.objective = Objective(student, weights, (CLS, ENC, DEC), momentum, teacher).to(device).train()
        self.objective.teacher.to(device)
        if device == 'cuda' and precision == 'bf16':  # as a run does
            self.objective.frozen.compute_in(torch.bfloat16)
        self.device, self.lengths, self.precision, self.number = device, lengths, precision, 0
        self.optimizer = torch.optim.AdamW(parameter_groups(self.objective, 0.05), lr=lr, fused=True)

    def compile(self) -> None:
        self.objective.compile_parts()

    def forward(self, batch, stored: dict | None = None) -> torch.Tensor:
        self.number += 1
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == 'bf16'):
            self.shared, batches = self.objective.prepare([Batch(*batch, self.lengths, stored)], 0.4, self.number)
            return self.objective(batches.pop(), self.shared)['loss']

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, *batch) -> None:
        self.forward(batch).backward()
        self.update()
        self.momentum_update()

    def momentum_update(self) -> None:
        self.objective.momentum.update(self.objective.student)
        self.objective.momentum.enqueue(self.shared.ids, **self.shared.own())

    def split(self, batch, make_batch: Callable, rounds: int) -> dict[str, float]:
        """Median seconds of each part of the step; the teacher's share of forward by running it alone."""
        times: dict[str, list[float]] = {}

        def timed(name: str, function: Callable):
            started = seconds_now(self.device)
            result = function()
            times.setdefault(name, []).append(seconds_now(self.device) - started)
            return result

        for _ in range(rounds):
            timed('data, beside the step', make_batch)
            loss = timed('forward', lambda: self.forward(batch))
            timed('backward', loss.backward)
            timed('clipping and AdamW', self.update)
            timed('momentum encoder', self.momentum_update)
            timed('  of forward: teacher', lambda: self.teacher_alone(*batch))
        parts = {name: statistics.median(values) for name, values in times.items()}
        parts['  of forward: student and momentum encoder'] = parts['forward'] - parts['  of forward: teacher']
        return parts

    @torch.no_grad()
    def teacher_alone(self, images, ids, mask, sample_ids) -> None:
        """What a step asks of it."""
        objective, texts, times = self.objective, unpadded(mask, self.lengths), 1
        targets, negatives = objective.frozen.targets(images), None
        if objective.uses('itm_soft'):  # then it sees the negatives too
            times, negatives = 3, torch.arange(len(ids), device=ids.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == 'bf16'):
            if objective.uses(*TEACHER_FEATURES):
                targets.features(ids, texts)
            targets.matching(ids.repeat(times, 1), unpadded(mask.repeat(times, 1), self.lengths * times), negatives,
                             False, objective.uses('self_attn', 'cross_attn'))
            decoded = targets.decoding(ids, texts, objective.uses('decoder_self_attn', 'decoder_cross_attn'))
            targets.next_tokens(decoded, mask[:, 1:].flatten().nonzero().flatten())


@torch.no_grad()
def best_product(device: str, precision: str) -> float:
    """Operations a second of a large linear layer."""
    side = 8192 if device == 'cuda' else 2048
    x, linear, times = torch.randn(side, side, device=device), Linear(side, side).to(device), []
    with torch.autocast(device, torch.bfloat16, enabled=precision == 'bf16'):
        if precision == 'bf16':
            x = x.bfloat16()
        for _ in range(10):
            started = seconds_now(device)
            linear(x)
            times.append(seconds_now(device) - started)
    return 2 * side ** 3 / statistics.median(times)


def seconds_now(device: str) -> float:
    """The clock, once the device has done what it was given."""
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--batch', type=whole(1), default=8, help='default: %(default)s')
    parser.add_argument('--image_size', type=whole(1), default=224, help='default: %(default)s')
    parser.add_argument('--rounds', type=whole(1), default=5, help='default: %(default)s')
    parser.add_argument('--threads', type=whole(1), default=2, help='default: %(default)s')
    parser.add_argument('--precisions', nargs='+', choices=('fp32', 'bf16'), default=['fp32', 'bf16'],
                        help='of our side; bf16 is slow where the CPU has no such arithmetic')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    on_gpu = args.device == 'cuda'
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    config = read_yaml('configs/pretrain.yaml')
    weights, queue = dict.fromkeys(ORIGINAL_TERMS, 1.0), config['ita']['queue_size']
    sizes = {name: architecture(name, args.image_size, VOCABULARY) for name in ('base', 'small')}
    batch = random_batch(args.batch, args.image_size, args.device)
    shared = (queue, weights, config['optim']['lr'], args.device)
    builders = {'original, fp32': lambda: ReferenceStep(Reference(sizes['small']), Reference(sizes['base']), *shared)}
    for precision in args.precisions:
        builders[f'DLIP, {precision}'] = lambda precision=precision: OurStep(
            BLIP(sizes['small']), BLIP(sizes['base']).eval(), *shared, batch[2].sum(1).tolist(), precision)
    steps, operations, memory = {}, {}, {}
    for name, build in progress(builders.items(), desc='building'):
        before = torch.cuda.memory_allocated() if on_gpu else 0
        steps[name] = build()
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            steps[name](*batch)
        operations[name] = counter.get_total_flops()
        if on_gpu:
            if isinstance(steps[name], OurStep):
                steps[name].compile()
                steps[name](*batch)
            torch.cuda.reset_peak_memory_stats()
            steps[name](*batch)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
    times = {name: [] for name in steps}
    for number in progress(range(args.rounds + 1), desc='rounds'):
        for name, step in steps.items():
            started = seconds_now(args.device)
            step(*batch)
            if number:
                times[name].append(seconds_now(args.device) - started)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peaks = {precision: best_product(args.device, precision) for precision in {'fp32', *args.precisions}}
    where = torch.cuda.get_device_name() if on_gpu else f'CPU, {args.threads} threads'
    print(f'{args.image_size} px, batch {args.batch}, {where}\n')
    print(f'| step | ms | pairs/s | times the original | TFLOPs | TFLOP/s | of the best product |{" GiB |" * on_gpu}')
    print(f'|---|{"---:|" * (6 + on_gpu)}')
    for name, value in seconds.items():
        rate, peak = operations[name] / value, peaks[name[-4:]]
        print(f'| {name} | {1000 * value:.0f} | {args.batch / value:.2f} | {seconds["original, fp32"] / value:.2f} | '
              f'{operations[name] / 1e12:.2f} | {rate / 1e12:.2f} | {rate / peak:.0%} of {peak / 1e12:.2f} |'
              + (f' {memory[name]:.1f} |' if on_gpu else ''))
    print(f'\n| part of a step (ms) | {" | ".join(args.precisions)} |\n|---|{"---:|" * len(args.precisions)}')
    make_batch = data(args.batch, args.image_size, args.device)
    parts = [steps[f'DLIP, {precision}'].split(batch, make_batch, args.rounds) for precision in args.precisions]
    for name in parts[0]:
        print(f'| {name} | {" | ".join(f"{1000 * times[name]:.0f}" for times in parts)} |')
    if not on_gpu:
        print(f'\nMost memory of the process, all sides at once: {memory_used(torch.device(args.device)):.1f} GiB')


if __name__ == '__main__':
    with clean_exit():
        main()
