"""Where a student starts: layers and channels of its teacher, a BERT, a timm ViT."""

import re
from dataclasses import replace

import pytest
import timm
import torch
import transformers
from conftest import NANO, relative
from safetensors.torch import save_file

from models.blip import BLIP, BLIPConfig
from models.distill.hidden import STREAMS
from models.distill.objective import Objective
from models.distill.start import init_projections
from models.losses import cosine_loss
from models.momentum import MomentumQueue
from models.text import Attention
from models.weights.build import build_student
from models.weights.inherit import (
    choose_layers,
    inherit_text,
    inherit_vision,
    keep_heads,
    load_bert,
    load_timm,
    text_channels,
)

BIG = {'vision_width': 64, 'text_width': 64, 'text_ffn': 128}


def test_which_layers_are_kept():
    assert [choose_layers(*sizes) for sizes in ((1, 6), (2, 6), (3, 7), (3, 3))] == [[5], [0, 5], [0, 3, 6], [0, 1, 2]]
    assert choose_layers(2, 5, 'first') == [0, 1] and choose_layers(2, 5, 'last') == [3, 4]
    with pytest.raises(ValueError, match="init_layers is 'middle': one of spaced, first, last"):
        choose_layers(2, 5, 'middle')
    with pytest.raises(ValueError, match='the student has 6 layers'):
        choose_layers(6, 5)


