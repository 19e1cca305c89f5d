"""Token ids against the original BLIP's `generate`, and properties of sampling."""

import re

import hypothesis
import pytest
import torch
from conftest import golden
from hypothesis import given
from hypothesis import strategies as st
from test_model import load
from transformers import NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor

from models.generation import beam_search, filter_top, generate, generate_ids, generate_scored
from models.generation.constraints import Constraints, Forbidden
from models.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def captioner():
    model = load('blip_caption_tiny.pth', 'caption')
    with torch.no_grad():
        return model, model.encode_image(golden('inputs_tiny.pt')['images'])


@pytest.mark.parametrize('key, settings', [
    ('greedy_ids', dict(num_beams=1)),
    ('beam3_ids', {}),
    ('beam3_rp1.1_ids', dict(repetition_penalty=1.1)),
    ('beam3_max20_min5_ids', dict(max_length=20, min_length=5)),
    ('greedy_20new_ids', dict(num_beams=1, max_length=24, min_length=24)),
    ('beam3_20new_ids', dict(max_length=24, min_length=24)),
    *[(f'eos+{bias}_{mode}_ids', dict(num_beams=beams, eos_bias=bias))
      for bias in (0.5, 1.0, 2.0) for mode, beams in (('greedy', 1), ('beam3', 3))]])
def test_ids_equal_the_original(captioner, key, settings):
    (model, tokens), want = captioner, golden('golden_blip_caption_tiny.pt')
    bias, settings = model.text_decoder.cls.predictions.bias, dict(settings)
    raised = settings.pop('eos_bias', 0.0)  # makes hypotheses finish at different lengths
    bias.data[102] += raised
    try:
        ids = generate_ids(model, tokens, want['prompt_ids'][0], 102, 0, **settings)
    finally:
        bias.data[102] -= raised
    assert torch.equal(ids, want[key])


@torch.no_grad()
def test_beam_scores_equal_the_original(captioner):
    (model, tokens), want = captioner, golden('golden_blip_caption_tiny.pt')
    scores = beam_search(model, tokens, want['prompt_ids'][0], 0, num_beams=3, max_length=30, length_penalty=1.0,
                         constraints=Constraints(102, min_length=10))[2]
    assert torch.allclose(scores, want['beam3_scores'], rtol=1e-5)


def test_an_image_alone_gives_the_caption_it_gets_in_a_batch(nano, small_tokenizer):
    images = torch.randn(4, 3, 32, 32)
    for settings in (dict(num_beams=1), dict(num_beams=3)):
        together = generate(nano, small_tokenizer, images, **settings)
        assert together == [generate(nano, small_tokenizer, image[None], **settings)[0] for image in images]


def test_sampling_is_seeded_and_keeps_to_the_nucleus(nano, small_tokenizer):
    images = torch.randn(3, 3, 32, 32)
    draw = [generate(nano, small_tokenizer, images, sample=True, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    kept = filter_top(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), top_k=0, top_p=0.7)
    assert torch.isfinite(kept).tolist() == [[True, True, False, False]]
    assert torch.isfinite(filter_top(kept, top_k=1, top_p=1.0)).sum() == 1


SPELLER = Tokenizer(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b', '##a', '##b', 'ab', '##ab', 'ba', '!'])


def spellings(words: list[str], start: int = 0) -> list[list[int]]:
    """Every way to split words into tokens of SPELLER."""
    if not words:
        return [[]]
    ways = []
    for token in range(5, len(SPELLER)):
        piece = SPELLER.vocab[token]
        if piece.startswith('##') == (start > 0) and words[0].startswith(piece.removeprefix('##'), start):
            end = start + len(piece.removeprefix('##'))
            rest = (words[1:], 0) if end == len(words[0]) else (words, end)
            ways += [[token, *way] for way in spellings(*rest)]
    return ways


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.text('ab', min_size=1, max_size=4) | st.just('!'), min_size=1, max_size=3), min_size=1,
                max_size=3), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_constraints_equal_those_of_transformers(phrases, length, size, seed):
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 13, (6, length), generator=noise)
    ids[:, 0] = SPELLER.bos_id
    scores = torch.randn(6, len(SPELLER), generator=noise)
    want = NoBadWordsLogitsProcessor([way for words in phrases for way in spellings(words)])(ids, scores)
    assert torch.equal(Forbidden([' '.join(words).upper() for words in phrases], SPELLER)(scores, ids), want)
    both = NoRepeatNGramLogitsProcessor(size)(ids, want)
    ours = Constraints(SPELLER.sep_id, no_repeat_ngram_size=size,
                       forbidden=Forbidden(list(map(' '.join, phrases)), SPELLER))
    assert torch.equal(ours(scores.clone(), ids), both)


