"""The losses of one batch: student, momentum twin and (optionally) a frozen teacher.

One module serves pre-training (ITA + ITM + LM + distillation) and both finetunes, which weigh fewer terms.
It is what DistributedDataParallel wraps; every trainable parameter gets a gradient in every step.
"""

import torch
from torch import nn

from models import losses
from models.blip import BLIP, select_images
from models.hidden import STREAMS, HiddenStates, layer_pairs
from models.linear import Linear
from models.momentum import MomentumQueue
from models.originals import HOLDERS
from utils import all_gather, all_gather_grad, rank, world_size

TEACHER_TERMS = ('image_tokens', 'image_feat', 'text_feat', 'fused_feat', 'decoder_feat', 'ita_soft', 'itm_soft',
                 'lm_logits', 'self_attn', 'cross_attn', 'decoder_self_attn', 'decoder_cross_attn', *STREAMS)
TERMS = ('ita', 'itm', 'lm', *TEACHER_TERMS)
VISION = ('image_tokens', 'vision_hidden')  # terms of the vision tower alone
CONTRASTIVE = ('ita', 'itm', 'ita_soft', 'itm_soft', 'image_feat', 'text_feat', 'text_hidden')  # of both features
FUSED = ('itm', 'itm_soft', 'fused_feat', 'self_attn', 'cross_attn', 'fused_hidden')  # terms of the matching pass
DECODER = ('lm', 'lm_logits', 'decoder_feat', 'decoder_self_attn', 'decoder_cross_attn', 'decoder_hidden')

GROUNDED_TEACHER_TERMS = tuple(term for term in TEACHER_TERMS if term in FUSED + DECODER)


class FrozenTeacher:
    """Holds a teacher that can neither train nor leave eval mode, outside the module tree.

    Not a submodule, so it is neither in the optimizer, nor broadcast by DDP, nor written to checkpoints.
    """

    def __init__(self, model: BLIP):
        self.model = model.eval().requires_grad_(False)


