"""Configs: reading YAML, checking it against the shipped file of its script, `key=value` overrides."""

import argparse
import difflib
import os
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from configs.rules import whole
from utils import ROOT


def read_yaml(path: str | os.PathLike) -> dict:
    """Read a YAML mapping.

    Raises:
        FileNotFoundError, ValueError: the file is missing, is no YAML, or is no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no config file {path}: the shipped ones are in {ROOT / "configs"}')
    try:
        config = YAML(typ='safe').load(path)
    except YAMLError as error:
        raise ValueError(f'{path} is not valid YAML: {error}') from None
    if not isinstance(config, dict):
        raise ValueError(f'{path} must hold a mapping of settings')
    return config


def check_config(config: dict, schema: dict, source: str, prefix: str = '') -> None:
    """Compare a config with a reference config key by key: same keys, same types (null where either is null).

    Raises:
        ValueError: naming the key, the file and the nearest valid name.
    """
    for key in config:
        if key not in schema:
            near = difflib.get_close_matches(str(key), [str(k) for k in schema], n=1, cutoff=0.0)
            raise ValueError(f'{source}: unknown key "{prefix}{key}"; did you mean "{prefix}{near[0]}"?')
    for key, example in schema.items():
        name = f'{prefix}{key}'
        if key not in config:
            raise ValueError(f'{source}: missing key "{name}" (for example {name}: {example})')
        value = config[key]
        if isinstance(example, dict):
            if not isinstance(value, dict):
                raise ValueError(f'{source}: "{name}" must be a mapping with {", ".join(example)}; got {value!r}')
            check_config(value, example, source, f'{name}.')
        elif value is None or example is None:
            if isinstance(value, dict) or (value is None and isinstance(example, int | float)):
                raise ValueError(f'{source}: "{name}" must be like {example!r}; got {value!r}')
        else:
            expected = (int, float) if type(example) is float else type(example)
            if not isinstance(value, expected) or isinstance(value, bool) != isinstance(example, bool):
                raise ValueError(f'{source}: "{name}" must be {type(example).__name__} like {example!r}; got {value!r}')


def apply_override(config: dict, override: str) -> None:
    """Set one `a.b=value` in place; the value is read as YAML."""
    name, equals, text = override.partition('=')
    if not equals:
        raise ValueError(f'override {override!r} is not of the form key=value')
    *parents, leaf = name.split('.')
    node = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        keys = list(flat_keys(config))
        near = difflib.get_close_matches(name, keys, n=1, cutoff=0.0)
        raise ValueError(f'command line: unknown key "{name}"; did you mean "{near[0]}"?')
    node[leaf] = YAML(typ='safe').load(text) if text else None


def flat_keys(config: dict, prefix: str = ''):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat_keys(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}'


def load_config(path: str | os.PathLike, schema: str | os.PathLike, overrides: list[str] = ()) -> dict:
    """Read a config, apply `key=value` overrides and check it against a shipped reference config."""
    config, reference = read_yaml(path), read_yaml(ROOT / schema)
    check_config(config, reference, str(path))
    for override in overrides:
        apply_override(config, override)
    check_config(config, reference, 'command line' if overrides else str(path))
    return config


def script_arguments(description: str, config: str, output_dir: str, argv: list[str] | None = None,
                     tests: bool = False) -> tuple:
    """Parse the options that every training script takes -> (namespace, config checked against the default).

    Args:
        tests: the script ends with the test pictures, which an option leaves alone.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=config, help='YAML file (default: %(default)s)')
    parser.add_argument('--output_dir', default=output_dir, help='checkpoints and logs (default: %(default)s); '
                        'a run found there is resumed')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    parser.add_argument('--seed', default=42, type=whole(0, 2 ** 32 - 1))
    parser.add_argument('--dry_run', action='store_true', help='check everything, train a few steps, write nothing and '
                        'print what the run will take')
    parser.add_argument('--store_teacher', type=whole(1), metavar='EPOCHS', help="write the teacher's targets of this "
                        'many epochs to the folder teacher.cache, which is then trained from without the teacher')
    if tests:
        parser.add_argument('--no_test', action='store_true', help='leave the test pictures alone, as for choosing '
                            'settings; eval.report and its like measure best.pth later')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='override a setting, e.g. optim.lr=1e-4')
    args = parser.parse_intermixed_args(argv)  # overrides before and after options
    return args, load_config(args.config, config, args.overrides)
