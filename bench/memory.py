"""What recomputing the last ViT blocks (`model.vit_ckpt_layer`) saves of a student's training step, and what it costs.

    python -m bench.memory

ViT-S + BERT-Small without a teacher (ITA, ITM, LM), queue 57600, batch 8, on CPU; each row is a process of its own.
"kept" is what autograd holds from the forward for the backward pass, counted tensor by tensor.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import statistics
import subprocess
import sys
import time

import torch

from bench.train_step import CLS, DEC, ENC, VOCABULARY, random_batch
from configs.rules import whole
from data.distributed import progress
from models.blip import BLIP
from models.distill.batch import Batch
from models.distill.objective import Objective
from models.engine.dry_run import SavedTensors
from models.engine.logs import memory_used
from models.momentum import MomentumQueue
from models.weights.checkpoint import architecture
from utils import clean_exit

GIB = 2 ** 30


def measure(image_size: int, layers: int, precision: str, batch_size: int, rounds: int) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    student = BLIP(architecture('small', image_size, VOCABULARY), vit_ckpt_layer=layers)
    objective = Objective(student, {'ita': 1.0, 'itm': 1.0, 'lm': 1.0}, (CLS, ENC, DEC),
                          MomentumQueue(student, 57600, 0.995)).train()
    images, ids, mask, sample_ids = random_batch(batch_size, image_size, 'cpu')
    batch = Batch(images, ids, mask, sample_ids, mask.sum(1).tolist())
    before, times = memory_used(torch.device('cpu')), []
    for number in range(rounds + 1):
        saved, started = SavedTensors(objective), time.perf_counter()
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            with saved:
                update, batches = objective.prepare([batch], 0.4, number)
                loss = objective(batches.pop(), update)['loss']
        loss.backward()
        objective.zero_grad(set_to_none=True)
        if number:
            times.append(time.perf_counter() - started)
    return (f'| {image_size} | {precision} | {layers} of 12 | {saved.bytes / GIB:.2f} | {before:.2f} | '
            f'{memory_used(torch.device("cpu")):.2f} | {1000 * statistics.median(times):.0f} |')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=whole(1), default=8, help='default: %(default)s')
    parser.add_argument('--rounds', type=whole(1), default=2, help='default: %(default)s')
    parser.add_argument('--threads', type=whole(1), default=2, help='default: %(default)s')
    parser.add_argument('--row', nargs=3, metavar=('PX', 'BLOCKS', 'PRECISION'), help='this row alone')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.row:
        image_size, layers, precision = args.row
        print(measure(int(image_size), int(layers), precision, args.batch, args.rounds))
        return
    print(f'| px | precision | recomputed blocks | kept, GiB | process before, GiB | process at most, GiB | ms for '
          f'{args.batch} pairs |\n|---:|---|---:|---:|---:|---:|---:|', flush=True)
    rows = [(size, layers, precision) for size in (224, 384) for precision in ('fp32', 'bf16') for layers in (0, 4, 12)]
    for row in progress(rows, desc='rows'):
        command = [sys.executable, '-m', 'bench.memory', '--batch', str(args.batch), '--rounds', str(args.rounds),
                   '--threads', str(args.threads), '--row', *map(str, row)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == '__main__':
    with clean_exit():
        main()
