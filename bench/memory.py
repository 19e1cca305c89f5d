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
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from bench.train_step import CLS, DEC, ENC, VOCABULARY, random_batch
from configs.rules import whole
from data.distributed import progress
from eval.table import markdown
from models.blip import BLIP
from models.distill.batch import Batch
from models.distill.objective import Objective
from models.engine.dry_run import SavedTensors
from models.engine.logs import memory_used
from models.momentum import MomentumQueue
from models.weights.checkpoint import architecture
from utils import clean_exit

GIB = 2 ** 30


def measure(image_size: int, layers: int, precision: str, batch_size: int, rounds: int, threads: int) -> dict[str, str]:
    """A row of the table; call it in a process of its own."""
    torch.set_num_threads(threads)
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
    return {'px': str(image_size), 'precision': precision, 'recomputed blocks': f'{layers} of 12',
            'kept, GiB': f'{saved.bytes / GIB:.2f}', 'process before, GiB': f'{before:.2f}',
            'process at most, GiB': f'{memory_used(torch.device("cpu")):.2f}',
            f'ms for {batch_size} pairs': f'{1000 * statistics.median(times):.0f}'}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=whole(1), default=8, help='default: %(default)s')
    parser.add_argument('--rounds', type=whole(1), default=2, help='default: %(default)s')
    parser.add_argument('--threads', type=whole(1), default=2, help='default: %(default)s')
    args = parser.parse_args(argv)
    rows = [(size, layers, precision) for size in (224, 384) for precision in ('fp32', 'bf16') for layers in (0, 4, 12)]
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), max_tasks_per_child=1) as pool:
        measured = [pool.submit(measure, *row, args.batch, args.rounds, args.threads) for row in rows]
        print(markdown([row.result() for row in progress(measured, desc='rows')]))


if __name__ == '__main__':
    with clean_exit():
        main()
