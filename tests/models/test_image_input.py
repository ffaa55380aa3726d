"""Images on the device: normalisation, padding, colour jitter."""

import colorsys

import numpy as np
import pytest
import torch

from lib.errors import ConfigError
from models.encoder.image_input import ImageInput, _jitter_hsv, draw_jitter, jitter_colours


def make(**changes):
    settings = dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True, size_divisor=32, color_aug=True
    )
    return ImageInput(**dict(settings, **changes))


def test_bgr_becomes_normalised_rgb_padded_with_zeros():
    images = torch.randint(0, 256, (2, 3, 40, 64), dtype=torch.uint8)
    out = make().eval()(images)
    assert out.shape == (2, 3, 64, 64) and out.is_contiguous(memory_format=torch.channels_last)
    red = (images[:, 2].float() - 123.675) / 58.395
    torch.testing.assert_close(out[:, 0, :40], red)
    assert not out[:, :, 40:].any()
    blue_first = make(to_rgb=False).eval()(images)
    torch.testing.assert_close(blue_first[:, 0, :40], (images[:, 0].float() - 123.675) / 58.395)


def test_jitter_in_training_only_and_per_image():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(8, 3, 32, 32)
    layer = make()
    plain, jittered = layer.eval()(images), layer.train()(images)
    assert torch.equal(plain, layer.eval()(images)) and not torch.equal(plain, jittered)
    assert len({tuple(image.flatten()[:50].tolist()) for image in jittered}) > 4
    assert torch.equal(make(color_aug=False).train()(images), plain)


def test_jitter_follows_the_seed_and_keeps_its_input():
    images = torch.rand(4, 3, 8, 8) * 255
    before = images.clone()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(jitter_colours(images, draw_jitter(1, 4, images.device)))
    assert torch.equal(*results) and torch.equal(images, before)


def test_hue_and_saturation_agree_with_colorsys():
    rng = np.random.RandomState(0)
    bgr = rng.randint(0, 256, (50, 3)).astype(np.float32)
    bgr[:3] = [[7, 7, 7], [0, 0, 0], [255, 0, 255]]
    ours = (
        _jitter_hsv(
            torch.from_numpy(bgr).view(50, 3, 1, 1),
            saturation=torch.full((50, 1, 1, 1), 0.8),
            hue=torch.full((50, 1, 1, 1), -15.0),
        )
        .view(50, 3)
        .numpy()
    )
    for i in range(50):
        h, s, v = colorsys.rgb_to_hsv(*(bgr[i, ::-1] / 255))
        expected = np.array(colorsys.hsv_to_rgb((h - 15 / 360) % 1, s * 0.8, v))[::-1] * 255
        np.testing.assert_allclose(ours[i], expected, atol=1e-2)  # float32 against double, values to 255


def test_range_of_the_jitter():
    """Mid-grey shows brightness and contrast alone: saturation and hue leave grey as it is."""
    torch.manual_seed(1)
    jitter = draw_jitter(1, 4000, torch.device('cpu'))
    values = jitter_colours(torch.full((4000, 3, 1, 1), 100.0), jitter)[:, 0, 0, 0]
    assert 34 <= values.min() < 40 and 190 < values.max() <= 132 * 1.5 + 0.01
    share_unchanged = (values == 100).float().mean()
    assert abs(share_unchanged - 0.25) < 0.03  # neither brightness nor contrast: 0.5 * 0.5, +-4 sigma


def test_unknown_key_is_a_sentence():
    with pytest.raises(ConfigError, match="model.data_aug: unknown key 'img_blur'"):
        ImageInput.from_config(dict(img_norm_cfg=dict(mean=[0] * 3, std=[1] * 3), img_blur=True))
