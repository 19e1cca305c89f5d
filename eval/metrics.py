"""Metrics as pure functions: recall of a score matrix, and caption scores by pycocoevalcap."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from utils import logger, shorten

KS = (1, 5, 10)
# Characters of scripts that put no blanks between words, each with the marks on it: Han, kana, bopomofo, Thai, Lao,
# Burmese, Khmer.
SOLID = ('\u3005-\u3007\u3021-\u3029\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf'
         '\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003fffd'
         '\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e81-\u0eb0\u0eb2\u0eb3\u0eb2\u0ebd-\u0ec6\u0edc-\u0edf'
         '\u1000-\u102a\u103f\u1050-\u1055\u1780-\u17b3')
MARKS = ''.join(mark for mark in map(chr, range(0x300, 0x11fff)) if unicodedata.category(mark)[0] == 'M')
SOLID_CHARACTER = re.compile(f'[{SOLID}][{MARKS}]*')
WORD = re.compile(f"[{SOLID}][{MARKS}]*|(?:(?![{SOLID}])[\\w{MARKS}])+(?:'(?:(?![{SOLID}])[\\w{MARKS}])+)*")
ENGLISH = '-Duser.language=en -Duser.country=US -Duser.language.format=en -Duser.country.format=US'


@functools.cache
def warn_once(message: str) -> None:
    logger.warning('%s', message)


# ---------------------------------------------------------------- retrieval

def ranks(scores, positives: Sequence[Iterable[int]]) -> np.ndarray:
    """Rank of each query's best right item.

    Items of equal score stand in the order of their index, so that equal scores for all earn only chance.

    Args:
        scores: [Q, N], higher is better.
        positives: per query the indices of its right items, at least one.

    Returns:
        [Q] int64, 0 = the first place.

    Raises:
        ValueError: a shape does not fit, a query has no right item, or a score is NaN.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or len(scores) != len(positives):
        raise ValueError(f'scores must be [{len(positives)} queries, items], got {list(scores.shape)}')
    if np.isnan(scores).any():
        raise ValueError('some scores are NaN: the model or its input is broken')
    out = np.empty(len(scores), dtype=np.int64)
    for query, (row, right) in enumerate(zip(scores, positives, strict=True)):
        right = np.unique(list(right))
        if not len(right) or right[0] < 0 or right[-1] >= len(row):
            raise ValueError(f'query {query} needs right items among 0..{len(row) - 1}, got {right.tolist()}')
        best = right[row[right].argmax()]  # of equals the first
        out[query] = (row > row[best]).sum() + (row[:best] == row[best]).sum()
    return out


def recall_at_k(scores, positives: Sequence[Iterable[int]], ks: Sequence[int] = KS) -> list[float]:
    """Per cent of the queries [Q, N] with a right item among the first k, for each k (see `ranks`)."""
    found = ranks(scores, positives)
    return [100.0 * float((found < k).mean()) for k in ks]


def retrieval_metrics(scores_i2t, scores_t2i, image_to_texts: Sequence[Iterable[int]],
                      text_to_image: Sequence[int]) -> dict[str, float]:
    """BLIP's `itm_eval`: recalls in per cent of image -> text ('txt_') and text -> image ('img_'), and their means.

    A recall that is 100 whatever the scores, since there are fewer wrong items than k, is named in a warning.

    Args:
        scores_i2t: [images, texts]; scores_t2i: [texts, images].
        image_to_texts: per image the indices of its texts; text_to_image: per text the index of its image.
    """
    wrong = {'txt': max((len(text_to_image) - len(set(texts)) for texts in image_to_texts), default=0),
             'img': len(image_to_texts) - 1}
    certain = [f'{way} R@{k}' for way, count in wrong.items() for k in KS if k > count]
    if certain:
        warn_once(f'{", ".join(certain)} of {len(image_to_texts)} images and {len(text_to_image)} captions can only be '
                  f'100: evaluate on more images')
    txt = recall_at_k(scores_i2t, image_to_texts)
    img = recall_at_k(scores_t2i, [[image] for image in text_to_image])
    txt_mean, img_mean = sum(txt) / len(KS), sum(img) / len(KS)
    return {**{f'txt_r{k}': value for k, value in zip(KS, txt, strict=True)}, 'txt_r_mean': txt_mean,
            **{f'img_r{k}': value for k, value in zip(KS, img, strict=True)}, 'img_r_mean': img_mean,
            'r_mean': (txt_mean + img_mean) / 2}