@torch.no_grad()
def test_the_neurons_that_do_something_are_kept(nano):
    """The others of the teacher's feed-forward net are silent, so the student computes what the teacher does."""
    for layer in nano.text_encoder.layers:  # the decoder's are the same, tied
        layer.intermediate.dense.weight[::2] = 0
        layer.intermediate.dense.bias[::2] = 0
        layer.output.dense.weight[:, ::2] = 0
    student = BLIP(replace(nano.config, text_ffn=nano.config.text_ffn // 2)).eval()
    inherit_vision(student, nano)
    inherit_text(student, nano)
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(5, 30, (2, 7))
    kv = student.project_image(student.encode_image(images))
    for tower in ('text_encoder', 'text_decoder'):
        ours, theirs = (getattr(net, tower) for net in (student, nano))
        ours, theirs = (net.bert if tower == 'text_decoder' else net for net in (ours, theirs))
        assert torch.allclose(ours(ids, image_kv=kv).hidden, theirs(ids, image_kv=kv).hidden, atol=1e-5)


@torch.no_grad()
def test_a_narrow_net_hidden_in_a_wide_one_is_found(nano):
    """A student is planted at the odd places of every axis of a teacher twice as wide, zeros elsewhere."""
    teacher = BLIP(replace(nano.config, **BIG))
    planted, wide = {name: torch.randn_like(weight) for name, weight in nano.state_dict().items()}, teacher.state_dict()
    nano.load_state_dict(planted)
    for name, weight in nano.state_dict().items():
        places = [torch.arange(small) * (big // small) + big // small - 1
                  for small, big in zip(weight.shape, wide[name].shape, strict=True)]
        wide[name].zero_()[torch.meshgrid(*places, indexing='ij') if places else ...] = weight
    teacher.load_state_dict(wide)
    student = BLIP(nano.config)
    inherit_vision(student, teacher)
    inherit_text(student, teacher)
    twice = 2 ** 0.5
    for name, weight in nano.state_dict().items():
        got = student.state_dict()[name]
        if re.search(r'(query|key|value|qkv|fc1|intermediate.dense|transform.dense|_proj|itm_head)\.weight', name):
            got = got / twice  # half of the inputs
        if 'query' in name:
            got = got * twice  # the heads are half as wide, so scores are divided by less
        if 'qkv' in name:
            got = torch.cat([got[:len(got) // 3] * twice, got[len(got) // 3:]])
        assert torch.allclose(got, weight, atol=1e-6), name


@torch.no_grad()
def test_the_heads_that_do_something_are_kept():
    """Of four heads two are silent, and in the others half of the dimensions: cut away, nothing changes."""
    silent = torch.ones(4, 8)
    silent[[0, 2]] = 0
    silent[:, ::2] = 0
    wide, narrow = Attention(32, 32, 4, 0.0).eval(), Attention(32, 32, 4, 0.0).eval()
    for part in (wide.self.query, wide.self.key, wide.self.value):
        part.weight.mul_(silent.flatten()[:, None])
        part.bias.mul_(silent.flatten())
    names = ('self.query', 'self.key', 'self.value', 'output.dense')
    weights = wide.state_dict()
    keep_heads(weights, names, heads=4, kept=2, width=4)
    narrow.heads = 2
    for name in names:
        part = narrow.get_submodule(name)
        part.weight.data, part.bias.data = weights[f'{name}.weight'], weights[f'{name}.bias']
    narrow.output.LayerNorm = wide.output.LayerNorm
    hidden = torch.randn(2, 5, 32)
    assert narrow.self.query.weight.shape == (8, 32)
    want, got = (net(hidden, *net.keys_values(hidden))[0] for net in (wide, narrow))
    assert torch.allclose(got, want, atol=1e-6)


@torch.no_grad()
def test_a_channel_is_mapped_to_the_one_it_comes_from(nano):
    teacher, images = BLIP(replace(nano.config, **BIG)).eval(), torch.randn(2, 3, 32, 32)
    inherit_vision(nano, teacher)
    inherit_text(nano, teacher)
    weights = dict.fromkeys(('image_tokens', 'fused_feat', 'decoder_feat', *STREAMS), 1.0)
    objective = Objective(nano, weights, (0, 1, 2), MomentumQueue(nano, 8, 0.9, teacher.config.embed_dim), teacher)

    def distance() -> float:
        return float(cosine_loss(objective.token_proj(nano.encode_image(images)), teacher.encode_image(images)))
    before = distance()
    init_projections(objective, {'init': None, 'init_vision': 'teacher', 'init_text': 'teacher'}, teacher)
    assert distance() < before / 2
    texts = [value for name, value in objective.projections.items() if value.ndim == 2 and 'vision' not in name][1:]
    assert len(texts) == 2 + 3 * nano.config.text_depth
    for value in texts:
        assert torch.equal(value[text_channels(nano, teacher)], torch.eye(32)) and value.sum() == 32


def test_a_teacher_narrower_than_the_student_is_refused(nano):
    with pytest.raises(ValueError, match='wider than what it would start from'):
        inherit_text(BLIP(replace(nano.config, **BIG)), nano)


@pytest.fixture
def bert(tmp_path, bert_tokenizer) -> tuple:
    """A BERT as on the hub: its vocabulary lacks [DEC] and [ENC]."""
    config = transformers.BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                                     intermediate_size=64)
    model = transformers.BertForPreTraining(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / 'vocab.txt').write_text('\n'.join(bert_tokenizer.vocab[:30522]) + '\n')
    return model, tmp_path


@torch.no_grad()
def test_text_towers_start_from_a_bert(bert, bert_tokenizer, small_tokenizer):
    theirs, folder = bert
    student = BLIP(BLIPConfig(**NANO | {'text_depth': 3}, vocab_size=30524)).eval()
    load_bert(student, folder, bert_tokenizer)
    ids, mask = bert_tokenizer(['a dog on a beach', 'snow'], 20)
    want = theirs.bert(ids, mask).last_hidden_state
    got = student.text_encoder(ids, mask).hidden
    assert relative(got[mask.bool()], want[mask.bool()]) < 1e-5
    assert relative(student.text_decoder.logits(want)[..., :30522], theirs.cls.predictions(want)) < 1e-5
    shallow = BLIP(BLIPConfig(**NANO | {'text_ffn': 32, 'task': 'caption'}, vocab_size=30524, max_positions=40))
    load_bert(shallow, folder, bert_tokenizer, 'first')
    layer = theirs.bert.encoder.layer[1].attention.self.query.weight
    assert torch.equal(shallow.text_decoder.bert.layers[1].attention.self.query.weight, layer)
    with pytest.raises(ValueError, match='has another vocabulary'):
        load_bert(BLIP(BLIPConfig(**NANO, vocab_size=len(small_tokenizer))), folder, small_tokenizer)
    with pytest.raises(ValueError, match='wider than'):
        load_bert(BLIP(BLIPConfig(**NANO | BIG, vocab_size=30524)), folder, bert_tokenizer)


@pytest.mark.parametrize('content', ['', '[]', '[' * 100_000, '{}', '{"model_type": "roberta"}',
                                     '{"hidden_size": "x", "num_hidden_layers": 1, "num_attention_heads": 1, '
                                     '"intermediate_size": 1}'])
def test_an_odd_config_of_a_bert_is_named(nano, tmp_path, small_tokenizer, content):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(ValueError, match='config.json describes no BERT: '):
        load_bert(nano, tmp_path, small_tokenizer)


@torch.no_grad()
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_vision_tower_starts_from_a_file_of_timm(tmp_path, nano, suffix):
    theirs = timm.create_model('vit_tiny_patch16_224', img_size=32, embed_dim=32, depth=2, num_heads=2).eval()
    file = tmp_path / f'vit{suffix}'
    if suffix == '.pth':
        torch.save({'model': theirs.state_dict()}, file)  # as DeiT's own files
    else:
        save_file(theirs.state_dict(), file)
    load_timm(nano, file)
    images = torch.randn(2, 3, 32, 32)
    assert relative(nano.encode_image(images), theirs.forward_features(images)) < 1e-5
    with pytest.raises(ValueError, match=r'does not fit the student: .* 64\) here'):
        load_timm(BLIP(replace(nano.config, **BIG)), file)


@pytest.mark.parametrize('changes, message', [
    ({'init_vision': 'deit_small_patch16_224.fb_in1k'}, "cannot get 'timm/deit_small_patch16_224.fb_in1k'"),
    ({'init_vision': 'save/deit.pth'}, 'no checkpoint save/deit.pth'),
    ({'init_text': 'bert-base-uncased'}, "cannot get 'bert-base-uncased'"),
    ({'init_text': 'teacher'}, 'model.init_text is teacher, but teacher.weights is null')])
def test_a_start_that_is_not_there_is_named(small_tokenizer, changes, message):
    settings = {'size': 'tests/sizes.yaml:nano', 'image_size': 32, 'init': None, 'init_vision': None, 'init_text': None,
                'init_layers': 'spaced', 'dropout': 0.0, 'vit_ckpt_layer': 0}
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        build_student(settings | changes, small_tokenizer, 'pretrain')
