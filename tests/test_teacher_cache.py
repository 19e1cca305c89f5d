"""Training from a teacher's stored targets: the live teacher's losses, and no targets of anything else."""

import json
import re
import shutil

import pytest
import torch
from conftest import NANO
from runs import broken_set, losses_of, read_losses, run, run_on_two, write_config

import pretrain_dlip
from data import target_store
from data.datasets import PairDataset
from data.target_store import TargetStore, WithTargets, pad_targets
from data.transforms import TrainTransform
from models import losses
from models.blip import BLIP, BLIPConfig
from models.distill.objective import Objective
from models.distill.teacher import StoredTeacher
from models.distill.teacher_cache import READ_BY, answers, fields_of, top_k_classes
from models.distill.terms import TEACHER_TERMS
from models.momentum import MomentumQueue
from utils import ROOT

pytestmark = pytest.mark.slow

SHARD, TEACHER = 16, ROOT / 'data/demo_teacher.pth'


@pytest.fixture(scope='module')
def stored(scenes, tmp_path_factory):
    """(config, folder of two epochs' targets of the demo's teacher, which is trained); every term but itm_soft, whose
    negatives no cache can hold.
    """
    folder = tmp_path_factory.mktemp('cache')
    changes = {f'loss__{term}': float(term in READ_BY and term != 'itm_soft') for term in TEACHER_TERMS}
    config = write_config(folder, 'pretrain', scenes, model__size='mini_4', model__image_size=64,
                          model__dropout=0.0, teacher__weights=str(TEACHER), data__min_scale=0.2,
                          data__randaugment=True, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('models.distill.teacher_cache.SHARD', SHARD)
        store(config, folder / 'targets', 2)
    return config, folder / 'targets'


def store(config, folder, epochs: int, *overrides: str) -> None:
    pretrain_dlip.main(['--config', str(config), '--output_dir', str(folder.parent / 'out'), '--device', 'cpu',
                        '--seed', '1', '--store_teacher', str(epochs), f'teacher.cache={folder}', *overrides])


def test_training_from_stored_targets_has_the_live_losses(stored, tmp_path):
    """Both epochs, random crops and RandAugment on; no teacher is in memory. Two processes read the same."""
    config, folder = stored
    run(pretrain_dlip, config, tmp_path / 'live')
    run(pretrain_dlip, config, tmp_path / 'stored', f'teacher.cache={folder}', 'teacher.weights=null')
    live, got = (read_losses(tmp_path / name / 'steps.txt') for name in ('live', 'stored'))
    assert {'train_loss_cross_attn', 'train_loss_lm_logits', 'train_loss_image_tokens'} <= live[0].keys()
    assert got[0] == pytest.approx(live[0], rel=1e-3, abs=1e-3)  # of the same weights
    for want, row in zip(live, got, strict=True):  # of weights that float16 targets have moved
        assert row == pytest.approx(want, rel=3e-3, abs=1e-3)
    shared = ('train.epochs=1', 'negative_all_rank=true')
    run_on_two(config, tmp_path / 'two', *shared, f'teacher.cache={folder}', 'train.batch_size=4')
    run(pretrain_dlip, config, tmp_path / 'one', *shared, f'teacher.cache={folder}')
    one, two = (read_losses(tmp_path / name / 'steps.txt') for name in ('one', 'two'))
    for want, row in zip(one, two, strict=True):
        assert row == pytest.approx(want, rel=1e-4)


def test_two_processes_share_the_storing(stored, tmp_path):
    config, folder = stored
    run_on_two(config, tmp_path / 'out', f'teacher.cache={tmp_path / "targets"}', '--store_teacher', '1')
    one, two = TargetStore(folder), TargetStore(tmp_path / 'targets')
    assert two.epochs == 1 and two.manifest['made_of'] == one.manifest['made_of']
    for index in (0, 15, 16, two.manifest['pairs'] - 1):
        (number, want), (same_number, got) = one(0, index), two(0, index)
        assert number == same_number and (got['lm_ids'][:, 0] == want['lm_ids'][:, 0]).all()
        assert got['image_feat'] == pytest.approx(want['image_feat'], abs=2e-3)


@torch.no_grad()
@pytest.mark.parametrize('term', READ_BY)
def test_each_term_from_stored_answers(small_tokenizer, term):
    """To 1e-3 with float16 and the 12 most probable of 39 tokens; itm_soft on the pairs alone."""
    torch.manual_seed(0)
    ids, mask = small_tokenizer(['a red dog', 'blue star', 'a picture of a dog', 'red'], 12)
    images, sample_ids = torch.randn(4, 3, 32, 32), torch.arange(4)
    starts = small_tokenizer.cls_id, small_tokenizer.enc_id, small_tokenizer.bos_id
    sizes = NANO | {'embed_dim': 256, 'vocab_size': len(small_tokenizer)}
    student, teacher = (BLIP(BLIPConfig(**sizes | {'vision_width': width})) for width in (32, 48))
    teacher.text_decoder.cls.predictions.bias[7:17] = torch.linspace(4, 8, 10)  # as sure as a trained one, others equal
    momentum = MomentumQueue(student, 10, 0.9, teacher.config.embed_dim)
    live = Objective(student, {term: 1.0}, starts, momentum, teacher).eval()
    want = losses_of(live, images, ids, mask, sample_ids)[term]
    found = answers(teacher, images, ids, mask, starts, [term], 12)
    fields = fields_of([term], teacher.config, 12)
    rows = [{name: found[name][row].numpy().astype(dtype)[tuple(map(slice, target_store.sides(shape, tokens)))]
             for name, (dtype, shape) in fields.items()} for row, tokens in enumerate(mask.sum(1).tolist())]
    stood_for = Objective(student, {term: 1.0}, starts, momentum,
                          StoredTeacher(teacher.config, float(teacher.temp))).eval()
    for name in ('token_proj', 'fused_proj', 'decoder_proj'):  # the learned projections of the two are drawn apart
        if hasattr(live, name):
            getattr(stood_for, name).load_state_dict(getattr(live, name).state_dict())
    got = losses_of(stood_for, images, ids, mask, sample_ids, pad_targets(rows))[term]
    if term == 'itm_soft':
        with_enc = torch.cat([torch.full((4, 1), small_tokenizer.enc_id), ids[:, 1:]], 1)
        ours, theirs = (net.match_logits(with_enc, mask, net.project_image(net.encode_image(images)))
                        for net in (student, teacher))
        want = losses.logit_kl_loss(ours, theirs)
    assert float(got) == pytest.approx(float(want), abs=1e-3) and float(want) > 2e-3


def test_top_k_kl_is_the_full_one_where_the_others_are_equal():
    """Label smoothing leaves a teacher so; gradients too, and down to no rows at all."""
    student = torch.randn(3, 7, requires_grad=True)
    teacher = torch.tensor([[5.0, 1, 1, 3, 1, 1, 4], [1, 1, 2, 1, 6, 3, 1], [0, 9, 2, 0, 0, 1, 0]])
    want, got = losses.logit_kl_loss(student, teacher), losses.top_k_kl_loss(student, *top_k_classes(teacher, 3))
    assert torch.allclose(got, want)
    assert torch.allclose(*(torch.autograd.grad(loss, student)[0] for loss in (got, want)), atol=1e-6)
    assert losses.top_k_kl_loss(student[:0], *top_k_classes(teacher[:0], 3)) == 0


def test_epochs_beyond_the_stored_ones_repeat_their_crops(stored, scenes):
    dataset = WithTargets(PairDataset(scenes / 'dataloader/all.json', TrainTransform(64, 0.2, True), 30, seed=1),
                          TargetStore(stored[1]))
    items = []
    for epoch in (0, 1, 2, 3):
        dataset.epoch = epoch
        items.append(dataset[5])
    assert torch.equal(items[2]['image'], items[0]['image']) and torch.equal(items[3]['image'], items[1]['image'])
    assert not torch.equal(items[0]['image'], items[1]['image'])
    assert (items[2]['targets']['image_feat'] == items[0]['targets']['image_feat']).all()
    assert (items[1]['targets']['image_feat'] != items[0]['targets']['image_feat']).any()


def test_storing_goes_on_where_it_stopped(stored, tmp_path, capsys):
    """One shard is missing, one damaged, and the manifest as it is before the end."""
    config, folder = stored
    copy = tmp_path / 'targets'
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / 'manifest.json').read_text())
    (copy / 'manifest.json').write_text(json.dumps(manifest | {'shards': {}}))
    with pytest.raises(ValueError, match='targets is not complete: launch the command with --store_teacher again'):
        run(pretrain_dlip, config, tmp_path / 'out', f'teacher.cache={copy}')
    (copy / 'epoch0-00001.targets').unlink()
    damage(copy / 'epoch1-00002.targets')
    (copy / 'epoch1-00000.targets.tmp0123456789ab').write_bytes(b'half')
    kept = (copy / 'epoch0-00000.targets').stat().st_mtime_ns
    store(config, copy, 1)
    shards = len(manifest['shards'])
    assert f'{shards - 2} of {shards} shards of this process are there already' in capsys.readouterr().out
    assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}
    assert all((copy / name).read_bytes() == (folder / name).read_bytes() for name in manifest['shards'])
    assert (copy / 'epoch0-00000.targets').stat().st_mtime_ns == kept


