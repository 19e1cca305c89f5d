"""Distillation while finetuning: a finetuned teacher's targets, its captions, and training on CIDEr itself."""

import copy
import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import NANO
from processes import joined
from pycocoevalcap.cider.cider import Cider
from runs import losses_of, run, stop_in_step, write_config
from test_losses import objective

import train_dlip_caption_flickr
import train_dlip_retrieval_flickr
from bench.stress import same
from data.captions import clean_caption
from data.datasets import AnnotatedTrain, AnnotatedWhole
from data.images import open_image
from data.transforms import EvalTransform, WholeTransform, normalise
from eval.cider import END, CiderReward
from eval.metrics import simple_tokens
from models import losses
from models.blip import BLIP, BLIPConfig
from models.distill.teacher_captions import teacher_captions
from models.engine.logs import read_log
from models.engine.run_state import RunState
from models.engine.self_critical import SelfCritical
from models.generation import generate
from models.momentum import NO_ID
from models.tokenizer import Tokenizer
from models.weights.checkpoint import load_model, read_checkpoint, save_checkpoint
from utils import ROOT

pytestmark = pytest.mark.slow

GENERATION = {'prompt': '', 'batch_size': 3, 'workers': 0, 'num_beams': 2, 'max_length': 8, 'min_length': 3}


@pytest.fixture(scope='session')
def tokenizer(scenes) -> Tokenizer:
    return Tokenizer.from_file(scenes / 'vocab.txt')


@pytest.fixture(scope='session')
def teachers(tokenizer, tmp_path_factory) -> dict:
    """Files of a retrieval and of a caption teacher of size nano, with random weights."""
    folder, files = tmp_path_factory.mktemp('teachers'), {}
    for seed, task in enumerate(('retrieval', 'caption')):
        torch.manual_seed(seed)
        config = BLIPConfig(**{**NANO, 'embed_dim': 256}, vocab_size=len(tokenizer), task=task)
        files[task] = folder / f'{task}.pth'
        save_checkpoint(files[task], BLIP(config), tokenizer, {})
    return files


def with_teacher(folder, name, scenes, teachers, **changes):
    return write_config(folder, name, scenes, teacher__weights=str(teachers[name.split('_')[0]]), **changes)


def test_a_finetune_goes_on_with_the_projections_of_the_stage_before(scenes, tmp_path):
    """From the student's width to the teacher's; at a rate of zero they are found again at its end."""
    config = write_config(tmp_path, 'caption_flickr', scenes, teacher__weights=str(ROOT / 'data/demo_teacher.pth'),
                          train__epochs=1, loss__decoder_hidden=1.0, loss__decoder_feat=1.0)
    first = run(train_dlip_caption_flickr, config, tmp_path / 'first', '--no_test')['objective']
    then = run(train_dlip_caption_flickr, config, tmp_path / 'then', '--no_test', 'optim.lr=0.0',
               f'model.init={tmp_path}/first/last.pth')['objective']
    assert {'hidden.decoder_hidden.projs.2_6.weight', 'decoder_proj.bias'} <= then.keys()
    for name, value in then.items():
        assert torch.equal(value, first[name]), name


# ---------------------------------------------------------------- retrieval

