"""A pre-training step as dlip-v2 does it, for bench/train_step.py, from transformers' BLIP modules.

In float32 with eager attention; keys and values of the image projected anew in every pass, matching in two passes,
logits over the vocabulary at every position, the negatives picked row by row with `.item()`, the momentum encoder
updated parameter by parameter.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BlipTextConfig, BlipTextLMHeadModel, BlipTextModel, BlipVisionConfig, BlipVisionModel

from models import losses
from models.blip import BLIPConfig
from models.distill.batch import with_start

CLS, ENC, DEC = 101, 30523, 30522
ORIGINAL_TERMS = ('ita', 'itm', 'lm', 'image_feat', 'text_feat', 'fused_feat', 'decoder_feat',
                  'ita_soft', 'lm_logits', 'self_attn', 'cross_attn', 'decoder_self_attn')


class Reference(nn.Module):
    """A BLIP from transformers' modules, encoder and decoder tied as the original ties them."""

    def __init__(self, config: BLIPConfig):
        super().__init__()
        text = BlipTextConfig(vocab_size=config.vocab_size, hidden_size=config.text_width,
                              intermediate_size=config.text_ffn, num_hidden_layers=config.text_depth,
                              num_attention_heads=config.text_heads, encoder_hidden_size=config.vision_width,
                              hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
                              projection_dim=config.embed_dim, bos_token_id=DEC, sep_token_id=102)
        text._attn_implementation = 'eager'
        vision = BlipVisionConfig(hidden_size=config.vision_width, intermediate_size=4 * config.vision_width,
                                  num_hidden_layers=config.vision_depth, num_attention_heads=config.vision_heads,
                                  image_size=config.image_size, patch_size=config.patch_size)
        self.vision = BlipVisionModel(vision)
        self.encoder = BlipTextModel(text, add_pooling_layer=False)
        self.decoder = BlipTextLMHeadModel(text)
        for ours, theirs in zip(self.decoder.bert.encoder.layer, self.encoder.encoder.layer, strict=True):
            ours.crossattention, ours.intermediate, ours.output = (
                theirs.crossattention, theirs.intermediate, theirs.output)
        self.decoder.bert.embeddings = self.encoder.embeddings
        self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
        self.text_proj = nn.Linear(config.text_width, config.embed_dim)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def features(self, tokens, ids, mask):
        hidden = self.encoder(ids, mask).last_hidden_state
        return (F.normalize(self.vision_proj(tokens[:, 0]), dim=-1), F.normalize(self.text_proj(hidden[:, 0]), dim=-1))


