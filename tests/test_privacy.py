"""Nothing is sent anywhere: no tool connects to another machine when all that it needs is on this one."""

import pytest
import watched
from processes import Python
from runs import write_config

from utils import ROOT

pytestmark = pytest.mark.slow

WEIGHT, EXAMPLES = ROOT / 'data/demo_teacher.pth', ROOT / 'prod/examples'


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """The demo's teacher as a folder of the transformers layout, which could be taken for a name on the hub."""
    folder = tmp_path_factory.mktemp('exported') / 'owner' / 'net'
    assert Python('-m', 'prod.export', WEIGHT, folder).wait().returncode == 0
    return folder


def test_the_watcher_sees_a_connection(tmp_path):
    (tmp_path / 'leak.py').write_text('import socket\ntry:\n    socket.create_connection(("192.0.2.1", 9), 0.01)\n'
                                      'except OSError:\n    pass\n')
    log = tmp_path / 'log'
    assert Python(watched.__file__, log, 'leak', cwd=tmp_path).wait().returncode == 0
    assert '192.0.2.1' in log.read_text()


@pytest.mark.parametrize('tool', ['caption', 'caption by openvino', 'search', 'try_it', 'training', 'retrieval'])
def test_no_tool_connects_to_another_machine(tool, exported, scenes, tmp_path):
    if 'openvino' in tool:
        pytest.importorskip('openvino')
    caption = ['prod.caption', EXAMPLES, '--out', tmp_path / 'captions.jsonl', '--weight']
    arguments = {
        'caption': [*caption, exported],
        'caption by openvino': [*caption, WEIGHT, '--backend', 'openvino'],
        'search': ['prod.search', EXAMPLES, 'a star', '--weight', exported, '--index', tmp_path / 'index'],
        'try_it': ['prod.try_it', '--caption', exported, '--retrieval', exported, EXAMPLES / '00.jpg'],
        'training': ['pretrain_dlip', '--config', write_config(tmp_path, 'pretrain', scenes),
                     '--output_dir', tmp_path / 'run'],
        'retrieval': ['eval.retrieval', '--config', write_config(tmp_path, 'retrieval_flickr', scenes),
                      '--checkpoint', WEIGHT, '--output_dir', tmp_path / 'eval'],
    }[tool]
    log = tmp_path / 'log'
    finished = Python(watched.__file__, log, *arguments, HF_HUB_OFFLINE='0', HOME=str(tmp_path)).wait()
    assert finished.returncode == 0, finished.stderr
    assert not log.exists(), log.read_text()
    assert not list(tmp_path.glob('*[Ii]ntel*')), 'OpenVINO keeps an id for its telemetry'
