"""The commands that the documents give for real data, read from them and run in their order, in one folder.

Only paths, names on the hub and the number of processes are replaced, and settings appended that make the nets and
epochs small.
"""

import http.server
import io
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pandas
import pytest
from conftest import NANO, TESTS
from processes import python

import json_dataset
from configs import load_config
from data import scene_layouts
from data.scene_captions import captions
from data.scenes import render, sample_split
from models.blip import BLIP, BLIPConfig
from models.engine.logs import read_log
from models.weights.checkpoint import save_checkpoint
from utils import ROOT

pytestmark = pytest.mark.slow

DOCUMENTS = [ROOT / name for name in ('README.md', 'data/README.md', 'models/README.md', 'eval/README.md')]
TEXT = '\n'.join(path.read_text(encoding='utf-8') for path in DOCUMENTS)
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```', TEXT, re.DOTALL | re.MULTILINE)
LINES = [' '.join(line.split()) for kind, block in BLOCKS if not kind
         for line in block.replace('\\\n', '').splitlines()]
COMMANDS = list(dict.fromkeys(line for line in LINES if line.startswith(('sed ', 'img2dataset ', 'python '))))
ON_THE_HUB = {'Salesforce/blip-image-captioning-base': 'save/dlip_caption_flickr.pth',
              'Salesforce/blip-itm-base-coco': 'save/dlip_retrieval_flickr.pth'}
PAIRS = 9  # of each downloaded source
BAD = {0: 'missing', 1: 'corrupt', 2: 'no image'}  # those that cannot be downloaded, by number


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """What a user downloads by hand: lists of addresses, Visual Genome, Flickr30K, a teacher, an image."""
    folder = tmp_path_factory.mktemp('readme')
    scenes = folder / 'scenes'
    scene_layouts.main(['--out', str(scenes), '--pretrain', '40', '--flickr_train', '6', '--flickr_val', '3',
                        '--flickr_test', '4', '--workers', '1'])
    for name in ('vgo', 'flickr30k'):
        shutil.copytree(scenes / name, folder / 'datadrive' / name)
    shutil.copy(scenes / 'flickr30k/flickr30k-images/test000000.jpg', folder / 'dog.jpg')
    return folder


@pytest.fixture(scope='module')
def address():
    """A loopback server of rendered images, some of them as a web of many years has them."""
    scenes = sample_split('train', PAIRS, 0, distinct=True)
    sizes = {3: (1, 1), 4: (5000, 4000)}

    class Pictures(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            number = int(re.findall(r'\d+', self.path)[-1])
            self.send_response(404 if BAD.get(number) == 'missing' else 200)
            self.end_headers()
            picture, file = render(scenes[number], random.Random(number)), io.BytesIO()
            picture.resize(sizes.get(number, picture.size)).save(file, 'JPEG')
            content = {0: b'', 1: file.getvalue()[:20] + random.Random(0).randbytes(3000),
                       2: b'<!doctype html><title>This picture was removed</title>'}.get(number, file.getvalue())
            if number == 5:
                time.sleep(1.5)  # slow, but within img2dataset's 10 s
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}', [captions(scene)[0] for scene in scenes]
    server.shutdown()


def run(command: str, place: Path, cwd: Path, *overrides: str) -> str:
    """Run a command of the documents with this folder's paths and files, and few processes."""
    for name, file in ON_THE_HUB.items():
        command = command.replace(name, file)
    for there in ('/datadrive', '/tars', 'output/', 'save/', 'photos'):
        command = command.replace(f' {there}', f' {place / there.strip("/")}{"/" if there[-1] == "/" else ""}')
    command = re.sub(r'(--processes_count|--nproc_per_node)(.)\d+', r'\1\g<2>1', command)
    command = command.replace('torch.distributed.run', 'torch.distributed.run --standalone')
    environment = {'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
                   'NO_ALBUMENTATIONS_UPDATE': '1', 'OMP_NUM_THREADS': '2'}
    program, *arguments = shlex.split(command)
    if program == 'python':
        done = python(*arguments, *overrides, cwd=cwd, **environment)
    else:
        done = subprocess.run(['bash', '-c', command], cwd=cwd, env=os.environ | environment, capture_output=True,
                              text=True, timeout=300)
    assert done.returncode == 0, f'{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}'
    return done.stdout


def commands(text: str) -> list[str]:
    """The commands that contain `text`; there must be one."""
    found = [command for command in COMMANDS if text in command]
    assert found, f'no document has a command with {text!r}'
    return found


def test_downloads_and_all_json(place, address):
    """img2dataset fetches each source as the README says, and `json_dataset.py` turns them into all.json."""
    server, texts = address
    rows = {name: [(f'{server}/{name}/{i}.jpg', text) for i, text in enumerate(texts)] for name in 'abc'}
    (place / 'Train_GCC-training.tsv').write_text(''.join(f'{text}\t{url}\n' for url, text in rows['a']))
    pandas.DataFrame(rows['b'], columns=['URL', 'TEXT']).to_parquet(place / 'mscoco.parquet')
    urls, sentences = zip(*rows['c'], strict=True)
    (place / 'sbu-captions-all.json').write_text(json.dumps({'image_urls': urls, 'captions': sentences}))
    for command in [*commands('sed '), *commands('img2dataset ')]:
        run(command, place, place)
    printed = run(*commands('json_dataset.py'), place, ROOT)
    assert re.search(rf'sbu +{PAIRS - len(BAD)} +{len(BAD)}\b', printed)
    failed = pandas.read_parquet(place / 'datadrive/dataloader/cc3m_failed.parquet')
    assert sorted(failed['url']) == [f'{server}/a/{number}.jpg' for number in BAD]
    pairs = json.loads((place / 'datadrive/dataloader/all.json').read_text())
    assert [pair['id'] for pair in pairs] == list(range(len(pairs)))
    for source in ('cc3m', 'mscoco', 'sbu'):
        kept = [pair for pair in pairs if f'/{source}/' in pair['image_root']]
        assert sorted(pair['caption'] for pair in kept) == sorted(texts[len(BAD):])
        assert all(Path(pair['image_root']).is_file() for pair in kept)


def test_download_as_webdataset(place, address):
    """The same command with `--output_format webdataset` leaves tars, of which `json_dataset.py` says what to do."""
    server, texts = address
    rows = [(f'{server}/d/{i}.jpg', text) for i, text in enumerate(texts)]
    pandas.DataFrame(rows, columns=['URL', 'TEXT']).to_parquet(place / 'mscoco.parquet')
    command, = commands('mscoco.parquet')
    run(command.replace('output_format files', 'output_format webdataset').replace('/datadrive', '/tars'), place, place)
    with tarfile.open(place / 'tars/mscoco/00000.tar') as tar:
        stems = [Path(name).stem for name in tar.getnames() if name.endswith('.jpg')]
        assert len(stems) == PAIRS - len(BAD)
        assert sorted(tar.getnames()) == sorted(f'{stem}.{kind}' for stem in stems for kind in ('jpg', 'json', 'txt'))
    with pytest.raises(ValueError, match='mscoco holds webdataset shards'):
        json_dataset.main(['--root', str(place / 'tars'), '--out', str(place / 'tars/dataloader')])


def test_train_evaluate_use(place, bert_tokenizer, monkeypatch, capsys):
    """The real configs at nano size: pre-train, finetune, evaluate, serve."""
    if not (place / 'datadrive/dataloader/all.json').exists():
        json_dataset.main(['--root', str(place / 'scenes'), '--out', str(place / 'datadrive/dataloader')])
    teacher = BLIP(BLIPConfig(**{**NANO, 'embed_dim': 256, 'dropout': 0.1}, vocab_size=len(bert_tokenizer)))
    (place / 'save').mkdir()
    save_checkpoint(place / 'save/model_base.pth', teacher, bert_tokenizer, {})
    small = ['model.size=tests/sizes.yaml:nano', 'model.image_size=32', f'tokenizer={TESTS / "vocab.txt"}',
             'train.epochs=1', 'train.batch_size=4', 'data.num_workers=0']
    save = place / 'save'
    distilled = *small, f'teacher.weights={save}/model_base.pth', 'model.init_vision=null'
    run(*commands('configs/pretrain.yaml'), place, ROOT, *distilled, 'ita.queue_size=64',
        f'data.train={place}/datadrive/dataloader/all.json')
    assert {'train_loss_ita', 'train_loss_lm_logits', 'train_loss_decoder_cross_attn', 'train_loss_fused_hidden'} <= \
        read_log(place / 'output/pretrain/log.txt')[0].keys()
    run(*commands('configs/pretrain_folder.yaml'), place, ROOT, *distilled,
        f'data.train={place}/datadrive/flickr30k')
    flickr = f'data.root={place}/datadrive/flickr30k'
    for script in ('train_dlip_retrieval_flickr.py', 'train_dlip_caption_flickr.py'):
        run(*commands(script), place, ROOT, *small, flickr, f'model.init={place}/output/pretrain/last.pth')
    for name in ('retrieval_flickr', 'caption_capfilt_large'):
        shutil.copy(save / 'model_base.pth', save / f'model_base_{name}.pth')
    classes = place / 'datadrive/my_images'
    for i in range(4):
        (classes / f'class_{i % 2}').mkdir(parents=True, exist_ok=True)
        shutil.copy(place / f'datadrive/flickr30k/flickr30k-images/test{i:06d}.jpg', classes / f'class_{i % 2}')
    out, settings = ('--output_dir', f'{place}/eval', '--device', 'cpu'), (flickr, 'data.num_workers=0')
    for command in (*commands('eval.retrieval'), *commands('eval.caption')):
        run(command, place, ROOT, *out, *settings)
    assert 'beam-3 caption' in run(*commands('eval.speed'), place, ROOT, *out, '--rounds', '2')
    assert 'top1' in run(*commands('eval.zeroshot'), place, ROOT, *out)
    mine = place / 'mine.yaml'  # the report takes no settings but of configs
    mine.write_text(f'data: {{num_workers: 0, root: {place}/datadrive/flickr30k}}\n')
    printed = run(*commands('eval.report'), place, ROOT, *out, '--retrieval_config', str(mine), '--caption_config',
                  str(mine))
    assert re.search(r'\| GFLOPs/caption +\|', printed)
    names = ('retrieval_test', 'caption_test', 'speed', 'zeroshot')
    assert {path.name for path in (place / 'eval').iterdir()} == {
        *(f'{name}.{kind}' for kind in ('json', 'html') for name in names),
        'caption_test_results.json', 'table.json', 'table.md', 'report.html', 'contact_sheet.png'}

    run(*commands('prod.export'), place, ROOT)
    assert (place / 'save/dlip-caption/model.safetensors').is_file()
    for name in ('retrieval', 'caption'):
        shutil.copy(place / f'output/{name}_flickr/best.pth', save / f'dlip_{name}_flickr.pth')
    monkeypatch.chdir(place)
    scope: dict = {}
    (place / 'photos').mkdir()
    shutil.copy('dog.jpg', 'photos')
    example, = (block for kind, block in BLOCKS if kind == 'python')
    for name, file in ON_THE_HUB.items():
        example = example.replace(name, file)
    exec(example, scope)
    assert scope['index'].images == [str((place / 'photos/dog.jpg').resolve())]
    words = scope['caption'].generate(scope['image'])
    assert len(words) == 1 and isinstance(words[0], str)
    for command in (*commands('prod.caption'), *commands('prod.search')):
        run(command.replace('--out ', f'--out {place}/').replace('--sheet ', f'--sheet {place}/'), place, ROOT)
    assert json.loads((place / 'captions.jsonl').read_text())['caption'] == words[0]
    assert (place / 'hits.png').stat().st_size > 0
    for feature in (scope['retrieval'].get_image_feat(scope['image']), scope['retrieval'].get_text_feat('a dog')):
        assert feature.shape == (1, 256) and float(feature.norm()) == pytest.approx(1, abs=1e-5)


def test_every_command_is_run():
    """A command that is added to a document must be added here; tests/test_app.py has the page's."""
    tested = ('sed ', 'img2dataset ', 'json_dataset.py', 'pretrain_dlip.py', 'train_dlip_', 'eval.', 'prod.export',
              'prod.app', 'prod.caption', 'prod.search')
    assert not [command for command in COMMANDS if not any(name in command for name in tested)]


def test_the_lines_of_yaml_are_settings():
    lines = re.findall(r'\| `([\w.]+): (\S+)` \|', TEXT)
    assert len(lines) > 10
    for key, value in lines:
        name = 'caption_flickr' if 'caption' in value else 'retrieval_flickr' if 'retrieval' in value else 'pretrain'
        section, key = key.split('.')
        config = load_config(f'configs/{name}.yaml', f'configs/{name}.yaml', [f'{section}.{key}={value}'])
        assert config[section][key] == value
