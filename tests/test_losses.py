"""Losses against hand-made numbers and the properties that make them safe to sum."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import NANO
from processes import joined
from runs import losses_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import losses
from models.blip import BLIP, BLIPConfig
from models.distill.batch import Batch, row_noise
from models.distill.hidden import STREAMS, layer_pairs
from models.distill.objective import Objective
from models.distill.teacher import StoredTeacher
from models.distill.terms import TEACHER_TERMS, TERMS
from models.momentum import NO_ID, MomentumQueue
from utils import ROOT


def test_ita_of_perfect_features_is_the_entropy_floor():
    features = torch.eye(3)
    targets = losses.positives(torch.arange(3), torch.arange(3))
    loss = losses.ita_loss(features, features, features, features, features, features, torch.tensor(0.1), targets, 0.0)
    assert float(loss) == pytest.approx(math.log(1 + 2 * math.exp(-10)), rel=1e-3)


def test_captions_of_one_picture_share_the_target():
    targets = losses.positives(torch.tensor([7, 8]), torch.tensor([7, 8, 7, NO_ID]))
    assert targets.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]


def test_soft_ita_is_least_where_student_and_teacher_agree():
    torch.manual_seed(0)
    teacher = [F.normalize(torch.randn(5, 8), dim=1) for _ in range(2)]
    temp = torch.tensor(0.2)

    def loss(image, text):
        return losses.soft_ita_loss(image, text, image, text, temp, *teacher, *teacher, temp)
    others = [F.normalize(torch.randn(5, 8), dim=1) for _ in range(2)]
    assert loss(*teacher) < loss(*others)


def test_hard_negatives_never_share_an_id_and_follow_the_weights():
    similarity = torch.tensor([[5.0, 3.0, 0.0, -9.0]]).repeat(20000, 1)
    ids, candidates = torch.zeros(20000, dtype=torch.long), torch.tensor([0, 1, 2, 3])
    drawn = losses.hard_negatives(similarity, ids, candidates, torch.rand(20000, 4).clamp(1e-9, 1 - 1e-7))
    share = torch.bincount(drawn, minlength=4) / 20000
    weights = similarity[0].softmax(0) + 1e-4
    weights[0] = 0
    assert share[0] == 0
    assert torch.allclose(share, weights / weights.sum(), atol=0.01)


def test_negatives_noise_is_a_function_of_step_and_row():
    """Not of the number of processes: two that share the rows draw what one draws."""
    whole = row_noise(7, 0, 8, 11)
    assert torch.equal(whole, torch.cat([row_noise(7, 0, 4, 11), row_noise(7, 4, 4, 11)]))
    assert not torch.equal(whole, row_noise(8, 0, 8, 11)) and len(whole.unique()) == whole.numel()
    many = row_noise(1, 0, 300, 300)
    assert 0 < many.min() and many.max() < 1 and many.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.corrcoef(many).fill_diagonal_(0).abs().max() < 0.35  # rows know nothing of each other


def test_top_1_counts_captions_of_the_same_image():
    rows, columns = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    assert float(losses.top_1(rows, columns, torch.tensor([4, 4, 5]))) == 1
    assert float(losses.top_1(rows, columns, torch.tensor([3, 4, 5]))) == pytest.approx(1 / 3)


def test_lm_loss_ignores_pads_and_an_empty_batch_is_zero():
    logits, labels = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    labels[1, 2:] = losses.IGNORE
    kept = labels.flatten() != losses.IGNORE
    want = F.cross_entropy(logits.flatten(0, 1)[kept], labels.flatten()[kept], label_smoothing=0.1)
    assert torch.allclose(losses.lm_loss(logits, labels), want)
    assert losses.lm_loss(logits, torch.full_like(labels, losses.IGNORE)) == 0
    assert losses.logit_kl_loss(logits[:0].flatten(0, 1), logits[:0].flatten(0, 1)) == 0


def test_logit_kl_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])  # 1/2 1/2 against 3/4 1/4
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(losses.logit_kl_loss(student, teacher)) == pytest.approx(want, rel=1e-3)


def test_cosine_loss_by_hand():
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    assert float(losses.cosine_loss(student, teacher)) == pytest.approx(0.5)
    assert float(losses.cosine_loss(student, teacher, torch.tensor([1, 0]))) == pytest.approx(0)


def test_attention_kl_ignores_pad_rows_and_masked_keys():
    scores = torch.randn(2, 2, 3, 3, 3)
    scores[..., 2] = torch.finfo(torch.float32).min  # the last key is a pad
    student, teacher = scores.log_softmax(-1).unbind(0)
    rows = torch.tensor([[1, 1, 0], [1, 1, 0]])
    loss = losses.attention_kl_loss(student, teacher, rows)
    p, q = teacher[:, :, :2, :2].exp(), student[:, :, :2, :2].exp()
    assert torch.allclose(loss, (p * (p / q).log()).sum(-1).mean(), atol=1e-6)
    changed = student.clone()
    changed[:, :, 2] = math.log(1 / 3)
    assert torch.equal(losses.attention_kl_loss(changed, teacher, rows), loss)


def test_hidden_loss_compares_directions_not_sizes():
    torch.manual_seed(0)
    teacher, other = torch.randn(2, 2, 3, 64)
    assert float(losses.hidden_loss(3 * teacher + 1, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(losses.hidden_loss(-teacher, teacher)) == pytest.approx(4, rel=1e-3)
    student = torch.cat([teacher[:, :1], other[:, 1:]], 1)
    want = 2 - 2 * torch.corrcoef(torch.stack([student[0, 1], teacher[0, 1]]))[0, 1]  # its closed form
    assert torch.allclose(losses.hidden_loss(student, teacher, torch.tensor([[0, 1, 0], [0, 0, 0]])), want, atol=1e-4)
    assert float(losses.hidden_loss(student, teacher, torch.tensor([[1, 0, 0], [1, 0, 0]]))) < 1e-6


@pytest.mark.parametrize('chosen, pairs', [
    (None, [(0, 1), (1, 3), (2, 5)]), ([3], [(2, 5)]), ([2], [(1, 3)]), ([[1, 6], [3, 6]], [(0, 5), (2, 5)])])
def test_layers_are_matched_by_depth(chosen, pairs):
    assert layer_pairs(chosen, 3, 6, 'text') == pairs


@pytest.mark.parametrize('chosen, message', [
    ([4], 'the student has the layers 1 to 3, not 4'), ([[3, 7]], 'the teacher has the layers 1 to 6, not 7'),
    ([], 'at least one'), ([1, 1], 'none of the student twice'), (['last'], "holds 'last'"), ([[1]], 'holds .1.')])
def test_a_layer_that_is_not_there_is_named(chosen, message):
    with pytest.raises(ValueError, match=f'hidden_layers.text.* {message}'):
        layer_pairs(chosen, 3, 6, 'text')


# ---------------------------------------------------------------- the objective

ACCURACIES = ('acc_i2t', 'acc_t2i')
PROJECTED = ('image_tokens', 'fused_feat', 'decoder_feat', *STREAMS)


@pytest.fixture
def batch(small_tokenizer):
    torch.manual_seed(1)
    ids, mask = small_tokenizer(['a red dog', 'blue star', 'a picture of a dog', 'red'], 12)
    return torch.randn(4, 3, 32, 32), ids, mask, torch.arange(4)


def objective(tokenizer, weights, seed=0, teacher_width=48, **settings) -> Objective:
    torch.manual_seed(seed)
    student = BLIP(BLIPConfig(**NANO, vocab_size=len(tokenizer)))
    teacher = BLIP(BLIPConfig(**{**NANO, 'vision_width': 48, 'text_width': teacher_width}, vocab_size=len(tokenizer)))
    momentum = MomentumQueue(student, 10, 0.9, teacher.config.embed_dim)
    return Objective(student, weights, (tokenizer.cls_id, tokenizer.enc_id, tokenizer.bos_id), momentum, teacher,
                     **settings)


def test_every_trainable_parameter_gets_a_gradient(small_tokenizer, batch):
    net = objective(small_tokenizer, dict.fromkeys(TERMS, 1.0))
    out = losses_of(net, *batch)
    assert set(out) == {*TERMS, *ACCURACIES, 'loss'} and all(torch.isfinite(value) for value in out.values())
    out['loss'].backward()
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trainable.values())
    assert not any(name.startswith('momentum') for name in trainable)
    assert all(p.grad is None for p in net.teacher.parameters())


@pytest.mark.parametrize('term', TERMS)
def test_each_term_alone(small_tokenizer, batch, term):
    """A weight of 0 skips the other terms, and the value is the one it has among all of them."""
    together = losses_of(objective(small_tokenizer, dict.fromkeys(TERMS, 1.0)), *batch)
    alone = losses_of(objective(small_tokenizer, {term: 2.0}), *batch)
    assert set(alone) - set(ACCURACIES) == {term, 'loss'}
    assert torch.allclose(alone['loss'], 2 * alone[term])
    if term not in PROJECTED:  # their learned projections are drawn in another order
        assert torch.allclose(alone[term], together[term], rtol=1e-4)


class Spy(TorchDispatchMode):
    """Names the operations on bfloat16 other than the cast to float32."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if 'to_copy' not in str(function) and any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16
                                                  for x in tree_leaves((args, kwargs, out))):
            self.seen.add(str(function))
        return out


