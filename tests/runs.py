"""Runs of the training scripts at nano size, on a small scene set (the fixtures `scenes` and `pretrained`)."""

import json
import os
import signal
from pathlib import Path

import torch
from processes import joined
from ruamel.yaml import YAML

from configs import load_config
from models.distill.batch import Batch
from models.distill.objective import Objective
from models.engine.logs import read_log
from models.engine.optim import learning_rate
from models.weights.checkpoint import read_checkpoint
from utils import ROOT


def write_config(folder: Path, name: str, scenes: Path, **changes) -> Path:
    """A demo config at nano size without a teacher, on the small scene set; `changes` are dotted keys."""
    config = load_config(ROOT / f'configs/demo/{name}.yaml', f'configs/{name}.yaml')
    settings = {'model.size': 'tests/sizes.yaml:nano', 'model.image_size': 32, 'model.init': None,
                'teacher.weights': None, 'tokenizer': str(scenes / 'vocab.txt'), 'optim.warmup_steps': 2,
                'train.batch_size': 8, 'train.epochs': 2, 'train.precision': 'fp32',
                'train.log_every': 1, 'train.save_every': 2}
    if name == 'pretrain':
        settings |= {'model.init_vision': None, 'model.init_text': None, 'ita.queue_size': 20,
                     'data.train': str(scenes / 'dataloader/all.json')}
    else:
        settings |= {'data.root': str(scenes / 'flickr30k')}
        config['loss'] = {key: float(key in ('ita', 'itm', 'lm')) for key in config['loss']}
    for key, value in (settings | {k.replace('__', '.'): v for k, v in changes.items()}).items():
        node = config
        *parents, leaf = key.split('.')
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    path = folder / f'{name}.yaml'
    YAML(typ='safe').dump(config, path)
    return path


def options(config: Path, out: Path, device: str = 'cpu') -> list[str]:
    return ['--config', str(config), '--output_dir', str(out), '--device', device, '--seed', '1']


def run(script, config: Path, out: Path, *overrides: str) -> dict:
    script.main([*options(config, out), *overrides])
    return read_checkpoint(out / 'last.pth')


def run_on(processes: int, config: Path, out: Path, *overrides: str) -> dict:
    """`run` of `pretrain_dlip.py` on several processes."""
    for done in joined(processes, 'pretrain_dlip.py', *options(config, out), *overrides):
        assert done.returncode == 0, done.stderr[-2000:]
    return read_checkpoint(out / 'last.pth') if '--store_teacher' not in overrides else {}


def run_on_two(config: Path, out: Path, *overrides: str) -> dict:
    return run_on(2, config, out, *overrides)


def losses_of(objective: Objective, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
              sample_ids: torch.Tensor, stored: dict | None = None) -> dict[str, torch.Tensor]:
    """The terms of a batch that is an update of its own."""
    batch = Batch(images, ids, mask, sample_ids, mask.sum(1).tolist(), stored)
    update, [batch] = objective.prepare([batch], alpha=0.4)
    return objective(batch, update)


def read_losses(path: Path) -> list[dict]:
    """The rows of a log without the accuracies, which are of a process's own batch, whatever its size."""
    return [{name: value for name, value in row.items() if 'acc' not in name} for row in read_log(path)]


def broken_set(scenes: Path, folder: Path, edit) -> Path:
    records = json.loads((scenes / 'dataloader/all.json').read_text())
    edit(records)
    (folder / 'all.json').write_text(json.dumps(records))
    return folder / 'all.json'


def stop_in_step(monkeypatch, number: int) -> list:
    """SIGTERM arrives in this step of a run; returns a list that grows by one a step."""
    steps = []

    def counted(*args, **kwargs):
        steps.append(args)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*args, **kwargs)
    monkeypatch.setattr('models.engine.optim.learning_rate', counted)
    return steps
