"""Counts FLOPs, bytes, kernels and memory of what runs on fake tensors: the counter of bench/traffic.py.

Eager operations are counted as they are dispatched, compiled ones as torch.compile would run them: inductor lowers and
fuses their graphs, forward and backward, and its scheduler says how many kernels there are and what each reads and
writes. Nothing is generated and nothing is run. It lowers for the CPU, as it takes no other device that is absent; on
a GPU it may fuse a little otherwise. Memory within a compiled graph is that of its operations one by one, an upper
bound. All this uses private parts of torch, which other versions may lack.
"""

import copy
import sys
import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, fields
from unittest.mock import patch

import sympy
import torch
from torch._inductor import compile_fx as inductor
from torch._inductor import ir
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

aten, COMPOSITE = torch.ops.aten, torch._C.DispatchKey.CompositeImplicitAutograd
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach,
        aten.lift_fresh, aten._unsafe_view, aten.alias, aten.set_, aten.resize_, aten.is_same_size}
WRITES = {aten.zeros, aten.zeros_like, aten.ones, aten.ones_like, aten.full, aten.full_like, aten.new_zeros,
          aten.new_full, aten.new_ones, aten.fill_, aten.zero_, aten.arange, aten.rand, aten.scalar_tensor}
GATHERS = {aten.index, aten.index_select, aten.gather, aten.embedding}  # read the rows they return
TENSORS_PER_KERNEL, CHUNKS_PER_KERNEL, CHUNK = 110, 320, 65536  # of torch's multi_tensor_apply


@dataclass
class Count:
    """Of one part of the step."""

    flops: int = 0
    bytes: int = 0
    kernels: int = 0


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
        forms: graphs that were compiled, forward and backward ones.
    """

    def __init__(self, part_of):
        super().__init__()
        self.part_of, self.label = part_of, 'other'
        self.parts: dict[str, Count] = defaultdict(Count)
        self.operations: dict[tuple[str, str], Count] = defaultdict(Count)
        self.alive = self.peak = 0
        self.peak_part = ''
        self.seen: set[int] = set()  # storages that are alive
        self.kept = self.gradients = self.forms = 0
        self.compiled = self.compiling = False  # a compiled graph runs, which is counted as a whole; one is being made
        self.sent: dict[str, int] = defaultdict(int)
        self.made_by: list[str] = []  # parts, by autograd's sequence number of the node

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile works within it."""
        return True

    def hold(self, *tensors: torch.Tensor) -> None:
        """Count the storages of tensors until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor) -> None:
        """Stands for torch.distributed's: every process has what this one has."""
        self.sent['all_gather'] += size(x)
        parts[:] = [x] * len(parts)

    def all_reduce(self, x: torch.Tensor) -> None:
        self.sent['all_reduce'] += size(x)

    @property
    def total(self) -> Count:
        return Count(*(sum(getattr(part, field.name) for part in self.parts.values()) for field in fields(Count)))

    def place(self) -> str:
        """The part of the step of the present operation."""
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            return f'{self.made_by[number]}, backward' if number < len(self.made_by) else 'sums of gradients'
        frame, found = sys._getframe(2), self.label
        while frame is not None:  # the outermost one that is claimed
            found, frame = self.part_of(frame) or found, frame.f_back
        self.made_by += [found] * (torch._C._autograd._get_sequence_nr() - len(self.made_by))
        return found

    def add(self, part: str, operation: str, **numbers: int) -> None:
        for count in (self.parts[part], self.operations[part, operation]):
            for name, number in numbers.items():
                setattr(count, name, getattr(count, name) + number)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.compiling:
            return func(*args, **kwargs)
        if func.namespace == 'aten' and func.has_kernel_for_dispatch_key(COMPOSITE):
            with self:  # in inference mode they come whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        part, out, packet = self.place(), func(*args, **kwargs), func.overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
        before = {x.untyped_storage()._cdata for x in inputs}
        self.hold(*outputs)
        if self.alive > self.peak:
            self.peak, self.peak_part = self.alive, part
        if self.compiled:
            self.add(part, packet.__name__, flops=flops)
            return out
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
        self.add(part, packet.__name__, flops=flops, bytes=moved, kernels=launches(packet.__name__, args))
        return out

    # ------------------------------------------------------------ compiled graphs

    def backend(self, graph: torch.fx.GraphModule, inputs: list):
        """For torch.compile: inductor up to where it would generate code; then what it scheduled is counted in each
        call."""
        with self.uncounted():
            return inductor.compile_fx(graph, inputs, inner_compile=self.lowered)

    @contextmanager
    def uncounted(self):
        before, self.compiling = self.compiling, True
        try:
            yield
        finally:
            self.compiling = before

    def lowered(self, graph: torch.fx.GraphModule, inputs: list, is_backward: bool = False, is_inference: bool = False,
                **_):
        with self.uncounted(), torch.no_grad():
            lowering = lower(copy.deepcopy(graph), inputs, is_backward, is_inference)
        symbols = [node.meta.get('val') for node in graph.graph.find_nodes(op='placeholder')]
        found: dict[tuple, list] = {}  # kernels by the sizes that the graph leaves open
        self.forms += 1

        def run(args: list):
            sizes = tuple(sizes_of(symbols, args).items())
            if sizes not in found:
                found[sizes] = kernels(lowering, dict(sizes))
            self.compiled = True
            try:
                outputs = graph.forward(*args)
            finally:
                self.compiled = False
                args.clear()
            part = self.place()
            for name, moved, launched in found[sizes]:
                self.add(part, name, bytes=moved, kernels=launched)
            return outputs
        run._boxed_call = True
        return run


