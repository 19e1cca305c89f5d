"""The loss of a batch: student, momentum encoder and (optionally) a frozen teacher.

One module serves pre-training (ITA + ITM + LM + distillation) and both finetunes, which weigh fewer terms. It is what
DistributedDataParallel wraps: every trainable parameter gets a gradient in every step. Each pass over the batch (image,
both features, image-text matching, decoder) returns its terms by name.
"""

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from data.distributed import all_gather, all_gather_grad, alone, rank, to_device, world_size
from models import losses
from models.blip import BLIP, select_images, with_negatives
from models.distill.batch import Batch, Update, pad_to, row_noise, token_share, with_start
from models.distill.hidden import STREAMS, HiddenStates, layer_pairs
from models.distill.teacher import LiveTeacher, StoredTeacher
from models.distill.terms import CONTRASTIVE, DECODER, FUSED, TEACHER_FEATURES, TERMS, check_terms
from models.linear import Linear, Unpadded, unpadded
from models.momentum import MomentumQueue
from models.text import ImageKV

LOGITS = 2 ** 25  # vocabulary logits in memory at once


class Objective(nn.Module):
    """Args:
        student: the net to train.
        weights: weight per term of `TERMS`; 0 skips its computation.
        momentum: momentum encoder and queues, needed by the contrastive terms.
        teacher: needed by the distillation terms: a net, or a `StoredTeacher` whose answers come with the batch.
        start_ids: the tokenizer's (cls_id, enc_id, bos_id).
        prompt_length: leading decoder tokens that carry no LM loss (4 for '[DEC] a picture of', 0 in pre-training).
        negative_all_rank: draw ITM negatives over all processes (BLIP's retrieval finetune) or the own batch.
        hidden_layers: by tower ('vision', 'text') what the hidden-state terms compare (see `layer_pairs`).

    Raises:
        ValueError: a term has a weight but the net, teacher or momentum encoder it needs is missing.
    """

    def __init__(self, student: BLIP, weights: dict[str, float], start_ids: tuple[int, int, int],
                 momentum: MomentumQueue | None = None, teacher: BLIP | StoredTeacher | None = None,
                 prompt_length: int = 0, negative_all_rank: bool = False,
                 hidden_layers: dict[str, list | None] | None = None):
        super().__init__()
        self.student, self.momentum = student, momentum
        self.frozen = LiveTeacher(teacher) if isinstance(teacher, BLIP) else teacher
        self.weights = {name: float(weights.get(name, 0)) for name in TERMS}
        self.cls_id, self.enc_id, self.bos_id = start_ids
        self.prompt_length, self.negative_all_rank = prompt_length, negative_all_rank
        self.next_token_losses, self.recomputed = losses.next_token_losses, losses.recomputed
        config, used = student.config, {term for term in TERMS if self.uses(term)}
        check_terms(used, config, teacher and teacher.config, momentum is not None)
        if self.uses('image_tokens'):
            same = config.vision_width == teacher.config.vision_width  # then the student speaks the teacher's own space
            self.token_proj = nn.Identity() if same else Linear(config.vision_width, teacher.config.vision_width)
        for name in ('fused', 'decoder'):
            if self.uses(f'{name}_feat'):
                setattr(self, f'{name}_proj', Linear(config.text_width, teacher.config.text_width))
        self.hidden = nn.ModuleDict()  # the hidden-state terms in use
        for term, tower in STREAMS.items():
            if self.uses(term):
                depths, widths = ([getattr(net.config, f'{tower}_{size}') for net in (student, teacher)]
                                  for size in ('depth', 'width'))
                pairs = layer_pairs((hidden_layers or {}).get(tower), *depths, tower)
                self.hidden[term] = HiddenStates(pairs, *widths)
                self.frozen.layers[term] = self.hidden[term].theirs
        self._freeze_unreached()

    def _freeze_unreached(self) -> None:
        """Freeze parameters that no weighted term reaches, since DDP expects a gradient of every trainable one.

        A backward pass of a copy on the meta device finds them: no values are computed, no random numbers are drawn.
        """
        meta = partial(torch.zeros, dtype=torch.long, device='meta')
        copies = {id(x): nn.Parameter(x.detach().to('meta'), x.requires_grad) for x in self.parameters()}
        copies |= {id(x): x.to('meta') for x in self.buffers()}
        if self.frozen is not None:
            with torch.device('meta'):
                copies[id(self.frozen)] = LiveTeacher(BLIP(self.frozen.config), self.frozen.layers)
        probe, size, length = copy.deepcopy(self, copies), self.student.config.image_size, self.prompt_length + 4
        batch = Batch(torch.zeros(2, 3, size, size, device='meta'), meta(2, length), meta(2, length), meta(2),
                      [length, length - 1])
        with alone(), torch.enable_grad(), torch.device('cpu'):
            update, [batch] = probe.prepare([batch], alpha=0.5, seed=0)
            probe(batch, update)['loss'].backward()
        for parameter, copied in zip(self.parameters(), probe.parameters(), strict=True):
            if copied.grad is None:
                parameter.requires_grad_(False)

    def compile_parts(self, **options) -> None:
        """torch.compile, with its options, of the nets' layers and of the losses over the vocabulary and states."""
        for net in filter(None, (self.student, self.teacher)):  # in the momentum encoder nothing would fuse
            net.compile_towers(**options)
        self.next_token_losses, self.recomputed = (torch.compile(function, dynamic=True, **options) for function in
                                                   (losses.next_token_losses, losses.recomputed))
        for states in self.hidden.values():
            states.recomputed = self.recomputed

    def uses(self, *terms: str) -> bool:
        return any(self.weights[term] for term in terms)

    def hidden_layers(self, term: str) -> list[int]:
        """The student's layers whose states a hidden-state term compares; none without a weight."""
        return self.hidden[term].ours if self.uses(term) else []

    @property
    def projections(self) -> dict[str, torch.Tensor]:
        """Parameters of the learned projections to the teacher's width."""
        return {name: value for name, value in self.state_dict().items()
                if name.startswith(('token_proj.', 'fused_proj.', 'decoder_proj.', 'hidden.'))}

    @property
    def teacher(self) -> BLIP | None:
        """The teacher's net; None without a teacher or where its answers are stored."""
        return getattr(self.frozen, 'model', None)

    @torch.no_grad()
    def prepare(self, batches: list[Batch], alpha: float = 0.0, seed: int = 0) -> tuple[Update, list[Batch]]:
        """Compute the features that the batches of an update share, and the teacher's answers.

        Args:
            alpha: share of the momentum targets.
            seed: of the hard negatives.
        """
        widths = all_gather(torch.tensor([[batch.ids.shape[1] for batch in batches]])).amax(0).tolist()
        prepared, found, counts = [], [], []
        for number, (batch, width) in enumerate(zip(batches, widths, strict=True)):
            targets = self.frozen.targets(batch.images, batch.stored) if self.frozen else None
            prepared.append(replace(batch, number=number, width=width, targets=targets))
            rows = {'ids': batch.sample_ids}
            if self.uses(*CONTRASTIVE):
                ids, texts = with_start(batch.ids, self.cls_id), unpadded(batch.mask, batch.lengths)
                rows['image'], rows['text'] = self.momentum.encode(batch.images, ids, texts)
                if self.uses(*TEACHER_FEATURES):
                    rows['teacher_image'], rows['teacher_text'] = targets.features(ids, texts)
            found.append({name: all_gather(value) for name, value in rows.items()})
            labels = batch.mask[:, max(1, self.prompt_length):]
            counts.append(all_gather(torch.stack([batch.mask.sum(), labels.sum()])[None]))
        features = {name: torch.cat([rows[name] for rows in found]) for name in found[0]}
        ids = features.pop('ids')
        tokens, labels = torch.cat(counts).float().mean(0)
        columns = self.momentum.behind(id=ids, **features) if features else {}
        column_ids = columns.pop('id', None)
        return Update(ids, columns, column_ids, tokens, labels, alpha, seed), prepared

    def forward(self, batch: Batch, update: Update) -> dict[str, torch.Tensor]:
        """The loss of a prepared batch.

        Returns:
            unweighted terms by name (scalars, float32), 'loss', their weighted sum, and of the contrastive terms
            'acc_i2t' and 'acc_t2i', the top-1 accuracy within the own batch (0 to 1, no part of the loss).
        """
        texts = unpadded(batch.mask, batch.lengths)
        tokens, states = self.student.encode_image(batch.images, self.hidden_layers('vision_hidden'))
        terms, negatives = self.image_terms(batch, tokens, states), None
        if self.uses(*CONTRASTIVE):
            image_feat = self.student.image_feat(tokens)
            text_feat, states = self.student.text_feat(with_start(batch.ids, self.cls_id), texts,
                                                       self.hidden_layers('text_hidden'))
            terms |= self.contrastive_terms(batch, update, image_feat, text_feat, states)
            if self.uses('itm', 'itm_soft'):
                negatives = self.draw_negatives(batch, update, image_feat, text_feat)
        image_kv = self.student.project_image(tokens)
        if self.uses(*FUSED):
            terms |= self.matching_terms(batch, update, tokens, image_kv, texts, negatives)
        if self.uses(*DECODER):
            terms |= self.decoder_terms(batch, update, image_kv, texts)
        terms['loss'] = sum(weight * terms[name] for name, weight in self.weights.items() if weight)
        return terms

    def image_terms(self, batch: Batch, tokens: torch.Tensor, states: dict[int, torch.Tensor]
                    ) -> dict[str, torch.Tensor]:
        """Distillation of the vision tower."""
        terms = {}
        if self.uses('image_tokens'):
            terms['image_tokens'] = self.recomputed(losses.cosine_error, self.token_proj(tokens),
                                                    batch.targets.image_tokens).mean()
        if self.uses('vision_hidden'):
            terms['vision_hidden'] = self.hidden['vision_hidden'](states, batch.targets.image_states)
        return terms

    def contrastive_terms(self, batch: Batch, update: Update, image_feat: torch.Tensor, text_feat: torch.Tensor,
                          states: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """ITA, and the distillation of both features [B, E] and of the text-only pass."""
        terms, columns, temp = {}, update.columns, self.student.temp
        first = (batch.number * world_size() + rank()) * len(batch.ids)
        own = {name: rows[first:first + len(batch.ids)] for name, rows in columns.items()}
        if self.uses('ita', 'ita_soft'):
            terms['acc_i2t'] = losses.top_1(image_feat, own['text'], batch.sample_ids)
            terms['acc_t2i'] = losses.top_1(text_feat, own['image'], batch.sample_ids)
        if self.uses('ita'):
            positives = losses.positives(batch.sample_ids, update.column_ids)
            terms['ita'] = losses.ita_loss(image_feat, text_feat, own['image'], own['text'], columns['image'],
                                           columns['text'], temp, positives, update.alpha)
        if self.uses('image_feat'):
            terms['image_feat'] = losses.cosine_loss(image_feat, own['teacher_image'])
        if self.uses('text_feat'):
            terms['text_feat'] = losses.cosine_loss(text_feat, own['teacher_text'])
        if self.uses('text_hidden'):
            terms['text_hidden'] = token_share(batch.mask, update.tokens) * self.hidden['text_hidden'](
                states, batch.targets.text_states, batch.mask)
        if self.uses('ita_soft'):
            terms['ita_soft'] = losses.soft_ita_loss(
                image_feat, text_feat, columns['image'], columns['text'], temp, own['teacher_image'],
                own['teacher_text'], columns['teacher_image'], columns['teacher_text'], self.frozen.temp)
        return terms

    @torch.no_grad()
    def draw_negatives(self, batch: Batch, update: Update, image_feat: torch.Tensor, text_feat: torch.Tensor
                       ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of a hard negative image per text and of a hard negative text per image, both [B].

        They are of the same batch, of this process or (`negative_all_rank`) of all of them: a negative image's tokens
        need a gradient, which other batches of the update do not keep.
        """
        size, first = len(batch.ids), rank() * len(batch.ids)
        start, total = batch.number * world_size() * size, world_size() * size
        pool = slice(start, start + total) if self.negative_all_rank else slice(start + first, start + first + size)
        ids = update.ids[pool]
        noise = row_noise(update.seed + batch.number, first, size, 2 * len(ids))
        image_index, text_index = (
            losses.hard_negatives(losses.similarity(rows, update.columns[name][pool], self.student.temp),
                                  batch.sample_ids, ids, own_noise)
            for name, rows, own_noise in zip(('image', 'text'), (text_feat, image_feat),
                                             to_device(noise, ids.device).chunk(2, 1), strict=True))
        return image_index, text_index

    def matching_terms(self, batch: Batch, update: Update, tokens: torch.Tensor, image_kv: ImageKV, texts: Unpadded,
                       negatives: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """ITM on [pairs; text, negative image; negative text, image], one pass of 3B rows, and its distillation.

        Without negatives it is a pass of the B pairs alone.
        """
        terms, size, pairs, mask = {}, len(batch.ids), texts, batch.mask
        ids = with_start(batch.ids, self.enc_id)
        images, from_all = None, self.negative_all_rank and world_size() > 1
        if negatives is not None:
            images, text_negative = negatives
            all_ids, all_mask, others = ids, mask, None
            if from_all:
                all_ids, all_mask = (all_gather(pad_to(rows, batch.width)) for rows in (ids, mask))
                others = self.student.project_image(all_gather_grad(tokens)[images])
            image_kv = with_negatives(image_kv, others or select_images(image_kv, images))
            width = all_ids.shape[1]
            ids = torch.cat([pad_to(ids, width), pad_to(ids, width), all_ids[text_negative]])
            mask = torch.cat([pad_to(mask, width), pad_to(mask, width), all_mask[text_negative]])
            pairs = unpadded(mask[:size], batch.lengths)
            # only the device knows the lengths of the negative texts: they keep their padding
            texts = unpadded(mask, batch.lengths + batch.lengths + size * [width])
        want_maps = self.uses('self_attn', 'cross_attn')
        fused = self.student.text_encoder(ids, texts, image_kv=image_kv, want_maps=want_maps, first_only=not want_maps,
                                          layers=self.hidden_layers('fused_hidden'))
        if negatives is not None:
            logits = self.student.itm_head(fused.hidden[:, 0])
            if self.uses('itm'):
                terms['itm'] = losses.itm_loss(logits)
        if not self.uses('itm_soft', 'fused_feat', 'self_attn', 'cross_attn', 'fused_hidden'):
            return terms
        if not self.uses('itm_soft'):  # then the teacher need not see the negatives
            ids, texts, images = ids[:size], pairs, None
        target = batch.targets.matching(ids, texts, images, from_all, want_maps)
        if self.uses('itm_soft'):
            terms['itm_soft'] = losses.logit_kl_loss(logits[:len(target.logits)], target.logits)
        if self.uses('fused_feat'):
            terms['fused_feat'] = losses.cosine_loss(self.fused_proj(fused.hidden[:size, 0]), target.hidden[:size])
        if self.uses('fused_hidden'):
            states = ({layer: state[:size] for layer, state in output.states.items()} for output in (fused, target))
            terms['fused_hidden'] = token_share(pairs.mask, update.tokens) * self.hidden['fused_hidden'](
                *states, pairs.mask)
        return terms | self.map_terms({'self_attn': 'self_map', 'cross_attn': 'cross_map'}, fused, target, pairs.mask,
                                      update)

    def decoder_terms(self, batch: Batch, update: Update, image_kv: ImageKV, texts: Unpadded
                      ) -> dict[str, torch.Tensor]:
        """LM on the teacher-forced caption, and the distillation of the decoder."""
        terms, mask, before = {}, batch.mask, max(0, self.prompt_length - 1)
        ids = with_start(batch.ids, self.bos_id)
        valid = mask[:, 1:].bool()  # positions whose next token carries a loss
        valid[:, :before] = False
        want_maps = self.uses('decoder_self_attn', 'decoder_cross_attn')
        decoded = self.student.text_decoder.bert(ids, texts, causal=True, image_kv=image_kv, want_maps=want_maps,
                                                 layers=self.hidden_layers('decoder_hidden'))
        hidden, share, target = decoded.hidden[:, :-1], token_share(valid, update.labels), None
        if self.uses('lm_logits', 'decoder_feat', 'decoder_self_attn', 'decoder_cross_attn', 'decoder_hidden'):
            target = batch.targets.decoding(ids, texts, want_maps)
        names = [term for term in ('lm', 'lm_logits') if self.uses(term)]
        if names:
            # The head runs on those positions only. They are found on the host: a mask as index waits for the device.
            rows = [row * valid.shape[1] + place for row, length in enumerate(batch.lengths)
                    for place in range(before, length - 1)]
            rows = to_device(torch.tensor(rows, dtype=torch.long), ids.device)

            def next_tokens(hidden, labels, rows):
                said = batch.targets.next_tokens(target, rows) if 'lm_logits' in names else None
                return self.next_token_losses(self.student.text_decoder.logits(hidden),
                                              labels if 'lm' in names else None, said)
            values = losses.in_chunks(next_tokens, max(1, LOGITS // self.student.config.vocab_size),
                                      hidden.flatten(0, 1)[rows], ids[:, 1:].flatten()[rows], rows)
            terms |= zip(names, share * values, strict=True)
        if target is None:
            return terms
        if self.uses('decoder_feat'):
            terms['decoder_feat'] = share * losses.cosine_loss(self.decoder_proj(hidden), target.hidden, valid)
        if self.uses('decoder_hidden'):
            terms['decoder_hidden'] = token_share(mask, update.tokens) * self.hidden['decoder_hidden'](
                decoded.states, target.states, mask)
        return terms | self.map_terms({'decoder_self_attn': 'self_map', 'decoder_cross_attn': 'cross_map'}, decoded,
                                      target, mask, update)

    def map_terms(self, names: dict[str, str], ours, theirs, mask: torch.Tensor, update: Update
                  ) -> dict[str, torch.Tensor]:
        """Terms over the attention maps, given by their names, of the first rows of both, as many as in the mask."""
        return {term: token_share(mask, update.tokens) * losses.attention_kl_loss(
                    *(getattr(side, name)[:len(mask)] for side in (ours, theirs)), mask)
                for term, name in names.items() if self.uses(term)}
