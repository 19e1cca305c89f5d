"""WordPiece tokenizer whose vocabulary travels inside every checkpoint, so that no network is needed."""

import json
import os
from pathlib import Path

import tokenizers
import torch

from utils import atomic_write, shorten

DEC, ENC = '[DEC]', '[ENC]'  # start of a caption, start of a text to be matched with an image


class Tokenizer:
    """Lower-casing BERT WordPiece with BLIP's two extra tokens.

    Args:
        vocab: the tokens in the order of their ids. [DEC] and [ENC] are appended when absent, as BLIP does
            with bert-base-uncased (ids 30522 and 30523).

    Raises:
        ValueError: they are no vocabulary of a BERT.
    """

    def __init__(self, vocab: list[str]):
        self.vocab = list(vocab) + [token for token in (DEC, ENC) if token not in vocab]
        ids = {token: i for i, token in enumerate(self.vocab)}
        missing = [token for token in ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]') if token not in ids]
        if missing or len(ids) != len(self.vocab):
            what = f'lacks {", ".join(missing)}' if missing else 'names a token twice'
            raise ValueError(f'not a BERT vocabulary: it {what}')
        self.pad_id, self.cls_id, self.sep_id = ids['[PAD]'], ids['[CLS]'], ids['[SEP]']
        self.bos_id, self.enc_id = ids[DEC], ids[ENC]
        self._starts = {'[CLS]': self.cls_id, DEC: self.bos_id, ENC: self.enc_id}
        self.special = {self.pad_id, self.cls_id, self.sep_id, self.bos_id, self.enc_id}  # texts do not show them
        try:
            self._wordpiece = tokenizers.BertWordPieceTokenizer(ids, lowercase=True)
        except (UnicodeEncodeError, TypeError):
            raise ValueError('not a BERT vocabulary: it holds half characters (lone surrogates)') from None

    @classmethod
    def from_file(cls, path: Path) -> 'Tokenizer':
        """Read a `vocab.txt` or `tokenizer.json`.

        Raises:
            ValueError: naming the file, which is damaged or no vocabulary of a BERT.
        """
        try:
            if path.suffix == '.json':
                ids = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
                if sorted(ids.values()) != list(range(len(ids))):
                    raise ValueError(f'its ids are not 0 to {len(ids) - 1}')
                return cls(sorted(ids, key=ids.get))
            lines = path.read_text(encoding='utf-8').removesuffix('\n').split('\n')  # a token may hold other line ends
            return cls(lines)
        except OSError:
            raise
        except Exception as error:  # of any kind: the tokenizers library raises Exception itself
            raise ValueError(f'{path} is no tokenizer: {shorten(error, 120)}') from None

    def __len__(self) -> int:
        return len(self.vocab)

    def __call__(self, texts: list[str], max_length: int, start: str = '[CLS]') -> tuple[torch.Tensor, torch.Tensor]:
        """Encode texts as `start` + pieces + [SEP], cut to `max_length` tokens, padded to the longest.

        Returns:
            ids [B, T] int64 and mask [B, T] int64 (1 = token, 0 = pad).
        """
        first, rows = self._starts[start], []
        # cut long strings early, and replace lone surrogates, which the tokenizer cannot take
        texts = [text[:32 * max_length].encode('utf-8', 'replace').decode() for text in texts]
        for encoding in self._wordpiece.encode_batch(texts, add_special_tokens=False):
            rows.append([first, *encoding.ids[:max_length - 2], self.sep_id])
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad_id)
        for i, row in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)
        return ids, (ids != self.pad_id).long()

    def words(self, text: str) -> list[str]:
        """The words and punctuation marks of a text, normalised, which are split into tokens one by one."""
        text = self._wordpiece.normalizer.normalize_str(text.encode('utf-8', 'replace').decode())
        return [word for word, _ in self._wordpiece.pre_tokenizer.pre_tokenize_str(text)]

    def decode(self, ids: torch.Tensor | list[int]) -> str:
        """Token ids -> text, special tokens dropped."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        return self._wordpiece.decode([i for i in ids if i not in self.special], skip_special_tokens=False)

    def batch_decode(self, rows: torch.Tensor | list[list[int]]) -> list[str]:
        return [self.decode(row) for row in rows]

    def save(self, folder: str | os.PathLike) -> None:
        """Write `vocab.txt`, and the two files that transformers reads beside it, into a folder."""
        settings = {'tokenizer_class': 'BertTokenizer', 'do_lower_case': True, 'unk_token': '[UNK]',
                    'sep_token': '[SEP]', 'pad_token': '[PAD]', 'cls_token': '[CLS]', 'mask_token': '[MASK]'}
        for name, text in (('vocab.txt', '\n'.join(self.vocab) + '\n'),
                           ('tokenizer.json', self._wordpiece.to_str(pretty=True)),
                           ('tokenizer_config.json', json.dumps(settings, indent=2) + '\n')):
            with atomic_write(Path(folder) / name) as file:
                file.write(text)
