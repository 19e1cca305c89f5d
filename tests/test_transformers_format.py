"""Folders of the transformers layout: the same numbers in both libraries, and back without a changed bit."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import NANO
from PIL import Image
from safetensors.torch import load_file, save_file
from test_originals import HEADS, VOCAB
from transformers import BlipForConditionalGeneration

from bench.equality import compare_caption, compare_retrieval, ended, random_net, random_pictures
from data.transforms import EvalTransform
from models.blip import BLIP, BLIPConfig
from models.generation import generate_ids
from models.generation.constraints import Forbidden
from models.tokenizer import DEC
from models.weights.build import build_teacher
from models.weights.checkpoint import load_model
from models.weights.transformers_format import write_folder
from prod import DLIPProd, export
from utils import ROOT

pytestmark = pytest.mark.slow


def config(tokenizer, task: str = 'pretrain', **changes) -> BLIPConfig:
    return BLIPConfig(**NANO | {'image_size': 64, 'text_heads': 4} | changes, vocab_size=len(tokenizer), task=task)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_output_equals_that_of_transformers(tmp_path, bert_tokenizer):
    images = random_pictures(8, 64)
    retrieval = compare_retrieval(config(bert_tokenizer, 'retrieval', vision_eps=1e-5), tmp_path / 'r', bert_tokenizer,
                                  images)
    assert max(retrieval.values()) < 1e-5
    caption = compare_caption(config(bert_tokenizer, 'caption'), tmp_path / 'c', bert_tokenizer, images, sep_bias=2)
    assert caption['LM logits'] < 1e-4  # enlarged cross-attention enlarges rounding
    assert caption['greedy ids equal'] == caption['beam 3 ids equal'] == 8
    assert min(caption['greedy captions'], caption['beam 3 captions']) > 5  # and they are not all one caption
    assert caption['beam 3 lengths'] > 1


@torch.no_grad()
def test_every_deterministic_setting_gives_the_ids_of_transformers(tmp_path, bert_tokenizer):
    write_folder(tmp_path, random_net(config(bert_tokenizer, 'caption'), sep_bias=2), bert_tokenizer, {})
    ours, theirs = load_model(tmp_path)[0], BlipForConditionalGeneration.from_pretrained(tmp_path)
    images = random_pictures(8, 64)
    tokens, prompt = ours.encode_image(images), bert_tokenizer(['a picture of '], 9, DEC)[0][0]
    base, said = {'max_length': 24, 'min_length': 6}, set()
    plain = bert_tokenizer.batch_decode(generate_ids(ours, tokens, prompt[:-1], 102, 0, **base)[:, 4:])
    phrases = [' '.join(caption.split()[:2]) for caption in plain] + plain[0].split()[2:3]
    forbid = {'forbidden': Forbidden(phrases, bert_tokenizer)}
    for settings in (dict(num_beams=1, repetition_penalty=1.3), dict(num_beams=3),
                     dict(num_beams=3, length_penalty=3.0), dict(num_beams=3, length_penalty=-1.0),
                     dict(num_beams=3, early_stopping=True), dict(num_beams=4, num_captions=3),
                     dict(num_beams=3, num_captions=2, early_stopping=True, length_penalty=0.3,
                          repetition_penalty=1.2),
                     dict(num_beams=1, no_repeat_ngram_size=2), dict(num_beams=3, no_repeat_ngram_size=2),
                     dict(num_beams=1, **forbid), dict(num_beams=3, **forbid),
                     dict(num_beams=3, no_repeat_ngram_size=1, repetition_penalty=1.2, **forbid)):
        mine = generate_ids(ours, tokens, prompt[:-1], 102, 0, length_rule='transformers', **base | settings)
        count = settings.pop('num_captions', 1)
        if settings.pop('forbidden', None):
            settings['bad_words_ids'] = [bert_tokenizer([phrase], 24)[0][0, 1:-1].tolist() for phrase in phrases]
        other = theirs.generate(images, prompt.repeat(8, 1), do_sample=False, num_return_sequences=count,
                                **base | settings)
        assert ended(mine, bert_tokenizer) == ended(other, bert_tokenizer), settings
        said.add(tuple(ended(mine, bert_tokenizer)))
    assert len(said) == 12  # each setting matters


def test_the_length_rule_matters(bert_tokenizer):
    """Else the equality above would not show that the rule is transformers'."""
    model = random_net(config(bert_tokenizer, 'caption'), sep_bias=2)
    with torch.no_grad():
        tokens = model.encode_image(random_pictures(8, 64))
    prompt = bert_tokenizer(['a picture of '], 9, DEC)[0][0, :-1]
    blip, theirs = (generate_ids(model, tokens, prompt, 102, 0, max_length=24, min_length=6, length_rule=rule)
                    for rule in ('blip', 'transformers'))
    assert blip.shape != theirs.shape or not torch.equal(blip, theirs)


