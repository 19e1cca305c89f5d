"""Configs: a user's YAML is laid over the shipped file of its script, then `key=value` overrides; all of it is checked
against configs/rules.py."""

import argparse
import codecs
import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from configs.rules import (
    RENAMED,
    SIZE_DEFAULTS,
    SIZE_RULES,
    Text,
    net_relations,
    output_path,
    relations,
    rule,
    size_relations,
    whole,
)
from utils import ROOT, logger, shorten

MOST_BYTES, MOST_VALUES, DEEPEST = 2 ** 20, 10_000, 20  # of a YAML file; the shipped ones hold about 100 values
SIZES = ROOT / 'configs' / 'sizes.yaml'


def parse_yaml(text: str, source: str):
    """The value of a YAML text.

    Raises:
        ValueError: it is no YAML, or is too large, too deep, or would be with its aliases written out.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f'{source} is too large for settings: {len(text):,} characters')
    try:
        refused = excess(text)
        value = None if refused else YAML(typ='safe').load(text)
    except YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        place = f' (line {mark.line + 1})' if mark else ''
        problem = ValueError(getattr(error, 'problem', None) or error)
        raise ValueError(f'{source} is not valid YAML: {shorten(problem, 200)}{place}') from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # odd tags
        raise ValueError(f'{source} is not valid YAML: {shorten(error, 200)}') from None
    if refused:
        raise ValueError(f'{source} {refused}')
    return value


def excess(text: str) -> str | None:
    """What is too much in a YAML text with its aliases written out, found from its events alone: nothing is built."""
    counts: dict[str, int] = {}  # values under each anchor
    nodes: list[tuple[str | None, int]] = [(None, 0)]  # open collections: anchor, values so far
    for event in YAML(typ='safe').parse(text):
        if isinstance(event, CollectionStartEvent):
            nodes.append((event.anchor, 1))
            if len(nodes) > DEEPEST:
                return f'is nested more than {DEEPEST} levels deep'
            continue
        if isinstance(event, CollectionEndEvent):
            anchor, count = nodes.pop()
        elif isinstance(event, ScalarEvent):
            anchor, count = event.anchor, 1
        elif isinstance(event, AliasEvent):
            if event.anchor not in counts:
                return f'has an alias {shorten("*" + event.anchor)} that stands for nothing, or for itself'
            anchor, count = None, counts[event.anchor]
        else:
            continue
        if anchor:
            counts[anchor] = count
        outer, before = nodes[-1]
        nodes[-1] = outer, before + count
        if before + count > MOST_VALUES:
            return f'holds more than {MOST_VALUES:,} values, aliases written out: too many for settings'
    return None


def read_yaml(path: str | os.PathLike) -> dict:
    """Read a YAML mapping, in UTF-8, or in UTF-16 with its byte order mark. A relative path that is not there is looked
    for in the repository, so that the shipped configs are found from any folder.

    Raises:
        FileNotFoundError, ValueError: the file is missing, is no text, no YAML, or no mapping.
    """
    name, path = shorten(path), Path(path) if os.path.exists(path) else ROOT / path
    if os.path.isdir(path):
        raise ValueError(f'{name} is a folder: name a YAML file')
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no config file {name}: the shipped ones are in {ROOT / "configs"}')
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f'{name} is too large for settings: {path.stat().st_size:,} bytes')
    data = path.read_bytes()
    try:
        text = data.decode('utf-16' if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else 'utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{name} is no text in UTF-8: {error.reason} at byte {error.start}') from None
    config = parse_yaml(text, name)
    if not isinstance(config, dict):
        raise ValueError(f'{name} must hold a mapping of settings, ' +
                         ('and is empty' if config is None else f'got {shorten(config)}'))
    return config


def flatten(config: dict, prefix: str = '') -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything in nested mappings that are not empty."""
    for key, value in config.items():
        name = f'{prefix}{key if isinstance(key, str) else shorten(key)}'
        if isinstance(value, dict) and value:
            yield from flatten(value, f'{name}.')
        else:
            yield name, value


def read_override(override: str, known: Collection[str]) -> tuple[str, object]:
    """`a.b=value` -> (key, value). The value is YAML, but an unquoted string is taken as it stands, braces and all."""
    key, equals, text = override.partition('=')
    if not equals or not key:
        raise ValueError(f'override {shorten(override)} is not of the form key=value')
    if RENAMED.get(key, key) not in known or not isinstance(rule(RENAMED.get(key, key)), Text):
        return key, parse_yaml(text, f'command line: {shorten(key)}')
    if text in ('null', '~'):
        return key, None
    if text[:1] in ('"', "'"):
        return key, parse_yaml(text, f'command line: {shorten(key)}')
    return key, text