def test_a_retrieval_finetune_goes_on_with_momentum_encoder_and_queues(pretrained, scenes, tmp_path, capsys):
    """Of a last.pth at another image size, and of an original file; a best.pth has neither. At a rate of zero the
    momentum encoder is found again at the end; a queue that is longer than what came keeps it behind.
    """
    before = read_checkpoint(pretrained[1] / 'last.pth')
    held = {name.removeprefix('momentum.'): value for name, value in before['objective'].items()
            if name.startswith('momentum.')}
    newest = held['image_queue'].roll(-int(held['pointer']), 0)
    towers = ('visual_encoder', 'text_encoder', 'vision_proj', 'text_proj')
    original = before['model'] | {f'{tower}_m.{name.split(".", 1)[1]}': value for tower in towers
                                  for name, value in held.items() if name.startswith(f'{tower}.')}
    original |= {'image_queue': held['image_queue'].T, 'text_queue': held['text_queue'].T,
                 'ptr_queue': held['pointer'][None]}
    torch.save({'model': original}, tmp_path / 'original.pth')
    torch.save({key: value for key, value in before.items() if key != 'objective'}, tmp_path / 'best.pth')
    config = write_config(tmp_path, 'retrieval_flickr', scenes, train__epochs=1, model__image_size=64)
    starts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, 'updates', lambda run, *args: starts.append(copy.deepcopy(
            run.objective.momentum)) or exit())
        for source, length in ((pretrained[1] / 'last.pth', 20), (tmp_path / 'original.pth', 30),
                               (tmp_path / 'original.pth', 8), (tmp_path / 'best.pth', 20),
                               (pretrained[1] / 'last.pth', 0)):
            with pytest.raises(SystemExit):
                run(train_dlip_retrieval_flickr, config, tmp_path / 'out', f'model.init={source}',
                    f'ita.queue_size={length}')
    whole, longer, shorter, without, off = starts
    for momentum in (whole, longer, shorter, off):
        assert torch.equal(momentum.text_proj.weight, held['text_proj.weight'])
        assert momentum.visual_encoder.pos_embed.shape == (1, 17, 32)
    assert torch.allclose(whole.image_queue, newest) and torch.allclose(shorter.image_queue, newest[-8:])
    assert torch.allclose(longer.image_queue[10:], newest) and int(longer.pointer) == 0
    assert set(longer.id_queue.tolist()) == {NO_ID}
    assert torch.equal(without.text_proj.weight, before['model']['text_proj.weight'])
    assert without.image_queue.shape == newest.shape and not torch.allclose(without.image_queue, newest, atol=0.1)
    said = re.findall('momentum encoder (.*); queues (.*)', capsys.readouterr().out)
    assert [(a.split()[0], b.split()[0]) for a, b in said] == [
        ('taken', 'taken'), ('taken', 'taken'), ('taken', 'taken'), ('absent', 'absent'), ('taken', 'off')]


def test_a_retrieval_finetune_learns_from_a_finetuned_teacher(scenes, teachers, tokenizer, tmp_path):
    """Its terms are logged and fall; its queue holds the teacher's own embeddings of training pairs."""
    terms = ('ita_soft', 'itm_soft', 'image_feat', 'text_feat')
    config = with_teacher(tmp_path, 'retrieval_flickr', scenes, teachers, train__epochs=2, optim__lr=2e-3,
                          ita__queue_size=20, **{f'loss__{term}': 1.0 for term in terms})
    state = run(train_dlip_retrieval_flickr, config, tmp_path / 'out')
    run(train_dlip_retrieval_flickr, config, tmp_path / 'out')  # a finished run: its test figures take the place
    first, last, tested = read_log(tmp_path / 'out/log.txt')
    assert 'test_txt_r1' in tested
    for term in ('image_feat', 'text_feat', 'ita_soft'):
        assert last[f'train_loss_{term}'] < first[f'train_loss_{term}'], term
    assert 'train_loss_itm_soft' in last
    teacher, data = load_model(teachers['retrieval'])[0], AnnotatedTrain(scenes / 'flickr30k', WholeTransform(32), 30)
    texts = {}
    for i in range(len(data)):
        _, caption, number = data.pair(i)
        with torch.no_grad():
            encoded = tokenizer([clean_caption(caption, 30)], 30)
            texts.setdefault(number, []).append(teacher.text_feat(*encoded)[0])
    queued, ids = (state['objective'][f'momentum.{name}_queue'] for name in ('teacher_text', 'id'))
    near = [max(float(feature @ text) for text in texts[int(number)]) for feature, number in zip(queued, ids,
                                                                                               strict=True)]
    assert sum(value > 0.9999 for value in near) >= len(near) / 3  # the others are of mirrored pictures' captions


