"""Metrics against numbers worked out by hand, re-ranking against a plain loop, scripts end to end."""

import json
import os
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NANO, TESTS, golden
from processes import joined
from ruamel.yaml import YAML

from data.datasets import ImageTextEval
from data.scene_captions import captions, vocabulary
from data.scene_layouts import write_flickr_annotation
from data.scenes import render, sample_split
from data.transforms import EvalTransform
from eval import caption as caption_script
from eval import metrics, report, speed
from eval import retrieval as retrieval_script
from eval.caption import evaluate_captions, score_captions, server_results
from eval.cider import CiderReward
from eval.metrics import caption_metrics, ranks, recall_at_k, retrieval_metrics
from eval.retrieval import NOT_RANKED, evaluate_retrieval, nearest, retrieval_scores
from models.blip import BLIP, BLIPConfig
from models.tokenizer import Tokenizer
from models.weights.checkpoint import save_checkpoint
from utils import ROOT


@pytest.fixture(scope='module')
def tokenizer() -> Tokenizer:
    return Tokenizer(vocabulary())


@pytest.fixture(scope='module')
def flickr(tmp_path_factory):
    """A Flickr30K folder with 14 rendered test images and five captions each."""
    root = tmp_path_factory.mktemp('flickr30k')
    (root / 'flickr30k-images').mkdir()
    named = [(f'test{i:06d}.jpg', scene) for i, scene in enumerate(sample_split('test', 14, 0, distinct=True))]
    for name, scene in named:
        render(scene, random.Random(0)).save(root / 'flickr30k-images' / name)
    write_flickr_annotation(root, {'test': named})
    return root


@pytest.fixture(scope='module')
def dataset(flickr) -> ImageTextEval:
    return ImageTextEval(flickr, 'test', EvalTransform(32), max_words=30)


def random_net(tokenizer: Tokenizer, task: str = 'pretrain', seed: int = 0) -> BLIP:
    torch.manual_seed(seed)
    net = BLIP(BLIPConfig(**NANO, vocab_size=len(tokenizer), task=task)).eval()
    for parameter in net.parameters():  # the usual initialisation scores nearly all pairs alike
        parameter.data.mul_(3.0)
    return net


@pytest.fixture(scope='module')
def files(flickr, tokenizer, tmp_path_factory) -> SimpleNamespace:
    """Checkpoints and configs for the scripts."""
    folder = tmp_path_factory.mktemp('files')
    paths = {}
    for seed, task in enumerate(('pretrain', 'retrieval', 'caption')):
        paths[task] = str(folder / f'{task}.pth')
        save_checkpoint(paths[task], random_net(tokenizer, task, seed), tokenizer, {})
    for task in ('retrieval', 'caption'):
        config = YAML(typ='safe').load(ROOT / 'configs' / 'demo' / f'{task}_flickr.yaml')
        config['data']['root'] = str(flickr)
        config['eval'] = config.get('eval', {}) | ({'k_test': 4} if task == 'retrieval' else {'max_length': 12})
        paths[f'{task}_config'] = str(folder / f'{task}.yaml')
        YAML(typ='safe').dump(config, folder / f'{task}.yaml')
    return SimpleNamespace(**paths)


# ---------------------------------------------------------------- retrieval metrics

SCORES = np.array([[0.9, 0.1, 0.5, 0.3, 0.2, 0.0],   # right: 2      -> second
                   [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],   # right: 0, 4   -> second, by item 4
                   [0.6, 0.5, 0.4, 0.3, 0.2, 0.1],   # right: 0      -> first
                   [0.1, 0.9, 0.9, 0.9, 0.2, 0.9]])  # right: 5, 3   -> third: of equals the first index leads
RIGHT = [[2], {0, 4}, [0], [5, 3]]


def test_recall_by_hand():
    assert ranks(SCORES, RIGHT).tolist() == [1, 1, 0, 2]
    assert recall_at_k(SCORES, RIGHT, (1, 2, 3)) == [25.0, 75.0, 100.0]


