"""Images that are decoded on the GPU: batches of files, and there what they become."""

import cv2
import numpy as np
import pytest
import torch

from lib.errors import ConfigError, DataError
from lib.run.loading import to_device
from lib.task import Task
from loaders import decode as decoding
from loaders.decode import EncodedImages, check_decoder, read_image
from loaders.pipelines import LoadMultiViewImageFromMultiSweeps, RandomTransformImage, collate
from loaders.pipelines.augmentation import ImageTransform

TASK = Task('occ3d', image_size=(64, 176), num_frames=1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
SIZES = [(225, 400), (225, 400), (100, 180)]  # of the files


@pytest.fixture
def files(tmp_path):
    """Paths of JPEGs: smooth colours with some edges."""
    paths = []
    for number, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width]
        image = np.stack([x * 255 // width, y * 255 // height, (x + y + 40 * number) % 256], axis=-1).astype(np.uint8)
        image[height // 2 : height // 2 + 20, 30:90] = (20, 200, 120)
        paths.append(tmp_path / f'{number}.jpg')
        cv2.imwrite(str(paths[-1]), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
    return paths


@pytest.fixture
def on_the_cpu(monkeypatch):
    """What a GPU would do, by the loaders' own decoder and transform."""

    def decode(contents, device):
        decoded = [cv2.imdecode(content.numpy(), cv2.IMREAD_COLOR) for content in contents]
        return [torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))) for image in decoded]

    def transform(images, transform):
        bgr = [np.ascontiguousarray(image.numpy().transpose(1, 2, 0)[..., ::-1]) for image in images]
        return torch.stack([torch.from_numpy(transform.apply(image).transpose(2, 0, 1).copy()) for image in bgr])

    monkeypatch.setattr(decoding, 'decode_jpegs', decode)
    monkeypatch.setattr(decoding, 'transform_on_gpu', transform)


def _transformed(paths, decoder):
    step = RandomTransformImage(TASK)
    images = [read_image(path, decoder).pixels for path in paths]
    return [step.test_transform(image.shape[:2]).apply(image) for image in images]


def _expected(paths):
    return torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in _transformed(paths, 'cv2')]))


def test_files_travel_and_become_the_same_batch(files, on_the_cpu):
    """Images of different sizes, a black one for a missing camera, and two samples."""
    black = np.zeros((64, 176, 3), np.uint8)
    first = EncodedImages.of_sample([*_transformed(files[:2], 'nvjpeg'), black])
    second = EncodedImages.of_sample([black, *_transformed(files[1:], 'nvjpeg')])
    sizes = [path.stat().st_size for path in files]
    assert first.lengths == [*sizes[:2], 0] and first.contents.shape == (sum(sizes[:2]),)
    made = EncodedImages.of_batch([first, second]).to(torch.device('cpu'))
    assert made.shape == (2, 3, 3, 64, 176) and made.dtype == torch.uint8
    assert torch.equal(made[0, :2], _expected(files[:2])) and torch.equal(made[1, 1:], _expected(files[1:]))
    assert not made[0, 2].any() and not made[1, 0].any()


def test_batches_that_are_decoded_together_stay_what_they_are(files, on_the_cpu, monkeypatch):
    black, calls, decode = np.zeros((64, 176, 3), np.uint8), [], decoding.decode_jpegs
    monkeypatch.setattr(decoding, 'decode_jpegs', lambda *given: calls.append(given) or decode(*given))
    many = [
        EncodedImages.of_sample(_transformed(files, 'nvjpeg')),
        EncodedImages.of_sample([black, *_transformed(files[2:], 'nvjpeg')]),
        EncodedImages.of_sample(_transformed(files[1:2], 'nvjpeg')),
    ]
    together = EncodedImages.all_to(many, torch.device('cpu'))
    assert len(calls) == 1
    for one, made in zip(many, together):
        assert torch.equal(made, one.to(torch.device('cpu')))
    assert torch.equal(together[0][0], _expected(files)) and not together[1][0, 0].any()


def test_a_batch_is_decoded_when_it_is_moved(files, on_the_cpu):
    sample = dict(img=EncodedImages.of_sample(_transformed(files, 'nvjpeg')), img_metas={})
    matrices = dict(lidar2img=torch.eye(4)[None], ego2lidar=torch.eye(4)[None])
    batch = collate([dict(sample, **matrices), dict(sample, **matrices)])
    moved = to_device(batch, torch.device('cpu'))
    assert torch.equal(moved['img'], torch.stack([_expected(files)] * 2))


def test_what_cannot_be_is_told_in_a_sentence(files, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="needs RandomTransformImage.*use decoder='cv2'"):
        EncodedImages.of_sample([read_image(path, 'nvjpeg').pixels for path in files[:2]])
    png = tmp_path / 'a.png'
    cv2.imwrite(str(png), np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(DataError, match="a.png cannot be decoded .decoder='nvjpeg' reads JPEGs only"):
        read_image(png, 'nvjpeg')
    images = EncodedImages.of_sample(_transformed(files, 'nvjpeg'))
    with pytest.raises(ConfigError, match="decodes on a GPU, not on cpu; use decoder='cv2'"):
        images.to(torch.device('cpu'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match="decodes on a GPU, and PyTorch finds none; use decoder='cv2'"):
        check_decoder('nvjpeg')


@pytest.mark.parametrize(
    'said, kind, message',
    [
        ('decode_jpegs_cuda: torchvision not compiled with nvJPEG support', ConfigError, 'no nvJPEG'),
        ('Error while decoding JPEG images', DataError, "cannot be decoded on the GPU .*use decoder='cv2'"),
    ],
)
def test_a_torchvision_without_nvjpeg_and_a_damaged_file_are_told_apart(monkeypatch, said, kind, message):
    def fail(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr('torchvision.io.decode_jpeg', fail)
    with pytest.raises(kind, match=message):
        decoding.decode_jpegs([torch.zeros(4, dtype=torch.uint8)], torch.device('cuda'))


def test_training_refuses(monkeypatch):
    monkeypatch.setattr('loaders.decode.check_nvjpeg', lambda: None)
    with pytest.raises(ConfigError, match="decoder='nvjpeg' is for inference"):
        LoadMultiViewImageFromMultiSweeps(TASK, decoder='nvjpeg')(dict(test_mode=False))


@needs_gpu
@pytest.mark.parametrize('left, top, mirror', [(0, 20, False), (11, 0, True), (-5, -7, False)])
def test_resizing_on_the_gpu_is_exact(left, top, mirror):
    pytest.importorskip('triton')
    transform = ImageTransform(0.44, (99, 176), left, top, (64, 160), mirror)
    images = np.random.default_rng(0).integers(0, 256, (3, 225, 400, 3), dtype=np.uint8)
    rgb = torch.from_numpy(np.ascontiguousarray(images[..., ::-1].transpose(0, 3, 1, 2))).cuda()
    made = decoding.transform_on_gpu(rgb, transform).cpu()
    expected = np.stack([transform.apply(image).transpose(2, 0, 1) for image in images])
    assert torch.equal(made, torch.from_numpy(expected))


@needs_gpu
def test_decoding_on_the_gpu_differs_by_little(files):
    """nvJPEG may round and blend colours otherwise than libjpeg-turbo; resized, little of that may be left."""
    try:
        check_decoder('nvjpeg')
    except ConfigError as error:
        pytest.skip(str(error))
    made = EncodedImages.of_sample(_transformed(files, 'nvjpeg')).to(torch.device('cuda')).cpu()
    apart = (made[0].int() - _expected(files).int()).abs().float()
    assert apart.mean() < 2 and apart.quantile(0.99) < 16