def load_config(path: str | os.PathLike, schema: str | os.PathLike, overrides: list[str] = ()) -> dict:
    """Lay the config `path` over the shipped file of its script (`schema`), and `key=value` overrides over both.

    Raises:
        FileNotFoundError, ValueError: the file is missing or unreadable, or a setting is unknown, is out of its range
            (configs/rules.py) or does not go with another; the message names the file, the key and the remedy.
    """
    config = dict(flatten(read_yaml(ROOT / schema)))
    sections = {key.rpartition('.')[0] for key in config} - {''}
    name = shorten(Path(path))
    given = [(name, *setting) for setting in with_new_names(flatten(read_yaml(path)), name)]
    repeated = [key for key, count in Counter(key for _, key, _ in given).items() if count > 1]
    if repeated:
        raise ValueError(f'{name}: {shorten(repeated[0])} is given twice')
    typed = with_new_names([read_override(override, config) for override in overrides], 'command line')
    given += [('command line', *setting) for setting in typed]  # the last of a key wins
    sources = dict.fromkeys(config, str(schema))
    for source, key, value in [(str(schema), *setting) for setting in config.items()] + given:
        if key in sections:
            raise ValueError(f'{source}: {shorten(key)} is a section: give its settings, such as '
                             f'{next(name for name in config if name.startswith(key + "."))}; got {shorten(value)}')
        if key not in config:
            near = nearest(key, [*config, *sections])
            raise ValueError(f'{source}: unknown key {shorten(key)}; did you mean {near}?')
        try:
            config[key], sources[key] = rule(key).read(value), source
        except ValueError as error:
            raise ValueError(f'{source}: {key} {error}; got {shorten(value)}') from None
    size, source = config['model.size'], sources['model.size']
    net = read_size(size, f'{source}: model.size')
    for key, problem in relations(config) + net_relations(config, net, f'model.size {size}'):
        raise ValueError(f'{sources[key]}: {key} {problem}; got {shorten(config[key])}')
    return nest(config)


def with_new_names(settings: Iterable[tuple[str, object]], source: str) -> list[tuple[str, object]]:
    """(dotted key, value) pairs with old keys replaced by those of today, which one line says.

    Args:
        source: where the settings stand, for that line.
    """
    settings = list(settings)
    old = [key for key in dict(settings) if key in RENAMED]
    if old and (os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or '0') == '0':  # one process of a run
        logger.warning('%s: old names of settings: %s', source, '; '.join(
            f'{key} is now {RENAMED[key]}' if RENAMED[key] else f'{key} is gone (nothing reads it)' for key in old))
    return [(RENAMED.get(key, key), value) for key, value in settings if RENAMED.get(key, key)]


def nest(flat: dict) -> dict:
    """Values by dotted key -> nested mappings."""
    config: dict = {}
    for key, value in flat.items():
        *parents, leaf = key.split('.')
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return config


def nearest(name: str, names: list[str]) -> str:
    return difflib.get_close_matches(name[:100], names, n=1, cutoff=0.0)[0]


def read_size(size: str, source: str = 'model size') -> dict[str, int]:
    """A checked block of configs/sizes.yaml, its defaults filled in.

    Args:
        size: NAME, or FILE.yaml:NAME for a block of another file.
        source: where the name stands, for messages.

    Raises:
        FileNotFoundError, ValueError: no such file or block, or one of which no net can be built.
    """
    file, _, name = size.rpartition(':')
    path = Path(file or SIZES)
    try:
        table = read_yaml(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f'{source}: {error}') from None
    if name not in table:
        raise ValueError(f'{source}: unknown size {shorten(name)}; {shorten(path)} has {", ".join(map(str, table))}')
    block, where = table[name], f'{shorten(path)}: {name}'
    if not isinstance(block, dict):
        raise ValueError(f'{where} must be a mapping with {", ".join(SIZE_RULES)}; got {shorten(block)}')
    block = SIZE_DEFAULTS | block
    for key in block.keys() - SIZE_RULES.keys():
        raise ValueError(f'{where}: unknown key {shorten(key)}; did you mean {nearest(str(key), list(SIZE_RULES))}?')
    for key, allowed in SIZE_RULES.items():
        try:
            allowed.read(block.get(key))
        except ValueError as error:
            raise ValueError(f'{where}: {key} {error}; got {shorten(block.get(key))}') from None
    for key, problem in size_relations(block):
        raise ValueError(f'{where}: {key} {problem}; got {block[key]}')
    return block


def script_arguments(description: str, config: str, output_dir: str, argv: list[str] | None = None,
                     tests: bool = False) -> tuple:
    """Parse the options that every training script takes -> (namespace, config checked against the default).

    Args:
        tests: the script ends with the test images, which an option leaves alone.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=config, help='YAML file (default: %(default)s)')
    parser.add_argument('--output_dir', default=output_dir, type=output_path,
                        help='checkpoints and logs (default: %(default)s); a run found there is resumed')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps (default: %(default)s)')
    parser.add_argument('--seed', default=42, type=whole(0, 2 ** 32 - 1))
    either = parser.add_mutually_exclusive_group()
    either.add_argument('--dry_run', action='store_true', help='check everything, train a few steps, write nothing and '
                        'print what the run will take')
    either.add_argument('--store_teacher', type=whole(1), metavar='EPOCHS', help="write the teacher's targets of this "
                        'many epochs to the folder teacher.cache, which is then trained from without the teacher')
    if tests:
        parser.add_argument('--no_test', action='store_true', help='leave the test images alone, as for choosing '
                            'settings; eval.report and its like measure best.pth later')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='override a setting, e.g. optim.lr=1e-4 (the '
                        'last of a key counts)')
    args = parser.parse_intermixed_args(argv)  # overrides before and after options
    return args, load_config(args.config, config, args.overrides)