@pytest.mark.parametrize('term', TERMS)
def test_no_loss_computes_in_bfloat16(small_tokenizer, batch, monkeypatch, term):
    """Under autocast, in which the towers do: neither the losses' own operations nor their gradients."""
    spy, called = Spy(), []

    def watched(function):
        def run(*args, **kwargs):
            called.append(function.__name__)
            with spy:
                out = function(*args, **kwargs)
                inputs = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
                if out.requires_grad:
                    with torch.autocast('cpu', enabled=False):  # as in a run, whose backward pass is outside of it
                        torch.autograd.grad(out.sum(), inputs, retain_graph=True)
            return out
        return run
    for name, function in inspect.getmembers(losses, inspect.isfunction):
        if name not in ('in_float32', 'as_float32', 'in_chunks'):
            monkeypatch.setattr(losses, name, watched(function))
    net = objective(small_tokenizer, {term: 1.0})
    called.clear()
    with torch.autocast('cpu', torch.bfloat16):
        out = losses_of(net, *batch)
        assert net.student.vision_proj(batch[0][:, 0]).dtype == torch.bfloat16
    assert called and not spy.seen
    assert all(value.dtype == torch.float32 for value in out.values())


def test_hidden_loss_of_bfloat16_states_is_that_of_float32_up_to_their_rounding():
    torch.manual_seed(0)
    student, mask = torch.randn(4, 50, 96).bfloat16(), torch.rand(4, 50) < 0.7
    teacher = (student + torch.randn(4, 50, 96) + 1).bfloat16()
    for kept in (None, mask):
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            states = student.to(dtype, copy=True).requires_grad_()
            with torch.autocast('cpu', torch.bfloat16):
                loss = losses.hidden_loss(states, teacher.to(dtype), kept)
            loss.backward()
            found.append((loss, states.grad.float()))
        (want, slope), (got, other) = found
        assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=1e-3)
        assert (slope - other).norm() < 0.01 * slope.norm()