def test_equal_scores_earn_chance():
    recall = recall_at_k(np.zeros((10, 10)), [[i] for i in range(10)], (1, 5, 10))
    assert recall == [10.0, 50.0, 100.0]


def test_retrieval_metrics_have_the_keys_of_blip():
    i2t = np.array([[0.9, 0.1, 0.8, 0.2], [0.9, 0.1, 0.8, 0.2]])  # texts 0, 1 are of image 0; 2, 3 of image 1
    t2i = np.array([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1], [0.1, 0.9]])
    result = retrieval_metrics(i2t, t2i, [[0, 1], [2, 3]], [0, 0, 1, 1])
    assert result == {'txt_r1': 50.0, 'txt_r5': 100.0, 'txt_r10': 100.0, 'txt_r_mean': 250 / 3,
                      'img_r1': 50.0, 'img_r5': 100.0, 'img_r10': 100.0, 'img_r_mean': 250 / 3, 'r_mean': 250 / 3}


@pytest.mark.parametrize('scores, right, message', [
    (np.full((1, 2), np.nan), [[0]], 'NaN'), (np.zeros((1, 2)), [[]], 'query 0 needs'),
    (np.zeros((1, 2)), [[2]], 'query 0 needs'), (np.zeros((2, 2)), [[0]], 'must be')])
def test_bad_scores_are_named(scores, right, message):
    with pytest.raises(ValueError, match=message):
        ranks(scores, right)


# ---------------------------------------------------------------- re-ranking

@torch.no_grad()
def plain_scores(model: BLIP, tokenizer: Tokenizer, dataset, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """BLIP's procedure, one query and one candidate at a time, each pair with its own pass over the image."""
    tokens = [model.encode_image(dataset[i][None]) for i in range(len(dataset))]
    image = torch.cat([model.image_feat(x) for x in tokens])
    text = torch.cat([model.text_feat(*tokenizer([caption], 35)) for caption in dataset.texts])
    cosine = image @ text.T

    def match(i: int, t: int) -> torch.Tensor:
        ids, mask = tokenizer([dataset.texts[t]], 35, start='[ENC]')
        hidden = model.text_encoder(ids, mask, image_kv=model.text_encoder.project_image(tokens[i])).hidden
        return model.itm_head(hidden[:, 0])[0, 1]
    i2t, t2i = torch.full_like(cosine, -100.0), torch.full_like(cosine.T, -100.0)
    for i in range(len(tokens)):
        for t in cosine[i].topk(k).indices.tolist():
            i2t[i, t] = match(i, t) + cosine[i, t]
    for t in range(len(dataset.texts)):
        for i in cosine[:, t].topk(k).indices.tolist():
            t2i[t, i] = match(i, t) + cosine[i, t]
    return i2t, t2i


def plain_metrics(i2t: torch.Tensor, t2i: torch.Tensor, dataset) -> dict[str, float]:
    """BLIP's `itm_eval`: sort each row, look for the right items, count."""
    result = {}
    image_of_text = [[image] for image in dataset.text_to_image]
    for way, scores, right in (('txt', i2t, dataset.image_to_texts), ('img', t2i, image_of_text)):
        found = []
        for row, items in zip(scores.numpy(), right, strict=True):
            order = np.argsort(-row, kind='stable')
            found.append(min(int(np.where(order == item)[0][0]) for item in items))
        recalls = [100.0 * len([place for place in found if place < k]) / len(found) for k in (1, 5, 10)]
        result |= {f'{way}_r{k}': value for k, value in zip((1, 5, 10), recalls, strict=True)}
        result[f'{way}_r_mean'] = sum(recalls) / 3
    return result | {'r_mean': (result['txt_r_mean'] + result['img_r_mean']) / 2}


def test_reranking_equals_the_plain_loop(dataset, tokenizer):
    model = random_net(tokenizer)
    expected = plain_scores(model, tokenizer, dataset, 4)
    # the last setting keeps the tokens of a few pictures only: the others are encoded again
    for settings in ({'batch_size': 64}, {'batch_size': 3}, {'batch_size': 5, 'memory_mb': 0.002}):
        scores = retrieval_scores(model, tokenizer, dataset, k_test=4, **settings)
        for ours, plain in zip(scores, expected, strict=True):
            assert torch.equal(ours == NOT_RANKED, plain == NOT_RANKED)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-4)
    result = evaluate_retrieval(model, tokenizer, dataset, k_test=4)
    assert result == pytest.approx(plain_metrics(*expected, dataset))
    assert expected[0][expected[0] != NOT_RANKED].std() > 0.1  # the scores do differ


