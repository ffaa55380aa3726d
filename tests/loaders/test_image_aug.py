"""RandomTransformImage: pixels as SPEC defines them, and matrices that follow the pixels."""

import numpy as np
import pytest
from PIL import Image

from lib.errors import ConfigError
from lib.task import Task
from loaders.pipelines import RandomTransformImage
from loaders.pipelines.augmentation import ImageTransform

TASK = Task('occ3d', image_size=(256, 704), num_frames=1)


def _sample(images, seed=0, test_mode=False):
    return dict(
        img=images, lidar2img=np.stack([np.eye(4)] * len(images)), rng=np.random.default_rng(seed), test_mode=test_mode
    )


def _noise(height=900, width=1600, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.NEAREST))


def test_evaluation_pixels_are_spec_s():
    """s = max(256/900, 704/1600) = 0.44: 704x396, the lower 256 rows, nothing cut in x, no mirror."""
    image = _noise()
    sample = RandomTransformImage(TASK, rand_flip=True)(_sample([image], test_mode=True))
    expected = np.asarray(Image.fromarray(image).resize((704, 396), Image.BICUBIC))[140:]
    np.testing.assert_array_equal(sample['img'][0], expected)
    np.testing.assert_allclose(sample['lidar2img'][0][:3, :3], [[0.44, 0, 0], [0, 0.44, -140], [0, 0, 1]], atol=1e-12)


@pytest.mark.parametrize('seed', range(6))
def test_training_pixels_are_spec_s(seed):
    """From the scale, shift and mirror in the matrix, the definition gives every pixel of the result."""
    image = _noise(seed=seed)
    sample = RandomTransformImage(TASK, rand_flip=True)(_sample([image], seed))
    matrix, result = sample['lidar2img'][0], sample['img'][0]
    mirror, scale = matrix[0, 0] < 0, abs(matrix[0, 0])
    size = int(1600 * scale), int(900 * scale)
    left = int(round(matrix[0, 2] - 704 if mirror else -matrix[0, 2]))
    assert 0.38 <= scale <= 0.55 and 0 <= left <= max(0, size[0] - 704) and matrix[1, 2] == -(size[1] - 256)
    expected = np.zeros((256, 704, 3), np.uint8)
    resized = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))[size[1] - 256 :, left : left + 704]
    expected[:, : resized.shape[1]] = resized
    np.testing.assert_array_equal(result, expected[:, ::-1] if mirror else expected)


def _spot_drift(seed):
    """Largest distance between two white squares of the result and where the matrix sends them, pixels."""
    image = np.zeros((900, 1600, 3), np.uint8)
    spots = np.array([[900.0, 700.0], [760.0, 600.0]])  # x, y; inside every crop
    for x, y in spots.astype(int):
        image[y - 10 : y + 10, x - 10 : x + 10] = 255
    sample = RandomTransformImage(TASK, rand_flip=True)(_sample([image], seed))
    rows, columns = np.nonzero(sample['img'][0][..., 0] > 128)
    moved = np.column_stack([spots, np.ones(2), np.ones(2)]) @ sample['lidar2img'][0].T
    found = np.column_stack([columns, rows])
    spread = [np.linalg.norm(found - spot[:2], axis=1) for spot in moved]
    return max(
        np.abs(found[near < 12].mean(axis=0) - spot[:2]).max() if (near < 12).any() else near.min()
        for near, spot in zip(spread, moved)
    )


# Half-pixel conventions, int(W·s) / (W·s), and the mean over the bright pixels of a square of 20·s.
SPOT_TOLERANCE = 1.5


@pytest.mark.parametrize('seed', range(8))
def test_the_matrix_moves_points_as_the_pixels_move(seed):
    assert _spot_drift(seed) < SPOT_TOLERANCE


