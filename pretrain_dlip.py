"""Distil BLIP into a small student on image-text pairs (ITA + ITM + LM + distillation).

    python pretrain_dlip.py --config configs/demo/pretrain.yaml                         # one process, CPU or GPU
    python -m torch.distributed.run --nproc_per_node=4 pretrain_dlip.py                 # one node, 4 GPUs
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 python -m torch.distributed.run --nnodes=2 --nproc_per_node=4 \\
        --max-restarts=3 --rdzv_id=dlip --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain_dlip.py
                                                                                         # on each of two nodes
    srun python pretrain_dlip.py                                                        # in a job of SLURM

Any setting of the config can be overridden: `optim.lr=1e-4 train.epochs=2`. Relaunching the same command
resumes from OUTPUT_DIR/last.pth; `--dry_run` prints beforehand the hours, memory and disk that a run needs.
"""

if __name__ == '__main__':  # before the slow imports
    from utils import end_at_once
    end_at_once()

import argparse
import math
from pathlib import Path

import torch

from data.distributed import rank, seed_everything
from data.pairs import open_pairs
from data.transforms import EvalTransform, TrainTransform
from eval.caption import caption_images
from eval.validation import HeldOut, validation
from models.distill.batch import to_batch
from models.distill.start import build_objective
from models.distill.teacher_cache import store_teacher, with_cache
from models.engine.dry_run import dry_run
from models.engine.optim import ramp, set_learning_rate
from models.engine.run_state import RunState
from models.engine.setup import build_nets, epoch_loader, script_run
from models.engine.stopping import STOP
from utils import clean_exit, logger


def main(argv: list[str] | None = None) -> None:
    with script_run(__doc__, 'configs/pretrain.yaml', 'output/pretrain', argv) as (args, config, device, output_dir):
        pretrain(args, config, device, output_dir)


def pretrain(args: argparse.Namespace, config: dict, device: torch.device, output_dir: Path) -> None:
    model, data, train = config['model'], config['data'], config['train']

    # data
    transform = TrainTransform(model['image_size'], data['min_scale'], data['randaugment'], data['image_memory'])
    dataset = open_pairs(data['train'], transform, data['max_words'], args.seed)
    held_out = HeldOut(dataset.hold_out(data['val_fraction']),
                       EvalTransform(model['image_size'], data['image_memory']), data['max_words'])

    # student, frozen teacher or its stored targets, momentum encoder and queues, losses
    tokenizer, student, teacher = build_nets(config, 'pretrain')
    if args.store_teacher is not None:
        return store_teacher(config, teacher, dataset, tokenizer, args.seed, device, args.store_teacher)
    dataset, source = with_cache(config, teacher, dataset, tokenizer, args.seed)
    objective = build_objective(config, student, tokenizer, source, teacher)

    # optimizer and everything else that is saved and resumed
    run = RunState(objective, tokenizer, config, output_dir, device, args.seed, len(dataset))
    if args.dry_run:
        return dry_run(run, epoch_loader(run, dataset), train_step)
    if not len(held_out):
        logger.info('data.val_fraction holds out no image of %d pairs: there is no validation, and the captions of '
                    'samples.png are of training images', len(dataset))
    shown = [file for file, _ in held_out.pairs[:8]] or dataset.examples(8)

    while run.epoch < train['epochs']:
        run.model.train()
        with run.updates(epoch_loader(run, dataset)) as updates:
            for batches in updates:
                losses = train_step(run, batches)
                run.step_done(batches, losses)
                if run.is_due(train['log_every']):
                    run.log_interval()
                if run.epoch_done or run.is_due(train['save_every']):
                    run.save()
        val = validation(student.eval(), tokenizer, held_out, max_tokens=data['max_tokens'],
                         workers=data['num_workers'])
        if val:
            logger.info('epoch %d val  %s', run.epoch, '  '.join(f'{name} {value:.3f}' for name, value in val.items()
                                                                if name.startswith('loss') or name.endswith('_r1')))
        run.end_epoch(val, caption_images(student, tokenizer, shown) if config['loss']['lm'] else ())
    logger.info('done: %s', output_dir / 'last.pth')


def train_step(run: RunState, loaded: list[dict]) -> dict[str, torch.Tensor]:
    """One optimizer step on its accumulated batches -> mean losses, gradient norm and temperature."""
    config, objective, optimizer, losses = run.config, run.objective, run.optimizer, {}
    set_learning_rate(optimizer, run.step, run.steps_per_epoch, config['train']['epochs'], config['optim'])
    alpha = ramp(run.step, run.steps_per_epoch, config['ita']['alpha'], config['ita']['alpha_ramp_epochs'])
    seed_everything(run.seed, run.batches_done, rank())
    batches = [to_batch(batch, run.tokenizer, config['data']['max_tokens'], run.device) for batch in loaded]
    with run.autocast():  # momentum encoder and teacher first, on all batches
        update, batches = objective.prepare(batches, alpha, run.seed * 1_000_003 + run.batches_done)
    while batches:
        if len(batches) < len(loaded):
            run.leave_if_stopped()
        with run.exchange_gradients(now=len(batches) == 1):  # with the last batch's
            with run.autocast():
                terms = run.model(batches.pop(0), update)  # pop: frees the teacher's answers before backward
            (terms['loss'] / len(loaded)).backward()
        for name, value in terms.items():
            losses[name] = losses.get(name, 0.0) + value.detach() / len(loaded)
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), config['optim']['clip_grad'] or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    objective.momentum.update(run.student)
    objective.momentum.enqueue(update.ids, **update.own())  # last: a batch in its own queue would be its own negative
    return {**losses, 'grad_norm': norm, 'temp': run.student.temp.data.clamp_(0.001, 0.5).clone()}


if __name__ == '__main__':
    with clean_exit(), STOP.ends():
        main()