def test_of_equal_cosines_the_lower_indices_are_reranked():
    similarity = torch.tensor([[0.5, 0.7, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]])
    assert nearest(similarity, 2).tolist() == [[True, True, False, False], [True, True, False, False]]
    many = torch.randint(5, (3000, 7), generator=torch.Generator().manual_seed(0))
    for row, chosen in zip(many.tolist(), nearest(many, 3).tolist(), strict=True):
        assert [i for i in range(7) if chosen[i]] == sorted(sorted(range(7), key=lambda i: (-row[i], i))[:3])


def test_without_reranking_scores_are_cosines(dataset, tokenizer):
    model = random_net(tokenizer, 'retrieval')
    i2t, t2i = retrieval_scores(model, tokenizer, dataset, k_test=0)
    assert torch.equal(i2t, t2i.T) and i2t.abs().max() <= 1 + 1e-5
    everything, _ = retrieval_scores(model, tokenizer, dataset, k_test=10 ** 6)  # more than there are
    assert (everything != NOT_RANKED).all()


@pytest.mark.slow
def test_retrieval_script_on_two_processes(files, tmp_path):
    """Straight after pre-training, without a finetune."""
    options = ['--config', files.retrieval_config, '--checkpoint', files.pretrain, '--device', 'cpu']
    retrieval_script.main([*options, '--output_dir', str(tmp_path / 'one')])
    for done in joined(2, '-m', 'eval.retrieval', *options, '--output_dir', tmp_path / 'two'):
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / 'retrieval_test.json').read_text()) for name in ('one', 'two'))
    assert one.keys() == two.keys() and len(one) > 15
    assert [key for key in one if one[key] != two[key] and key not in ('seconds', 'image_ms')] == []
    assert '<img' in (tmp_path / 'one' / 'retrieval_test.html').read_text()


@pytest.mark.slow
def test_a_teacher_stands_beside_the_student(files, tmp_path, capsys, monkeypatch):
    """An original file as the teacher of a pre-trained net without finetune."""
    monkeypatch.setattr(metrics, 'java_works', lambda: False)  # METEOR would take most of the time
    teacher = tmp_path / 'blip.pth'
    heads = {'vision_heads': 4, 'text_heads': 4}
    torch.save({'model': golden('blip_caption_tiny.pth')['model'], 'config': heads}, teacher)
    shared = ['--teacher', str(teacher), '--tokenizer', str(TESTS / 'vocab.txt'), '--output_dir', str(tmp_path),
              '--device', 'cpu']
    caption_script.main(['--config', files.caption_config, '--checkpoint', files.pretrain, *shared,
                         'eval.num_beams=2', '--export'])
    result = json.loads((tmp_path / 'caption_test.json').read_text())
    blip = result['teacher']
    assert result['share_of_teacher']['caption_gflops'] == pytest.approx(
        100 * result['caption_gflops'] / blip['caption_gflops'])
    assert blip['parameters_M'] > result['parameters_M'] and {'CIDEr', 'exact', 'caption_ms'} <= blip.keys()
    assert re.search(r'\| GFLOPs/caption +\| +[\d.]+ \| +[\d.]+ \| +\d+% \|', capsys.readouterr().out)
    page = (tmp_path / 'caption_test.html').read_text()
    assert 'TEACHER' in page.upper() and result['captions'][0]['references'][0] in page
    for record, sent in zip(result['captions'], json.loads((tmp_path / 'caption_test_results.json').read_text()),
                            strict=True):
        assert len(record['n_best']) == 2 and record['n_best'][0] == record['caption'] == sent['caption']


