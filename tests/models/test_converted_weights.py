"""Weights converted once for mixed precision, instead of in every step."""

import pytest
import torch
from small_model import small_batch, small_model, small_task
from torch import nn

from lib.run.numerics import autocast, convert_weights


@pytest.fixture
def predict():
    """Function from a model to its raw prediction of one batch in mixed bfloat16 on the CPU."""
    task = small_task()
    batch = small_batch(task, with_labels=False)

    def run(model):
        with torch.no_grad(), autocast('bf16', torch.device('cpu')):
            return model.predict_raw(batch['img'], batch['lidar2img'], batch['ego2lidar'])

    return run


@pytest.mark.skipif(int(torch.__version__.split('.')[0]) < 2, reason='no LayerNorm in the CPU autocast of PyTorch 1')
def test_converted_weights_give_the_same_bits(predict):
    model = small_model(small_task()).eval()
    before = predict(model)
    head = model.pts_bbox_head.transformer
    sensitive = [
        head.voxel_decoder.decoder_layers[0].self_attn,
        head.voxel_decoder.decoder_layers[0].norm1,
        model.img_backbone,
    ]
    assert convert_weights(model, 'bf16') is model
    assert head.decoder.decoder_layer.classifier.weight.dtype == torch.bfloat16
    assert head.decoder.decoder_layer.self_attn.self_attn.in_proj_weight.dtype == torch.bfloat16
    assert head.voxel_decoder.decoder_layers[0].mixing.out_proj.bias.dtype == torch.bfloat16
    assert model.img_neck.fpn_convs[0].conv.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for part in sensitive for p in part.parameters())
    after = predict(model)
    for one, other in zip(before.features.maps, after.features.maps):
        assert torch.equal(one, other)
    for one, other in zip(before.output.layers, after.output.layers):
        assert torch.equal(one.class_logits, other.class_logits) and torch.equal(one.mask_logits, other.mask_logits)
    assert torch.equal(before.merged[0].semantics, after.merged[0].semantics)


def test_without_mixed_precision_nothing_is_converted():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1))
    assert convert_weights(model, None)[0].weight.dtype == torch.float32
    assert convert_weights(model, 'fp16')[1].bias.dtype == torch.float16