def test_losses_in_chunks_are_those_of_all_rows():
    torch.manual_seed(0)
    rows, labels, head = torch.randn(10, 8), torch.randint(0, 20, (10,)), torch.nn.Linear(8, 20)

    def found(size):
        head.zero_grad()
        x = rows.clone().requires_grad_()
        value = losses.in_chunks(lambda x, labels: losses.lm_loss(head(x), labels)[None], size, x, labels)
        value.sum().backward()
        return value, x.grad, head.weight.grad.clone()
    for got, want in zip(found(4), found(10), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_autocast_changes_no_contrastive_gradient():
    torch.manual_seed(0)
    features = [F.normalize(torch.randn(8, 64), dim=1).requires_grad_() for _ in range(2)]
    temp, targets = torch.tensor(0.015, requires_grad=True), losses.positives(torch.arange(8), torch.arange(8))

    def gradients(autocast):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss = losses.ita_loss(*features, *features, *features, temp, targets, 0.4)
        return torch.autograd.grad(loss, [*features, temp])
    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(small_tokenizer, batch):
    terms = [t for t in TEACHER_TERMS if t not in (*PROJECTED, 'ita_soft')]
    net = objective(small_tokenizer, dict.fromkeys(terms, 1.0))
    net.frozen.model = net.student
    out = losses_of(net.eval(), *batch)
    assert all(abs(float(out[term].detach())) < 1e-5 for term in terms)


def test_pads_change_no_loss(small_tokenizer, batch):
    images, ids, mask, sample_ids = batch
    net = objective(small_tokenizer, dict.fromkeys(TERMS, 1.0)).eval()
    want = losses_of(net, images, ids, mask, sample_ids)
    got = losses_of(net, images, F.pad(ids, (0, 5)), F.pad(mask, (0, 5)), sample_ids)
    for name, value in want.items():
        assert torch.allclose(value, got[name], rtol=1e-4, atol=1e-6), name


PAIRS = [('image_tokens', 'vision_hidden'), ('text_feat', 'text_hidden'), ('image_tokens', 'lm'), ('ita', 'cross_attn')]


@pytest.mark.slow
def test_any_set_of_terms_trains_on_two_processes(tmp_path):
    """DDP waits for a gradient of every parameter that trains; each term alone and a few pairs."""
    code = tmp_path / 'sets.py'
    code.write_text(f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from test_step import micro_batch, objective
from models.distill.terms import TERMS
dist.init_process_group('gloo')
for names in [*((term,) for term in TERMS), *{PAIRS!r}]:
    torch.manual_seed(0)
    net = objective(names, depth=1)
    parallel = DistributedDataParallel(net)
    batch = micro_batch('cpu')
    for step in range(2):  # the second finds out what the first waited for
        update, [prepared] = net.prepare([batch], 0.4, step)
        parallel(prepared, update)['loss'].backward()
    print(names, sum(p.requires_grad for p in net.parameters()))
""")
    for done in joined(2, code):
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count('(') == len(TERMS) + len(PAIRS)


@pytest.mark.parametrize('task, terms', [
    ('retrieval', ('ita', 'itm')), ('caption', ('lm',)), ('caption', ('lm_logits',)), ('retrieval', ('cross_attn',)),
    ('pretrain', ('vision_hidden',))])
def test_what_no_term_reaches_is_frozen(small_tokenizer, batch, task, terms):
    """For each task, with recomputed blocks, a prompt and a stored teacher; found without drawing a random number."""
    torch.manual_seed(0)
    config = BLIPConfig(**NANO | {'dropout': 0.1}, vocab_size=len(small_tokenizer), task=task)
    student, teacher = BLIP(config, vit_ckpt_layer=1), BLIP(config)
    momentum = MomentumQueue(student, 10, 0.9, 16) if task == 'retrieval' else None
    state = torch.get_rng_state()
    stored = StoredTeacher(config, 0.07)
    frozen = [Objective(copy.deepcopy(student), dict.fromkeys(terms, 1.0), (2, 3, 4), momentum, source, prompt_length=2,
                        hidden_layers={'vision': [1]}) for source in (teacher, stored)]
    assert 'vision_hidden' in terms or torch.equal(torch.get_rng_state(), state)  # its projections are drawn
    names = [{name for name, p in net.named_parameters() if p.requires_grad} for net in frozen]
    assert names[0] == names[1]
    losses_of(frozen[0], *batch)['loss'].backward()
    assert {name for name, p in frozen[0].named_parameters() if p.grad is not None} == names[0]


def test_teacher_cannot_leave_eval_nor_train(small_tokenizer, batch):
    net = objective(small_tokenizer, {'lm_logits': 1.0}).train()
    assert not net.teacher.training and not any(p.requires_grad for p in net.teacher.parameters())
    assert not any('teacher' in key and 'queue' not in key for key in net.state_dict())


@pytest.mark.parametrize('term', STREAMS)
def test_hidden_states_are_those_of_the_chosen_layers(small_tokenizer, batch, term):
    """Against states recorded by hooks: the first layer beside the teacher's second. A text layer sees no pads."""
    net = objective(small_tokenizer, {term: 1.0}, hidden_layers={'vision': [[1, 2]], 'text': [[1, 2]]}).eval()
    seen = {}
    for model, layer in ((net.student, 0), (net.teacher, 1)):
        tower = {'vision_hidden': model.visual_encoder.blocks, 'decoder_hidden': model.text_decoder.bert.layers}.get(
            term, model.text_encoder.layers)
        tower[layer].register_forward_hook(
            lambda module, inputs, out, layer=layer: seen.update({layer: out if term == 'vision_hidden' else out[0]}))
    got = losses_of(net, *batch)[term].detach()
    want = losses.hidden_loss(net.hidden[term].projs['1_2'](seen[0]), seen[1])
    assert torch.allclose(got, want, atol=1e-6) and float(got) > 0.1
    assert term == 'vision_hidden' or len(seen[0]) == batch[2].sum()
    with pytest.raises(ValueError, match='the student has the layers 1 to 2, not 3'):
        objective(small_tokenizer, {term: 1.0}, hidden_layers={'vision': [3], 'text': [3]})


@pytest.mark.parametrize('term', STREAMS)
def test_layers_above_the_compared_ones_do_not_train(small_tokenizer, batch, term):
    """Nothing else reaches them: DDP would wait for their gradients."""
    weights = {term: 1.0, 'image_tokens': 1.0, 'lm': float(term == 'vision_hidden')}
    net = objective(small_tokenizer, weights, hidden_layers={'vision': [1], 'text': [1]})
    losses_of(net, *batch)['loss'].backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_copied_layer_starts_at_its_teachers_states(small_tokenizer, batch):
    """Equal widths: the maps start as the identity."""
    net = objective(small_tokenizer, {'text_hidden': 1.0, 'decoder_hidden': 1.0}, teacher_width=32)
    net.frozen.model = net.student
    out = losses_of(net.eval(), *batch)
    assert all(abs(float(out[term].detach())) < 1e-5 for term in ('text_hidden', 'decoder_hidden'))


@torch.no_grad()
@pytest.mark.parametrize('change', [lambda net: net.teacher.temp.mul_(2),
                                    lambda net: net.momentum.teacher_image_queue.neg_()])
def test_soft_targets_come_from_the_teachers_own_space(small_tokenizer, batch, change):
    """Its temperature and its features of the queue, not the student's (bug 4 of the original)."""
    net = objective(small_tokenizer, {'ita_soft': 1.0}).eval()
    before = losses_of(net, *batch)['ita_soft']
    change(net)
    assert not torch.isclose(losses_of(net, *batch)['ita_soft'], before)


@torch.no_grad()
def test_every_pass_starts_with_its_own_token(small_tokenizer, batch):
    """[CLS] embeds, [ENC] matches, [DEC] captions, whatever stands at position 0 of the batch."""
    for token, terms in (('cls_id', {'ita'}), ('enc_id', {'itm'}), ('bos_id', {'lm'})):
        net = objective(small_tokenizer, {'ita': 1.0, 'itm': 1.0, 'lm': 1.0}).eval()
        before = losses_of(net, *batch)
        setattr(net, token, 9)
        after = losses_of(net, *batch)
        assert {term for term in ('ita', 'itm', 'lm') if not torch.isclose(before[term], after[term])} >= terms


def test_an_update_is_enqueued_when_asked_for(small_tokenizer, batch):
    net = objective(small_tokenizer, {'ita': 1.0, 'ita_soft': 1.0}).train()
    before = net.momentum.image_queue.clone()
    update, _ = net.prepare([Batch(*batch, batch[2].sum(1).tolist())])
    losses_of(net, *batch)
    assert torch.equal(net.momentum.image_queue, before)
    net.momentum.enqueue(update.ids, **update.own())
    assert net.momentum.id_queue[:4].tolist() == [0, 1, 2, 3] and int(net.momentum.pointer) == 4
    assert torch.equal(net.momentum.image_queue[4:], before[4:])


def test_without_a_queue_the_batch_is_compared_with_itself(small_tokenizer, batch):
    torch.manual_seed(0)
    student = BLIP(BLIPConfig(**NANO, vocab_size=len(small_tokenizer)))
    net = Objective(student, {'ita': 1.0, 'ita_soft': 1.0, 'itm': 1.0}, (2, 3, 4), MomentumQueue(student, 0, 0.9, 16),
                    copy.deepcopy(student)).train()
    assert not any('queue' in name or 'pointer' in name for name in net.state_dict())
    update, _ = net.prepare([Batch(*batch, batch[2].sum(1).tolist())])
    assert {len(rows) for rows in update.columns.values()} == {4} and len(update.column_ids) == 4
    out = losses_of(net, *batch)
    net.momentum.enqueue(update.ids, **update.own())  # keeps nothing
    assert math.isfinite(out['loss'].item()) and torch.equal(out['ita'], losses_of(net, *batch)['ita'])
    assert 0 <= float(out['acc_i2t']) <= 1


def test_queue_wraps_at_any_batch_size(small_tokenizer):
    momentum = objective(small_tokenizer, {'ita': 1.0}).momentum
    for start in range(0, 12, 4):  # a queue of 10 and batches of 4
        ids = torch.arange(start, start + 4)
        momentum.enqueue(ids, image=F.one_hot(ids, 16).float(), text=F.one_hot(ids, 16).float())
    assert momentum.id_queue.tolist() == [10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert momentum.image_queue.argmax(1).tolist() == [10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_momentum_encoder_starts_equal_and_follows(small_tokenizer, batch):
    net = objective(small_tokenizer, {'ita': 1.0}).eval()
    images, ids, mask, _ = batch
    ids[:, 0] = small_tokenizer.cls_id
    with torch.no_grad():
        image, text = net.momentum.encode(images, ids, mask)
        assert torch.allclose(image, net.student.image_feat(net.student.encode_image(images)), atol=1e-6)
        assert torch.allclose(text, net.student.text_feat(ids, mask), atol=1e-6)
        net.student.text_proj.weight.add_(1.0)
        old = net.momentum.text_proj.weight.clone()
        net.momentum.update(net.student)
    assert torch.allclose(net.momentum.text_proj.weight, 0.9 * old + 0.1 * net.student.text_proj.weight)


@pytest.mark.parametrize('weights, task, message', [
    ({'lm': 1.0}, 'retrieval', 'loss.lm needs a text_decoder'),
    ({'itm': 1.0}, 'caption', 'loss.itm needs a text_encoder')])
def test_a_missing_part_is_named(small_tokenizer, weights, task, message):
    student = BLIP(BLIPConfig(**NANO, vocab_size=len(small_tokenizer), task=task))
    with pytest.raises(ValueError, match=message):
        Objective(student, weights, (2, 3, 4))


def test_weights_of_zero_alone_are_refused(nano):
    with pytest.raises(ValueError, match='every weight under `loss` is 0'):
        Objective(nano, {'lm': 0.0}, (2, 3, 4))


def test_a_missing_teacher_is_named(nano):
    with pytest.raises(ValueError, match='loss.lm_logits needs a teacher'):
        Objective(nano, {'lm_logits': 1.0}, (2, 3, 4))
