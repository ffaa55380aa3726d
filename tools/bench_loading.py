#!/usr/bin/env python
"""Time what one keyframe costs to load: decoding six images and resizing and cropping them, per decoder.

    python tools/bench_loading.py                              # made-up 1600x900 images
    python tools/bench_loading.py --images data/nuscenes/samples/CAM_FRONT --repeats 50

Prints, for each decoder that is installed (cv2, Pillow or Pillow-SIMD, TurboJPEG), the median CPU time of
both steps in one thread, exact and with fast_decode, and by how much the pixels of the result differ from those
of cv2's exact decoding. --json writes the figures to a file.
"""

import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib.cli import make_parser, run_main, whole_number  # noqa: E402
from lib.errors import ConfigError, DataError  # noqa: E402

IMAGES_PER_KEYFRAME = 6


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument('--images', metavar='DIR', help='folder of JPEGs; the first six are used')
    parser.add_argument(
        '--network',
        type=whole_number(1),
        nargs=2,
        default=(256, 704),
        metavar=('HEIGHT', 'WIDTH'),
        help="size of the network's images (default: 256 704)",
    )
    parser.add_argument('--repeats', type=whole_number(1), default=20, help='keyframes timed (default: %(default)s)')
    parser.add_argument('--json', metavar='FILE', help='write the figures there')
    return parser.parse_args()


def make_images(folder):
    """Six made-up street-like JPEGs of 1600x900; their paths."""
    import cv2
    import numpy as np

    paths = []
    for number in range(IMAGES_PER_KEYFRAME):
        rng = np.random.default_rng(number)
        image = np.zeros((900, 1600, 3))
        for cells in (4, 16, 64, 256):  # detail at several scales compresses about as a photograph does
            noise = rng.uniform(0, 255, (cells * 9 // 16 + 1, cells, 3))
            image += cv2.resize(noise, (1600, 900), interpolation=cv2.INTER_CUBIC) / 4
        path = os.path.join(folder, f'{number}.jpg')
        cv2.imwrite(path, image.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 75])
        paths.append(path)
    return paths


def find_images(folder):
    """The first six JPEGs of a folder."""
    if not os.path.isdir(folder):
        raise DataError(f'folder {folder} does not exist; correct --images')
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(('.jpg', '.jpeg')))
    if not names:
        raise DataError(f'{folder} holds no JPEGs; give --images another folder')
    paths = [os.path.join(folder, name) for name in names[:IMAGES_PER_KEYFRAME]]
    return (paths * IMAGES_PER_KEYFRAME)[:IMAGES_PER_KEYFRAME]


def median_ms(action, repeats):
    """Median CPU milliseconds of ``action()``, after one run that does not count."""
    action()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append((time.process_time() - start) * 1e3)
    return statistics.median(times)


def measure(paths, decoder, fast, step, repeats):
    """Figures of one way of loading, and the images it makes (uint8 [6, H, W, 3])."""
    import numpy as np

    from loaders.decode import read_image

    half_covers = step.size if fast else None

    def decode():
        return [read_image(path, decoder, half_covers).pixels for path in paths]

    def transform(images):
        return [step.test_transform(image.shape[:2]).apply(image) for image in images]

    decoded = decode()
    figures = dict(
        decoder=decoder,
        fast_decode=fast,
        decode_ms=median_ms(decode, repeats),
        transform_ms=median_ms(lambda: transform(decoded), repeats),
    )
    return figures, np.stack(transform(decoded)).astype(np.int16)


def difference(images, exact):
    """Mean and largest absolute difference in grey levels."""
    import numpy as np

    apart = np.abs(images - exact)
    return dict(mean_difference=float(apart.mean()), max_difference=int(apart.max()))


def installed_decoders():
    """Decoders that work here, with a name to print."""
    import PIL

    from loaders.decode import check_decoder

    pillow = 'Pillow-SIMD' if '.post' in PIL.__version__ else 'Pillow'
    found = []
    for decoder, name in (('cv2', 'cv2'), ('pillow', f'{pillow} {PIL.__version__}'), ('turbojpeg', 'TurboJPEG')):
        try:
            check_decoder(decoder)
            found.append((decoder, name))
        except ConfigError as error:
            print(f'left out: {error}')
    return found


def run(paths, args):
    import cv2

    from lib.task import Task
    from loaders.pipelines import RandomTransformImage

    cv2.setNumThreads(0)
    step = RandomTransformImage(Task('occ3d', image_size=args.network))
    exact, rows = None, []
    print(
        f'{"decoder":22} {"fast":6} {"decode ms":>10} {"transform ms":>12} {"sum ms":>10}   '
        'grey levels from cv2 exact: mean, max'
    )
    for decoder, name in installed_decoders():
        for fast in (False, True):
            figures, images = measure(paths, decoder, fast, step, args.repeats)
            exact = images if exact is None else exact
            figures.update(difference(images, exact), name=name)
            decode, transform = figures['decode_ms'], figures['transform_ms']
            print(
                f'{name:22} {"yes" if fast else "no":6} {decode:10.1f} {transform:12.1f} {decode + transform:10.1f}   '
                f'{figures["mean_difference"]:.2f}, {figures["max_difference"]}',
                flush=True,
            )
            rows.append(figures)
    return rows


def main():
    import tempfile

    args = parse_args()
    args.network = tuple(args.network)
    print(f'CPU time per keyframe of {IMAGES_PER_KEYFRAME} images, one thread, median of {args.repeats}')
    with tempfile.TemporaryDirectory() as folder:
        rows = run(find_images(args.images) if args.images else make_images(folder), args)
    if args.json:
        from lib.io import write_json

        write_json(args.json, dict(network=args.network, images=args.images, rows=rows))
        print(f'wrote {args.json}')


if __name__ == '__main__':
    run_main(main)