@pytest.mark.parametrize('mode', [dict(num_beams=1), dict(num_beams=4, num_captions=4),
                                  dict(sample=True, top_p=1.0, temperature=3.0, num_captions=20)])
def test_captions_keep_to_their_constraints(nano, small_tokenizer, mode):
    images, asked = torch.randn(3, 3, 32, 32), dict(mode, max_length=24, min_length=16)
    plain = generate(nano, small_tokenizer, images, **asked)
    forbid = sorted({word for caption in plain for word in caption.split()} - {'a', 'blue'})[::2]
    for caption in generate(nano, small_tokenizer, images, prefix='A Blue', forbid=forbid, no_repeat_ngram_size=2,
                            **asked):
        assert caption.startswith('a blue') and not set(forbid) & set(caption.split()), caption
        pieces = ['[DEC]', 'a', 'picture', 'of', *re.findall(r'\w+', caption)]
        if all(piece in small_tokenizer.vocab for piece in pieces):
            assert len(set(zip(pieces, pieces[1:], strict=False))) == len(pieces) - 1
    with pytest.raises(ValueError, match="the prefix 'a red dog' contains a phrase that forbid names"):
        generate(nano, small_tokenizer, images, prefix='a red dog', forbid=['Red Dog'])
    with pytest.raises(ValueError, match='forbid names .*which holds no word'):
        generate(nano, small_tokenizer, images, forbid=['dog', ' '])


def test_a_caption_that_nothing_may_follow_ends(nano, small_tokenizer):
    words = [token.removeprefix('##') for token in small_tokenizer.vocab if token.isalpha()]
    for mode in (dict(num_beams=1), dict(num_beams=3, num_captions=3), dict(sample=True)):
        captions = generate(nano, small_tokenizer, torch.randn(2, 3, 32, 32), no_repeat_ngram_size=1, max_length=200,
                            min_length=200, forbid=words, **mode)
        assert len(captions) >= 2 and not any(word in words for caption in captions for word in caption.split())


@torch.inference_mode()
@pytest.mark.parametrize('mode', [dict(num_beams=1), dict(num_beams=3, num_captions=2, repetition_penalty=1.5),
                                  dict(num_beams=3, length_rule='transformers'),
                                  dict(sample=True, temperature=2.0, num_captions=3)])
def test_mean_log_probabilities_are_the_nets_own(captioner, bert_tokenizer, mode):
    (model, tokens), prompt = captioner, golden('golden_blip_caption_tiny.pt')['prompt_ids'][0]
    bias = model.text_decoder.cls.predictions.bias
    bias.data[102] += 1.5
    try:
        ids, means = generate_scored(model, tokens, prompt, 102, 0, max_length=20, min_length=6, **mode)
        copies = len(ids) // len(tokens)
        kv = model.project_image(tokens.repeat_interleave(copies, 0))
        logits = model.caption_logits(ids, torch.ones_like(ids), kv)
    finally:
        bias.data[102] -= 1.5
    ends = (ids == 102).cumsum(1) - (ids == 102).long()
    said = (ends == 0)[:, len(prompt):]
    logp = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, len(prompt) - 1:, 0]
    assert len(set(said.sum(1).tolist())) > 1 or mode.get('num_beams') != 3  # captions of several lengths
    assert torch.allclose(means, (logp * said).sum(1) / said.sum(1), atol=1e-5)


@pytest.mark.parametrize('settings, names', [(dict(num_beams=0), 'num_beams'), (dict(max_length=3), 'max_length'),
                                             (dict(min_length=31), 'min_length'), (dict(top_p=0.0), 'top_p')])
def test_bad_settings_are_named(nano, small_tokenizer, settings, names):
    with pytest.raises(ValueError, match=names):
        generate(nano, small_tokenizer, torch.randn(1, 3, 32, 32), **settings)


def test_a_compiled_net_decodes_without_compiling(nano, small_tokenizer):
    """A form for every length of the cache would be compiled."""
    forms = []
    nano.compile_towers(backend=lambda graph, _: forms.append(graph) or graph)
    prompt = torch.tensor([small_tokenizer.bos_id])
    generate_ids(nano, torch.randn(2, 5, 32), prompt, small_tokenizer.sep_id, small_tokenizer.pad_id)
    assert not forms
    nano.encode_image(torch.randn(2, 3, 32, 32))
    assert forms
