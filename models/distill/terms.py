"""Loss terms by name, the passes that compute them, and what they require of the nets."""

from models.blip import BLIPConfig
from models.distill.hidden import STREAMS
from models.weights.originals import HOLDERS

TEACHER_TERMS = ('image_tokens', 'image_feat', 'text_feat', 'fused_feat', 'decoder_feat', 'ita_soft', 'itm_soft',
                 'lm_logits', 'self_attn', 'cross_attn', 'decoder_self_attn', 'decoder_cross_attn', *STREAMS)
TERMS = ('ita', 'itm', 'lm', *TEACHER_TERMS)
VISION = ('image_tokens', 'vision_hidden')  # terms of the vision tower alone
CONTRASTIVE = ('ita', 'itm', 'ita_soft', 'itm_soft', 'image_feat', 'text_feat', 'text_hidden')  # of both features
TEACHER_FEATURES = ('ita_soft', 'image_feat', 'text_feat', 'text_hidden')  # terms that need a teacher's features
FUSED = ('itm', 'itm_soft', 'fused_feat', 'self_attn', 'cross_attn', 'fused_hidden')  # terms of the matching pass
DECODER = ('lm', 'lm_logits', 'decoder_feat', 'decoder_self_attn', 'decoder_cross_attn', 'decoder_hidden')
MAPS = ('self_attn', 'cross_attn', 'decoder_self_attn', 'decoder_cross_attn')
MISSING_IN = {'caption': 'text_encoder', 'retrieval': 'text_decoder', 'pretrain': None}  # the part that a task lacks


def asks_for_features(config: dict) -> bool:
    """Whether a run of this config uses a teacher's features, and so fills the teacher's queues."""
    return any(config.get('loss', {}).get(term) for term in TEACHER_FEATURES)


def check_terms(used: set[str], student: BLIPConfig, teacher: BLIPConfig | None, has_momentum: bool) -> None:
    """Whether the terms with a weight can be computed.

    Args:
        has_momentum: there is a momentum encoder.

    Raises:
        ValueError: there is none; or one needs a teacher, a part that a net of its task does not have, or equal sizes;
            names the term and the remedy.
    """
    if not used:
        raise ValueError('every weight under `loss` is 0, so that nothing would train: give one a weight')
    for term in (term for term in TERMS if term in used):
        for who, net in (('student', student), ('teacher', teacher))[:1 + (term in TEACHER_TERMS)]:
            part = 'text_decoder' if term in DECODER else 'text_encoder'
            if net is None:
                raise ValueError(f'loss.{term} needs a teacher: set teacher.weights, or loss.{term}: 0')
            if term not in VISION and part == MISSING_IN[net.task]:
                raise ValueError(f'loss.{term} needs a {part}, which the {who} of task {net.task!r} does not have: set '
                                 f'loss.{term}: 0, or give one that has it (BLIP: {HOLDERS[part]})')
    if used & set(CONTRASTIVE) and not has_momentum:
        raise ValueError('the contrastive terms need a momentum encoder')
    if teacher is None:
        return
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(f'student and teacher have vocabularies of {student.vocab_size} and {teacher.vocab_size} '
                         f"tokens: use the teacher's tokenizer")
    if used & set(MAPS) and student.text_heads != teacher.text_heads:
        raise ValueError(f'attention terms need equal text heads: student {student.text_heads}, teacher '
                         f'{teacher.text_heads}')
    patches = [net.image_size // net.patch_size for net in (student, teacher)]
    if used & {*VISION, 'cross_attn', 'decoder_cross_attn'} and patches[0] != patches[1]:
        raise ValueError(f'image_tokens, vision_hidden and cross-attention terms need equal patch grids: student '
                         f'{patches[0]}, teacher {patches[1]} patches a side')
    if used & {'image_feat', 'text_feat'} and student.embed_dim != teacher.embed_dim:
        raise ValueError(f'image_feat and text_feat need equal embed_dim: student {student.embed_dim}, teacher '
                         f'{teacher.embed_dim}')