class ReferenceStep:
    """dlip-v2's `forward`, with the losses of models/losses.py, so that both sides compute the same terms."""

    def __init__(self, student: Reference, teacher: Reference, queue_size: int, weights: dict[str, float], lr: float,
                 device: str):
        self.student, self.teacher = student.to(device).train(), teacher.to(device).eval().requires_grad_(False)
        self.average = copy.deepcopy(student).eval().requires_grad_(False)
        text = teacher.text_proj.in_features, student.text_proj.in_features
        self.maps = nn.ModuleDict({name: nn.Linear(text[1], text[0]) for name in ('fused', 'decoder')}).to(device)
        self.weights = weights
        self.queues = {name: F.normalize(torch.randn(256, queue_size, device=device), dim=0)
                       for name in ('image', 'text', 'teacher image', 'teacher text')}
        self.ids = torch.full((queue_size,), losses.IGNORE, device=device)
        self.pointer = 0
        parameters = [*student.parameters(), *self.maps.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)

    def __call__(self, images, ids, mask, sample_ids) -> None:
        student, teacher, out, batch = self.student, self.teacher, {}, len(ids)
        ids = with_start(ids, CLS)
        tokens = student.vision(images).last_hidden_state
        image, text = student.features(tokens, ids, mask)
        with torch.no_grad():
            for ours, theirs in zip(self.average.parameters(), student.parameters(), strict=True):
                ours.data = ours.data * 0.995 + theirs.data * 0.005
            image_m, text_m = self.average.features(self.average.vision(images).last_hidden_state, ids, mask)
            teacher_tokens = teacher.vision(images).last_hidden_state
            teacher_image, teacher_text = teacher.features(teacher_tokens, ids, mask)
        new = {'image': image_m, 'text': text_m, 'teacher image': teacher_image, 'teacher text': teacher_text}
        every = {name: torch.cat([new[name].T, queue], 1).T for name, queue in self.queues.items()}
        targets = losses.positives(sample_ids, torch.cat([sample_ids, self.ids]))
        out['ita'] = losses.ita_loss(image, text, image_m, text_m, every['image'], every['text'], student.temp, targets,
                                     0.4)
        out['ita_soft'] = losses.soft_ita_loss(image, text, every['image'], every['text'], student.temp, teacher_image,
                                               teacher_text, every['teacher image'], every['teacher text'],
                                               teacher.temp)
        out['image_feat'] = losses.cosine_loss(image, teacher_image)
        out['text_feat'] = losses.cosine_loss(text, teacher_text)
        rows = (self.pointer + torch.arange(batch, device=ids.device)) % len(self.ids)
        for name, queue in self.queues.items():
            queue[:, rows] = new[name].T
        self.ids[rows] = sample_ids
        self.pointer += batch

        ids = with_start(ids, ENC)  # matching: the pairs, and the teacher's pass over them
        fused = student.encoder(ids, mask, encoder_hidden_states=tokens, output_attentions=True)
        with torch.no_grad():
            target = teacher.encoder(ids, mask, encoder_hidden_states=teacher_tokens, output_attentions=True)
            to_text = (image @ text_m.T / student.temp).softmax(1).fill_diagonal_(0) + 1e-4
            to_image = (text @ image_m.T / student.temp).softmax(1).fill_diagonal_(0) + 1e-4
        images_negative, ids_negative, mask_negative = [], [], []
        for row in range(batch):
            images_negative.append(tokens[torch.multinomial(to_image[row], 1).item()])
            chosen = torch.multinomial(to_text[row], 1).item()
            ids_negative.append(ids[chosen])
            mask_negative.append(mask[chosen])
        negative = student.encoder(torch.cat([ids, torch.stack(ids_negative)]),
                                   torch.cat([mask, torch.stack(mask_negative)]),
                                   encoder_hidden_states=torch.cat([torch.stack(images_negative), tokens]))
        out['itm'] = losses.itm_loss(student.itm_head(torch.cat([fused.last_hidden_state[:, 0],
                                                                 negative.last_hidden_state[:, 0]])))
        out['fused_feat'] = losses.cosine_loss(self.maps['fused'](fused.last_hidden_state[:, 0]),
                                               target.last_hidden_state[:, 0])
        for name, maps in (('self_attn', 'attentions'), ('cross_attn', 'cross_attentions')):
            ours, theirs = (getattr(result, maps)[-1].clamp_min(1e-9).log() for result in (fused, target))
            out[name] = losses.attention_kl_loss(ours, theirs, mask)

        ids = with_start(ids, DEC)  # captions
        labels = ids.masked_fill(mask == 0, losses.IGNORE)
        passes = {'encoder_hidden_states': tokens, 'output_attentions': True, 'output_hidden_states': True,
                  'is_decoder': True, 'use_cache': False}
        said = student.decoder(ids, mask, **passes)
        with torch.no_grad():
            wanted = teacher.decoder(ids, mask, **passes | {'encoder_hidden_states': teacher_tokens})
        valid = labels[:, 1:] != losses.IGNORE
        out['lm'] = losses.lm_loss(said.logits[:, :-1], labels[:, 1:])
        logits = said.logits[:, :-1][valid]
        out['lm_logits'] = losses.logit_kl_loss(logits, logits.detach())  # there of the student with itself: always 0
        out['decoder_feat'] = losses.cosine_loss(self.maps['decoder'](said.hidden_states[-1][:, :-1]),
                                                 wanted.hidden_states[-1][:, :-1], valid)
        ours, theirs = (result.attentions[-1].clamp_min(1e-9).log() for result in (said, wanted))
        out['decoder_self_attn'] = losses.attention_kl_loss(ours, theirs, mask)
        sum(self.weights[name] * value for name, value in out.items()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
