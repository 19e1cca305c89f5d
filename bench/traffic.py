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

The fake device is the CPU, with a GPU's choices where the two differ (attention, layer norms under autocast, clipping).
"""

if __name__ == '__main__':  # before the slow imports; run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    from utils import end_at_once
    end_at_once()

import argparse
import copy
import sys
import weakref
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from inspect import signature
from itertools import count as count_from
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

import models.text
import models.vit
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
from models.text import LMHead, TextLayer, TextTower
from models.vit import CheckpointedBlock, VisionTower
from models.weights.checkpoint import architecture
from utils import clean_exit

aten, COMPOSITE = torch.ops.aten, torch._C.DispatchKey.CompositeImplicitAutograd
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach,
        aten.lift_fresh, aten._unsafe_view, aten.alias, aten.set_, aten.resize_, aten.is_same_size}
WRITES = {aten.zeros, aten.zeros_like, aten.ones, aten.ones_like, aten.full, aten.full_like, aten.new_zeros,
          aten.new_full, aten.new_ones, aten.fill_, aten.zero_, aten.arange, aten.rand, aten.scalar_tensor}
GATHERS = {aten.index, aten.index_select, aten.gather, aten.embedding}  # read the rows they return
UNFUSED = {aten.addmm, aten.mm, aten.bmm, aten.convolution, aten.convolution_backward, aten.index_copy, aten.index_put,
           aten.embedding_dense_backward, aten._scaled_dot_product_efficient_attention,
           aten._scaled_dot_product_efficient_attention_backward}  # what torch.compile leaves a kernel of its own
TENSORS_PER_KERNEL, CHUNKS_PER_KERNEL, CHUNK = 110, 320, 65536  # of torch's multi_tensor_apply
LINKS = {'NVLink': 300e9, '100 Gb/s Ethernet': 11e9}  # bytes a second that a GPU can send, of H100s and of a node
GIB = 2 ** 30


@dataclass
class Count:
    """Of one part of the step."""

    flops: int = 0
    bytes: int = 0
    kernels: int = 0


class Operation(NamedTuple):
    """One that was dispatched: the numbers and bytes of the storages that it reads and writes."""

    region: int | None
    packet: object
    reads: list[tuple[int | None, int]]
    writes: list[tuple[int | None, int]]
    moved: int
    kernels: int


class AsOnGPU(TorchFunctionMode):
    """Where a GPU runs other kernels than a CPU for the same call: fused attention, float32 layer norms of autocast.

    Args:
        width: the most tokens of a text, the one value of tensors that a step asks for.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            mask, dropout = kwargs.get('attn_mask'), kwargs.get('dropout_p', 0.0)
            if mask is not None:  # the kernel adds it, aligned to 16 bytes
                shape = *q.shape[:3], -(-k.shape[2] // 8) * 8
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
                mask = F.pad(mask, (0, shape[3] - mask.shape[3])).expand(shape)[..., :k.shape[2]]
            return aten._scaled_dot_product_efficient_attention(
                q, k, v, mask, torch.is_grad_enabled() and q.requires_grad, dropout)[0]
        if func is F.dropout:
            call = signature(F.dropout).bind(*args, **kwargs)
            call.apply_defaults()
            x, p, training = call.args[:3]
            return aten.native_dropout(x, p, True)[0] if training and p else x
        if func is torch.Tensor.item:
            return self.width
        if func is F.layer_norm and torch.is_autocast_enabled('cpu'):
            args = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
        return func(*args, **kwargs)


class Traffic(TorchDispatchMode):
    """Counts what is dispatched within it, by part.

    Args:
        part_of: a function from a frame of Python to the name of the part whose code it runs, or None.

    Attributes:
        label: the part of what no frame claims; a backward operation belongs to the part of its forward one.
        peak, alive: bytes of storages.
        peak_part: in which part of the step the peak was reached.
        kept: bytes that are there before and after a step.
        gradients: bytes of the trained parameters' gradients.
        sent: bytes handed to the collectives by name.
    """

    def __init__(self, part_of):
        super().__init__()
        self.part_of, self.label = part_of, 'other'
        self.parts: dict[str, Count] = defaultdict(Count)
        self.operations: dict[tuple[str, str], Count] = defaultdict(Count)
        self.alive = self.peak = 0
        self.peak_part = ''
        self.seen: dict[int, int] = {}  # numbers of the storages that are alive
        self.count = 0
        self.kept = self.gradients = 0
        self.region: int | None = None  # number of the call of a layer that torch.compile would compile
        self.log: list[Operation] = []
        self.sent: dict[str, int] = defaultdict(int)
        self.made_by: list[tuple] = []  # parts and regions, by autograd's sequence number of the node

    def hold(self, *tensors: torch.Tensor) -> None:
        """Count the storages of tensors until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                self.count += 1
                self.seen[storage._cdata] = self.count
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def as_region(self, method):
        """A method of a layer, each call of which is a region."""
        numbers = count_from(1)

        def run(*args, **kwargs):
            self.region = next(numbers)
            try:
                return method(*args, **kwargs)
            finally:
                self.region = None
        return run

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor) -> None:
        """Stands for torch.distributed's: every process has what this one has."""
        self.sent['all_gather'] += size(x)
        parts[:] = [x] * len(parts)

    def all_reduce(self, x: torch.Tensor) -> None:
        self.sent['all_reduce'] += size(x)

    @property
    def total(self) -> Count:
        return Count(*(sum(getattr(part, field.name) for part in self.parts.values()) for field in fields(Count)))

    def drop(self, key: int, size: int) -> None:
        self.seen.pop(key, None)
        self.alive -= size

    def place(self) -> tuple[str, int | None]:
        """The part of the step, and the region (a negative one in the backward pass), of the present operation."""
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            if number >= len(self.made_by):
                return 'sums of gradients', None
            part, region = self.made_by[number]
            return f'{part}, backward', region and -region
        frame, found = sys._getframe(2), self.label
        while frame is not None:  # the outermost one that is claimed
            found, frame = self.part_of(frame) or found, frame.f_back
        new = torch._C._autograd._get_sequence_nr() - len(self.made_by)
        self.made_by += [(found, self.region)] * new
        return found, self.region

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == 'aten' and func.has_kernel_for_dispatch_key(COMPOSITE):
            with self:  # in inference mode they come whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        part, region = self.place()
        out = func(*args, **kwargs)
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
        packet = func.overloadpacket
        before = {x.untyped_storage()._cdata for x in inputs}
        self.hold(*outputs)
        if self.alive > self.peak:
            self.peak, self.peak_part = self.alive, part
        if packet in FREE or func.is_view or not outputs and not inputs:
            return out
        mutated = func._schema.is_mutable
        written = [x for x in outputs if x.untyped_storage()._cdata not in before or mutated]
        if mutated and not outputs:  # of lists
            written = [x for value, argument in zip(args, func._schema.arguments, strict=False)
                       if argument.alias_info is not None and argument.alias_info.is_write
                       for x in tensors_of(value)]
        if not written:
            return out
        moved = sum(map(size, written))
        if packet in GATHERS:
            moved += sum(map(size, outputs)) + sum(size(x) for x in inputs if not x.is_floating_point())
        elif packet not in WRITES:
            moved += sum(map(size, inputs))
        reads, writes = ([(self.seen.get(x.untyped_storage()._cdata), size(x)) for x in xs] for xs in (inputs, written))
        self.log.append(Operation(region, packet, reads, writes, moved, launches(packet.__name__, args)))
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        for count in (self.parts[part], self.operations[part, packet.__name__]):
            count.flops += flops
            count.bytes += moved
            count.kernels += launches(packet.__name__, args)
        return out


def fused(log: list[Operation]) -> Count:
    """Bytes and kernels if torch.compile compiles the regions.

    Within a region, operations that hand over to each other with no product, attention or scatter between them become
    one kernel, which reads what comes from outside and writes what others read.
    """
    groups, level, maker = list(range(len(log))), {}, {}

    def group(number: int) -> int:
        while groups[number] != number:
            number = groups[number]
        return number

    for number, operation in enumerate(log):
        region, known = operation.region, {storage for storage, _ in operation.reads}
        at = max((level.get((region, storage), 0) for storage in known), default=0)
        single = region is None or operation.packet in UNFUSED
        for storage in known:
            before = maker.get((region, storage))
            if not single and before is not None and level[region, storage] == at and log[before].packet not in UNFUSED:
                groups[group(before)] = group(number)
        for storage, _ in operation.writes:
            level[region, storage], maker[region, storage] = at + single, number
    members, readers = defaultdict(list), defaultdict(set)
    for number, operation in enumerate(log):
        members[group(number)].append(operation)
        for storage, _ in operation.reads:
            readers[storage].add(group(number))
    total = Count()
    for number, operations in members.items():
        total.kernels += operations[0].kernels
        if len(operations) == 1:
            total.bytes += operations[0].moved
            continue
        made = {storage: size for operation in operations for storage, size in operation.writes}
        read = {storage: size for operation in operations for storage, size in operation.reads if storage not in made}
        total.bytes += sum(read.values()) + sum(size for storage, size in made.items() if readers[storage] - {number})
    return total


def tensors_of(values) -> list[torch.Tensor]:
    return [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]


def size(x: torch.Tensor) -> int:
    """Bytes of memory behind a tensor, an expanded one's counted once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def launches(name: str, args: tuple) -> int:
    if not name.startswith(('_foreach', '_fused', '_amp_foreach')):
        return 1
    tensors = args[0]
    chunks = sum(-(-x.numel() // CHUNK) for x in tensors)
    return max(-(-len(tensors) // TENSORS_PER_KERNEL), -(-chunks // CHUNKS_PER_KERNEL))


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
    if file == teaching.__file__ and name != 'logit_loss':
        return 'teacher'
    if file == losses.__file__ and name not in ('in_chunks', '<genexpr>'):
        return frame.f_locals['function'].__name__ if name == 'run' else name
    return None


@contextmanager
def as_on_gpu(width: int):
    """The choices of a GPU's step on fake tensors of the CPU: see `AsOnGPU`; and gradients clipped as lists."""
    with ExitStack() as held:
        for owner in (models.text, models.vit):
            held.enter_context(patch.object(owner, 'prefers_plain_attention', lambda *_: False))
        held.enter_context(patch.object(torch.nn.utils.clip_grad, '_has_foreach_support', lambda *_: True))
        held.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        held.enter_context(AsOnGPU(width))
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


def count(config: dict, processes: int = 1) -> Traffic:
    """Count one step of a config of pre-training, its optimizer's state already there.

    Args:
        processes: among which this one exchanges what all of them need.
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
        for layer in (TextLayer, CheckpointedBlock):
            held.enter_context(patch.object(layer, 'forward', traffic.as_region(layer.forward)))
        for name in ('lm_loss', 'logit_kl_loss'):
            setattr(objective, name, traffic.as_region(getattr(objective, name)))
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
    print('One step\n\n| part | TFLOP | GB | kernels |\n|---|---:|---:|---:|')
    for name, part in [*sorted(traffic.parts.items()), ('all', traffic.total)]:
        print(f'| {name} | {part.flops / 1e12:.2f} | {part.bytes / 1e9:.1f} | {part.kernels} |')
    compiled = fused(traffic.log)
    print(f'| with compiled layers | | {compiled.bytes / 1e9:.1f} | {compiled.kernels} |')
    if args.processes > 1:
        print(f'\nWhat {args.processes} processes exchange\n\n{exchange(traffic, args.processes)}')
    print(f'\npeak memory {traffic.peak / GIB:.1f} GiB (in {traffic.peak_part}), of which {traffic.kept / GIB:.1f} are '
          f'weights, optimizer, queues and batch')
    worst = sorted(traffic.operations.items(), key=lambda item: -item[1].bytes)[:args.operations]
    for (part, name), cost in worst:
        print(f'{part:<40} {name:<45} {cost.bytes / 1e9:8.2f} GB {cost.kernels:5d}')


if __name__ == '__main__':
    with clean_exit():
        main()
