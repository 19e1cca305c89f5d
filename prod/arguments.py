"""What the arguments of the public methods may be, by their annotations."""

import functools
import inspect
import os
import types
import typing
from numbers import Integral, Real

import numpy as np

from utils import shorten

KINDS = {int: (Integral, 'a whole number'), float: (Real, 'a number'), bool: ((bool, np.bool_), 'true or false'),
         str: (str, 'a string'), os.PathLike: (os.PathLike, 'a path'), types.NoneType: (types.NoneType, 'None')}
LONGEST = 4096  # characters of a path, where an operating system takes the most


def checked(cls: type) -> type:
    """Make the public methods of a class check their arguments: those annotated with plain classes or a union of them.

    Numbers of numpy are accepted. A method then raises TypeError for another kind of value, and ValueError for a path
    that no file can have; the message names the argument.
    """
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and (name == '__init__' or not name.startswith('_')):
            setattr(cls, name, _checking(method))
    return cls


def _checking(method):
    signature = inspect.signature(method)
    hints = {name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
             for name, hint in typing.get_type_hints(method).items() if name != 'return'}
    allowed = {name: kinds for name, kinds in hints.items() if all(isinstance(kind, type) for kind in kinds)}

    @functools.wraps(method)
    def called(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        for name in bound.arguments.keys() & allowed.keys():
            bound.arguments[name] = _read(name, bound.arguments[name], allowed[name])
        return method(*bound.args, **bound.kwargs)
    return called


def _read(name: str, value, kinds: tuple[type, ...]):
    for kind in kinds:
        accepted, _ = KINDS.get(kind, (kind, ''))
        if isinstance(value, accepted) and not (isinstance(value, bool) and kind in (int, float)):
            if os.PathLike in kinds and kind in (str, os.PathLike):
                path = os.fsdecode(value)
                if '\0' in path or len(path) > LONGEST:
                    raise ValueError(f'{name} is no path of a file: {shorten(path)}')
            return kind(value) if kind in (int, float, bool) else value
    wanted = ' or '.join(KINDS.get(kind, (kind, f'a {kind.__name__}'))[1] for kind in kinds)
    raise TypeError(f'{name} must be {wanted}, got {shorten(value)}')