def lower(graph: torch.fx.GraphModule, inputs: list, is_backward: bool, is_inference: bool) -> GraphLowering:
    """A graph as inductor schedules it."""
    inductor.view_to_reshape(graph)
    mode = inductor.fake_tensor_prop(graph, inputs)
    inductor._recursive_record_original_output_strides(graph)
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        inductor._recursive_post_grad_passes(graph, is_inference=is_inference)
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=inductor.shape_env_from_inputs(inputs),
                                 is_backward=is_backward, is_inference=is_inference)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            lowering._update_scheduler()
    return lowering


def sizes_of(symbols: list, args: list) -> dict:
    """The values of symbolic sizes in a graph's arguments."""
    pairs = []
    for symbol, arg in zip(symbols, args, strict=True):
        pairs += zip(symbol.shape, arg.shape, strict=True) if isinstance(arg, torch.Tensor) else [(symbol, arg)]
    return {size.node.expr: int(value) for size, value in pairs
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol}


def kernels(lowering: GraphLowering, sizes: dict) -> list[tuple[str, int, int]]:
    """`kernel_of` all that was scheduled, of a call with these sizes."""
    usual = lowering.sizevars.optimization_hint

    def hint(expression, **options):
        value = sympy.sympify(expression).subs(sizes)
        return int(value) if value.is_number else usual(expression, **options)
    with V.set_graph_handler(lowering), patch.object(lowering.sizevars, 'optimization_hint', hint):
        return [kernel for node in lowering.scheduler.nodes if (kernel := kernel_of(node))]


def kernel_of(node) -> tuple[str, int, int] | None:
    """Name, bytes and launches of what inductor's scheduler made one kernel; None of what is none."""
    if isinstance(node, NopKernelSchedulerNode):
        return None
    moved = node.get_read_write_buffers_sizes_impl(include_reads=True, include_writes=True)
    if isinstance(node.node, ir.MultiOutput):  # one output of an operation that has several
        layout = node.node.get_layout()
        numel = V.graph.sizevars.optimization_hint(node.node.get_numel())
        return 'an output', numel * layout.dtype.itemsize, 0
    name = getattr(node.node, 'python_kernel_name', None) if node.node is not None else 'fused'
    return name or type(node).__name__, moved, 1


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
