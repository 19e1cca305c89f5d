"""Keeping what a notebook sets for all of torch away from DLIPProd."""

import functools
import inspect

import torch


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
