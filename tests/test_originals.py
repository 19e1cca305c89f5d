"""Files of the original BLIP and dlip-v2 code: served as they are, by DLIPProd and the evaluation."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from conftest import GOLDEN, TESTS, golden, relative
from runs import losses_of
from safetensors.torch import save_file

from models.blip import BLIP
from models.distill.objective import Objective
from models.generation import generate_ids
from models.momentum import MomentumQueue
from models.tokenizer import Tokenizer
from models.weights.build import build_teacher
from models.weights.checkpoint import architecture, load_model, read_checkpoint
from models.weights.inherit import inherit_text
from models.weights.originals import infer_config
from prod import DLIPProd

HEADS = {'vision_heads': 4, 'text_heads': 4}  # of the tiny golden nets: not the published 64-wide heads and 12
VOCAB = TESTS / 'vocab.txt'


@pytest.mark.parametrize('size, image_size', [('small', 384), ('small_ffn1536', 224), ('base', 384)])
@pytest.mark.parametrize('task', ['pretrain', 'retrieval', 'caption'])
def test_the_architecture_is_read_from_the_shapes(size, image_size, task):
    want = architecture(size, image_size, 30524, task)
    with torch.device('meta'):
        weights = BLIP(want).state_dict()
    assert infer_config(weights) == want


def original(folder, name: str, **changes) -> str:
    """A golden file whose config names its head counts; `changes` are made to its state dict."""
    path = folder / f'{name}.pth'
    torch.save({'model': golden(f'{name}.pth')['model'] | changes, 'config': HEADS}, path)
    return str(path)


def test_dlip_v2_retrieval(tmp_path):
    served = DLIPProd('retrieval', original(tmp_path, 'dlip_retrieval_tiny'), tokenizer=VOCAB)
    want = golden('golden_dlip_retrieval_tiny.pt')
    with torch.no_grad():
        tokens = served.model.encode_image(golden('inputs_tiny.pt')['images'])
        assert relative(served.model.image_feat(tokens), want['image_feat']) < 1e-5
        assert relative(served.model.text_feat(want['input_ids'], want['attention_mask']), want['text_feat']) < 1e-5
    assert served.get_text_feat('a dog').shape == (1, 256)


@pytest.mark.parametrize('name', ['dlip_caption_tiny', 'blip_caption_tiny'])
def test_caption_ids_equal_the_original(tmp_path, name):
    model, _, _ = load_model(original(tmp_path, name), tokenizer=VOCAB)
    want = golden(f'golden_{name}.pt')
    with torch.no_grad():
        tokens = model.encode_image(golden('inputs_tiny.pt')['images'])
    assert relative(tokens, want['image_embeds']) < 1e-5
    for key, settings in (('greedy_ids', {'num_beams': 1}), ('beam3_ids', {})):
        assert torch.equal(generate_ids(model, tokens, want['prompt_ids'][0], 102, 0, **settings), want[key])


@pytest.mark.parametrize('task, lacks, term, works', [('retrieval', 'text_decoder', 'lm_logits', 'image_feat'),
                                                      ('caption', 'text_encoder', 'itm_soft', 'image_tokens')])
def test_a_teacher_that_lacks_a_part_teaches_the_rest(tmp_path, small_tokenizer, task, lacks, term, works):
    """BLIP's retrieval files hold no decoder, its caption files no text encoder."""
    config = architecture('tests/sizes.yaml:nano', 32, len(small_tokenizer), task)
    torch.save({'model': BLIP(config).state_dict(), 'config': {'vision_heads': 2, 'text_heads': 2}}, tmp_path / 'b.pth')
    teacher = build_teacher({'teacher': {'weights': tmp_path / 'b.pth'}}, small_tokenizer, 'pretrain')
    student = BLIP(architecture('tests/sizes.yaml:nano', 32, len(small_tokenizer)))
    momentum = MomentumQueue(student, 8, 0.9, 256)
    with pytest.raises(ValueError, match=f'loss.{term} needs a {lacks}, which the teacher .* model_base.pth'):
        Objective(student, {term: 1.0}, (2, 5, 6), momentum, teacher)
    with pytest.raises(ValueError, match=f'has no {lacks}'):
        inherit_text(student, teacher)
    ids, mask = small_tokenizer(['a red dog', 'blue star'], 12)
    objective = Objective(student, {works: 1.0}, (2, 5, 6), momentum, teacher)
    out = losses_of(objective, torch.randn(2, 3, 32, 32), ids, mask, torch.arange(2))
    assert float(out[works].detach()) > 0