def damage(path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('how, message', [
    (damage, r'epoch0-00001.targets is damaged: pair 15 of 16 has another checksum'),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), r'epoch0-00001.targets is damaged: it has \d+ bytes'),
    (lambda path: path.write_bytes(b'\1' + path.read_bytes()[1:]), 'is damaged: its table has another checksum'),
    (lambda path: path.unlink(), r'epoch0-00001.targets is missing: store the targets again'),
    (lambda path: path.with_name('manifest.json').write_text('[]'), 'manifest.json is damaged'),
    (lambda path: path.with_name('manifest.json').write_text('{}'), 'manifest.json is damaged .without architecture')])
def test_a_damaged_shard_is_named(stored, tmp_path, how, message):
    config, folder = stored
    shutil.copytree(folder, tmp_path / 'targets')
    how(tmp_path / 'targets/epoch0-00001.targets')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(pretrain_dlip, config, tmp_path / 'out', f'teacher.cache={tmp_path / "targets"}')


@pytest.mark.parametrize('overrides, message', [
    (['data.min_scale=0.5', 'data.max_words=7'],
     'of another data.min_scale (stored 0.2, now 0.5), data.max_words (stored 30, now 7): set that back'),
    (['teacher.top_k=8'], 'of another teacher.top_k'),
    (['loss.itm_soft=1.0'], 'holds nothing for loss.itm_soft'),
    (['teacher.cache=nowhere'], 'no stored targets in nowhere: write them with --store_teacher')])
