"""What saves memory changes nothing else: recomputed activations, sharded optimizer state."""

import pytest
import torch
from runs import broken_set, run, run_on_two

import pretrain_dlip
from bench.stress import same
from models.engine.dry_run import SavedTensors
from models.vit import VisionTower

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_recomputed_blocks_have_the_same_gradients_and_keep_less(precision):
    torch.manual_seed(0)
    towers = [VisionTower(32, 8, 48, depth=4, heads=3, checkpoint_layers=layers).train() for layers in (0, 2, 4)]
    images, kept = torch.randn(2, 3, 32, 32), []
    for tower in towers:
        tower.load_state_dict(towers[0].state_dict())
        saved = SavedTensors(tower)
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'), saved:
            loss = tower(images).float().square().mean()
        loss.backward()
        kept.append(saved.bytes)
    for tower in towers[1:]:
        for ours, theirs in zip(tower.parameters(), towers[0].parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2]


def test_saved_tensors_by_hand():
    """Of x * w the input x is kept, the parameter w is there anyway; a view of x adds nothing, and without gradients
    nothing is kept."""
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4, requires_grad=True)
    none, saved = SavedTensors(layer), SavedTensors(layer)
    with none, torch.no_grad():
        layer(x)
    with saved:
        y = layer(x) + layer(x[:])
    y.sum().backward()
    assert none.bytes == 0 and saved.bytes == 8 * 4 * 4 and x.grad is not None


def test_sharded_optimizer_state_equals_the_whole_and_moves_to_other_processes(pretrained, scenes, tmp_path):
    """Two processes with OSS end as two without; their checkpoint goes on in one process without it, and one process's
    in two with it, as a run that stayed the same.
    """
    config, _ = pretrained
    pairs = broken_set(scenes, tmp_path, lambda records: records.__delitem__(slice(48, None)))
    shared = (f'data.train={pairs}', 'negative_all_rank=true', 'model.dropout=0.0')
    whole, sharded = (
        run_on_two(config, tmp_path / name, *shared, 'train.batch_size=4', 'train.epochs=1', f'optim.shard={sharded}')
        for name, sharded in (('whole', 'false'), ('sharded', 'true')))
    assert same(sharded['model'], whole['model'])
    assert same(sharded['optimizer']['state'], whole['optimizer']['state'])
    unbroken = run(pretrain_dlip, config, tmp_path / 'one', *shared)
    to_one = run(pretrain_dlip, config, tmp_path / 'sharded', *shared)
    run(pretrain_dlip, config, tmp_path / 'back', *shared, 'train.epochs=1')
    to_two = run_on_two(config, tmp_path / 'back', *shared, 'train.batch_size=4', 'optim.shard=true')
    for got in (to_one, to_two):
        assert got['epoch'] == 2
        for key, value in unbroken['model'].items():
            assert torch.allclose(got['model'][key], value, atol=1e-4), key
        assert got['optimizer']['state'].keys() == unbroken['optimizer']['state'].keys()
        assert {int(entry['step']) for entry in got['optimizer']['state'].values()} == {12}