@pytest.mark.parametrize('task', ['pretrain', 'retrieval', 'caption'])
def test_save_and_load_is_bit_exact(tmp_path, small_tokenizer, task):
    model = BLIP(config(small_tokenizer, task)).eval()
    run = {'data': {'train': 'all.json', 'prompt': 'a photo of ', 'max_tokens': 7}, 'eval': {'num_beams': 2}}
    write_folder(tmp_path / 'first', model, small_tokenizer, {'config': run, 'metrics': {'CIDEr': 98.765}})
    once = DLIPProd.from_pretrained(tmp_path / 'first')
    once.save_pretrained(tmp_path / 'second')
    twice = DLIPProd.from_pretrained(tmp_path / 'second', device='cpu')
    assert same(once.model, model) and same(twice.model, model)
    assert twice.model.config == model.config
    assert (twice.prompt, twice.max_tokens, twice.generation['num_beams']) == ('a photo of ', 7, 2)
    assert twice.tokenizer.vocab == small_tokenizer.vocab
    card = (tmp_path / 'second' / 'README.md').read_text()
    assert '98.77' in card and '`all.json`' in card
    assert sorted(path.name for path in (tmp_path / 'second').iterdir()) == [
        'README.md', 'config.json', 'model.safetensors', 'preprocessor_config.json', 'tokenizer.json',
        'tokenizer_config.json', 'vocab.txt']


def test_a_folder_whose_writing_was_cut_short_is_no_net(tmp_path, small_tokenizer, monkeypatch):
    """Rather than the weights of one net beside the tokenizer of another, which was there before."""
    net = BLIP(config(small_tokenizer))
    write_folder(tmp_path, net, small_tokenizer, {})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr('models.weights.transformers_format.model_card', raising)
        write_folder(tmp_path, BLIP(config(small_tokenizer)), small_tokenizer, {})
    with pytest.raises(FileNotFoundError, match='has no config.json'):
        load_model(tmp_path)
    write_folder(tmp_path, net, small_tokenizer, {})
    assert same(load_model(tmp_path)[0], net)


def raising(*_):
    raise KeyboardInterrupt


def test_both_classes_of_transformers_find_their_part_of_a_pretraining_net(tmp_path, small_tokenizer):
    import transformers
    model = BLIP(config(small_tokenizer)).eval()
    write_folder(tmp_path, model, small_tokenizer, {})
    for name in ('BlipForConditionalGeneration', 'BlipForImageTextRetrieval'):
        _, loading = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
        assert not loading['missing_keys'] and not loading['mismatched_keys']


def test_transformers_own_folder_is_a_teacher_and_is_served(tmp_path, bert_tokenizer):
    """As Salesforce's on the hub: written by transformers, no vocabulary size of ours, layer norms of 1e-5."""
    import transformers
    text = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 64}
    vision = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 128,
              'image_size': 64}
    theirs = transformers.BlipForConditionalGeneration(transformers.BlipConfig(text_config=text, vision_config=vision))
    theirs.save_pretrained(tmp_path)
    served = DLIPProd('caption', tmp_path, tokenizer=VOCAB)  # the folder has no vocab.txt
    images = random_pictures(2, 64)
    with torch.no_grad():
        assert torch.allclose(served.model.encode_image(images), theirs.eval().vision_model(images)[0], atol=1e-5)
    assert served.generate(Image.new('RGB', (9, 9)))
    weights = load_file(tmp_path / 'model.safetensors')
    torch.save(weights | {'text_decoder.bert.embeddings.position_ids': torch.arange(512)[None]},
               tmp_path / 'pytorch_model.bin')
    (tmp_path / 'model.safetensors').unlink()
    teacher = build_teacher({'teacher': {'weights': str(tmp_path)}}, bert_tokenizer, 'caption')
    assert same(teacher, served.model)


def test_transformers_reads_words_and_pictures_as_we_do(tmp_path, small_tokenizer):
    from transformers import BlipProcessor
    write_folder(tmp_path, BLIP(config(small_tokenizer, 'caption')), small_tokenizer, {})
    processor = BlipProcessor.from_pretrained(tmp_path)
    assert processor(text='A red DOG, zz!').input_ids == small_tokenizer(['A red DOG, zz!'], 30)[0][0].tolist()
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    theirs = processor(images=picture, return_tensors='pt').pixel_values[0]
    assert (theirs - EvalTransform(64)(picture)).abs().max() < 0.05  # rounding of 8-bit pixels: 1 / 255 / 0.26