@pytest.mark.parametrize('script', [retrieval_script, caption_script], ids=['retrieval', 'caption'])
def test_a_run_that_cannot_work_ends_before_it_evaluates(files, flickr, tmp_path, monkeypatch, script):
    """Each with one line that names the thing: a missing teacher costs no evaluation of the other net."""
    task, other = ('retrieval', 'caption') if script is retrieval_script else ('caption', 'retrieval')
    monkeypatch.setattr(script, f'evaluate_{task}s' if task == 'caption' else 'retrieval_scores',
                        lambda *_, **__: pytest.fail('it evaluated'))
    (tmp_path / 'file').write_text('')
    for options, message in ((['--checkpoint', getattr(files, other)], f'{other} checkpoint: it cannot serve {task}'),
                             (['--checkpoint', files.pretrain, '--teacher', 'none.pth'], 'no checkpoint none.pth'),
                             (['--checkpoint', 'none.pth', '--teacher', files.pretrain], 'no checkpoint none.pth'),
                             (['--checkpoint', files.pretrain, '--split', 'val'], "split 'val'"),
                             (['--checkpoint', files.pretrain, '--output_dir', str(tmp_path / 'file')],
                              'cannot write to the output folder')):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            script.main(['--config', getattr(files, f'{task}_config'), '--output_dir', str(tmp_path / 'out'),
                         '--device', 'cpu', *options])
        assert '\n' not in str(caught.value)


# ---------------------------------------------------------------- captions

HYPOTHESES = {'a': 'A man rides a horse.', 'b': "the dog's ball is red", 'c': ''}
REFERENCES = {'a': ['a man is riding a horse', 'A person, on a horse!'], 'b': ['a red ball of a dog', "dog's ball"],
              'c': ['nothing at all']}


@pytest.mark.slow
@pytest.mark.parametrize('words', ['simple', 'ptb'])
def test_caption_metrics_equal_pycocoevalcap(words, monkeypatch):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    given = {'a': ['a man rides a horse'], 'b': ["the dog's ball is red"], 'c': ['']}
    wanted = {'a': ['a man is riding a horse', 'a person on a horse'], 'b': ['a red ball of a dog', "dog's ball"],
              'c': ['nothing at all']}
    if words == 'ptb':
        if not metrics.java_works():
            pytest.skip('no Java')
        given, wanted = (PTBTokenizer().tokenize({key: [{'caption': text} for text in texts]
                                                  for key, texts in side.items()})
                         for side in ({key: [text] for key, text in HYPOTHESES.items()}, REFERENCES))
    with monkeypatch.context() as italian:
        speak(italian, 'it')
        metrics.meteor_server.cache_clear()
        corpus, single = caption_metrics(HYPOTHESES, REFERENCES, tokenizer=words, meteor=words == 'ptb')
    bleu, bleus = Bleu(4).compute_score(wanted, given, verbose=0)
    assert [corpus[f'Bleu_{n}'] for n in (1, 2, 3, 4)] == [100 * x for x in bleu]
    assert corpus['CIDEr'] == 100 * Cider().compute_score(wanted, given)[0]
    assert corpus['ROUGE_L'] == 100 * Rouge().compute_score(wanted, given)[0]
    assert corpus['tokenizer'] == words
    assert [single[key]['Bleu_4'] for key in 'abc'] == [100 * x for x in bleus[3]]
    if words == 'ptb':
        from pycocoevalcap.meteor.meteor import Meteor
        meteor, meteors = Meteor().compute_score(wanted, given)
        assert corpus['METEOR'] == 100 * meteor
        assert [single[key]['METEOR'] for key in 'abc'] == [100 * x for x in meteors]
        metrics.meteor_server().meteor_p.kill()  # as Linux does when memory runs out
        assert 'METEOR' not in caption_metrics(HYPOTHESES, REFERENCES, meteor=True)[0]
        assert metrics.meteor_server.cache_info().currsize == 0  # the next one starts anew


