"""Distil BLIP into a small student on image-text pairs (ITA + ITM + LM + distillation).

    python pretrain_dlip.py --config configs/demo/pretrain.yaml                         # one process, CPU or GPU
    python -m torch.distributed.run --nproc_per_node=4 pretrain_dlip.py                 # one node, 4 GPUs
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 python -m torch.distributed.run --nnodes=2 --nproc_per_node=4 \\
        --max-restarts=3 --rdzv_id=dlip --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain_dlip.py
                                                                                         # on each of two nodes
    srun python pretrain_dlip.py                                                        # in a job of SLURM

Any setting of the config can be overridden: `optim.lr=1e-4 train.epochs=2`. Relaunching the same command
resumes from OUTPUT_DIR/last.pth; `--dry_run` says beforehand what the run will take.
"""

if __name__ == '__main__':  # before the slow imports
    from signals import end_at_once
    end_at_once()

import argparse
from pathlib import Path

import torch

from configs import script_arguments
from data.folders import run_folder
from data.loader import make_loader
from data.pairs import open_pairs
from data.transforms import eval_transform, train_transform
from eval.caption import caption_pictures
from eval.validation import HeldOut, validation
from models.distill.objective import Objective
from models.distill.start import init_maps, init_momentum, loss_weights
from models.distill.teacher_cache import store_teacher, with_cache
from models.engine.dry_run import rehearse
from models.engine.launch import setup_process
from models.engine.stopping import STOP
from models.engine.training import Run
from models.momentum import MomentumQueue
from models.weights.build import at_resolution, build_student, build_teacher
from models.weights.sources import load_tokenizer
from utils import clean_exit, logger, rank, seed_everything, world_size


def main(argv: list[str] | None = None) -> None:
    args, config = script_arguments(__doc__, 'configs/pretrain.yaml', 'output/pretrain', argv)
    STOP.listen()
    device = setup_process(args.device)
    with run_folder(args) as output_dir:
        pretrain(args, config, device, output_dir)


def pretrain(args: argparse.Namespace, config: dict, device: torch.device, output_dir: Path) -> None:
    seed_everything(args.seed)
    model, data, train = config['model'], config['data'], config['train']

    # data
    transform = train_transform(model['image_size'], data['min_scale'], data['randaugment'], data['image_memory'])
    dataset = open_pairs(data['train'], transform, data['max_words'], args.seed)
    held_out = HeldOut(dataset.hold_out(data['val_fraction']),
                       eval_transform(model['image_size'], data['image_memory']), data['max_words'])

    # teacher (frozen), student, momentum twin and queues, losses
    tokenizer = load_tokenizer(config['tokenizer'])
    teacher = build_teacher(config, tokenizer, 'pretrain')
    student = build_student(model, tokenizer, 'pretrain', teacher)
    teacher = teacher and at_resolution(teacher, model['image_size'])
    if args.store_teacher is not None:
        return store_teacher(config, teacher, dataset, tokenizer, args.seed, device, args.store_teacher)
    dataset, source = with_cache(config, teacher, dataset, tokenizer, args.seed)  # of targets: the net, or a folder
    momentum = MomentumQueue(student, config['ita']['queue_size'], config['ita']['momentum'],
                             source.config.embed_dim if source else 0)
    objective = Objective(student, loss_weights(config['loss'], source),
                          (tokenizer.cls_id, tokenizer.enc_id, tokenizer.bos_id), momentum, source,
                          negative_all_rank=config['negative_all_rank'], hidden_layers=config['hidden_layers'])
    init_maps(objective, model, teacher)
    init_momentum(objective, config)

    # run
    run = Run(objective, tokenizer, config, output_dir, device, args.seed, len(dataset))
    logger.info('%d pairs, %d processes x batch %d x accumulate %d = %d pairs a step, %d batches x %d epochs',
                len(dataset), world_size(), train['batch_size'], run.accumulate,
                train['batch_size'] * world_size() * run.accumulate, run.steps_per_epoch, train['epochs'])

    def batches():
        return make_loader(dataset, train['batch_size'], seed=args.seed, epoch=run.epoch, start_step=run.batch,
                           workers=data['num_workers'], rank=rank(), world_size=world_size())

    if args.dry_run:
        return rehearse(run, batches(), data['max_tokens'])
    if not len(held_out):
        logger.info('data.val_fraction holds out no image of %d pairs: there is no validation, and the captions of '
                    'samples.png are of training images', len(dataset))
    shown = [file for file, _ in held_out.pairs[:8]] or dataset.examples(8)
    while run.epoch < train['epochs']:
        stats = run.train_one_epoch(batches(), data['max_tokens'])
        val = validation(student.eval(), tokenizer, held_out, max_tokens=data['max_tokens'],
                         workers=data['num_workers'])
        if val:
            logger.info('epoch %d val  %s', run.epoch, '  '.join(f'{name} {value:.3f}' for name, value in val.items()
                                                                if name.startswith('loss') or name.endswith('_r1')))
        samples = caption_pictures(student, tokenizer, shown) if config['loss']['lm'] else ()
        run.end_epoch(stats | {f'val_{name}': value for name, value in val.items()}, samples)
    logger.info('done: %s', output_dir / 'last.pth')


if __name__ == '__main__':
    with clean_exit(), STOP.ends():
        main()