def test_originals_become_folders(tmp_path, bert_tokenizer):
    from test_originals import original
    source = original(tmp_path, 'dlip_caption_tiny')
    export.main([source, str(tmp_path / 'folder'), '--tokenizer', str(VOCAB)])
    export.main([str(tmp_path / 'folder'), str(tmp_path / 'back.pth'), '--half'])
    want, got = load_model(source, tokenizer=VOCAB)[0], load_model(tmp_path / 'back.pth')[0]
    assert same(want, got)  # the golden weights are exact in float16
    assert HEADS['text_heads'] == got.config.text_heads


def edit(path, **changes) -> None:
    settings = json.loads(path.read_text())
    for key, value in changes.items():
        part, _, name = key.partition('__')
        (settings[part] if name else settings)[name or part] = value
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize('break_it, message', [
    (lambda folder: (folder / 'config.json').unlink(), 'has no config.json'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'has no model.safetensors or .* or pytorch_model.bin'),
    (lambda folder: (folder / 'config.json').write_text('{'), 'config.json is not valid JSON'),
    (lambda folder: edit(folder / 'config.json', model_type='clip'), "describes a 'clip', not a \"blip\""),
    (lambda folder: edit(folder / 'config.json', vision_config__hidden_act='relu'), 'hidden_act is relu'),
    (lambda folder: edit(folder / 'config.json', text_config__num_hidden_layers=1), 'says text_depth 1, its tensors 2'),
    (lambda folder: os.truncate(folder / 'model.safetensors', 5000), 'model.safetensors is not a readable checkpoint'),
    (lambda folder: (folder / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n'), 'its own tokenizer'),
    (lambda folder: save_file({'a': torch.zeros(1)}, folder / 'model.safetensors'), 'neither a text_encoder nor'),
    (lambda folder: save_file(load_file(folder / 'model.safetensors') | {
        'vision_model.post_layernorm.bias': torch.full((32,), torch.nan)}, folder / 'model.safetensors'), 'holds NaN')])
def test_a_broken_folder_is_named(tmp_path, small_tokenizer, break_it, message):
    write_folder(tmp_path, BLIP(config(small_tokenizer, 'caption')), small_tokenizer, {})
    break_it(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(tmp_path)


@contextmanager
def hub(root):
    """A hub on the loopback that has the repositories `root/OWNER/NAME`."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            repository, _, name = self.path.strip('/').partition('/resolve/main/')
            file = root / repository / name
            if self.path != '/' and not file.is_file():
                self.send_response(404)
                self.send_header('X-Error-Code', 'EntryNotFound' if file.parent.is_dir() else 'RepoNotFound')
                self.end_headers()
                return
            content = file.read_bytes() if name else b''
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.send_header('ETag', f'"{sha256(content).hexdigest()}"')
            self.send_header('X-Repo-Commit', 'a' * 40)
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


ASK = """
import sys
from models.weights.checkpoint import load_model
for name in sys.argv[1:]:
    try:
        model, tokenizer, _ = load_model(name)
        print(model.config.task, len(tokenizer))
    except FileNotFoundError as error:
        print(error)
"""


def ask_hub(cache, endpoint: str, *names: str) -> list[str]:
    """Load names in a fresh process, whose hub is `endpoint`; a line each."""
    env = {**os.environ, 'HF_ENDPOINT': endpoint, 'HF_HOME': str(cache), 'HF_HUB_OFFLINE': '0'}
    done = subprocess.run([sys.executable, '-c', ASK, *names], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=120)
    assert 'Retrying' not in done.stderr and done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_name_without_a_network_is_one_quick_message(tmp_path):
    name, folder = ask_hub(tmp_path, 'http://127.0.0.1:9', 'Salesforce/blip-image-captioning-base', 'no/such/folder')
    assert "cannot get 'Salesforce/blip-image-captioning-base'" in name and 'hf download' in name
    assert 'no such file or folder' in folder


def test_a_name_on_the_hub(tmp_path, small_tokenizer):
    """Downloaded once; afterwards the hub is not asked."""
    write_folder(tmp_path / 'hub/dlip/caption', BLIP(config(small_tokenizer, 'caption')), small_tokenizer, {})
    with hub(tmp_path / 'hub') as endpoint:
        first, none = ask_hub(tmp_path, endpoint, 'dlip/caption', 'dlip/none')
    assert first == f'caption {len(small_tokenizer)}' and 'the hub did not supply it' in none
    assert ask_hub(tmp_path, endpoint, 'dlip/caption') == [first]
