"""Token ids against the original BLIP's `generate`, and properties of sampling."""

import pytest
import torch
from conftest import golden
from test_model import load

from models.generation import beam_search, filter_top, generate, generate_ids


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
    scores = beam_search(model, tokens, want['prompt_ids'][0], 102, 0, num_beams=3, max_length=30, min_length=10,
                         length_penalty=1.0, repetition_penalty=1.0)[1]
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