def test_a_score_that_fails_is_left_out_and_its_needs_are_said(monkeypatch, caplog):
    def unreachable():
        raise OSError('no route to nlp.stanford.edu')
    monkeypatch.setattr('pycocoevalcap.spice.spice.get_stanford_models', unreachable)
    monkeypatch.setattr(metrics, 'java_works', lambda: True)
    corpus, single = caption_metrics(HYPOTHESES, REFERENCES, spice=True, tokenizer='simple')
    assert 'SPICE' not in corpus and corpus['CIDEr'] > 0
    message, = (r.message for r in caplog.records if 'SPICE' in r.message)
    assert 'no route to nlp.stanford.edu' in message and '8 GB of memory' in message and 'spice/lib' in message


def test_spice_in_the_order_of_the_pictures(monkeypatch):
    """pycocoevalcap returns it sorted by id."""
    class Spice:
        def compute_score(self, references, captions):
            return 0.5, [{'All': {'f': float(key)}} for key in sorted(references)]
    monkeypatch.setattr('pycocoevalcap.spice.spice.Spice', Spice)
    monkeypatch.setattr(metrics, 'java_works', lambda: True)
    keys = {3: 'a dog', 1: 'a cat', 2: 'a cow'}
    corpus, single = caption_metrics(keys, {key: [text] for key, text in keys.items()}, spice=True, tokenizer='simple')
    assert corpus['SPICE'] == 50 and [single[key]['SPICE'] for key in keys] == [300, 100, 200]


@pytest.mark.parametrize('names, ids', [
    (['COCO_val2014_000000391895.jpg', 'val2014/COCO_val2014_000000000042.jpg'], [391895, 42]),
    (['1007129816.jpg', '000000005.png'], [1007129816, 5]), (['0013ea2087020901.jpg', '12.jpg'], [0, 1]),
    (['a/7.jpg', 'b/7.jpg'], [0, 1])])
def test_captions_for_the_servers(names, ids, tmp_path):
    from pycocotools.coco import COCO
    results = server_results([{'image': name, 'caption': 'a dog'} for name in names])
    assert results == [{'image_id': number, 'caption': 'a dog'} for number in ids]
    (tmp_path / 'results.json').write_text(json.dumps(results))
    coco = COCO()
    coco.dataset = {'images': [{'id': number} for number in ids]}
    coco.createIndex()
    assert len(coco.loadRes(str(tmp_path / 'results.json')).anns) == 2


def test_without_java_the_rest_still_comes_and_the_remedy_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(metrics.shutil, 'which', lambda name: None)
    metrics.java_works.cache_clear()
    for _ in range(2):
        corpus, _ = caption_metrics(HYPOTHESES, REFERENCES, meteor=True)
    metrics.java_works.cache_clear()
    assert corpus['tokenizer'] == 'simple' and 'METEOR' not in corpus and corpus['CIDEr'] > 0
    assert len([r for r in caplog.records if 'apt install default-jre-headless' in r.message]) == 1


@pytest.mark.parametrize('text, words', [
    ("A man's dog, running.", "a man's dog running"), ('一只狗在草地上奔跑。', '一 只 狗 在 草 地 上 奔 跑'),
    ('ｶﾞﾗｽの猫と3 dogs', 'ガ ラ ス の 猫 と 3 dogs'), ('개가 달린다', '개가 달린다'), ('สุนัขวิ่ง', 'สุ นั ข วิ่ ง'),
    ('हिन्दी शब्द', 'हिन्दी शब्द'), ('cafe\u0301 ＤＯＧ', 'caf\u00e9 dog'), ('', '')])
def test_simple_tokens(text, words):
    assert metrics.simple_tokens(text) == words


