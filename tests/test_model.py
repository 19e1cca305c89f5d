"""The net against the original BLIP / dlip-v2 code (golden files) and against transformers' BLIP text model."""


import pytest
import torch
from conftest import NANO, TINY, golden, relative
from runs import losses_of

from models import losses
from models.blip import BLIP, BLIPConfig
from models.distill.objective import Objective
from models.linear import unpadded
from models.momentum import MomentumQueue
from models.text import KVCache
from models.weights.checkpoint import load_weights


def load(name: str, task: str, **config) -> BLIP:
    model = BLIP(BLIPConfig(**{**TINY, **config}, task=task)).eval()
    load_weights(model, golden(name)['model'], name)
    return model


@torch.no_grad()
def test_caption_net_equals_the_original():
    model, want = load('blip_caption_tiny.pth', 'caption'), golden('golden_blip_caption_tiny.pt')
    tokens = model.encode_image(golden('inputs_tiny.pt')['images'])
    hidden = model.text_decoder.bert(want['input_ids'], want['attention_mask'], causal=True,
                                     image_kv=model.project_image(tokens)).hidden
    logits = model.text_decoder.logits(hidden)
    valid = want['attention_mask'].bool()
    assert relative(tokens, want['image_embeds']) < 1e-5
    assert relative(hidden[valid], want['last_hidden'][valid]) < 1e-5
    assert relative(logits[valid][:, want['logit_cols']], want['logits_at_cols'][valid]) < 1e-5
    assert relative(logits.logsumexp(-1)[valid], want['logits_lse'][valid]) < 1e-5
    loss = losses.lm_loss(logits[:, :-1], want['labels'][:, 1:])
    assert relative(loss, want['loss_label_smooth']) < 1e-5


@torch.no_grad()
def test_retrieval_net_equals_the_original(bert_tokenizer):
    model, want = load('dlip_retrieval_tiny.pth', 'retrieval'), golden('golden_dlip_retrieval_tiny.pt')
    ids, mask = want['input_ids'], want['attention_mask']
    tokens, hidden = model.encode_image(golden('inputs_tiny.pt')['images']), model.text_encoder(ids, mask).hidden
    assert relative(hidden[mask.bool()], want['text_hidden'][mask.bool()]) < 1e-5
    assert relative(model.image_feat(tokens), want['image_feat']) < 1e-5
    assert relative(model.text_feat(ids, mask), want['text_feat']) < 1e-5
    kv = model.project_image(tokens)
    for start, key in ((bert_tokenizer.cls_id, 'itm_logits_cls'), (bert_tokenizer.enc_id, 'itm_logits_enc')):
        rows = ids.clone()
        rows[:, 0] = start
        rows, masks = rows.repeat(4, 1), mask.repeat(4, 1)  # four texts for each image, side by side
        assert relative(model.match_logits(rows, masks, kv).view(4, 4, 2), want[key]) < 1e-5
        picked = model.match_logits(rows, masks, kv, torch.arange(4).repeat_interleave(4))
        assert relative(picked.view(4, 4, 2), want[key]) < 1e-5


@pytest.mark.parametrize('alpha', [0.0, 0.4])
def test_ita_equals_the_original(alpha):
    want, student = golden('golden_pretrain_tiny.pt')['records'][('eval', alpha)], golden('pretrain_student_tiny.pth')
    feats, queues = want['tensors'], student['model']
    everything = [torch.cat([feats[f'{kind}_feat_m'], queues[f'{kind}_queue'].float().T]) for kind in ('image', 'text')]
    ids = torch.arange(4)
    targets = losses.positives(ids, torch.cat([ids, torch.full((64,), losses.IGNORE)]))
    loss = losses.ita_loss(feats['image_feat'], feats['text_feat'], feats['image_feat_m'], feats['text_feat_m'],
                           *everything, queues['temp'].float(), targets, alpha)
    assert float(loss) == pytest.approx(want['loss_ita'], rel=1e-4)


def test_itm_and_lm_equal_the_original(bert_tokenizer, monkeypatch):
    file = golden('golden_pretrain_tiny.pt')
    want = file['records'][('eval', 0.0)]
    size = dict(image_size=224, vision_width=48, text_width=48, text_ffn=96)
    model = load('pretrain_student_tiny.pth', 'pretrain', **size)
    drawn = torch.tensor(want['neg_idx'])  # the negatives that the original drew: images per text, texts per image
    objective = Objective(model, {'itm': 1, 'lm': 1}, start_ids(bert_tokenizer), MomentumQueue(model, 8, 0.9))
    monkeypatch.setattr(objective, 'draw_negatives', lambda *args: (drawn[:4], drawn[4:]))
    ids, mask = bert_tokenizer(file['captions'], 30)
    out = losses_of(objective, file['images'], ids, mask, torch.arange(4))
    assert float(out['itm'].detach()) == pytest.approx(want['loss_itm'], rel=1e-4)
    assert float(out['lm'].detach()) == pytest.approx(want['loss_lm'], rel=1e-4)
    out['loss'].backward()  # gradients of the two terms reach every text parameter
    assert all(p.grad is not None for p in model.text_decoder.parameters())


