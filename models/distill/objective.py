"""The losses of one batch: student, momentum encoder and (optionally) a frozen teacher.

One module serves pre-training (ITA + ITM + LM + distillation) and both finetunes, which weigh fewer terms.
It is what DistributedDataParallel wraps; every trainable parameter gets a gradient in every step.
"""

import copy
from functools import partial

import torch
from torch import nn

from models import losses
from models.blip import BLIP, concat_images, select_images
from models.distill.hidden import STREAMS, HiddenStates, layer_pairs
from models.distill.teacher import LiveTeacher, StoredTeacher
from models.distill.terms import CONTRASTIVE, DECODER, FUSED, TEACHER_FEATURES, TERMS, check_terms
from models.distill.update import MicroBatch, Update, pad_to, row_noise, token_share, with_start
from models.linear import Linear, Packed, packed
from models.momentum import MomentumQueue
from utils import all_gather, all_gather_grad, alone, rank, to_device, world_size


class Objective(nn.Module):
    """Args:
        student: the net to train.
        weights: weight per term of `TERMS`; 0 skips its computation.
        momentum: encoder and queues, needed by the contrastive terms.
        teacher: needed by the distillation terms: a net, or what stands for one whose answers come with the batch.
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
        self.prompt_length = prompt_length
        self.negative_all_rank = negative_all_rank
        check_terms({term for term in TERMS if self.uses(term)}, student.config, teacher and teacher.config,
                    momentum is not None)
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
                self.frozen.layers[term] = self.hidden[term].theirs
        self._freeze_unreached()

    def _freeze_unreached(self) -> None:
        """Parameters that no weighted term reaches do not train: DDP expects a gradient of every one that does.

        One backward pass finds them, of a copy on the meta device: no tensor has values there, nothing random is drawn.
        """
        meta = partial(torch.zeros, dtype=torch.long, device='meta')
        copies = {id(x): nn.Parameter(x.detach().to('meta'), x.requires_grad) for x in self.parameters()}
        copies |= {id(x): x.to('meta') for x in self.buffers()}
        if self.frozen is not None:
            with torch.device('meta'):
                copies[id(self.frozen)] = LiveTeacher(BLIP(self.frozen.config), self.frozen.layers)
        probe, size, length = copy.deepcopy(self, copies), self.student.config.image_size, self.prompt_length + 4
        batch = MicroBatch(torch.zeros(2, 3, size, size, device='meta'), meta(2, length), meta(2, length), meta(2),
                           [length, length - 1])
        with alone(), torch.enable_grad(), torch.device('cpu'):
            probe(*batch[:4], 0.5, 0, probe.prepare([batch]))['loss'].backward()
        for parameter, copied in zip(self.parameters(), probe.parameters(), strict=True):
            if copied.grad is None:
                parameter.requires_grad_(False)

    def uses(self, *terms: str) -> bool:
        return any(self.weights[term] for term in terms)

    def hidden_layers(self, term: str) -> list[int]:
        """The student's layers whose states a hidden-state term compares; none without a weight."""
        return self.hidden[term].ours if self.uses(term) else []

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        """Parameters of the learned linear maps to the teacher's width, by name."""
        return {name: value for name, value in self.state_dict().items()
                if name.startswith(('token_map.', 'fused_map.', 'decoder_map.', 'hidden.'))}

    @property
    def teacher(self) -> BLIP | None:
        """The teacher's net; None without a teacher or where its answers are stored."""
        return getattr(self.frozen, 'model', None)

    @torch.no_grad()
    def prepare(self, batches: list[MicroBatch]) -> Update:
        """Encode what the micro-batches of an update share."""
        targets, lengths, found, counts = [], [], [], []
        for images, ids, mask, sample_ids, tokens, stored in batches:
            targets.append(self.frozen.targets(images, stored) if self.frozen else None)
            lengths.append(mask.sum(1).tolist() if tokens is None else tokens)
            rows = {'ids': sample_ids}
            if self.uses(*CONTRASTIVE):
                ids, texts = with_start(ids, self.cls_id), packed(mask, lengths[-1])
                rows['image'], rows['text'] = self.momentum.encode(images, ids, texts)
                if self.uses(*TEACHER_FEATURES):
                    rows['teacher_image'], rows['teacher_text'] = targets[-1].features(ids, texts)
            found.append({name: all_gather(value) for name, value in rows.items()})
            counts.append(all_gather(torch.stack([mask.sum(), mask[:, max(1, self.prompt_length):].sum()])[None]))
        features = {name: torch.cat([rows[name] for rows in found]) for name in found[0]}
        ids = features.pop('ids')
        tokens, labels = torch.cat(counts).float().mean(0)
        widths = all_gather(torch.tensor([[batch.ids.shape[1] for batch in batches]])).amax(0).tolist()
        columns = self.momentum.behind(id=ids, **features) if features else {}
        column_ids = columns.pop('id', None)
        return Update(targets, lengths, widths, ids, columns, column_ids, tokens, labels)

    def forward(self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, sample_ids: torch.Tensor,
                alpha: float, step_seed: int, update: Update | None = None, part: int = 0) -> dict[str, torch.Tensor]:
        """images [B, 3, S, S]; ids, mask [B, T] (position 0 is replaced as each pass needs); sample_ids [B].

        Args:
            update: of which this is micro-batch `part`; None: it is an update of its own.

        Returns:
            unweighted terms by name (scalars, float32), 'loss', their weighted sum, and of the contrastive terms
            'acc_i2t' and 'acc_t2i', the top-1 accuracy within the own batch (0 to 1, no part of the loss).
        """
        if update is None:
            update = self.prepare([MicroBatch(images, ids, mask, sample_ids)])
        out: dict[str, torch.Tensor] = {}
        targets, update.targets[part] = update.targets[part], None  # its tensors go with this micro-batch
        tokens, states = self.student.encode_image(images, self.hidden_layers('vision_hidden'))
        if self.uses('image_tokens'):
            out['image_tokens'] = losses.cosine_loss(self.token_map(tokens), targets.image_tokens)
        if self.uses('vision_hidden'):
            out['vision_hidden'] = self.hidden['vision_hidden'](states, targets.image_states)
        negatives, texts = None, packed(mask, update.lengths[part])
        if self.uses(*CONTRASTIVE):
            negatives = self.contrastive(out, targets, tokens, ids, texts, sample_ids, alpha, step_seed, update, part)
        kv = self.student.project_image(tokens)
        if self.uses(*FUSED):
            self.matching(out, targets, tokens, kv, ids, texts, negatives, update, part)
        if self.uses(*DECODER):
            self.decoding(out, targets, kv, ids, texts, update, part)
        out['loss'] = sum(weight * out[name] for name, weight in self.weights.items() if weight)
        return out

    def contrastive(self, out, targets, tokens, ids, texts: Packed, sample_ids, alpha, step_seed, update, part):
        """ITA and the embedding terms; returns the hard negatives for the matching pass."""
        student, momentum, columns = self.student, self.momentum, update.columns
        image_feat = student.image_feat(tokens)
        text_feat, states = student.text_feat(with_start(ids, self.cls_id), texts, self.hidden_layers('text_hidden'))
        first = (part * world_size() + rank()) * len(ids)
        own = {name: rows[first:first + len(ids)] for name, rows in columns.items()}
        if self.uses('ita', 'ita_soft'):
            out['acc_i2t'] = losses.top_1(image_feat, own['text'], sample_ids)
            out['acc_t2i'] = losses.top_1(text_feat, own['image'], sample_ids)
        if self.uses('ita'):
            out['ita'] = losses.ita_loss(image_feat, text_feat, own['image'], own['text'], columns['image'],
                                         columns['text'], student.temp,
                                         losses.positives(sample_ids, update.column_ids), alpha)
        if self.uses('image_feat'):
            out['image_feat'] = losses.cosine_loss(image_feat, own['teacher_image'])
        if self.uses('text_feat'):
            out['text_feat'] = losses.cosine_loss(text_feat, own['teacher_text'])
        if self.uses('text_hidden'):
            out['text_hidden'] = token_share(texts.mask, update.tokens) * self.hidden['text_hidden'](
                states, targets.text_states, texts.mask)
        if self.uses('ita_soft'):
            out['ita_soft'] = losses.soft_ita_loss(
                image_feat, text_feat, columns['image'], columns['text'], student.temp, own['teacher_image'],
                own['teacher_text'], columns['teacher_image'], columns['teacher_text'], self.frozen.temp)
        negatives = None
        if self.uses('itm', 'itm_soft'):
            negatives = self.draw_negatives(image_feat, text_feat, sample_ids, step_seed, update, part)
        if self.training and part == len(update.targets) - 1:  # last: an update must not meet itself in the queue
            momentum.enqueue(update.ids, **{name: rows[:len(update.ids)] for name, rows in columns.items()})
        return negatives

    @torch.no_grad()
    def draw_negatives(self, image_feat, text_feat, sample_ids, step_seed, update, part):
        """Index of a hard negative image per text and of a hard negative text per image, both [B].

        They are of the same micro-batch, of this process or (`negative_all_rank`) of all of them: a negative image's
        tokens need a gradient, which other micro-batches do not keep.
        """
        size, first = len(sample_ids), rank() * len(sample_ids)
        start, total = part * world_size() * size, world_size() * size
        pool = slice(start, start + total) if self.negative_all_rank else slice(start + first, start + first + size)
        ids = update.ids[pool]
        noise = to_device(row_noise(step_seed, first, size, 2 * len(ids)), ids.device).chunk(2, 1)
        image_index, text_index = (
            losses.hard_negatives(losses.similarity(rows, update.columns[name][pool], self.student.temp), sample_ids,
                                  ids, own_noise)
            for name, rows, own_noise in zip(('image', 'text'), (text_feat, image_feat), noise, strict=True))
        return image_index, text_index

    def matching(self, out, targets, tokens, kv, ids, texts: Packed, negatives, update, part):
        """ITM on [pairs; text, negative image; negative text, image], one pass of 3B rows, and its distillation."""
        batch, pairs, mask = len(ids), texts, texts.mask
        ids = with_start(ids, self.enc_id)
        image_index, foreign = torch.arange(batch, device=ids.device), None
        own = image_index
        if negatives is not None:
            image_negative, text_negative = negatives
            all_ids, all_mask = ids, mask
            if self.negative_all_rank and world_size() > 1:
                all_ids, all_mask = (all_gather(pad_to(rows, update.widths[part])) for rows in (ids, mask))
                foreign = image_negative
                kv = concat_images(kv, self.student.project_image(all_gather_grad(tokens)[foreign]))
                image_negative = own + batch
            width = all_ids.shape[1]
            ids = torch.cat([pad_to(ids, width), pad_to(ids, width), all_ids[text_negative]])
            mask = torch.cat([pad_to(mask, width), pad_to(mask, width), all_mask[text_negative]])
            lengths = update.lengths[part]
            pairs = packed(mask[:batch], lengths)
            texts = packed(mask, lengths + lengths + batch * [width])  # those of the negatives the device alone knows
            image_index = torch.cat([own, image_negative, own])
        want_maps = self.uses('self_attn', 'cross_attn')
        fused = self.student.text_encoder(ids, texts, image_kv=select_images(kv, image_index), want_maps=want_maps,
                                          first_only=not want_maps, layers=self.hidden_layers('fused_hidden'))
        if negatives is not None:
            logits = self.student.itm_head(fused.hidden[:, 0])
            if self.uses('itm'):
                out['itm'] = losses.itm_loss(logits)
        if not self.uses('itm_soft', 'fused_feat', 'self_attn', 'cross_attn', 'fused_hidden'):
            return
        if not self.uses('itm_soft'):  # then the teacher need not see the negatives
            ids, texts, image_index, foreign = ids[:batch], pairs, own, None
        target = targets.matching(ids, texts, image_index, foreign, want_maps)
        if self.uses('itm_soft'):
            out['itm_soft'] = losses.logit_kl_loss(logits[:len(target.logits)], target.logits)
        if self.uses('fused_feat'):
            out['fused_feat'] = losses.cosine_loss(self.fused_map(fused.hidden[:batch, 0]), target.hidden[:batch])
        if self.uses('fused_hidden'):
            states = ({layer: state[:batch] for layer, state in output.states.items()} for output in (fused, target))
            out['fused_hidden'] = token_share(pairs.mask, update.tokens) * self.hidden['fused_hidden'](
                *states, pairs.mask)
        for term in ('self_attn', 'cross_attn'):
            if self.uses(term):
                name = term.replace('attn', 'map')
                out[term] = token_share(pairs.mask, update.tokens) * losses.attention_kl_loss(
                    getattr(fused, name)[:batch], getattr(target, name)[:batch], pairs.mask)

    def decoding(self, out, targets, kv, ids, texts: Packed, update, part):
        """LM on the teacher-forced caption, and the distillation of the decoder."""
        ids, before, mask = with_start(ids, self.bos_id), max(0, self.prompt_length - 1), texts.mask
        valid = mask[:, 1:].bool()  # positions whose next token carries a loss
        valid[:, :before] = False
        want_maps = self.uses('decoder_self_attn', 'decoder_cross_attn')
        decoded = self.student.text_decoder.bert(ids, texts, causal=True, image_kv=kv, want_maps=want_maps,
                                                 layers=self.hidden_layers('decoder_hidden'))
        hidden = decoded.hidden[:, :-1]
        share = token_share(valid, update.labels)
        if self.uses('lm', 'lm_logits'):
            # The head runs on those positions only. They are found on the host: a mask as index waits for the device.
            rows = torch.tensor([row * valid.shape[1] + place for row, length in enumerate(update.lengths[part])
                                 for place in range(before, length - 1)], dtype=torch.long)
            rows = to_device(rows, ids.device)
            logits = self.student.text_decoder.logits(hidden.flatten(0, 1)[rows])
        if self.uses('lm'):
            out['lm'] = share * losses.lm_loss(logits, ids[:, 1:].flatten()[rows])
        if not self.uses('lm_logits', 'decoder_feat', 'decoder_self_attn', 'decoder_cross_attn', 'decoder_hidden'):
            return
        target = targets.decoding(ids, texts, want_maps)
        if self.uses('lm_logits'):
            out['lm_logits'] = share * targets.logit_loss(logits, target, rows)
        if self.uses('decoder_feat'):
            out['decoder_feat'] = share * losses.cosine_loss(self.decoder_map(hidden), target.hidden, valid)
        if self.uses('decoder_hidden'):
            out['decoder_hidden'] = token_share(mask, update.tokens) * self.hidden['decoder_hidden'](
                decoded.states, target.states, mask)
        for term in ('decoder_self_attn', 'decoder_cross_attn'):
            if self.uses(term):
                name = term.removeprefix('decoder_').replace('attn', 'map')
                out[term] = token_share(mask, update.tokens) * losses.attention_kl_loss(
                    getattr(decoded, name), getattr(target, name), mask)
