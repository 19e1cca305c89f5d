"""Finetune a pre-trained student for image-text retrieval on Flickr30K (ITA + ITM, optionally distilled).

    python train_dlip_retrieval_flickr.py --config configs/demo/retrieval_flickr.yaml
    python -m torch.distributed.run --nproc_per_node=8 train_dlip_retrieval_flickr.py

Each epoch is evaluated on the validation images; the best by mean recall (where it ties, by the validation loss) is
kept in OUTPUT_DIR/best.pth and measured on the test images at the end, with the teacher beside it in
OUTPUT_DIR/table.md (`--no_test`: it is not).
Relaunching the same command resumes.
"""

if __name__ == '__main__':  # before the slow imports
    from signals import end_at_once
    end_at_once()

import argparse
from pathlib import Path

import torch

from configs import script_arguments
from data.datasets import AnnotatedTrain, ImageTextEval
from data.folders import run_folder
from data.loader import make_loader
from data.transforms import eval_transform, train_transform
from eval.retrieval import evaluate_retrieval
from eval.table import finetune_table
from eval.validation import first_captions, validation
from models.distill.objective import Objective
from models.distill.start import init_maps, init_momentum, loss_weights
from models.distill.teacher_cache import store_teacher, with_cache
from models.engine.dry_run import rehearse
from models.engine.launch import setup_process
from models.engine.stopping import STOP
from models.engine.training import Run
from models.momentum import MomentumQueue
from models.weights.build import at_resolution, build_student, build_teacher
from models.weights.checkpoint import load_model
from models.weights.sources import load_tokenizer
from utils import barrier, clean_exit, logger, rank, seed_everything, world_size


def main(argv: list[str] | None = None) -> None:
    args, config = script_arguments(__doc__, 'configs/retrieval_flickr.yaml', 'output/retrieval_flickr', argv,
                                    tests=True)
    STOP.listen()
    device = setup_process(args.device)
    with run_folder(args) as output_dir:
        finetune(args, config, device, output_dir)


def finetune(args: argparse.Namespace, config: dict, device: torch.device, output_dir: Path) -> None:
    seed_everything(args.seed)
    model, data, train = config['model'], config['data'], config['train']

    # data
    transform = train_transform(model['image_size'], data['min_scale'], data['randaugment'], data['image_memory'])
    dataset = AnnotatedTrain(data['root'], transform, data['max_words'], args.seed, data['split'])
    held_out = {split: ImageTextEval(data['root'], split, eval_transform(model['image_size'], data['image_memory']),
                                     data['max_words'], data['split'])
                for split in ('val', 'test')}
    pairs = first_captions(held_out['val'], data['max_words'])

    # student, momentum twin and queues, optional teacher
    tokenizer = load_tokenizer(config['tokenizer'])
    teacher = build_teacher(config, tokenizer, 'retrieval')
    teacher = teacher and at_resolution(teacher, model['image_size'])
    student = build_student(model, tokenizer, 'retrieval', teacher)
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
    logger.info('%d captions, %d processes x batch %d, %d batches x %d epochs', len(dataset), world_size(),
                train['batch_size'], run.steps_per_epoch, train['epochs'])
    settings = {'max_tokens': data['max_tokens'], 'workers': data['num_workers'], **config['eval']}

    def batches():
        return make_loader(dataset, train['batch_size'], seed=args.seed, epoch=run.epoch, start_step=run.batch,
                           workers=data['num_workers'], rank=rank(), world_size=world_size())

    if args.dry_run:
        return rehearse(run, batches(), data['max_tokens'])
    while run.epoch < train['epochs']:
        stats = run.train_one_epoch(batches(), data['max_tokens'])
        val = validation(student.eval(), tokenizer, pairs, max_tokens=data['max_tokens'], workers=data['num_workers'])
        val |= evaluate_retrieval(student, tokenizer, held_out['val'], device=device, **settings)
        stats |= {f'val_{name}': value for name, value in val.items()}
        logger.info('epoch %d val  txt R@1 %.2f  img R@1 %.2f  mean recall %.2f  loss %.3f', run.epoch, val['txt_r1'],
                    val['img_r1'], val['r_mean'], val['loss'])
        run.keep_best(val['r_mean'], val['loss'], metrics=val)
        run.end_epoch(stats)
    barrier()
    if args.no_test:
        return
    best, _, _ = load_model(output_dir / 'best.pth', device)
    test = evaluate_retrieval(best, tokenizer, held_out['test'], device=device, **settings)
    run.finish({f'test_{name}': value for name, value in test.items()})
    blip = {}
    if teacher is not None and teacher.text_encoder is None:
        logger.info('the teacher has no text encoder: BLIP has no column in the table')
    elif teacher is not None:
        blip = evaluate_retrieval(teacher.to(device), tokenizer, held_out['test'], device=device, **settings)
    finetune_table(output_dir, {f'test_{name}': value for name, value in blip.items()})


if __name__ == '__main__':
    with clean_exit(), STOP.ends():
        main()
