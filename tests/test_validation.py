"""Held-out pairs: what is held out, the losses on them, and the best checkpoint chosen by them."""

import json

import pytest
import torch
from runs import broken_set, losses_of, run, run_on_two, write_config
from test_losses import objective
from test_shards import sample, write_tar

import pretrain_dlip
import train_dlip_caption_flickr
from data.datasets import PairDataset
from data.shards import ShardDataset
from data.transforms import TrainTransform
from eval.validation import HeldOut, validation
from models.engine.logs import read_log
from models.weights.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow


def test_images_are_held_out_with_all_their_pairs(scenes, tmp_path):
    """The same at every start, and a larger share holds out more of them."""
    def edit(records):
        records += [record | {'caption': 'a second caption'} for record in records]
    source = broken_set(scenes, tmp_path, edit)
    every = {record['image_root'] for record in json.loads(source.read_text())}

    def held_out(share):
        dataset = PairDataset(source, TrainTransform(32, 0.5, False), 30)
        paths = [path for path, _ in dataset.hold_out(share)]
        trained = {dataset.pair(i)[0] for i in range(len(dataset))}
        assert len(set(paths)) == len(paths) == round(share * len(every)) and not trained & {*paths}
        assert trained | {*paths} == every
        return paths
    assert held_out(0.1) == held_out(0.1) == held_out(0.3)[:len(held_out(0.1))]


def test_samples_of_tars_are_held_out(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f'{shard:05d}.tar', [sample('a', i) for i in range(10)])
    dataset = ShardDataset(str(tmp_path), TrainTransform(32, 0.5, False), 30)
    total = len(dataset)
    held_out = {file.name for file, _ in dataset.hold_out(0.2)}
    trained = {row.image.name for row in dataset.rows([2, 0, 1], 0, len(dataset))}
    assert len(held_out) + len(trained) == total and not held_out & trained
    assert len(held_out) == 6


def test_the_losses_are_those_of_training(small_tokenizer):
    """Without dropout, momentum and smoothing of the targets; an image that cannot be read is left out."""
    net = objective(small_tokenizer, {'lm': 1.0, 'ita': 1.0, 'itm': 1.0}).eval()
    captions = ['a red dog', 'blue star', 'a picture of a dog', 'red']
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    items = [*zip(images, captions, strict=True), (None, 'gone')]

    class Given(HeldOut):
        def __init__(self):
            self.pairs = items

        def __getitem__(self, index):
            return items[index]
    out = validation(net.student, small_tokenizer, Given(), max_tokens=12)
    ids, mask = small_tokenizer(captions, 12)
    with torch.no_grad():
        want = losses_of(net, images, ids, mask, torch.arange(4))
        image = net.student.image_feat(net.student.encode_image(images))
        cosine = image @ net.student.text_feat(ids, mask).T / net.student.temp
    assert out['loss_lm'] == pytest.approx(float(want['lm']), rel=1e-5)
    both = [-rows.log_softmax(1).diagonal().mean() for rows in (cosine, cosine.T)]
    assert out['loss_ita'] == pytest.approx(float(sum(both)) / 2, rel=1e-5)
    assert out['loss'] == pytest.approx(out['loss_ita'] + out['loss_itm'] + out['loss_lm'])
    assert 0 < out['loss_itm'] < 3 and out['txt_r10'] == 100


@pytest.mark.parametrize('readable', [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 1, 1]])
def test_a_batch_may_have_one_image_or_none(small_tokenizer, nano, readable):
    """One image alone has no negatives: it counts for the other losses."""
    image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))

    class Given(HeldOut):
        def __init__(self):
            self.pairs = readable

        def __getitem__(self, index):
            return (image if readable[index] else None), 'a red dog'
    out = validation(nano, small_tokenizer, Given(), max_tokens=12, batch_size=2)
    assert {'loss_ita', 'loss_itm', 'loss_lm'} < out.keys()


def test_pre_training_is_validated_the_same_by_any_number_of_processes(pretrained, tmp_path):
    config, _ = pretrained
    settings = 'data.val_fraction=0.2', 'train.epochs=1', 'negative_all_rank=true', 'model.dropout=0.0'
    run(pretrain_dlip, config, tmp_path / 'one', *settings)
    run_on_two(config, tmp_path / 'two', *settings, 'train.batch_size=4')
    one, two = ({name: value for name, value in read_log(tmp_path / name / 'log.txt')[0].items()
                 if name.startswith('val_')} for name in ('one', 'two'))
    assert {'val_loss', 'val_loss_ita', 'val_loss_itm', 'val_loss_lm', 'val_txt_r1', 'val_img_r1'} <= one.keys()
    assert two == pytest.approx(one, rel=1e-3)


def test_where_the_metric_ties_the_validation_loss_chooses(scenes, tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, 'caption_flickr', scenes, train__epochs=3, eval__num_beams=1)
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr('eval.caption.caption_metrics', lambda best, *args, **kw: (
        {'CIDEr': 0.0, 'Bleu_4': 0.0}, [{} for _ in best]))
    monkeypatch.setattr('train_dlip_caption_flickr.validation', lambda *args, **kw: {'loss': next(losses)})
    state = run(train_dlip_caption_flickr, config, tmp_path / 'out', '--no_test')
    assert read_checkpoint(tmp_path / 'out/best.pth')['metrics']['loss'] == 1.0
    assert state['best'] == (0.0, -1.0)
    assert [row['val_loss'] for row in read_log(tmp_path / 'out/log.txt')] == [3.0, 1.0, 2.0]
    assert 'the validation split has 4 images, which is few' in capsys.readouterr().out