@pytest.mark.parametrize('words', ['simple', 'ptb'])
def test_captions_without_blanks_between_words_are_scored(words):
    if words == 'ptb' and not metrics.java_works():
        pytest.skip('no Java')
    given = {1: '一只狗在草地上奔跑', 2: '公园里有两只猫', 3: '犬が公園を走る'}
    wanted = {1: ['一只狗在草地上跑'], 2: ['两只猫在公园里'], 3: ['犬が公園で走っている']}
    corpus, _ = caption_metrics(given, wanted, tokenizer=words)
    assert corpus['Bleu_1'] > 60 and corpus['CIDEr'] > 60
    reward = CiderReward([wanted[key] for key in given])
    assert min(reward([0, 1, 2], list(given.values()), [True] * 3)) > 0.5


def speak(monkeypatch, language: str) -> None:
    """Set the language of the system and of Java by every means there is."""
    monkeypatch.setenv('JAVA_TOOL_OPTIONS', f'-Duser.language={language} -Duser.language.format={language}')
    monkeypatch.setenv('_JAVA_OPTIONS', f'-Duser.language={language}')
    monkeypatch.setenv('LC_ALL', f'{language}.UTF-8')


def test_java_speaks_english_whatever_the_system_does(monkeypatch):
    """Else a Turkish PTB lower-cases I to a dotless i. METEOR in Italian, which would write 0,5: see above."""
    if not metrics.java_works():
        pytest.skip('no Java')
    speak(monkeypatch, 'tr')
    assert metrics.ptb_tokens(['A MAN IS HERE']) == ['a man is here']
    assert os.environ['_JAVA_OPTIONS'] == '-Duser.language=tr'


def test_another_failure_of_java_is_said_as_it_is(monkeypatch, caplog):
    if not metrics.java_works():
        pytest.skip('no Java')
    monkeypatch.setenv('JAVA_TOOL_OPTIONS', '-Xmx1k')
    metrics.java_works.cache_clear()
    corpus, _ = caption_metrics(HYPOTHESES, REFERENCES, meteor=True)
    assert corpus['tokenizer'] == 'simple' and 'Java does not start (Error occurred' in caplog.text
    assert 'apt install' not in caplog.text and '2 GB' not in caplog.text
    monkeypatch.setattr(metrics, 'java_works', lambda: True)  # as if it had broken just now
    corpus, _ = caption_metrics(HYPOTHESES, REFERENCES)
    assert corpus['tokenizer'] == 'simple' and 'the PTB tokenizer failed (Error occurred' in caplog.text
    with pytest.raises(OSError, match='PTB tokenizer failed'):
        caption_metrics(HYPOTHESES, REFERENCES, tokenizer='ptb')
    monkeypatch.undo()
    metrics.java_works.cache_clear()


def test_what_a_metric_cannot_say_is_said_once(caplog):
    metrics.warn_once.cache_clear()
    for _ in range(2):
        assert caption_metrics({1: 'a dog'}, {1: ['a dog']}, tokenizer='simple')[0]['CIDEr'] == 0
        retrieval_metrics(np.eye(3), np.eye(3), [[0], [1], [2]], [0, 1, 2])
        retrieval_metrics(np.eye(20), np.eye(20), [[i] for i in range(20)], range(20))
    assert caplog.text.count('CIDEr of one image is always 0') == 1
    assert caplog.text.count('txt R@5, txt R@10, img R@5, img R@10 of 3 images and 3 captions can only be 100') == 1
    assert len(caplog.records) == 2


def test_captions_without_a_partner_are_named():
    with pytest.raises(ValueError, match='same images.*b'):
        caption_metrics({'a': 'x'}, {'a': ['x'], 'b': ['y']})
    with pytest.raises(ValueError, match="'a' has no reference"):
        caption_metrics({'a': 'x'}, {'a': []})


def test_right_captions_score_full_marks(dataset, flickr):
    scenes = sample_split('test', 14, 0, distinct=True)
    result, records = score_captions(dataset, [[captions(scene)[0]] for scene in scenes])
    assert result['exact'] == 100.0 and result['Bleu_4'] == pytest.approx(100)
    wrong, records = score_captions(dataset, [['an image']] * 13 + [captions(scenes[13])[1:]])
    assert wrong['exact'] == pytest.approx(100 / 14) and [r['right'] for r in records] == [False] * 13 + [True]