def test_weights_from_a_url(tmp_path, monkeypatch):
    """Downloaded once into torch.hub's cache, its checksum checked where the name has one; a damaged download is not
    kept, a missing file is named."""
    served, cache = tmp_path / 'served', tmp_path / 'cache'
    served.mkdir()
    original(served, 'dlip_caption_tiny')
    good = sha256((served / 'dlip_caption_tiny.pth').read_bytes()).hexdigest()[:8]
    for checksum in (good, '01234567'):
        shutil.copy(served / 'dlip_caption_tiny.pth', served / f'tiny-{checksum}.pth')
    (served / 'torn.pth').write_bytes((served / 'dlip_caption_tiny.pth').read_bytes()[:5000])
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(cache))
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        first = read_checkpoint(f'{address}/dlip_caption_tiny.pth')
        with pytest.raises(ValueError, match='truncated'):
            read_checkpoint(f'{address}/torn.pth')
        with pytest.raises(FileNotFoundError, match='cannot download .*none.pth .*404'):
            read_checkpoint(f'{address}/none.pth')
        read_checkpoint(f'{address}/tiny-{good}.pth')
        with pytest.raises(FileNotFoundError, match='cannot download .*checksum is .*, its name says 01234567'):
            read_checkpoint(f'{address}/tiny-01234567.pth')
        server.shutdown()
    again = read_checkpoint(f'{address}/dlip_caption_tiny.pth')  # the server is gone
    assert again['model'].keys() == first['model'].keys()
    kept = sorted(path.name.split('-', 1)[1] for path in (cache / 'checkpoints').iterdir())
    assert kept == ['dlip_caption_tiny.pth', f'tiny-{good}.pth']


class Uneven(BaseHTTPRequestHandler):
    """Serves each URL, query included, as another checkpoint, in two parts; `/short` breaks off between them."""

    content: dict[str, bytes] = {}

    def do_GET(self):
        content = self.content[self.path]
        self.send_response(200)
        self.send_header('Content-Length', str(len(content) + 7 * self.path.startswith('/short')))
        self.end_headers()
        self.wfile.write(content[:999])
        self.wfile.write(content[999:])

    def log_message(self, *args):
        pass


