"""Keeping what a notebook sets for all of torch, and the threads of the process it forked from, away from DLIPProd."""

import functools
import inspect
import os

import torch

if hasattr(os, 'register_at_fork'):
    # A forked child has none of the threads that torch's operations started in its parent, and would wait for them.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def on_its_own_devices(cls: type) -> type:
    """Make the public methods of a class ignore `torch.set_default_device`: what they do not place explicitly is on the
    CPU, as without it."""
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and (name == '__init__' or not name.startswith('_')):
            setattr(cls, name, _with_cpu_default(method))
    return cls


def _with_cpu_default(method):
    @functools.wraps(method)
    def called(*arguments, **options):
        if torch.get_default_device().type == 'cpu':
            return method(*arguments, **options)
        with torch.device('cpu'):  # of this thread alone
            return method(*arguments, **options)
    return called