@pytest.mark.parametrize('row, column', [(0, 0), (0, 2), (1, 2)])
def test_the_spot_test_notices_a_wrong_sign(row, column, monkeypatch):
    """Mirror, crop x and crop y of the matrix with the other sign: some draw must fail."""
    right = ImageTransform.matrix

    def wrong(transform):
        matrix = right(transform)
        matrix[row, column] *= -1
        return matrix

    monkeypatch.setattr(ImageTransform, 'matrix', wrong)
    assert max(_spot_drift(seed) for seed in range(8)) > 10 * SPOT_TOLERANCE


def test_release_1_0_never_mirrors_and_1_1_mirrors_half():
    class Counting(RandomTransformImage):
        def train_transform(self, source, zoom, shift, mirror):
            mirrors.append(mirror)
            return self.test_transform(source)

    for rand_flip, low, high in ((False, 0, 0), (True, 70, 130)):  # 200 coins: 100 +- 7, four deviations
        mirrors = []
        step = Counting(Task('occ3d', image_size=(32, 32)), rand_flip=rand_flip)
        for seed in range(200):
            step(_sample([np.zeros((40, 40, 3), np.uint8)], seed))
        assert low <= sum(mirrors) <= high


def test_draws_cover_the_valid_range():
    step = RandomTransformImage(TASK)
    assert step.train_transform((900, 1600), 0.0, 0.0, False).resized == (342, 608)
    low, high = (step.train_transform((900, 1600), 1.0, shift, False) for shift in (0.0, 1 - 1e-12))
    assert high.resized == (495, 880) and (low.left, high.left) == (0, 176) and high.top == 239


def test_one_draw_serves_all_images_of_a_sample():
    images = [_noise(seed=n) for n in range(3)]
    sample = RandomTransformImage(TASK, rand_flip=True)(_sample(images, seed=3))
    assert (sample['lidar2img'] == sample['lidar2img'][0]).all()
    assert not np.array_equal(sample['img'][0], sample['img'][1])


@pytest.mark.parametrize(
    'source, network',
    [((450, 800), (256, 704)), ((180, 320), (64, 176)), ((900, 1600), (512, 1408)), ((720, 1280), (96, 256))],
)
def test_other_sizes_see_the_same_share_of_the_picture(source, network):
    step = RandomTransformImage(Task('occ3d', image_size=network))
    test = step.test_transform(source)
    assert min(r - n for r, n in zip(test.resized, network)) == 0  # covers the network's size, just
    for zoom in (0.0, 0.3, 1.0):
        transform = step.train_transform(source, zoom, 0.0, False)
        assert transform.scale / test.scale == pytest.approx((0.38 + 0.17 * zoom) / 0.44)


def test_plain_factors_where_no_reference_is_given():
    step = RandomTransformImage(Task('occ3d', image_size=(64, 176)), resize_lim=(0.6, 0.6), resize_reference=None)
    assert step.train_transform((180, 320), 0.5, 0.0, False).resized == (108, 192)


@pytest.mark.parametrize('width', range(33, 400, 7))
def test_resizing_to_a_width_gives_that_width(width):
    step = RandomTransformImage(Task('occ3d', image_size=(32, width)))
    assert step.test_transform((900, 1600)).resized[1] == max(width, int(1600 * 32 / 900))


def test_images_smaller_than_the_crop_are_black_outside():
    image = np.full((900, 1600, 3), 200, np.uint8)
    step = RandomTransformImage(TASK, resize_lim=(0.2, 0.2), resize_reference=None)
    result = step(_sample([image]))['img'][0]
    assert (result[:76] == 0).all() and (result[:, 320:] == 0).all() and (result[76:, :320] == 200).all()


def test_training_can_be_set_apart_from_the_data_set_s_mode():
    image = _noise()
    fixed = RandomTransformImage(TASK, training=False)(_sample([image], seed=1))
    test = RandomTransformImage(TASK)(_sample([image], seed=2, test_mode=True))
    np.testing.assert_array_equal(fixed['img'][0], test['img'][0])


@pytest.mark.parametrize('limits', [(0.5, 0.4), (0, 1), (0.4,)])
def test_wrong_limits_are_named(limits):
    with pytest.raises(ConfigError, match='resize_lim'):
        RandomTransformImage(TASK, resize_lim=limits)