class Objective(nn.Module):
    """Args:
        student: the net to train.
        weights: weight per term of `TERMS`; 0 skips its computation.
        momentum: twin and queues, needed by 'ita' and 'itm'.
        teacher: needed by the distillation terms.
        start_ids: the tokenizer's (cls_id, enc_id, bos_id).
        prompt_length: leading decoder tokens that carry no LM loss (4 for '[DEC] a picture of', 0 in pre-training).
        negative_all_rank: draw ITM negatives over all processes (BLIP's retrieval finetune) or the own batch.
        hidden_layers: by tower ('vision', 'text') what the hidden-state terms compare (see `layer_pairs`).

    Raises:
        ValueError: a term has a weight but the net, teacher or momentum twin it needs is missing.
    """

    def __init__(self, student: BLIP, weights: dict[str, float], start_ids: tuple[int, int, int],
                 momentum: MomentumQueue | None = None, teacher: BLIP | None = None, prompt_length: int = 0,
                 negative_all_rank: bool = False, hidden_layers: dict[str, list | None] | None = None):
        super().__init__()
        self.student, self.momentum = student, momentum
        self.frozen = FrozenTeacher(teacher) if teacher is not None else None
        self.weights = {name: float(weights.get(name, 0)) for name in TERMS}
        self.cls_id, self.enc_id, self.bos_id = start_ids
        self.prompt_length = prompt_length
        self.negative_all_rank = negative_all_rank
        self._check()
        config = student.config
        if self.uses('image_tokens'):
            same = config.vision_width == teacher.config.vision_width  # then the student speaks the teacher's own space
            self.token_map = nn.Identity() if same else Linear(config.vision_width, teacher.config.vision_width)
        if self.uses('fused_feat'):
            self.fused_map = Linear(config.text_width, teacher.config.text_width)
        if self.uses('decoder_feat'):
            self.decoder_map = Linear(config.text_width, teacher.config.text_width)
        self.hidden = nn.ModuleDict()  # the hidden-state terms in use
        for term, tower in STREAMS.items():
            if self.uses(term):
                depths, widths = ([getattr(net.config, f'{tower}_{size}') for net in (student, teacher)]
                                  for size in ('depth', 'width'))
                pairs = layer_pairs((hidden_layers or {}).get(tower), *depths, tower)
                self.hidden[term] = HiddenStates(pairs, *widths)
        self._freeze_unreached()

    def _freeze_unreached(self) -> None:
        """Parts that no weighted term reaches do not train: DDP expects a gradient of everything that does."""
        student, aligned = self.student, ('ita', 'ita_soft')
        encoder, decoder = student.text_encoder, student.text_decoder
        texts = ('text_feat', 'text_hidden', *aligned, *FUSED, *DECODER)
        parts = []  # (part, terms that reach it, number of its layer)
        if encoder is not None:
            parts += [(student.vision_proj, (*aligned, 'image_feat'), 0),
                      (student.text_proj, (*aligned, 'text_feat'), 0),
                      (student.itm_head, ('itm', 'itm_soft'), 0), (nn.ParameterList([student.temp]), aligned, 0)]
            parts += [(layer.attention, (*aligned, 'text_feat', 'text_hidden', *FUSED), i)
                      for i, layer in enumerate(encoder.layers)]
        if decoder is not None:
            head = decoder.cls.predictions
            parts += [(head.transform, ('lm', 'lm_logits'), 0), (nn.ParameterList([head.bias]), ('lm', 'lm_logits'), 0)]
            parts += [(layer.attention, DECODER, i) for i, layer in enumerate(decoder.bert.layers)]
        for i, layer in enumerate((encoder or decoder.bert).layers):
            parts += [(layer.crossattention, FUSED + DECODER, i), (layer.intermediate, texts, i),
                      (layer.output, texts, i)]
        for part, terms, layer in parts:
            if not self.reaches(layer, *terms):
                part.requires_grad_(False)

    def uses(self, *terms: str) -> bool:
        return any(self.weights[term] for term in terms)

    def reaches(self, layer: int, *terms: str) -> bool:
        """Whether a weighted term is computed from this layer: a hidden-state term ends at its deepest one."""
        return any(term not in STREAMS or layer <= max(self.hidden[term].ours) for term in terms if self.uses(term))

    def hidden_layers(self, term: str) -> tuple[list[int], list[int]]:
        """The student's and the teacher's layers whose states a hidden-state term compares; none without a weight."""
        return (self.hidden[term].ours, self.hidden[term].theirs) if self.uses(term) else ([], [])

    @property
    def teacher(self) -> BLIP | None:
        return self.frozen.model if self.frozen else None

    def _check(self) -> None:
        nets = {'student': self.student, 'teacher': self.teacher}
        for term in (term for term in TERMS if self.uses(term)):
            for who in ('student', 'teacher') if term in TEACHER_TERMS else ('student',):
                net, part = nets[who], 'text_decoder' if term in DECODER else 'text_encoder'
                if net is None:
                    raise ValueError(f'loss.{term} needs a teacher: set teacher.weights, or loss.{term}: 0')
                if term not in VISION and getattr(net, part) is None:
                    raise ValueError(f'loss.{term} needs a {part}, which the {who} of task {net.config.task!r} does '
                                     f'not have: set loss.{term}: 0, or give one that has it (BLIP: {HOLDERS[part]})')
        if self.uses(*CONTRASTIVE) and self.momentum is None:
            raise ValueError('the contrastive terms need a momentum twin')
        if self.teacher is not None:
            ours, theirs = self.student.config, self.teacher.config
            if ours.vocab_size != theirs.vocab_size:
                raise ValueError(f'student and teacher have vocabularies of {ours.vocab_size} and '
                                 f'{theirs.vocab_size} tokens: use the teacher\'s tokenizer')
            maps = ('self_attn', 'cross_attn', 'decoder_self_attn', 'decoder_cross_attn')
            if self.uses(*maps) and ours.text_heads != theirs.text_heads:
                raise ValueError(f'attention terms need equal text heads: student {ours.text_heads}, teacher '
                                 f'{theirs.text_heads}')
            patches = [net.image_size // net.patch_size for net in (ours, theirs)]
            if self.uses(*VISION, 'cross_attn', 'decoder_cross_attn') and patches[0] != patches[1]:
                raise ValueError(f'image_tokens, vision_hidden and cross-attention terms need equal patch grids: '
                                 f'student {patches[0]}, teacher {patches[1]} patches a side')
            if self.uses('image_feat', 'text_feat') and ours.embed_dim != theirs.embed_dim:
                raise ValueError(f'image_feat and text_feat need equal embed_dim: student {ours.embed_dim}, '
                                 f'teacher {theirs.embed_dim}')

    def forward(self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, sample_ids: torch.Tensor,
                alpha: float, step_seed: int) -> dict[str, torch.Tensor]:
        """images [B, 3, S, S]; ids, mask [B, T] (position 0 is replaced as each pass needs); sample_ids [B].

        Returns:
            unweighted terms by name (scalars, float32) and 'loss', their weighted sum.
        """
        out: dict[str, torch.Tensor] = {}
        teacher = self.teacher
        ours, theirs = self.hidden_layers('vision_hidden')
        tokens, states = self.student.encode_image(images, ours)
        with torch.no_grad():
            teacher_tokens, teacher_states = teacher.encode_image(images, theirs) if teacher is not None else (None, {})
        if self.uses('image_tokens'):
            out['image_tokens'] = losses.cosine_loss(self.token_map(tokens), teacher_tokens)
        if self.uses('vision_hidden'):
            out['vision_hidden'] = self.hidden['vision_hidden'](states, teacher_states)
        negatives = None
        if self.uses(*CONTRASTIVE):
            negatives = self.contrastive(out, images, tokens, teacher_tokens, ids, mask, sample_ids, alpha, step_seed)
        kv = self.student.project_image(tokens)
        with torch.no_grad():
            teacher_kv = teacher.project_image(teacher_tokens) if self.uses(*GROUNDED_TEACHER_TERMS) else None
        if self.uses(*FUSED):
            self.matching(out, tokens, kv, teacher_tokens, teacher_kv, ids, mask, negatives)
        if self.uses(*DECODER):
            self.decoding(out, kv, teacher_kv, ids, mask)
        out['loss'] = sum(self.weights[name] * value for name, value in out.items())
        return out

    def contrastive(self, out, images, tokens, teacher_tokens, ids, mask, sample_ids, alpha, step_seed):
        """ITA and the embedding terms; returns the hard negatives for the matching pass."""
        student, teacher, momentum = self.student, self.teacher, self.momentum
        ids = with_start(ids, self.cls_id)
        image_feat = student.image_feat(tokens)
        ours, theirs = self.hidden_layers('text_hidden')
        text_feat, states = student.text_feat(ids, mask, ours)
        image_feat_m, text_feat_m = momentum.encode(images, ids, mask)
        batch_ids, batch = all_gather(sample_ids), {'image': all_gather(image_feat_m), 'text': all_gather(text_feat_m)}
        image_all = torch.cat([batch['image'], momentum.image_queue])
        text_all = torch.cat([batch['text'], momentum.text_queue])
        if self.uses('ita'):
            targets = losses.positives(sample_ids, torch.cat([batch_ids, momentum.id_queue]))
            out['ita'] = losses.ita_loss(image_feat, text_feat, image_feat_m, text_feat_m, image_all, text_all,
                                         student.temp, targets, alpha)
        if self.uses('ita_soft', 'image_feat', 'text_feat', 'text_hidden'):
            with torch.no_grad():
                teacher_image = teacher.image_feat(teacher_tokens)
                teacher_text, teacher_states = teacher.text_feat(ids, mask, theirs)
            if self.uses('text_hidden'):
                out['text_hidden'] = token_share(mask) * self.hidden['text_hidden'](states, teacher_states, mask)
            if self.uses('image_feat'):
                out['image_feat'] = losses.cosine_loss(image_feat, teacher_image)
            if self.uses('text_feat'):
                out['text_feat'] = losses.cosine_loss(text_feat, teacher_text)
            if self.uses('ita_soft'):
                batch |= {'teacher_image': all_gather(teacher_image), 'teacher_text': all_gather(teacher_text)}
                out['ita_soft'] = losses.soft_ita_loss(
                    image_feat, text_feat, image_all, text_all, student.temp, teacher_image, teacher_text,
                    torch.cat([batch['teacher_image'], momentum.teacher_image_queue]),
                    torch.cat([batch['teacher_text'], momentum.teacher_text_queue]), teacher.temp)
        negatives = None
        if self.uses('itm', 'itm_soft'):
            negatives = self.draw_negatives(image_feat, text_feat, batch, sample_ids, batch_ids, step_seed)
        if self.training:
            momentum.enqueue(batch_ids, **batch)  # last: a batch must not meet itself in the queue
        return negatives

    @torch.no_grad()
    def draw_negatives(self, image_feat, text_feat, batch, sample_ids, batch_ids, step_seed):
        """Index of a hard negative image per text and of a hard negative text per image, both [B]."""
        size, mine = len(sample_ids), slice(rank() * len(sample_ids), (rank() + 1) * len(sample_ids))
        noise = torch.rand(2, len(batch_ids), len(batch_ids),
                           generator=torch.Generator().manual_seed(step_seed)).clamp_(1e-9, 1 - 1e-7)
        noise = noise[:, mine].to(image_feat.device)
        pool = slice(None) if self.negative_all_rank else mine
        images, texts, pool_ids = batch['image'][pool], batch['text'][pool], batch_ids[pool]
        assert self.negative_all_rank or len(images) == size
        temp = self.student.temp
        image_index = losses.hard_negatives(text_feat @ images.T / temp, sample_ids, pool_ids, noise[0][:, pool])
        text_index = losses.hard_negatives(image_feat @ texts.T / temp, sample_ids, pool_ids, noise[1][:, pool])
        return image_index, text_index

    def matching(self, out, tokens, kv, teacher_tokens, teacher_kv, ids, mask, negatives):
        """ITM on [pairs; text, negative image; negative text, image], one pass of 3B rows, and its distillation."""
        batch = len(ids)
        ids = with_start(ids, self.enc_id)
        image_index, foreign = torch.arange(batch, device=ids.device), None
        own = image_index
        if negatives is not None:
            image_negative, text_negative = negatives
            all_ids, all_mask = ids, mask
            if self.negative_all_rank and world_size() > 1:
                all_ids, all_mask = gather_texts(ids, mask)
                foreign = all_gather_grad(tokens)[image_negative]
                kv = concat_images(kv, self.student.project_image(foreign))
                image_negative = own + batch
            width = all_ids.shape[1]
            ids = torch.cat([pad_to(ids, width), pad_to(ids, width), all_ids[text_negative]])
            mask = torch.cat([pad_to(mask, width), pad_to(mask, width), all_mask[text_negative]])
            image_index = torch.cat([own, image_negative, own])
        want_maps = self.uses('self_attn', 'cross_attn')
        ours, theirs = self.hidden_layers('fused_hidden')
        fused = self.student.text_encoder(ids, mask, image_kv=select_images(kv, image_index), want_maps=want_maps,
                                          first_only=not want_maps, layers=ours)
        if negatives is not None:
            logits = self.student.itm_head(fused.hidden[:, 0])
            if self.uses('itm'):
                out['itm'] = losses.itm_loss(logits)
        if not self.uses('itm_soft', 'fused_feat', 'self_attn', 'cross_attn', 'fused_hidden'):
            return
        with torch.no_grad():
            if not self.uses('itm_soft'):
                ids, mask, image_index = ids[:batch], mask[:batch], own
            elif foreign is not None:
                remote = all_gather(teacher_tokens)[negatives[0]]
                teacher_kv = concat_images(teacher_kv, self.teacher.project_image(remote))
            target = self.teacher.text_encoder(ids, mask, image_kv=select_images(teacher_kv, image_index),
                                               want_maps=want_maps, first_only=not want_maps, layers=theirs)
        if self.uses('itm_soft'):
            out['itm_soft'] = losses.logit_kl_loss(logits, self.teacher.itm_head(target.hidden[:, 0]))
        pair_mask = mask[:batch]
        if self.uses('fused_feat'):
            out['fused_feat'] = losses.cosine_loss(self.fused_map(fused.hidden[:batch, 0]), target.hidden[:batch, 0])
        if self.uses('fused_hidden'):
            pairs = ({layer: state[:batch] for layer, state in output.states.items()} for output in (fused, target))
            out['fused_hidden'] = token_share(pair_mask) * self.hidden['fused_hidden'](*pairs, pair_mask)
        for term in ('self_attn', 'cross_attn'):
            if self.uses(term):
                name = term.replace('attn', 'map')
                out[term] = token_share(pair_mask) * losses.attention_kl_loss(
                    getattr(fused, name)[:batch], getattr(target, name)[:batch], pair_mask)

    def decoding(self, out, kv, teacher_kv, ids, mask):
        """LM on the teacher-forced caption, and the distillation of the decoder."""
        ids = with_start(ids, self.bos_id)
        labels = ids.masked_fill(mask == 0, losses.IGNORE)
        labels[:, :self.prompt_length] = losses.IGNORE
        valid = labels[:, 1:] != losses.IGNORE  # positions whose next token carries a loss
        want_maps = self.uses('decoder_self_attn', 'decoder_cross_attn')
        ours, theirs = self.hidden_layers('decoder_hidden')
        decoded = self.student.text_decoder.bert(ids, mask, causal=True, image_kv=kv, want_maps=want_maps, layers=ours)
        hidden = decoded.hidden[:, :-1]
        if self.uses('lm', 'lm_logits'):
            logits = self.student.text_decoder.logits(hidden[valid])  # the head runs on labelled positions only
        share = token_share(valid)
        if self.uses('lm'):
            out['lm'] = share * losses.lm_loss(logits, labels[:, 1:][valid])
        if not self.uses('lm_logits', 'decoder_feat', 'decoder_self_attn', 'decoder_cross_attn', 'decoder_hidden'):
            return
        with torch.no_grad():
            target = self.teacher.text_decoder.bert(ids, mask, causal=True, image_kv=teacher_kv, want_maps=want_maps,
                                                    layers=theirs)
            target_hidden = target.hidden[:, :-1]
        if self.uses('lm_logits'):
            with torch.no_grad():
                target_logits = self.teacher.text_decoder.logits(target_hidden[valid])
            out['lm_logits'] = share * losses.logit_kl_loss(logits, target_logits)
        if self.uses('decoder_feat'):
            out['decoder_feat'] = share * losses.cosine_loss(self.decoder_map(hidden), target_hidden, valid)
        if self.uses('decoder_hidden'):
            out['decoder_hidden'] = token_share(mask) * self.hidden['decoder_hidden'](decoded.states, target.states,
                                                                                      mask)
        for term in ('decoder_self_attn', 'decoder_cross_attn'):
            if self.uses(term):
                name = term.removeprefix('decoder_').replace('attn', 'map')
                out[term] = token_share(mask) * losses.attention_kl_loss(getattr(decoded, name),
                                                                         getattr(target, name), mask)


def with_start(ids: torch.Tensor, start_id: int) -> torch.Tensor:
    """The same texts with another start token at position 0."""
    ids = ids.clone()
    ids[:, 0] = start_id
    return ids


def token_share(mask: torch.Tensor) -> torch.Tensor | float:
    """Tokens of this process over the mean of all processes: turns a mean over the process's own tokens into its
    part of the mean over the global batch's, which DDP's average of gradients then is.
    """
    if world_size() == 1:
        return 1.0
    counts = all_gather(mask.sum()[None].float())
    return counts[rank()] / counts.mean()


def pad_to(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Right-pad [B, T] with zeros ([PAD] in ids, masked in masks) to [B, width]."""
    return nn.functional.pad(rows, (0, width - rows.shape[1]))


def concat_images(kv, more):
    return [(torch.cat([k, k2]), torch.cat([v, v2])) for (k, v), (k2, v2) in zip(kv, more, strict=True)]


def gather_texts(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of all processes [W * B, T'], padded to the longest of any."""
    width = int(all_gather(torch.tensor([ids.shape[1]], device=ids.device)).max())
    return all_gather(pad_to(ids, width)), all_gather(pad_to(mask, width))