# ---------------------------------------------------------------- captions

@contextlib.contextmanager
def english_java():
    """Java that is started within writes numbers with a dot and lower-cases as in English, whatever the system's
    language and the user's own Java options, which stay in force otherwise."""
    name = '_JAVA_OPTIONS'  # outdoes JAVA_TOOL_OPTIONS and the command line
    before = os.environ.get(name)
    os.environ[name] = f'{before or ""} {ENGLISH}'.strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def java_said(stderr: str, stdout: str = '') -> str:
    """The reason in what a failed Java wrote, as one line. A virtual machine that cannot start tells stdout."""
    lines = [line.strip() for line in f'{stderr}\n{stdout}'.splitlines()]
    lines = [line for line in lines if line and not line.startswith('Picked up ')]
    return ' '.join(lines[:2])[:200]


@functools.cache
def java_works() -> bool:
    """Whether a Java runtime starts (macOS has a `java` that only says how to get one); if not, say so once."""
    reason, remedy = 'there is no Java runtime', '. Remedy: apt install default-jre-headless'
    if shutil.which('java') is not None:
        run = subprocess.run(['java', '-version'], capture_output=True, encoding='utf-8', errors='replace')
        if run.returncode == 0:
            return True
        reason, remedy = f'Java does not start ({java_said(run.stderr, run.stdout)})', ''
    logger.warning('%s: captions are split by the simple tokenizer instead of PTB, METEOR and SPICE are left out. '
                   'BLEU, ROUGE-L and CIDEr come all the same%s', reason, remedy)
    return False


def simple_tokens(caption: str) -> str:
    """Lower-case words without punctuation, joined by spaces: near to PTB on plain captions.

    Of a script that puts no blanks between words each character is a word. Half-width and full-width forms count as the
    ordinary ones.
    """
    return ' '.join(WORD.findall(unicodedata.normalize('NFKC', caption).lower()))


def ptb_tokens(captions: list[str]) -> list[str]:
    """COCO's tokenization (as pycocoevalcap's PTBTokenizer): Stanford's PTB in Java, lower case, no punctuation.

    Run directly, since pycocoevalcap's wrapper writes into site-packages and hides a failure of Java. Characters of
    scripts without blanks between words, which PTB takes for one word, are parted first.

    Raises:
        OSError: Java failed, with its reason.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer as ptb
    jar = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    parted = [SOLID_CHARACTER.sub(r' \g<0> ', caption).strip() for caption in captions]
    with english_java():
        run = subprocess.run(['java', '-cp', jar, 'edu.stanford.nlp.process.PTBTokenizer', '-preserveLines',
                              '-lowerCase', '-encoding', 'UTF-8'],
                             input='\n'.join([*parted, '']), capture_output=True, encoding='utf-8')
    lines = run.stdout.split('\n')[:-1]
    if run.returncode or len(lines) != len(captions):
        raise OSError(f'the PTB tokenizer failed ({java_said(run.stderr, run.stdout)}, exit code {run.returncode})')
    return [' '.join(token for token in line.split() if token not in ptb.PUNCTUATIONS) for line in lines]


def tokenise(captions: dict[object, list[str]], tokenizer: str) -> dict[object, list[str]]:
    """{id: captions} -> the same with tokens joined by single spaces; `tokenizer` is 'ptb' (Java) or 'simple'."""
    flat = [' '.join(text.split()) for texts in captions.values() for text in texts]
    tokens = iter(ptb_tokens(flat) if tokenizer == 'ptb' else map(simple_tokens, flat))
    return {key: [next(tokens) for _ in texts] for key, texts in captions.items()}


@functools.cache
def meteor_server():
    """METEOR's Java process, which takes 10 s and more to start: one for all nets of a table."""
    from pycocoevalcap.meteor.meteor import Meteor
    with english_java():
        return Meteor()


