"""What one pre-training step of the real size asks of a GPU, counted without one.

    python -m bench.traffic                        # FLOPs, bytes, kernels and peak memory by part; well under a minute
    python -m bench.traffic --processes 4          # and what 4 processes exchange

The step of configs/pretrain.yaml (teacher BLIP-Base, student ViT-S + BERT-Small, bf16 autocast, captions of 8 to 30
tokens) runs on fake tensors: every operation is dispatched, none is computed. Counted are

- FLOPs, by torch's own formulas;
- bytes: an operation reads its inputs and writes its outputs once (a gather reads the rows it takes), as an eager GPU
  does whose caches hold nothing from one kernel to the next;
- kernels: operations that are not views or allocations (operations on lists of tensors launch one per ~100 tensors);
- peak memory: of the storages alive at once, without the allocator's fragmentation and cuBLAS's workspace.

Then the same step with `train.compile`, its layers and losses as inductor fuses them (bench/traffic_count.py). The fake
device is the CPU, with a GPU's choices where the two differ (attention, dropout, clipping).
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
import copy
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import models.linear
import models.text
import models.vit
from bench.traffic_count import Traffic, aten
from bench.train_step import CLS, DEC, ENC, VOCABULARY
from configs import load_config
from configs.rules import whole
from models import losses
from models.blip import BLIP
from models.distill import teacher as teaching
from models.distill.batch import Batch
from models.distill.hidden import HiddenStates
from models.distill.objective import Objective
from models.engine.optim import build_optimizer
from models.momentum import MomentumQueue
from models.text import LMHead, TextTower
from models.vit import VisionTower
from models.weights.checkpoint import architecture
from utils import clean_exit

LINKS = {'NVLink': 300e9, '100 Gb/s Ethernet': 11e9}  # bytes a second that a GPU can send, of H100s and of a node
GIB = 2 ** 30


def part_of(frame) -> str | None:
    """The part of the step whose code a frame runs."""
    owner = frame.f_locals.get('self')
    if isinstance(owner, MomentumQueue):
        return 'momentum encoder'
    if isinstance(owner, HiddenStates):
        return 'hidden states'
    if isinstance(owner, VisionTower | TextTower | LMHead):
        return {VisionTower: 'vision tower', TextTower: 'text tower', LMHead: 'LM head'}[type(owner)]
    name, file = frame.f_code.co_name, frame.f_code.co_filename
    if file == teaching.__file__:
        return 'teacher'
    if file == losses.__file__ and name not in ('in_chunks', '<genexpr>'):
        return frame.f_locals['function'].__name__ if name == 'run' else name
    return None


def attention(q, k, v, attn_mask=None, dropout_p=0.0):
    """F.scaled_dot_product_attention as a GPU runs it with a mask, in one kernel."""
    if attn_mask is not None:  # the kernel adds it, aligned to 16 bytes
        width = -(-k.shape[2] // 8) * 8
        mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
        mask = F.pad(mask, (0, width - mask.shape[3])).expand(*q.shape[:3], width)
        attn_mask = mask[..., :k.shape[2]]
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, torch.is_grad_enabled() and q.requires_grad, dropout_p)[0]


def dropout(x, p=0.5, training=True, inplace=False):
    """F.dropout as a GPU runs it, in one kernel."""
    return aten.native_dropout(x, p, True)[0] if training and p else x


@contextmanager
def as_on_gpu(width: int):
    """The choices of a GPU's step, on fake tensors of the CPU; gradients are clipped as lists.

    Args:
        width: the most tokens of a text, the one value of tensors that a step asks for.
    """
    item = torch.Tensor.item
    with ExitStack() as held:
        for owner, name, value in (
                (models.text, 'prefers_plain_attention', lambda *_: False),
                (models.vit, 'prefers_plain_attention', lambda *_: False),
                (models.linear, 'on_cpu', lambda _: False),
                (torch.nn.utils.clip_grad, '_has_foreach_support', lambda *_: True),
                (F, 'scaled_dot_product_attention', attention), (F, 'dropout', dropout),
                (torch.Tensor, 'item', lambda x: item(x) if x.is_floating_point() else width)):
            held.enter_context(patch.object(owner, name, value))
        held.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def build(config: dict) -> Objective:
    """The objective of a config of pre-training, on the meta device."""
    size, ita = config['model']['image_size'], config['ita']
    with torch.device('meta'):
        teacher, student = (BLIP(architecture(name, size, VOCABULARY)) for name in ('base', config['model']['size']))
        momentum = MomentumQueue(student, ita['queue_size'], ita['momentum'], teacher.config.embed_dim)
        return Objective(student, config['loss'], (CLS, ENC, DEC), momentum, teacher,
                         negative_all_rank=config['negative_all_rank'], hidden_layers=config['hidden_layers'])


def faked(objective: Objective) -> Objective:
    """A copy from the meta device, under a mode of fake tensors."""
    fakes, teacher = {}, objective.teacher
    for x in (*objective.parameters(), *objective.buffers(), *teacher.parameters(), *teacher.buffers()):
        fake = torch.empty(x.shape, dtype=x.dtype)
        fakes[id(x)] = torch.nn.Parameter(fake, x.requires_grad) if isinstance(x, torch.nn.Parameter) else fake
    return copy.deepcopy(objective, fakes).train()


def count(config: dict, processes: int = 1, compiled: bool = False) -> Traffic:
    """Count one step of a config of pre-training, its optimizer's state already there.

    Args:
        processes: among which this one exchanges what all of them need.
        compiled: with `train.compile`.
    """
    batch_size, length = config['train']['batch_size'], config['data']['max_tokens']
    lengths = torch.linspace(8, length, batch_size).long().tolist()
    objective, bf16 = build(config), config['train']['precision'] == 'bf16'
    if bf16:
        objective.frozen.compute_in(torch.bfloat16)
    with ExitStack() as held:
        if processes > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore
            dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=processes)
            held.callback(dist.destroy_process_group)
        held.enter_context(as_on_gpu(length))
        objective = faked(objective)
        optimizer = build_optimizer(objective, config['optim'], torch.device('cpu'))
        for group in optimizer.param_groups:
            for x in group['params']:
                x.grad = torch.zeros_like(x)
        optimizer.step()
        optimizer.zero_grad()
        images = torch.empty(batch_size, 3, *[config['model']['image_size']] * 2)
        ids, sample_ids = torch.ones(batch_size, length, dtype=torch.long), torch.ones(batch_size, dtype=torch.long)
        batch = images, ids, torch.ones_like(ids), sample_ids
        traffic = held.enter_context(Traffic(part_of))
        if compiled:
            torch._dynamo.reset()
            objective.compile_parts(backend=traffic.backend)
        for name in ('all_gather', 'all_reduce'):
            held.enter_context(patch.object(dist, name, getattr(traffic, name)))
        traffic.hold(*objective.parameters(), *objective.buffers(), *objective.teacher.parameters(), *batch,
                     *(x for state in optimizer.state.values() for x in state.values()))
        traffic.kept = traffic.alive
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            update, batches = objective.prepare([Batch(*batch, lengths)], 0.4, 1)
            loss = objective(batches.pop(), update)['loss']
        traffic.label = 'sums of gradients'
        loss.backward()
        traffic.label = 'clipping and AdamW'
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config['optim']['clip_grad'])
        optimizer.step()
        optimizer.zero_grad()
        traffic.label = 'momentum encoder'
        objective.momentum.update(objective.student)
        objective.momentum.enqueue(update.ids, **update.own())
        traffic.gradients = sum(4 * x.numel() for x in objective.parameters() if x.requires_grad)
    return traffic


def exchange(traffic: Traffic, processes: int) -> str:
    """What each of some processes sends a step, and the least seconds that it takes by ring algorithms.

    An all-gather of b bytes a process sends (W - 1) b, an all-reduce of b bytes 2 (W - 1) / W b.
    """
    times = {'all_gather': processes - 1, 'all_reduce': 2 * (processes - 1) / processes}
    sent = {'all_reduce of gradients (DDP, while the backward pass runs)': times['all_reduce'] * traffic.gradients}
    sent |= {f'{name} of features, ids and negatives': times[name] * number for name, number in traffic.sent.items()}
    lines = ['| exchange | MB sent by a process | ms by NVLink | ms by 100 Gb/s Ethernet |', '|---|---:|---:|---:|']
    lines += [f'| {name} | {number / 1e6:.2f} | ' + ' | '.join(f'{1000 * number / rate:.2f}' for rate in LINKS.values())
              + ' |' for name, number in sent.items()]
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--processes', type=whole(1), default=1, help='default: %(default)s')
    parser.add_argument('--operations', type=whole(0), default=0, help='show this many of the costliest')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='of configs/pretrain.yaml')
    args = parser.parse_args(argv)
    config = load_config('configs/pretrain.yaml', 'configs/pretrain.yaml', args.overrides)
    traffic = count(config, args.processes)
    compiled = count(config, args.processes, compiled=True)
    print('One step\n\n| part | TFLOP | GB, eager | kernels, eager | GB, compiled | kernels, compiled |\n'
          '|---|---:|---:|---:|---:|---:|')
    for name in [*sorted({*traffic.parts, *compiled.parts}), 'all']:
        eager, fused = (side.total if name == 'all' else side.parts[name] for side in (traffic, compiled))
        print(f'| {name} | {eager.flops / 1e12:.2f} | {eager.bytes / 1e9:.1f} | {eager.kernels} | '
              f'{fused.bytes / 1e9:.1f} | {fused.kernels} |')
    if args.processes > 1:
        print(f'\nWhat {args.processes} processes exchange\n\n{exchange(traffic, args.processes)}')
    print('\nPeak memory\n\n| step | GiB | of which stays | reached in |\n|---|---:|---:|---|')
    for name, side in (('eager', traffic), ('compiled', compiled)):
        print(f'| {name} | {side.peak / GIB:.1f} | {side.kept / GIB:.1f} | {side.peak_part} |')
    for side in (traffic, compiled):
        worst = sorted(side.operations.items(), key=lambda item: -item[1].bytes)[:args.operations]
        for (part, operation), cost in worst:
            print(f'{part:<40} {operation:<45} {cost.bytes / 1e9:8.2f} GB {cost.kernels:5d}')


if __name__ == '__main__':
    with clean_exit():
        main()
