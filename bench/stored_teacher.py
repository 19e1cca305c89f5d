"""Training from the teacher's stored targets beside asking the teacher: the step as a ratio, and the disk it takes.

    python -m bench.stored_teacher

The step of bench.train_step (base teacher, small student, 224 px, 30 tokens, queue 57600) with the original's terms,
and without those whose targets are large (image tokens, decoder states, attention maps). Both sides take the same terms
and turns; the stored side reads and pads its targets from a shard on disk within its time.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.original_step import CLS, DEC, ENC, ORIGINAL_TERMS
from bench.train_step import VOCABULARY, OurStep, random_batch, seconds_now
from configs import read_yaml
from configs.rules import whole
from data.distributed import progress
from data.target_store import ROW, Fields, Shard, ShardWriter, pad_targets, sides
from models.blip import BLIP
from models.distill.teacher import StoredTeacher
from models.distill.teacher_cache import answers, fields_of
from models.distill.terms import TEACHER_TERMS
from models.weights.checkpoint import architecture
from utils import clean_exit

LARGE = ('image_tokens', 'decoder_feat', 'self_attn', 'cross_attn', 'decoder_self_attn', 'decoder_cross_attn')
PAIRS, TOKENS = 5_000_000, 13  # of the whole data, and of a caption of CC3M (10.3 words) with [CLS] and [SEP]


class StoredStep(OurStep):
    """`OurStep` on targets from a shard, without the teacher."""

    def from_shard(self, shard: Shard, rows: int) -> None:
        self.shard, self.rows = shard, rows
        net = self.objective.teacher
        self.objective.frozen = StoredTeacher(net.config, net.temp.item())

    def forward(self, batch) -> torch.Tensor:
        stored = pad_targets([self.shard[row][1] for row in range(self.rows)])
        return super().forward(batch, {name: x.to(self.device) for name, x in stored.items()})


def store(path: Path, teacher: BLIP, batch, terms: list[str], fields: Fields, top_k: int) -> Shard:
    images, ids, mask, sample_ids = batch
    found = answers(teacher, images, ids, mask, (CLS, ENC, DEC), terms, top_k)
    with open(path, 'wb') as file:
        writer = ShardWriter(file, len(ids), fields)
        for row, tokens in enumerate(mask.sum(1).tolist()):
            writer.add(int(sample_ids[row]), tokens, {name: found[name][row].cpu().numpy() for name in fields})
    return Shard(path, len(ids), fields)


def bytes_of(fields: Fields) -> int:
    """Of a pair of `TOKENS` tokens."""
    return sum(math.prod(sides(shape, TOKENS)) * np.dtype(dtype).itemsize for dtype, shape in fields.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--batch', type=whole(1), default=8, help='default: %(default)s')
    parser.add_argument('--rounds', type=whole(1), default=5, help='default: %(default)s')
    parser.add_argument('--threads', type=whole(1), default=2, help='default: %(default)s')
    parser.add_argument('--precisions', nargs='+', default=['fp32', 'bf16'], choices=('fp32', 'bf16'))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = read_yaml('configs/pretrain.yaml')
    top_k, queue = config['teacher']['top_k'], config['ita']['queue_size']
    sizes = {name: architecture(name, 224, VOCABULARY) for name in ('base', 'small')}
    teacher = BLIP(sizes['base']).eval()
    batch = random_batch(args.batch, 224, args.device)
    sets = {'without the large ones': [name for name in ORIGINAL_TERMS if name not in LARGE], 'all': ORIGINAL_TERMS}
    print(f'224 px, batch {args.batch}, {args.device}, {top_k} tokens of the distribution\n\n'
          '| terms | precision | live teacher, ms | stored, ms | times the live step | by CPU time |\n'
          '|---|---|---:|---:|---:|---:|',
          flush=True)
    for name, weighted in sets.items():
        weights, terms = dict.fromkeys(weighted, 1.0), [term for term in TEACHER_TERMS if term in weighted]
        fields = fields_of(terms, sizes['base'], top_k)
        for precision in args.precisions:
            shared = queue, weights, config['optim']['lr'], args.device, batch[2].sum(1).tolist(), precision
            live = OurStep(BLIP(sizes['small']), teacher, *shared)
            stored = StoredStep(BLIP(sizes['small']), teacher, *shared)
            with tempfile.TemporaryDirectory() as folder:
                stored.from_shard(store(Path(folder) / 'shard', teacher, batch, terms, fields, top_k), args.batch)
                if args.device == 'cuda':
                    live.compile(), stored.compile()
                times: dict[str, list[tuple[float, float]]] = {'live': [], 'stored': []}
                for number in progress(range(args.rounds + 1), desc=f'{name}, {precision}'):
                    for side, step in (('live', live), ('stored', stored)):
                        started = seconds_now(args.device), time.process_time()
                        step(*batch)
                        if number:
                            times[side].append((seconds_now(args.device) - started[0],
                                                time.process_time() - started[1]))
            (live_s, live_cpu), (stored_s, stored_cpu) = (
                map(statistics.median, zip(*rounds, strict=True)) for rounds in times.values())
            print(f'| {name} | {precision} | {1000 * live_s:.0f} | {1000 * stored_s:.0f} | {live_s / stored_s:.2f} | '
                  f'{live_cpu / stored_cpu:.2f} |', flush=True)
            del live, stored
    print(f'\n| terms | bytes a pair of {TOKENS} tokens | of {PAIRS / 1e6:.0f} M pairs, each stored epoch |\n|---|---:|'
          f'---:|')
    for name, weighted in (sets | {f'{term} alone': [term] for term in LARGE}).items():
        terms = [term for term in TEACHER_TERMS if term in weighted]
        size = bytes_of(fields_of(terms, sizes['base'], top_k)) + ROW.itemsize
        print(f'| {name} | {size} | {size * PAIRS / 1e9:.0f} GB |')


if __name__ == '__main__':
    with clean_exit():
        main()
