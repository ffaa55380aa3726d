"""Images: the decoders agree, damaged files are named, half-size decoding keeps the geometry."""

import cv2
import numpy as np
import pytest
from PIL import Image

from lib.errors import ConfigError, DataError
from loaders.decode import HeldImage, check_decoder, look_at_image, read_image


def _picture(width=320, height=180):
    """A smooth picture with some edges: BGR uint8."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)
    image[40:80, 100:200] = (20, 200, 120)
    return image


@pytest.fixture
def jpeg(tmp_path):
    path = tmp_path / 'picture.jpg'
    cv2.imwrite(str(path), _picture(), [cv2.IMWRITE_JPEG_QUALITY, 92])
    return path


def _has_turbojpeg():
    try:
        from turbojpeg import TurboJPEG

        TurboJPEG()
    except (ImportError, RuntimeError, OSError):
        return False
    return True


needs_turbojpeg = pytest.mark.skipif(not _has_turbojpeg(), reason='PyTurboJPEG or libturbojpeg is not installed')


@pytest.mark.parametrize('decoder', ['cv2', 'pillow', pytest.param('turbojpeg', marks=needs_turbojpeg)])
def test_decoders_give_bgr(jpeg, decoder):
    image = read_image(jpeg, decoder)
    assert image.factor == 1.0 and image.pixels.shape == (180, 320, 3) and image.pixels.dtype == np.uint8
    assert image.pixels.flags['C_CONTIGUOUS']
    # JPEG at quality 92 keeps flat colours to a few levels.
    np.testing.assert_allclose(image.pixels[60, 150], [20, 200, 120], atol=6)


@pytest.mark.parametrize('decoder', ['pillow', pytest.param('turbojpeg', marks=needs_turbojpeg)])
def test_decoders_give_the_same_pixels_on_real_images(real_dir, decoder):
    for path in sorted((real_dir / 'mmdet3d_demo_nuscenes').glob('*.jpg')):
        np.testing.assert_array_equal(read_image(path, decoder).pixels, read_image(path).pixels)


@pytest.mark.parametrize('decoder', ['cv2', 'pillow', pytest.param('turbojpeg', marks=needs_turbojpeg)])
def test_half_size_where_it_is_enough(jpeg, decoder):
    half = read_image(jpeg, decoder, half_covers=(90, 160))
    assert half.factor == 0.5 and half.pixels.shape == (90, 160, 3)
    full = read_image(jpeg, decoder).pixels.astype(np.float64)
    blocks = full.reshape(90, 2, 160, 2, 3).mean(axis=(1, 3))
    assert np.abs(half.pixels - blocks).mean() < 2  # means of 2x2 blocks but for rounding and chroma
    assert read_image(jpeg, decoder, half_covers=(91, 160)).factor == 1.0
    assert read_image(jpeg, decoder, half_covers=(90, 161)).factor == 1.0


def test_odd_sizes_and_other_formats_are_decoded_in_full(tmp_path):
    odd, png = tmp_path / 'odd.jpg', tmp_path / 'a.png'
    cv2.imwrite(str(odd), _picture(321, 181))
    cv2.imwrite(str(png), _picture())
    assert read_image(odd, half_covers=(10, 10)).pixels.shape == (181, 321, 3)
    np.testing.assert_array_equal(read_image(png, half_covers=(10, 10)).pixels, _picture())


def test_orientation_tags_turn_nothing(tmp_path):
    path = tmp_path / 'tagged.jpg'
    tags = Image.Exif()
    tags[0x0112] = 6  # rotate by 90 degrees to view
    Image.fromarray(_picture()[..., ::-1]).save(str(path), exif=tags.tobytes())
    assert read_image(path).pixels.shape == read_image(path, 'pillow').pixels.shape == (180, 320, 3)


def test_grey_images_become_three_channels(tmp_path):
    path = tmp_path / 'grey.jpg'
    cv2.imwrite(str(path), _picture()[..., 0])
    assert read_image(path).pixels.shape == read_image(path, 'pillow').pixels.shape == (180, 320, 3)


@pytest.mark.parametrize('decoder', ['cv2', 'pillow'])
@pytest.mark.parametrize('kept', [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_image_is_named(jpeg, decoder, kept):
    content = jpeg.read_bytes()
    jpeg.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r'picture\.jpg is truncated .*fetch it again'):
        read_image(jpeg, decoder)


@pytest.mark.parametrize('decoder', ['cv2', 'pillow'])
@pytest.mark.parametrize('content', [b'', b'no image', b'\xff\xd8\xff\xd9', b'\x89PNG\r\n\x1a\n'])
def test_what_is_no_image_is_named(tmp_path, decoder, content):
    path = tmp_path / 'picture.jpg'
    path.write_bytes(content)
    with pytest.raises(DataError, match=r'picture\.jpg cannot be decoded'):
        read_image(path, decoder)


def test_a_missing_image_is_named_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r'none\.jpg does not exist; check data_root'):
        read_image(tmp_path / 'none.jpg')


def test_bytes_after_the_end_mark_do_no_harm(jpeg):
    before = read_image(jpeg).pixels
    jpeg.write_bytes(jpeg.read_bytes() + b'\0' * 100)
    np.testing.assert_array_equal(read_image(jpeg).pixels, before)


def test_an_unknown_decoder_is_named():
    with pytest.raises(ConfigError, match="unknown image decoder 'nvjpg'; use one of"):
        check_decoder('nvjpg')


@pytest.mark.skipif(_has_turbojpeg(), reason='it is installed')
def test_a_decoder_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match="PyTurboJPEG.*use decoder='cv2'"):
        check_decoder('turbojpeg')


@pytest.mark.parametrize('half_covers', [None, (90, 160), (91, 160)])
def test_a_look_tells_the_size_that_reading_gives(jpeg, half_covers):
    read, seen = read_image(jpeg, half_covers=half_covers), look_at_image(jpeg, half_covers)
    assert seen == (HeldImage(read.pixels.shape), read.factor)


def test_a_look_at_what_is_no_image_is_told(tmp_path):
    path = tmp_path / 'a.jpg'
    with pytest.raises(DataError, match='a.jpg does not exist'):
        look_at_image(path)
    path.write_bytes(b'no image at all')
    with pytest.raises(DataError, match='a.jpg cannot be decoded .no known format.; fetch it again'):
        look_at_image(path)
