"""Self-critical training of a captioner (Rennie et al. 2017, arXiv 1612.00563): captions that it samples itself are
rewarded by CIDEr, the metric that they are judged by."""

from collections.abc import Callable

import torch
from torch import nn

from models import losses
from models.blip import BLIP
from models.generation import generate_ids
from models.tokenizer import DEC, Tokenizer


class SelfCritical(nn.Module):
    """The loss of a batch of images: captions that the student samples, weighted by their rewards.

    The student should have no dropout: the probabilities must be those by which the captions were drawn.

    Args:
        reward: (image numbers, captions without the prompt, whether each came to its end) -> a reward of each.
        samples: captions per image, at least 2: each is compared with the mean of the others.
        max_length: tokens of a caption, the prompt's included.
    """

    teacher = None

    def __init__(self, student: BLIP, tokenizer: Tokenizer, reward: Callable[[list, list, list], list[float]],
                 samples: int, prompt: str, max_length: int):
        super().__init__()
        self.student, self.tokenizer, self.reward = student, tokenizer, reward
        self.samples, self.max_length = samples, max_length
        self.prompt_ids = tokenizer([prompt], student.config.max_positions, DEC)[0][0, :-1]

    def compile_parts(self, **options) -> None:
        self.student.compile_towers(**options)

    def forward(self, images: torch.Tensor, image_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """images [B, 3, S, S], image_ids [B] (which `reward` knows them by).

        Returns:
            'loss' and the mean 'reward' (scalars, float32).
        """
        tokens = self.student.encode_image(images)
        drawn, sampled = self.draw(tokens.detach())
        captions = self.tokenizer.batch_decode(drawn[:, len(self.prompt_ids):])
        ended = (drawn == self.tokenizer.sep_id).any(1).tolist()
        numbers = image_ids.repeat_interleave(self.samples).tolist()
        rewards = torch.tensor(self.reward(numbers, captions, ended), device=images.device)
        log_probs = self.log_probs(tokens, drawn, sampled)
        loss = losses.self_critical_loss(log_probs, sampled, rewards.unflatten(0, (-1, self.samples)))
        return {'loss': loss, 'reward': rewards.mean()}

    def draw(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B * samples, T] drawn from the student's own distribution, and [B * samples, T - 1], 1 where token
        t + 1 was drawn: after the prompt, up to the first [SEP]."""
        drawn = generate_ids(self.student, tokens, self.prompt_ids, self.tokenizer.sep_id, self.tokenizer.pad_id,
                             sample=True, top_p=1.0, min_length=1, max_length=self.max_length,
                             num_captions=self.samples)
        torch.clear_autocast_cache()  # it holds weights cast without gradients
        drawn = drawn.clone()  # from inference mode into autograd's
        ends = drawn == self.tokenizer.sep_id
        sampled = (ends.cumsum(1) - ends.long() == 0)[:, 1:].long()
        sampled[:, :len(self.prompt_ids) - 1] = 0
        return drawn, sampled

    def log_probs(self, tokens: torch.Tensor, drawn: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B * samples, T - 1] of the sampled tokens, 0 elsewhere, in one teacher-forced pass."""
        kept = sampled.bool()
        image_kv = self.student.project_image(tokens)
        hidden = self.student.text_decoder.bert(drawn, causal=True, image_kv=image_kv).hidden[:, :-1]
        logits = self.student.text_decoder.logits(hidden[kept]).float()
        out = logits.new_zeros(kept.shape)
        out[kept] = logits.log_softmax(-1).gather(1, drawn[:, 1:][kept][:, None])[:, 0]
        return out
