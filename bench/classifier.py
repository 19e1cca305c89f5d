"""A vision tower that was trained elsewhere: a classifier of scenes, as ImageNet's classifiers are to a real run."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F

from configs import read_yaml
from data.distributed import progress
from data.scenes import BACKGROUNDS, COLOURS, FILLS, SHAPES, Scene, render, sample_split
from data.transforms import EvalTransform
from models.blip import BLIP
from models.weights.checkpoint import architecture
from utils import ROOT, atomic_write

LABELS = (*SHAPES, *COLOURS, *FILLS, *BACKGROUNDS)
LR, WARMUP = 1e-3, 100


def labels(scene: Scene) -> torch.Tensor:
    """float32 [L]: which shapes, colours, fills and background a scene has; not which of them belong together."""
    seen = {scene.background} | {value for thing in scene.things for value in (thing.shape, thing.colour, thing.fill)}
    return torch.tensor([float(label in seen) for label in LABELS])


def train_tower(path: Path, size: str, image_size: int = 64, steps: int = 2000, batch: int = 32) -> None:
    """Train a BLIP vision tower to name what scenes hold, and write its weights as timm names them.

    The scenes are single things and groups only: relations and their words are left to pre-training.

    Args:
        size: a name of configs/sizes.yaml.
    """
    torch.manual_seed(0)
    rng = random.Random(0)
    scenes = sample_split('train', steps * batch, seed=9, distinct=False, kinds={'single': 0.5, 'group': 0.5})
    tower = BLIP(architecture(size, image_size, vocab_size=100)).visual_encoder
    head = torch.nn.Linear(read_yaml(ROOT / 'configs/sizes.yaml')[size]['vision_width'], len(LABELS))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - (step - WARMUP) / (steps - WARMUP)))
    transform = EvalTransform(image_size)
    for step in progress(range(steps), desc='classifier'):
        part = scenes[step * batch:(step + 1) * batch]
        images = torch.stack([transform(render(scene, rng)) for scene in part])
        loss = F.binary_cross_entropy_with_logits(head(tower(images)[:, 0]), torch.stack([labels(s) for s in part]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with atomic_write(path, 'wb') as file:
        torch.save(tower.state_dict(), file)
    print(f'{path}: cross-entropy {loss.item():.3f} of the last {batch} scenes')