def start_ids(tokenizer):
    return tokenizer.cls_id, tokenizer.enc_id, tokenizer.bos_id


@torch.no_grad()
@pytest.mark.parametrize('causal', [False, True])
def test_text_tower_equals_transformers(causal):
    """Independent reference: transformers' BLIP text model with the same weights, with and without the image."""
    from transformers import BlipTextConfig, BlipTextModel
    config = BLIPConfig(**TINY, vocab_size=120)
    ours = BLIP(config).eval().text_encoder
    theirs = BlipTextModel(BlipTextConfig(vocab_size=120, hidden_size=64, encoder_hidden_size=64, intermediate_size=128,
                                          num_hidden_layers=2, num_attention_heads=4, is_decoder=True),
                           add_pooling_layer=False).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all(key.endswith('position_ids') for key in missing)
    ids, image = torch.randint(5, 120, (3, 9)), torch.randn(3, 17, 64)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    for tokens in (None, image):
        want = theirs(ids, mask, encoder_hidden_states=tokens, is_decoder=causal, return_dict=True,
                      mode=None if tokens is not None else 'text').last_hidden_state \
            if 'mode' in BlipTextModel.forward.__code__.co_varnames else \
            theirs(ids, mask, encoder_hidden_states=tokens, is_decoder=causal).last_hidden_state
        kv = ours.project_image(tokens) if tokens is not None else None
        for maps in (False, True):  # SDPA and the path that returns attention maps agree
            got = ours(ids, mask, causal=causal, image_kv=kv, want_maps=maps)
            assert relative(got.hidden[mask.bool()], want[mask.bool()]) < 1e-5


@torch.no_grad()
def test_cached_decoding_equals_one_pass(nano):
    ids = torch.randint(5, 60, (4, 7))
    kv = nano.project_image(nano.encode_image(torch.randn(2, 3, 32, 32)))  # two rows per image
    decoder = nano.text_decoder.bert
    want = decoder(ids, causal=True, image_kv=kv).hidden
    cache = KVCache(2, 7)
    got = [decoder(ids[:, :3], causal=True, image_kv=kv, cache=cache).hidden]
    got += [decoder(ids[:, i:i + 1], causal=True, image_kv=kv, cache=cache).hidden for i in range(3, 7)]
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-5)


def test_encoder_and_decoder_share_all_but_self_attention(nano):
    encoder = dict(nano.text_encoder.named_parameters(remove_duplicate=False))
    decoder = dict(nano.text_decoder.bert.named_parameters(remove_duplicate=False))
    for name, parameter in encoder.items():
        assert (parameter is decoder[name]) == ('.attention.' not in name), name
    assert nano.text_decoder.cls.predictions.decoder.weight is nano.text_encoder.embeddings.word_embeddings.weight


@pytest.mark.parametrize('amp', [False, True])
def test_activation_checkpointing_gives_the_same_gradients(amp):
    images, grads = torch.randn(2, 3, 32, 32), []
    for layers in (0, 2):
        torch.manual_seed(0)
        model = BLIP(BLIPConfig(**NANO, vocab_size=60), vit_ckpt_layer=layers).train()
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            tokens = model.encode_image(images)
        tokens.float().square().mean().backward()
        grads.append([p.grad for p in model.visual_encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize('causal', [False, True])
def test_packed_texts_compute_the_same_without_their_pads(small_tokenizer, causal):
    """States, maps and gradients, at every token; what pads would give is 0."""
    torch.manual_seed(0)
    net = BLIP(BLIPConfig(**NANO | {'dropout': 0.0}, vocab_size=len(small_tokenizer)))
    ids, mask = small_tokenizer(['a red dog', 'a blue star left of a dog', 'red'], 30)
    lengths = mask.sum(1).tolist()
    tokens = torch.randn(3, 5, NANO['vision_width'])
    found = []
    for texts in (mask, unpadded(mask, lengths)):
        net.zero_grad()
        image_kv = net.project_image(tokens)
        out = net.text_encoder(ids, texts, causal, image_kv, want_maps=True, layers=[0, 1])
        first = net.text_encoder(ids, texts, False, image_kv, first_only=True).hidden
        (out.hidden.square() * mask[..., None]).sum().backward()
        found.append((out.hidden, out.states[0], out.self_map, out.cross_map, first,
                      [p.grad for p in net.text_encoder.parameters() if p.grad is not None]))
    (*plain, first, grads), (*short, same_first, same_grads) = found
    for want, got in zip(plain, short, strict=True):
        want, got = (x.transpose(1, 2) if x.ndim == 4 else x for x in (want, got))  # maps: [R, T, heads, keys]
        assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-5)
    assert (short[0][~mask.bool()] == 0).all() and torch.allclose(first, same_first, atol=1e-5)
    assert len(grads) == len(same_grads) > 20
    for want, got in zip(grads, same_grads, strict=True):
        assert torch.allclose(got, want, atol=1e-4)
