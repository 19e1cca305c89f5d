"""Figures of nets side by side: one table for the terminal, Markdown files and pages.

A net's figures are a dict {measure: number}; what is in MEASURES is shown, in that order, a row per measure and a
column per net, and behind each net its share of the first one, the teacher. A finetune's table uses its log's names.
"""

from pathlib import Path

from data.distributed import is_main
from models.engine.logs import read_log
from utils import atomic_write, logger

# measure -> (its name in tables, number of decimals)
MEASURES = {**{f'{way}_r{k}': (f'{way} R@{k}', 1) for way in ('txt', 'img') for k in (1, 5, 10)},
            'r_mean': ('mean recall', 1),
            'CIDEr': ('CIDEr', 1), 'Bleu_4': ('BLEU-4', 1), 'METEOR': ('METEOR', 1), 'ROUGE_L': ('ROUGE-L', 1),
            'SPICE': ('SPICE', 1), 'exact': ('exact %', 1), 'parameters_M': ('parameters (M)', 2),
            'image_gflops': ('GFLOPs/image', 2), 'image_ms': ('ms/image', 1),
            'caption_gflops': ('GFLOPs/caption', 2), 'caption_ms': ('ms/caption', 1)}


def shares(teacher: dict, student: dict) -> dict[str, float]:
    """The student's figures in per cent of the teacher's, where both have one and the teacher's is not 0."""
    return {key: 100 * student[key] / teacher[key] for key in MEASURES if key in student and teacher.get(key)}


def beside(nets: dict[str, dict], teacher: str | None) -> dict:
    """The figures of the last net for a JSON file, with those of the first one, `teacher`, if there is one."""
    *others, own = nets.values()
    return {**own, 'teacher': {'checkpoint': teacher, **others[0]},
            'share_of_teacher': shares(others[0], own)} if others else own


def side_by_side(nets: dict[str, dict]) -> list[dict[str, str]]:
    """The table of {name: figures}, the teacher first if there is one: rows of equal keys, numbers formatted."""
    (first, teacher), *students = nets.items()
    rows = []
    for key, (label, decimals) in MEASURES.items():
        if not any(key in figures for figures in nets.values()):
            continue
        row = {'': label, first: number(teacher.get(key), decimals)}
        for name, figures in students:
            share = shares(teacher, figures).get(key)
            row |= {name: number(figures.get(key), decimals),
                    f'{name} / {first}': '-' if share is None else f'{share:.0f}%'}
        rows.append(row)
    return rows


def number(value: float | None, decimals: int) -> str:
    return '-' if value is None else f'{value:.{decimals}f}'


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table with aligned columns, fit for a terminal too."""
    keys = list(rows[0])
    widths = [max(len(key), *(len(row[key]) for row in rows)) for key in keys]

    def line(cells):
        return '| ' + ' | '.join(cell.rjust(width) if i else cell.ljust(width)
                                 for i, (cell, width) in enumerate(zip(cells, widths, strict=True))) + ' |'
    rule = '|' + '|'.join('-' * (width + 1) + (':' if i else '-') for i, width in enumerate(widths)) + '|'
    return '\n'.join([line(keys), rule, *(line(row.values()) for row in rows)]) + '\n'


def finetune_table(output_dir: Path, teacher: dict[str, float]) -> None:
    """Print the table of a finished finetune and write it to `table.md`: the last `train_` and `test_` values of
    `log.txt` for DLIP and, for BLIP beside it, the `teacher`'s figures by the same names (none: no such column)."""
    if not is_main():
        return
    dlip = {key: value for row in read_log(output_dir / 'log.txt') for key, value in row.items()
            if key.startswith(('train_', 'test_')) and isinstance(value, int | float)}
    nets = {'DLIP': dlip, 'BLIP': teacher} if teacher else {'DLIP': dlip}
    text = markdown([{'': key, **{name: f'{own[key]:.4g}' if key in own else '' for name, own in nets.items()}}
                     for key in dlip])
    with atomic_write(output_dir / 'table.md') as file:
        file.write(text)
    logger.info('%s\n\n%s', output_dir / 'table.md', text)