def test_stale_targets_are_refused(stored, tmp_path, overrides, message):
    config, folder = stored
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        run(pretrain_dlip, config, tmp_path, f'teacher.cache={folder}', *overrides)


def test_targets_of_another_teacher_or_data_are_refused(stored, scenes, tmp_path):
    config, folder = stored
    state = torch.load(TEACHER, weights_only=True)
    state['model']['itm_head.bias'] += 0.01
    torch.save(state, tmp_path / 'other.pth')
    fewer = broken_set(scenes, tmp_path, lambda records: records.pop())
    with pytest.raises(ValueError, match=r'another teacher \(stored \w+, now \w+\), data \(stored'):
        run(pretrain_dlip, config, tmp_path / 'out', f'teacher.cache={folder}', f'data.train={fewer}',
            f'teacher.weights={tmp_path / "other.pth"}')
    with pytest.raises(ValueError, match='of another teacher'):
        store(config, folder, 2, f'teacher.weights={tmp_path / "other.pth"}')


def test_a_term_that_cannot_be_stored_is_named(stored, tmp_path, monkeypatch):
    monkeypatch.delitem(READ_BY, 'lm_logits')
    with pytest.raises(ValueError, match='loss.lm_logits needs the teacher itself: set it to 0, or teacher.cache'):
        run(pretrain_dlip, stored[0], tmp_path, f'teacher.cache={stored[1]}')