@torch.no_grad()
def test_embeddings_are_regressed_on_unit_spheres_and_itm_on_the_same_pairs(small_tokenizer):
    """Against an independent computation with the teacher's and the student's public functions."""
    net = objective(small_tokenizer, {'image_feat': 1.0, 'text_feat': 1.0, 'itm_soft': 1.0, 'itm': 1.0}).eval()
    torch.manual_seed(1)
    images = torch.randn(4, 3, 32, 32)
    ids, mask = small_tokenizer(['a red dog', 'blue star', 'a picture of a dog', 'red'], 12)
    drawn = []
    draw = net.draw_negatives
    net.draw_negatives = lambda *args: drawn.append(draw(*args)) or drawn[0]
    out = losses_of(net, images, ids, mask, torch.arange(4))
    tokens = [model.encode_image(images) for model in (net.student, net.teacher)]
    for name, features in (('image_feat', [m.image_feat(t) for m, t in zip((net.student, net.teacher), tokens,
                                                                            strict=True)]),
                           ('text_feat', [m.text_feat(ids, mask) for m in (net.student, net.teacher)])):
        assert torch.allclose(out[name], (features[0] - features[1]).square().sum(1).mean() / 2, atol=1e-5)
    image_negative, text_negative = drawn[0]
    pairs = [(i, i) for i in range(4)] + list(zip(image_negative.tolist(), range(4), strict=True)) + list(
        zip(range(4), text_negative.tolist(), strict=True))
    assert all(image != text for image, text in pairs[4:])
    enc = ids.clone()
    enc[:, 0] = small_tokenizer.enc_id
    ours, theirs = (torch.cat([model.match_logits(enc[text:text + 1], mask[text:text + 1],
                                                  model.project_image(t[image:image + 1])) for image, text in pairs])
                    for model, t in zip((net.student, net.teacher), tokens, strict=True))
    want = F.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction='batchmean')
    assert torch.allclose(out['itm_soft'], want, atol=1e-5)


# ---------------------------------------------------------------- the teacher's captions

@pytest.fixture
def pictures(scenes) -> AnnotatedWhole:
    return AnnotatedWhole(scenes / 'flickr30k', 32, 30)


def test_teacher_captions_are_its_beam_captions_of_whole_pictures(pictures, teachers, tokenizer, tmp_path):
    teacher = load_model(teachers['caption'])[0]
    said = teacher_captions(teacher, tokenizer, pictures, tmp_path / 'said.jsonl', **GENERATION)
    assert len(said) == len(pictures) == 8
    for i in range(8):
        path, image = pictures.pair(i)[0], normalise(pictures[i]['image'])
        assert (image - EvalTransform(32)(open_image(path))).abs().max() < 0.05  # of a range of 4: rounding
        assert said[path] == generate(teacher, tokenizer, image[None], '', num_beams=2, max_length=8, min_length=3)[0]


