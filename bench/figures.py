"""Figures in documents come from the runs that measured them.

    python -m bench.figures search -- python -m bench.search --threads 1

runs a command and keeps the Markdown tables that it prints in bench/search.json, as an entry with the command, the
date, the commit, the machine and the minutes it took; an entry of the same command is replaced.
Then it fills in every document, as `python -m bench.figures` alone does. Comments mark the places:

    <!-- figures: bench/search.json -->                             every table of every run
    <!-- figures: bench/search.json | TITLE -->                     the first table whose title begins so
    <!-- figures: bench/search.json | TITLE | COLUMN; COLUMN -->    some of its columns
    <!-- figures: bench/search.json | TITLE | ROW x COLUMN: VALUE -->   a column for each value of COLUMN
    <!-- figure: bench/search.json | TITLE | ROW | COLUMN -->       one cell, within a line
    <!-- figure: bench/search.json | machine -->                    a field of the newest run, within a line

up to `<!-- end -->`. A table's title is the line printed before it, or else its first column's name. ROW is the text of
the row's first cell, or of its first cells joined by commas.
"""

if __name__ == '__main__':  # run by its path, a script looks for modules in its own folder
    import os
    import sys
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import json
import platform
import re
import shlex
import subprocess
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from eval.table import markdown
from utils import ROOT, atomic_write, clean_exit, shorten

MARK = re.compile(r'(<!-- (figures?): ([^>]+) -->)(.*?)(<!-- end -->)', re.DOTALL)
DOCUMENTS = ('README.md', 'data/README.md', 'models/README.md', 'eval/README.md', 'bench/*.md')
PACKAGES = ('torch', 'transformers', 'openvino', 'faiss-cpu')
NOT_YET = 'Not measured yet.'


# ---------------------------------------------------------------- measuring

def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The Markdown tables in a text by their titles; a row is {column: cell}, cells as they are printed.

    Raises:
        ValueError: two columns, or two tables, have the same name.
    """
    found, title, rows = {}, '', None
    for line in [*text.splitlines(), '']:
        cells = [cell.strip() for cell in line.strip().strip('|').split('|')] if line.startswith('|') else []
        if not cells:
            title, rows = line.strip('# ') or ('' if rows else title), None
        elif rows is None:
            columns, rows = cells, []
            if len({*columns}) < len(columns) or (title := title or columns[0] or 'all') in found:
                raise ValueError(f'the table {shorten(title)} repeats its title or the name of a column')
            found[title] = rows
        elif not re.fullmatch(r'[-: |]+', line):
            rows.append(dict(zip(columns, cells, strict=True)))
    return found


def machine() -> str:
    """The GPU or CPU, and the packages that a measurement depends on."""
    info = Path('/proc/cpuinfo')
    text = info.read_text() if info.is_file() else ''
    names = re.findall(r'^model name\s*: (.*)', text, re.MULTILINE) or [platform.processor()]
    kinds = [name for name in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if re.search(rf'\b{name}\b', text)]
    parts = [f'{torch.cuda.get_device_name()} with'] if torch.cuda.is_available() else []
    parts.append(f'{len(names)} cores of {names[0]} ({", ".join(kinds)})')
    for package in PACKAGES:
        try:
            parts.append(f'{package} {version(package)}')
        except PackageNotFoundError:
            continue
    return ', '.join(parts).replace('with,', 'with')


def record(name: str, command: list[str]) -> None:
    """Run a command, show what it prints, and keep its tables in bench/NAME.json.

    Raises:
        ValueError: it fails, or prints no table.
    """
    started, lines = time.monotonic(), []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(line, end='', flush=True)
        lines.append(line)
    minutes, found = (time.monotonic() - started) / 60, tables(''.join(lines))
    if process.wait() or not found:
        raise ValueError(f'{shlex.join(command)} {"failed" if process.returncode else "printed no table"}')
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout
    run = {'command': shlex.join(command), 'date': date.today().isoformat(), 'commit': commit.strip(),
           'machine': machine(), 'minutes': round(minutes, 1), 'tables': found}
    path = ROOT / 'bench' / f'{name}.json'
    others = [old for old in read(path) if old['command'] != run['command']]
    with atomic_write(path) as file:
        json.dump([run, *others], file, indent=1, ensure_ascii=False)


def read(path: Path) -> list[dict]:
    """The runs in a file of figures, newest first."""
    return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else []


# ---------------------------------------------------------------- documents

def table(rows: list[dict], columns: str = '') -> list[dict[str, str]]:
    """Some columns of a table (`A; B`), or a column for each value of one of them (`ROW x COLUMN: VALUE`)."""
    if ' x ' in columns:
        row_key, column_key, value = re.fullmatch(r'(.*) x (.*): (.*)', columns).groups()
        wide: dict[str, dict] = {}
        for row in rows:
            wide.setdefault(row[row_key], {'': row[row_key]})[row[column_key]] = str(row[value])
        values = dict.fromkeys(key for row in wide.values() for key in row)
        return [{key: row.get(key, '') for key in values} for row in wide.values()]
    names = columns.split('; ') if columns else list(rows[0])
    return [{name: str(row[name]) for name in names} for row in rows]


def cell(rows: list[dict], name: str, column: str) -> str:
    return next(str(row[column]) for row in rows
                for count in range(1, len(row)) if ', '.join(map(str, list(row.values())[:count])) == name)


def whole(run: dict) -> str:
    """What a run measured: how, then every table under its title."""
    text = f'`{run["command"]}`, {run["date"]}, commit {run["commit"]}, {run["machine"]}'
    text += f', {run["minutes"]} minutes:\n' if 'minutes' in run else ':\n'
    for title, rows in run['tables'].items():
        text += '' if title in (*rows[0], 'all') else f'\n{title}\n'
        text += f'\n{markdown(table(rows))}'
    return text


def fill(mark: re.Match) -> str:
    start, kind, what, _, end = mark.groups()
    file, *place = what.split(' | ')
    runs = read(ROOT / file)
    if not runs:
        content = NOT_YET
    elif kind == 'figure' and len(place) == 1:
        content = str(runs[0][place[0]])
    elif place:
        found = [rows for run in runs for title, rows in run['tables'].items() if title.startswith(place[0])]
        if not found:
            raise ValueError(f'{file} has no table {shorten(place[0])}')
        content = cell(found[0], *place[1:]) if kind == 'figure' else markdown(table(found[0], *place[1:]))
    else:
        content = '\n'.join(map(whole, runs))
    return f'{start}{content}{end}' if kind == 'figure' else f'{start}\n\n{content.rstrip()}\n\n{end}'


def filled(text: str) -> str:
    """A document's text with the figures that its files hold.

    Raises:
        ValueError: a file lacks what a mark names.
    """
    try:
        return MARK.sub(fill, text)
    except (KeyError, StopIteration) as error:
        raise ValueError(f'a mark names a row or column that is not there: {error}') from None


def documents() -> list[Path]:
    return [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='?', help='of the file in bench/')
    parser.add_argument('command', nargs='*', help='what prints the tables, after --')
    args = parser.parse_args(argv)
    if args.command:
        record(args.name, args.command)
    for path in documents():
        text = path.read_text(encoding='utf-8')
        if (new := filled(text)) != text:
            with atomic_write(path) as file:
                file.write(new)


if __name__ == '__main__':
    with clean_exit():
        main()
