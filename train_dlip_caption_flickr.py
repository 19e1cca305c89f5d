"""Finetune a pre-trained student for captioning on Flickr30K (LM, optionally distilled).

    python train_dlip_caption_flickr.py --config configs/demo/caption_flickr.yaml
    python -m torch.distributed.run --nproc_per_node=8 train_dlip_caption_flickr.py

Each epoch is evaluated on the validation pictures; the best by CIDEr is kept in OUTPUT_DIR/best.pth and
measured on the test pictures at the end. Relaunching the same command resumes.
"""

from pathlib import Path

from data.datasets import FlickrTrain, ImageTextEval
from data.loader import make_loader
from data.transforms import eval_transform, train_transform
from eval.caption import evaluate_captions
from models.build import at_resolution, build_student, build_teacher, loss_weights
from models.checkpoint import load_model
from models.objective import Objective
from models.rehearsal import rehearse
from models.tokenizer import DEC, Tokenizer
from models.training import Run
from utils import (
    barrier,
    clean_exit,
    logger,
    make_output_dir,
    rank,
    script_arguments,
    seed_everything,
    setup_process,
    world_size,
)


def main(argv: list[str] | None = None) -> None:
    args, config = script_arguments(__doc__, 'configs/caption_flickr.yaml', 'output/caption_flickr', argv)
    device = setup_process(args.device)
    output_dir = make_output_dir(args.output_dir)
    seed_everything(args.seed)
    model, data, train = config['model'], config['data'], config['train']

    # data
    transform = train_transform(model['image_size'], data['min_scale'], data['randaugment'])
    dataset = FlickrTrain(data['root'], transform, data['max_words'], args.seed, data['split'])
    held_out = {split: ImageTextEval(data['root'], split, eval_transform(model['image_size']), data['max_words'],
                                     data['split'])
                for split in ('val', 'test')}

    # student and optional teacher
    tokenizer = Tokenizer.from_pretrained(config['tokenizer'])
    teacher = build_teacher(config['teacher'], tokenizer, 'caption')
    teacher = teacher and at_resolution(teacher, model['image_size'])
    student = build_student(model, tokenizer, 'caption', teacher)
    prompt_length = tokenizer([data['prompt']], data['max_tokens'], DEC)[0].shape[1] - 1  # without [SEP]
    objective = Objective(student, loss_weights(config['loss'], teacher),
                          (tokenizer.cls_id, tokenizer.enc_id, tokenizer.bos_id), teacher=teacher,
                          prompt_length=prompt_length)

    # run
    steps = len(dataset) // (train['batch_size'] * world_size())
    run = Run(objective, tokenizer, config, output_dir, device, args.seed, steps)
    logger.info('%d captions, %d processes x batch %d, %d batches x %d epochs', len(dataset), world_size(),
                train['batch_size'], steps, train['epochs'])
    settings = {'prompt': data['prompt'], 'workers': data['workers'], **config['eval']}

    def batches():
        return make_loader(dataset, train['batch_size'], seed=args.seed, epoch=run.epoch, start_step=run.batch,
                           workers=data['workers'], rank=rank(), world_size=world_size())

    if args.dry_run:
        return rehearse(run, batches(), data['max_tokens'], data['prompt'])
    while run.epoch < train['epochs']:
        stats = run.train_one_epoch(batches(), data['max_tokens'], data['prompt'])
        val, records = evaluate_captions(student.eval(), tokenizer, held_out['val'], device=device, **settings)
        stats |= {f'val_{name}': value for name, value in val.items()}
        logger.info('epoch %d val  CIDEr %.2f  BLEU-4 %.2f', run.epoch - 1, val['CIDEr'], val['Bleu_4'])
        if val['CIDEr'] > run.best:
            run.best = val['CIDEr']
            run.save_best(metrics=val)
        run.end_epoch(stats, [(Path(record['image']), record['caption']) for record in records[:8]])
    barrier()
    best, _, _ = load_model(output_dir / 'best.pth', device)
    test, _ = evaluate_captions(best, tokenizer, held_out['test'], device=device, **settings)
    run.finish({f'test_{name}': value for name, value in test.items()})


if __name__ == '__main__':
    with clean_exit():
        main()