def test_teacher_captions_go_on_where_they_stopped(pictures, teachers, tokenizer, tmp_path, monkeypatch):
    teacher, file = load_model(teachers['caption'])[0], tmp_path / 'said.jsonl'
    want = teacher_captions(teacher, tokenizer, pictures, file, **GENERATION)
    whole = file.read_text()
    file.write_text(whole[:len(whole) // 2])  # killed within a line
    seen = []
    monkeypatch.setattr('models.distill.teacher_captions.generate',
                        lambda model, tokenizer, images, *args, **kw: seen.append(len(images)) or
                        generate(model, tokenizer, images, *args, **kw))
    assert teacher_captions(teacher, tokenizer, pictures, file, **GENERATION) == want
    assert 0 < sum(seen) < 8 and sorted(file.read_text().splitlines()) == sorted(whole.splitlines())
    assert teacher_captions(teacher, tokenizer, pictures, file, **GENERATION) == want and sum(seen) < 8
    with pytest.raises(ValueError, match='said.jsonl was made with another num_beams: delete it'):
        teacher_captions(teacher, tokenizer, pictures, file, **GENERATION | {'num_beams': 3})
    teacher.visual_encoder.cls_token.data.add_(1)
    with pytest.raises(ValueError, match='said.jsonl was made with another teacher'):
        teacher_captions(teacher, tokenizer, pictures, file, **GENERATION)


def test_a_broken_picture_has_no_caption(pictures, teachers, tokenizer, tmp_path):
    path = pictures.pair(2)[0]
    content = open(path, 'rb').read()
    try:
        with open(path, 'wb') as file:
            file.write(content[:100])
        said = teacher_captions(load_model(teachers['caption'])[0], tokenizer, pictures, tmp_path / 'said.jsonl',
                                **GENERATION)
    finally:
        with open(path, 'wb') as file:
            file.write(content)
    assert len(said) == 7 and os.path.basename(path) not in said


def test_a_share_of_the_items_has_the_teachers_caption(scenes):
    """Decided by seed, epoch and item; without a share items are what they were."""
    def captions(share, epoch=0):
        data = AnnotatedTrain(scenes / 'flickr30k', WholeTransform(32), 30, 0, teacher_share=share)
        data.teacher_captions = {data.pair(i)[0]: 'said by the teacher' for i in range(20)}
        data.epoch = epoch
        return [data[i]['caption'] == 'said by the teacher' for i in range(len(data))]
    half = captions(0.5)
    assert 10 <= sum(half[:20]) + sum(captions(0.5, 1)[:20]) <= 30 and not any(half[20:])
    assert half == captions(0.5) != captions(0.5, 1)
    assert not any(captions(0.0)) and all(captions(1.0)[:20])
    with pytest.raises(ValueError, match='data.teacher_captions is a probability'):
        captions(1.5)


# ---------------------------------------------------------------- CIDEr as reward

def test_the_reward_is_pycocoevalcaps_cider():
    """On the same tokens, over the set that the frequencies were counted on."""
    references = [['a red dog runs', 'the dog runs on grass', 'a dog'], ['a blue star', 'blue star in the sky'],
                  ['two men, with a dog!', 'men walking'], ["a man's hat", 'the hat of a man']]
    said = ['a red dog runs on on grass', 'a star', '', "a man's hat"]
    ended = [True, True, True, False]

    def tokens(text, end=True):
        return f'{simple_tokens(text)} {END if end else ""}'.strip()
    _, want = Cider().compute_score({i: [tokens(text) for text in texts] for i, texts in enumerate(references)},
                                    {i: [tokens(*pair)] for i, pair in enumerate(zip(said, ended, strict=True))})
    got = CiderReward(references)([0, 1, 2, 3], said, ended)
    assert got == pytest.approx(list(want), abs=1e-9) and got[0] > got[2]


def test_a_caption_that_breaks_off_is_worth_less():
    reward = CiderReward([['a red dog runs on grass'], ['a blue star in the sky'], ['two men walk home']])
    whole, cut = reward([0, 0], ['a red dog runs on grass', 'a red dog runs on grass'], [True, False])
    assert whole > cut


def test_the_gradient_favours_what_was_better_than_the_others():
    log_probs = torch.zeros(4, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    losses.self_critical_loss(log_probs, mask, torch.tensor([[3.0, 1.0], [2.0, 2.0]])).backward()
    # a step against the gradient raises the first caption's probability, lowers the second's, leaves the equal ones
    want = torch.tensor([[-2.0, -2, 0], [2, 2, 2], [0, 0, 0], [0, 0, 0]]) / 4
    assert torch.allclose(log_probs.grad, want)


class LengthReward:
    """The more often a word, the better."""

    def __init__(self, word):
        self.word = word

    def __call__(self, pictures, captions, ended):
        return [float(caption.split().count(self.word)) for caption in captions]


@pytest.fixture
def captioner(small_tokenizer) -> BLIP:
    torch.manual_seed(0)
    return BLIP(BLIPConfig(**NANO, vocab_size=len(small_tokenizer), task='caption'))


@pytest.mark.parametrize('bf16', [False, True])
def test_the_mean_reward_rises(captioner, small_tokenizer, bf16):
    net = SelfCritical(captioner, small_tokenizer, LengthReward('dog'), 5, 'a ', 8).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    images, rewards = torch.randn(4, 3, 32, 32), []
    for step in range(40):
        torch.manual_seed(step)
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            out = net(images, torch.arange(4))
        out['loss'].backward()
        if not step:
            assert all(p.grad is not None for p in net.parameters() if p.requires_grad)  # DDP waits for all
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(float(out['reward']))
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1


def test_log_probabilities_are_those_of_the_sampled_captions(captioner, small_tokenizer):
    """Token by token with a cache, against the one teacher-forced pass."""
    net = SelfCritical(captioner, small_tokenizer, LengthReward('dog'), 3, 'a ', 8).eval()
    with torch.no_grad():
        tokens = captioner.encode_image(torch.randn(2, 3, 32, 32))
        drawn, sampled = net.draw(tokens)
        got = net.log_probs(tokens, drawn, sampled)
        kv = captioner.project_image(tokens.repeat_interleave(3, 0))
        for row, ids in enumerate(drawn.tolist()):
            for t in range(1, len(ids)):
                wanted = t >= 2 and small_tokenizer.sep_id not in ids[2:t]
                assert bool(sampled[row, t - 1]) == wanted
                if wanted:
                    one = [(k[row:row + 1], v[row:row + 1]) for k, v in kv]
                    hidden = captioner.text_decoder.bert(torch.tensor([ids[:t]]), causal=True, image_kv=one).hidden
                    want = captioner.text_decoder.logits(hidden[0, -1]).log_softmax(0)[ids[t]]
                    assert torch.allclose(got[row, t - 1], want, atol=1e-4)
                else:
                    assert got[row, t - 1] == 0


# ---------------------------------------------------------------- the caption script with all of it

@pytest.fixture(scope='session')
def finished(scenes, teachers, tmp_path_factory):
    """(config, output folder) of an uninterrupted run: distilled with the teacher's captions, then self-critical."""
    folder = tmp_path_factory.mktemp('caption')
    config = with_teacher(folder, 'caption_flickr', scenes, teachers, train__epochs=1, train__batch_size=2,
                          loss__lm_logits=1.0, loss__vision_hidden=1.0, loss__decoder_hidden=1.0, eval__max_length=12,
                          data__teacher_captions=0.5, scst__epochs=2, scst__samples=3, scst__lr=1e-3)
    run(train_dlip_caption_flickr, config, folder / 'out')
    return config, folder / 'out'


def test_a_caption_run_with_teacher_captions_and_self_critical_stage(finished):
    _, out = finished
    first, tested = read_log(out / 'log.txt')
    assert {'train_loss_lm_logits', 'train_loss_vision_hidden', 'val_CIDEr', 'val_greedy_CIDEr'} <= first.keys()
    assert 'test_CIDEr' in tested
    header, *said = map(json.loads, (out / 'teacher_captions.jsonl').read_text().splitlines())
    assert header['num_beams'] == 3 and len(said) == 8
    rows = read_log(out / 'scst/log.txt')
    assert [row['epoch'] for row in rows] == [0, 1] and all('train_reward' in row for row in rows)
    best = read_checkpoint(out / 'best.pth')
    assert best['metrics']['CIDEr'] == max(row['val_CIDEr'] for row in [first, *rows])
    assert load_model(out / 'best.pth')[0].config.task == 'caption'


@pytest.mark.parametrize('stop_after', [20, 22])
def test_a_stop_in_either_stage_changes_nothing(finished, tmp_path, monkeypatch, stop_after):
    """Of 20 steps of distillation and 2 x 4 of the stage after it."""
    config, reference = finished
    stop_in_step(monkeypatch, stop_after)
    with pytest.raises(SystemExit):
        run(train_dlip_caption_flickr, config, tmp_path)
    run(train_dlip_caption_flickr, config, tmp_path)
    for name in ('best.pth', 'scst/last.pth'):
        got, want = (read_checkpoint(folder / name) for folder in (tmp_path, reference))
        for part in ('model', 'optimizer', 'epoch', 'batch') if 'last' in name else ('model',):
            assert same(got[part], want[part]), (name, part)


def test_the_stages_run_on_two_processes(finished, tmp_path):
    """All processes have all the teacher's captions, and gradients of everything that trains."""
    config, reference = finished
    for done in joined(2, 'train_dlip_caption_flickr.py', '--config', config, '--output_dir', tmp_path, '--device',
                      'cpu', 'train.batch_size=1', 'scst.epochs=1'):
        assert done.returncode == 0, done.stderr[-2000:]
    said = [sorted((folder / 'teacher_captions.jsonl').read_text().splitlines()) for folder in (tmp_path, reference)]
    assert said[0] == said[1]
    assert 'train_reward' in read_log(tmp_path / 'scst/log.txt')[0]


def test_the_self_critical_stage_alone(finished, tmp_path):
    """No epochs before it: from `model.init` on; and what cannot work is said before anything is trained."""
    config, out = finished
    settings = ['--config', str(config), '--output_dir', str(tmp_path), '--device', 'cpu', 'scst.epochs=1']
    train_dlip_caption_flickr.main([*settings, 'train.epochs=0', f'model.init={out / "best.pth"}',
                                    'data.teacher_captions=0'])
    assert same(read_checkpoint(tmp_path / 'before_scst.pth')['model'], read_checkpoint(out / 'best.pth')['model'])
    assert len(read_log(tmp_path / 'scst/log.txt')) == 1
    for setting, message in ((f'data.prompt={"red " * 50}', 'leaves no token for a caption: raise data.max_tokens, 30'),
                             ('scst.samples=1', 'scst.samples must be a whole number from 2 to 1000; got 1'),
                             ('teacher.cache=targets', 'set data.teacher_captions to 0, or teacher.cache to null')):
        with pytest.raises(ValueError, match=message):
            train_dlip_caption_flickr.main([*settings, setting])