@pytest.mark.parametrize('content', ['{}', '[1]', 'x', '{"test000000.jpg": 5}'])
def test_a_scenes_json_of_the_users_is_left_alone(dataset, tmp_path, content):
    (tmp_path / 'scenes.json').write_text(content)
    result, _ = score_captions(SimpleNamespace(root=tmp_path, paths=dataset.paths, references=dataset.references),
                               [['an image']] * 14)
    assert 'exact' not in result


def test_evaluate_captions(dataset, tokenizer):
    result, records = evaluate_captions(random_net(tokenizer, 'caption'), tokenizer, dataset, num_beams=1,
                                        max_length=10, min_length=5, batch_size=4)
    assert len(records) == 14 and {'CIDEr', 'Bleu_4', 'ROUGE_L', 'exact'} <= result.keys()
    assert records[3]['references'] == dataset.references[3] and records[3]['image'] == str(dataset.paths[3])


# ---------------------------------------------------------------- speed and report

def test_speed_counts_flops_and_parameters(tokenizer):
    net = random_net(tokenizer)
    rows = {row['']: row for row in speed.compare({'teacher': (net, tokenizer), 'student': (net, tokenizer)},
                                                  rounds=2)}
    assert rows['parameters (M)']['ratio'] == 1 and rows['image embedding (GFLOPs)']['ratio'] == 1
    patches, width, ffn = 4, 32, 128  # of NANO
    tokens = patches + 1
    block = 2 * tokens * (4 * width * width + 2 * width * ffn) + 4 * tokens * tokens * width
    expected = 2 * patches * 3 * 16 * 16 * width + 2 * block + 2 * width * NANO['embed_dim']
    assert rows['image embedding (GFLOPs)']['student'] == pytest.approx(expected / 1e9)
    assert rows['beam-3 caption (ms)']['student'] > 0


@pytest.mark.slow
def test_report(files, tmp_path, capsys):
    curves = tmp_path / 'pretrain' / 'curves.png'
    curves.parent.mkdir()
    render(sample_split('test', 1, 0, distinct=True)[0], random.Random(0)).save(curves)
    report.main(['--teacher', files.retrieval, files.caption, '--retrieval', files.pretrain,
                 '--caption', files.pretrain, '--plain_retrieval', files.retrieval, '--plain_caption', files.caption,
                 '--retrieval_config', files.retrieval_config, '--caption_config', files.caption_config,
                 '--curves', str(curves), '--output_dir', str(tmp_path), '--device', 'cpu'])
    table = json.loads((tmp_path / 'table.json').read_text())
    assert list(table['nets']) == ['teacher', 'undistilled', 'student']
    assert table['share_of_teacher']['student']['parameters_M'] == 100
    assert table['share_of_teacher']['undistilled']['caption_gflops'] == 100
    lines = (tmp_path / 'table.md').read_text().splitlines()
    names = [line.split('|')[1].strip() for line in lines if line.startswith('| ')]
    assert names == ['', *(f'{way} R@{k}' for way in ('txt', 'img') for k in (1, 5, 10)), 'mean recall', 'CIDEr',
                     'BLEU-4', 'ROUGE-L', 'exact %', 'parameters (M)', 'GFLOPs/image', 'ms/image', 'GFLOPs/caption',
                     'ms/caption']
    assert lines[0].count('|') == 7 and lines[0] in capsys.readouterr().out
    page = (tmp_path / 'report.html').read_text()
    assert page.count('<img') == 14 + 25 + 1 and 'src="http' not in page
    assert (tmp_path / 'contact_sheet.png').stat().st_size > 10_000
    for options, message in ((['--teacher', 'a', '--plain_caption', 'd'], 'give both or none'),
                             (['--teacher', 'a', 'b', 'c'], 'one for retrieval and one for captions')):
        with pytest.raises(ValueError, match=message):
            report.main([*options, '--retrieval', 'b', '--caption', 'c'])