def test_urls_of_one_name_are_several_files(tmp_path, monkeypatch):
    """Each is kept under its whole address; what broke off is not kept, and two downloads at once do not meet."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))
    paths = ['/a/model.pth', '/b/model.pth', '/b/model.pth?version=2', '/', f'/{"n" * 300}.pth?/../../x=%2F']
    content = {}
    for i, path in enumerate(paths):
        torch.save({'model': {'number': torch.full((500,), float(i))}}, tmp_path / 'file.pth')
        content[path] = (tmp_path / 'file.pth').read_bytes()
    content |= {'/short.safetensors': content[paths[0]], '/one.pth': content[paths[0]]}
    monkeypatch.setattr(Uneven, 'content', content)
    with ThreadingHTTPServer(('127.0.0.1', 0), Uneven) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        for _ in range(2):
            got = [float(read_checkpoint(f'{address}{path}')['model']['number'][0]) for path in paths]
            assert got == [0, 1, 2, 3, 4]
        with pytest.raises(FileNotFoundError, match='short.safetensors .*ended 7 bytes early'):
            read_checkpoint(f'{address}/short.safetensors')
        with ThreadPoolExecutor(8) as pool:
            several = list(pool.map(lambda _: read_checkpoint(f'{address}/one.pth')['model']['number'][0], range(8)))
        assert several == [0] * 8
        server.shutdown()
    kept = list((tmp_path / 'cache' / 'checkpoints').iterdir())
    assert len(kept) == 6 and all(len(path.name) < 120 and path.suffix != '.tmp' for path in kept)


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match='not divisible by its 12 heads'):  # no config: the published head counts
        load_model(GOLDEN / 'dlip_caption_tiny.pth', tokenizer=VOCAB)
    with pytest.raises(ValueError, match=r'1 unexpected \(surprise\)'):
        load_model(original(tmp_path, 'dlip_caption_tiny', surprise=torch.zeros(1)), tokenizer=VOCAB)
    with pytest.raises(ValueError, match=r'NaN or infinite numbers \(visual_encoder.norm.bias\)'):
        broken = {'visual_encoder.norm.bias': torch.full((64,), torch.nan)}
        load_model(original(tmp_path, 'dlip_caption_tiny', **broken), tokenizer=VOCAB)
    letters = tmp_path / 'vocab.txt'
    Tokenizer(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a']).save(tmp_path)
    with pytest.raises(ValueError, match='has a vocabulary of 30524 tokens, the tokenizer'):
        load_model(original(tmp_path, 'dlip_caption_tiny'), tokenizer=letters)
    other = tmp_path / 'other.pth'
    torch.save({'model': {'layer.weight': torch.zeros(2)}}, other)
    with pytest.raises(ValueError, match='neither a checkpoint of this repository nor of BLIP or dlip-v2'):
        load_model(other)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    good = (GOLDEN / 'dlip_caption_tiny.pth').read_bytes()
    torch.save({'model': {}, 'f': subprocess.Popen}, tmp_path / 'code.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    save_file({'a': torch.zeros(3)}, tmp_path / 'renamed.pth')
    for name, content in (('cut', good[:len(good) // 2]), ('head', good[:100]), ('empty', b''), ('page', b'<html>404')):
        (tmp_path / f'{name}.pth').write_bytes(content)
    for name, message in (('code', 'needs the code of .*Popen .* is refused'), ('cut', '.*may be truncated'),
                          ('head', '.*may be truncated'), ('empty', '.*it is empty: download'),
                          ('page', ".*b'<html>404'"), ('list', 'holds no weights: .* got list'),
                          ('renamed', r'holds no weights .*bare tensors \(a\)')):
        with pytest.raises(ValueError, match=f'{name}.pth {message}'):
            load_model(tmp_path / f'{name}.pth')
    with pytest.raises(FileNotFoundError, match='no checkpoint .*none.pth'):
        load_model(tmp_path / 'none.pth')


def test_dlip_v2_training_and_half_files(tmp_path, bert_tokenizer):
    """The pre-training form has queues, momentum encoder and optimizer beside the net; `_half` files are float16."""
    weights = golden('pretrain_student_tiny.pth')['model']
    assert {'image_queue', 'queue_ptr', 'vl_proj.weight'} <= weights.keys()
    momentum = {f'{name.partition(".")[0]}_m.{name.partition(".")[2]}': weight for name, weight in weights.items()
             if name.startswith(('visual_encoder.', 'text_encoder.', 'text_proj.', 'vision_proj.'))}
    form = {'model': weights | momentum, 'optimizer': {'state': {}}, 'config': HEADS, 'epoch': 3}
    torch.save(form, tmp_path / 'dlip_pretrain.pth')
    half = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    torch.save({'model': half, 'config': HEADS}, tmp_path / 'dlip_pretrain_half.pth')
    full, small = (load_model(tmp_path / f'dlip_pretrain{name}.pth', tokenizer=VOCAB)[0] for name in ('', '_half'))
    assert full.config.task == 'pretrain' and full.config.image_size == 224
    for name, weight in full.state_dict().items():
        assert torch.equal(weight, small.state_dict()[name]), name  # exact: the golden weights are float16 numbers
        assert torch.equal(weight, weights[name].float())
