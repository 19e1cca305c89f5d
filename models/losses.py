"""Losses as pure functions: tensors in, float32 scalar out (DESIGN: every weight in YAML, 0 skips the term).

Each casts its inputs to float32 and runs with autocast off; `hidden_loss` sums bfloat16 in float32. In bfloat16 a
cosine near 1 is off by up to 0.002, and its logit at a temperature of 0.015 by 0.13.

Sources: BLIP (arXiv 2201.12086) for ITA, ITM and LM; DLIP (arXiv 2308.12956) for the distillation terms.
"""

from contextlib import nullcontext
from functools import wraps

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of a position that carries no loss


def in_float32(function):
    """Decorator: floating-point tensors arrive as float32, and autocast is off."""
    @wraps(function)
    def run(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        device = tensors[0].device.type
        known = torch.amp.is_autocast_available(device)  # the meta device has none
        with torch.autocast(device, enabled=False) if known else nullcontext():
            return function(*map(as_float32, args), **{name: as_float32(x) for name, x in kwargs.items()})
    return run


def as_float32(x):
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of values [...] over the positions where mask [...] is 1 (0 if there are none), or over all."""
    if mask is None:
        return values.mean()
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def positives(ids: torch.Tensor, all_ids: torch.Tensor) -> torch.Tensor:
    """Contrastive targets [B, N]: row-normalised `ids[i] == all_ids[j]` (an image's captions share an id)."""
    same = (ids[:, None] == all_ids[None, :]).float()
    return same / same.sum(1, keepdim=True)


@in_float32
def similarity(rows: torch.Tensor, columns: torch.Tensor, temp: torch.Tensor) -> torch.Tensor:
    """Contrastive logits [B, N] of unit-norm features [B, E] and [N, E] at a temperature (scalar)."""
    return rows @ columns.T / temp


@torch.no_grad()
@in_float32
def top_1(rows: torch.Tensor, columns: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Share (0 to 1) of the rows [B, E] whose most similar column of [B, E] has their id, of ids [B]."""
    return (ids[(rows @ columns.T).argmax(1)] == ids).float().mean()


@in_float32
def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over rows of -sum_j targets[i, j] log softmax(logits)[i, j]; targets are probabilities [B, N]."""
    return -(targets * logits.log_softmax(1)).sum(1).mean()


@in_float32
def ita_loss(image_feat: torch.Tensor, text_feat: torch.Tensor, image_feat_m: torch.Tensor,
             text_feat_m: torch.Tensor, image_all: torch.Tensor, text_all: torch.Tensor,
             temp: torch.Tensor, targets: torch.Tensor, alpha: float) -> torch.Tensor:
    """Image-text alignment with momentum soft targets (BLIP section 3.2, ALBEF).

    Args:
        image_feat, text_feat: student features [B, E], unit norm.
        image_feat_m, text_feat_m: momentum features [B, E] of the same pairs.
        image_all, text_all: momentum features [N, E] of the global batch followed by the queue.
        temp: temperature, scalar.
        targets: hard targets [B, N], rows sum to one (`positives`).
        alpha: share of the momentum model's soft targets, 0..1.
    """
    with torch.no_grad():
        soft_i2t = alpha * similarity(image_feat_m, text_all, temp).softmax(1) + (1 - alpha) * targets
        soft_t2i = alpha * similarity(text_feat_m, image_all, temp).softmax(1) + (1 - alpha) * targets
    return (soft_cross_entropy(similarity(image_feat, text_all, temp), soft_i2t)
            + soft_cross_entropy(similarity(text_feat, image_all, temp), soft_t2i)) / 2


@in_float32
def soft_ita_loss(image_feat: torch.Tensor, text_feat: torch.Tensor, image_all: torch.Tensor,
                  text_all: torch.Tensor, temp: torch.Tensor, teacher_image_feat: torch.Tensor,
                  teacher_text_feat: torch.Tensor, teacher_image_all: torch.Tensor,
                  teacher_text_all: torch.Tensor, teacher_temp: torch.Tensor) -> torch.Tensor:
    """The student's similarity distribution against the teacher's, each in its own space and temperature.

    Column j of the student's `*_all` [N, E] and of the teacher's [N, E_t] belongs to the same pair.
    """
    with torch.no_grad():
        soft_i2t = similarity(teacher_image_feat, teacher_text_all, teacher_temp).softmax(1)
        soft_t2i = similarity(teacher_text_feat, teacher_image_all, teacher_temp).softmax(1)
    return (soft_cross_entropy(similarity(image_feat, text_all, temp), soft_i2t)
            + soft_cross_entropy(similarity(text_feat, image_all, temp), soft_t2i)) / 2


@in_float32
def hard_negatives(similarity: torch.Tensor, ids: torch.Tensor, candidate_ids: torch.Tensor,
                   noise: torch.Tensor) -> torch.Tensor:
    """One negative per row, drawn with probability softmax(similarity) + 1e-4 among other ids -> index [B].

    Gumbel-max with given noise is a batched multinomial whose draw depends only on the step, not on the
    number of processes that share the batch.

    Args:
        similarity: logits [B, N] of the rows against the candidates.
        ids [B], candidate_ids [N]: equal ids are never a negative. A row with no negative at all (every
            candidate has its id) gets an arbitrary candidate.
        noise: uniform (0, 1) float [B, N].
    """
    weights = similarity.softmax(1) + 1e-4
    weights = weights.masked_fill(ids[:, None] == candidate_ids[None, :], 0)
    return (weights.log() - (-noise.log()).log()).argmax(1)


@in_float32
def itm_loss(logits: torch.Tensor) -> torch.Tensor:
    """Matching loss: logits [3B, 2], the first B rows are matching pairs, the rest hard negatives."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[:len(logits) // 3] = 1
    return F.cross_entropy(logits, labels)


@in_float32
def lm_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.1) -> torch.Tensor:
    """Label-smoothed cross-entropy; logits [..., V], labels [...] with IGNORE skipped; 0 if all are ignored."""
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE,
                           label_smoothing=label_smoothing, reduction='sum')
    return loss / (labels != IGNORE).sum().clamp(min=1)


def in_chunks(function, size: int, *rows: torch.Tensor) -> torch.Tensor:
    """`function(*rows)`, a tensor of means over M rows, from chunks of at most `size` rows.

    If there is more than one chunk, each is recomputed in the backward pass, so that large intermediate results (logits
    over a vocabulary) are never held for all rows at once.
    """
    count = len(rows[0])
    if count <= size:
        return function(*rows)
    parts = zip(*(x.split(size) for x in rows), strict=True)
    return sum(checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) * (len(part[0]) / count)
               for part in parts)


@in_float32
def logit_kl_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) over the classes, mean over rows; logits [M, V] of valid positions only.

    Scaled by temperature^2, so that the gradient does not shrink with it (Hinton et al., 2015). No rows: 0.
    """
    student = (logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    kl = F.kl_div(student, teacher, log_target=True, reduction='sum')
    return kl * temperature ** 2 / max(1, len(logits))


@in_float32
def top_k_kl_loss(logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, rest: torch.Tensor
                  ) -> torch.Tensor:
    """`logit_kl_loss` where of the teacher only its k most probable classes are known, and of the others their sum.

    The others are taken as equally probable, as they nearly are for a teacher trained with label smoothing; if they
    were, this would equal the full KL. (As a single class they would lose what smoothing teaches: 0.05 of a KL of 2
    for the demo's teacher.)

    Args:
        logits: [M, V]
        ids: the k classes of each row [M, k].
        log_probs: of those, and of all others together [M, k + 1]; brought to a sum of one here.
        rest: sum of p log p over the others [M].
    """
    ids, log_probs = ids.long(), log_probs.log_softmax(-1)
    total, k = logits.logsumexp(1, keepdim=True), ids.shape[1]
    top = logits.gather(1, ids)
    others = (logits.sum(1) - top.sum(1)) / max(1, logits.shape[1] - k) - total[:, 0]
    kl = F.kl_div(top - total, log_probs[:, :k], log_target=True, reduction='none').sum(1)
    return (kl + rest - log_probs[:, k].exp() * others).sum() / max(1, len(logits))


@in_float32
def next_token_losses(logits: torch.Tensor, labels: torch.Tensor | None, said: tuple[torch.Tensor, ...] | None
                      ) -> torch.Tensor:
    """`lm_loss`, and the KL to what the teacher said: its logits alone (`logit_kl_loss`), or the three tensors of
    `top_k_kl_loss`; of the two those that are given, stacked."""
    values = [] if labels is None else [lm_loss(logits, labels)]
    if said is not None:
        values.append((logit_kl_loss if len(said) == 1 else top_k_kl_loss)(logits, *said))
    return torch.stack(values)


@in_float32
def self_critical_loss(log_probs: torch.Tensor, mask: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Policy gradient with the mean reward of an image's other captions as baseline (Luo 2020, arXiv 2003.09971).

    Args:
        log_probs: [B * K, T] of the tokens of K sampled captions per image, an image's captions side by side.
        mask: [B * K, T], 1 where a token was sampled.
        rewards: [B, K], K >= 2.
    """
    count = rewards.shape[1]
    advantages = (rewards - rewards.mean(1, keepdim=True)) * (count / (count - 1))  # = reward - mean of the others
    return -(advantages.flatten() * (log_probs * mask).sum(1)).mean()


@in_float32
def cosine_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity of vectors [..., E] -> [...]"""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


@in_float32
def hidden_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error of layer-normalised states [..., E], mean over E -> [...]

    TinyBERT's hidden-state loss (arXiv 1909.10351) on states whitened by a layer norm without weights, as in feature
    distillation (Wei et al. 2022, arXiv 2205.14141): the norm of the residual stream grows with depth and varies from
    token to token, and need not be learned. From 0 (equal up to scale and shift) to 4; 2 for unrelated states.
    """
    student, teacher = (F.layer_norm(x, x.shape[-1:]) for x in (student, teacher))
    return (student - teacher).square().mean(-1)


def recomputed(error, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`error(student, teacher)`, for whose backward pass only these two are kept: float32 copies of all image tokens,
    or of the states of several layers, would be gigabytes."""
    return checkpoint(error, student, teacher, use_reentrant=False, preserve_rng_state=False)


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean `cosine_error` of vectors [..., E] over the positions where mask [...] is 1."""
    return masked_mean(recomputed(cosine_error, student, teacher), mask)


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean `hidden_error` of states [..., E] over the positions where mask [...] is 1."""
    return masked_mean(recomputed(hidden_error, student, teacher), mask)


@in_float32
def attention_kl_loss(log_map: torch.Tensor, teacher_log_map: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of attention, given as log-probabilities [B, heads, T, keys].

    Mean over heads and over the query rows where mask [B, T] is 1 (pads teach nothing). Masked keys have a
    probability of exactly zero in both maps and contribute nothing.
    """
    kl = F.kl_div(log_map, teacher_log_map, log_target=True, reduction='none').sum(-1).mean(1)
    return masked_mean(kl, mask)