def meteor_scores(references: dict, captions: dict) -> tuple[float, list[float]]:
    """METEOR of the corpus and of each caption, in the order of the ids (about 25 s per 1,000 images, 2 GB).

    Raises:
        OSError: Java failed, with its reason.
    """
    server = meteor_server()
    try:
        return server.compute_score(references, captions)
    except Exception as error:
        meteor_server.cache_clear()
        if server.lock.locked():
            server.lock.release()  # its destructor would wait for it
        with contextlib.suppress(OSError):
            server.meteor_p.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.meteor_p.wait(5)
        code = server.meteor_p.poll()
        server.meteor_p.kill()
        if code is not None and code < 0:
            raise OSError(f'Java was ended by signal {-code}, as happens when memory runs out: METEOR needs 2 GB'
                          ) from None
        said = java_said(*(pipe.read().decode(errors='replace') for pipe in (server.meteor_p.stderr,
                                                                             server.meteor_p.stdout)))
        raise OSError(said or f'it answered with no number: {error}') from None


def spice_scores(references: dict, captions: dict) -> tuple[float, list[float]]:
    """SPICE of the corpus and of each caption, in the order of the ids (8 GB; two jars downloaded at its first use)."""
    from pycocoevalcap.spice.spice import Spice
    with english_java():
        score, singles = Spice().compute_score(references, captions)
    own = dict(zip(sorted(references), singles, strict=True))  # its own order
    return score, [own[key]['All']['f'] for key in references]


SLOW = {'METEOR': (meteor_scores, ''),
        'SPICE': (spice_scores, ': it needs 8 GB of memory and, at its first use, stanford-corenlp-full-2015-12-09.zip '
                  'from nlp.stanford.edu (its jars stanford-corenlp-3.6.0.jar and -models.jar belong into the folder '
                  'spice/lib of the package pycocoevalcap)')}


def caption_metrics(hypotheses: dict, references: dict, *, meteor: bool = False, spice: bool = False,
                    tokenizer: str | None = None) -> tuple[dict, dict]:
    """BLEU-1..4, ROUGE-L, CIDEr and, on demand, METEOR and SPICE by pycocoevalcap, all times 100 as papers quote them.

    Args:
        hypotheses: id -> caption.
        references: the same ids -> list of captions.
        meteor, spice: these too, where Java is found. One that fails is left out, which a warning says.
        tokenizer: 'ptb' (COCO's own, needs Java) or 'simple'; default: 'ptb' where Java works. Compare only
            scores of one tokenizer.

    Returns:
        ({'Bleu_1': ..., 'CIDEr': ..., 'tokenizer': 'ptb' or 'simple'}, {id: {name: score of that caption}}).

    Raises:
        ValueError: nothing to score, an id is on one side only, or an image has no reference.
        OSError: tokenizer 'ptb' was asked for, and Java fails.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    if not hypotheses or hypotheses.keys() != references.keys():
        odd = sorted(map(str, hypotheses.keys() ^ references.keys()))[:3]
        raise ValueError(f'captions and references must be of the same images; on one side only: {odd}')
    empty = [key for key, texts in references.items() if not texts]
    if empty:
        raise ValueError(f'image {shorten(empty[0])} has no reference caption')
    if len(references) == 1:
        warn_once('CIDEr of one image is always 0, since it weighs words by the share of images that have them: '
                  'evaluate on more images')
    together = {key: [hypotheses[key], *texts] for key, texts in references.items()}
    wanted_tokenizer, tokenizer = tokenizer, tokenizer or ('ptb' if java_works() else 'simple')
    try:
        both = tokenise(together, tokenizer)
    except OSError as error:
        if wanted_tokenizer:
            raise
        warn_once(f'{error}: captions are split by the simple tokenizer instead')
        tokenizer, both = 'simple', tokenise(together, 'simple')
    given, wanted = {key: texts[:1] for key, texts in both.items()}, {key: texts[1:] for key, texts in both.items()}
    results = list(zip(('Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4'),
                       *Bleu(4).compute_score(wanted, given, verbose=0), strict=True))
    results += [('ROUGE_L', *Rouge().compute_score(wanted, given)), ('CIDEr', *Cider().compute_score(wanted, given))]
    for name, asked in (('METEOR', meteor), ('SPICE', spice)):
        if asked and java_works():
            score, needs = SLOW[name]
            try:
                results.append((name, *score(wanted, given)))
            except (OSError, ValueError, subprocess.CalledProcessError, zipfile.BadZipFile) as error:
                logger.warning('%s is left out (%s)%s', name, error, needs)
    corpus = {name: 100 * float(score) for name, score, _ in results}
    single = {key: {name: 100 * float(scores[i]) for name, _, scores in results} for i, key in enumerate(wanted)}
    return {**corpus, 'tokenizer': tokenizer}, single
