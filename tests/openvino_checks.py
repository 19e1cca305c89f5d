"""What OpenVINO must give; test_search.py runs this file in a process of its own."""

import pytest
import torch
from PIL import Image
from test_prod import folder, picture  # noqa: F401 (fixtures)

from models.text import KVCache
from prod import DLIPProd
from prod.images import find_pictures
from utils import ROOT


def test_openvino_gives_what_torch_gives(folder, picture):  # noqa: F811
    """Of nets of all tasks: pictures alone and in batches, beams that end early, texts of unequal length."""
    pictures, texts = [picture, picture.rotate(90), picture.rotate(180)], ['a dog', 'a red dog and a red dog']
    torch_net, other = (DLIPProd(None, folder / 'save/last.pth', backend=name) for name in ('torch', 'openvino'))
    assert torch.allclose(other.get_image_feat(pictures), torch_net.get_image_feat(pictures), atol=1e-5)
    assert torch.allclose(other.get_text_feat(texts), torch_net.get_text_feat(texts), atol=1e-5)
    assert torch.allclose(other.match(pictures, texts), torch_net.match(pictures, texts), atol=1e-4)
    for settings in ({'num_beams': 1, 'min_length': 5}, {'num_beams': 3, 'min_length': 5}, {'num_beams': 2}):
        assert other.generate(pictures, **settings) == torch_net.generate(pictures, **settings)
    assert other.generate(picture) == torch_net.generate(picture)
    half = DLIPProd('retrieval', folder / 'save/dlip_retrieval_flickr.pth', precision='bf16', backend='openvino')
    assert float((half.get_image_feat(picture) * half.get_image_feat(picture)).sum()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="unknown backend 'onnx': choose one of torch, openvino"):
        DLIPProd(None, folder / 'save/last.pth', backend='onnx')


@torch.inference_mode()
def test_eight_bit_weights_keep_the_captions_of_a_trained_net():
    exact, small = (DLIPProd(None, ROOT / 'data/demo_teacher.pth', backend=backend, precision=precision)
                    for backend, precision in (('torch', 'fp32'), ('openvino', 'int8')))
    pictures = find_pictures(ROOT / 'prod/examples')
    same = [a == b for a, b in zip(exact.generate(pictures), small.generate(pictures), strict=True)]
    assert sum(same) >= 10
    scores = []
    for net in (exact, small):
        kv = net.model.project_image(exact.model.encode_image(net.transform(Image.open(pictures[0]))[None]))
        scores.append(net.model.next_logits(net.prompt_ids[None], kv, KVCache(exact.model.config.text_depth, 9)))
    assert 1e-4 < float((scores[0] - scores[1]).norm() / scores[0].norm()) < 0.05  # 8 bits, and not more error
