"""Draw a sample: six cameras, true and predicted occupancy (obliquely and from above), and a legend.

    python tools/visualize.py --config C --sample 0                                   # truth alone
    python tools/visualize.py --config C --predictions DIR --sample TOKEN --out a.png # beside a prediction
    python tools/visualize.py --config C --predictions DIR --scene scene-0103 --out drive.mp4
    python tools/visualize.py --labels labels.npz --out a.png                         # a label file, no data set

DIR is what val.py --save-predictions or tools/infer.py wrote, or predictions of another project
(lib/metrics/formats.py lists the forms). Panoptic labels and predictions get a second
view in which every thing has a colour of its own. The data set may lack labels (test split); then the
prediction is drawn alone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import run_main  # noqa: E402

VIDEO_SUFFIXES = ('.mp4', '.gif')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', help='config whose data set holds the sample')
    parser.add_argument('--override', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--split', choices=('train', 'val', 'test'), default='val', help='data.<split> of the config')
    parser.add_argument('--predictions', metavar='DIR', help='folder or zip of predictions')
    parser.add_argument('--sample', default='0', help='sample token, or its number in the data set (default 0)')
    parser.add_argument('--scene', help='all samples of this scene (name or token), as frames of a video')
    parser.add_argument('--labels', metavar='FILE', help='draw this labels.npz; no config needed')
    parser.add_argument('--label-set', default='occ3d', help='with --labels: occ3d (default) or openocc_v2')
    parser.add_argument('--visible-only', action='store_true', help='leave out true voxels that no camera saw')
    parser.add_argument('--fps', type=float, default=2.0, help='frames per second of a video (default 2)')
    parser.add_argument('--out', default='outputs/pictures/sample.png', help='.png or .jpg; .mp4 or .gif with --scene')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def truth_volume(labels, task, visible_only):
    """Volume of a label file's arrays."""
    from lib.errors import DataError
    from tools.drawing.figure import Volume

    semantics = labels['semantics']
    if visible_only:
        if 'mask_camera' not in labels:
            raise DataError('--visible-only needs labels with mask_camera, and these have none; leave it out')
        semantics = semantics.copy()
        semantics[labels['mask_camera'] == 0] = task.label_set.free_id
    return Volume('truth', semantics, labels.get('instances'))


def camera_images(info, dataset, task):
    """RGB per camera of a keyframe; a missing image is left out of the picture."""
    from lib.errors import DataError
    from loaders.decode import read_image
    from loaders.infos import relocate

    images = {}
    for name in task.cameras:
        try:
            images[name] = read_image(relocate(info['cams'][name]['data_path'], dataset.data_root)).pixels[..., ::-1]
        except DataError as error:
            print(f'left out: {error}', file=sys.stderr)
    return images


def draw_sample(dataset, index, task, prediction=None, visible_only=False):
    """Picture of one sample of a data set, and its dense prediction if given, uint8 [height, width, 3] RGB."""
    from lib.errors import DataError
    from tools.drawing.figure import Volume, draw_figure

    info = dataset.info(index)
    volumes = []
    if dataset.has_labels:
        volumes.append(truth_volume(dataset.ground_truth(index), task, visible_only))
    if prediction is not None:
        volumes.append(Volume('prediction', prediction['semantics'], prediction.get('instances')))
    if not volumes:
        raise DataError('nothing to draw: the data set has no labels (occ_gt_root) and no --predictions were given')
    title = 'sample {}'.format(info['token'])
    scene = info.get('scene_name') or info.get('scene_token')
    return draw_figure(task, volumes, camera_images(info, dataset, task), f'{scene}, {title}' if scene else title)


def find_samples(dataset, sample, scene):
    """Numbers of the samples that --sample or --scene names."""
    from lib.errors import DataError

    if scene:
        found = [
            i
            for i in range(len(dataset))
            if scene in (dataset.info(i).get('scene_name'), dataset.info(i).get('scene_token'))
        ]
        if not found:
            raise DataError(f'no sample of {dataset.ann_file} is in scene {scene!r}')
        return found
    if sample.isdigit() and int(sample) < len(dataset):
        return [int(sample)]
    found = [i for i in range(len(dataset)) if dataset.sample_token(i) == sample]
    if not found:
        raise DataError(
            f'{dataset.ann_file} has no sample {sample!r}; give a token in it, or a number from 0 to {len(dataset) - 1}'
        )
    return found


def draw_label_file(args):
    """Picture of a label file alone."""
    from lib.task import Task
    from loaders.labels import read_labels
    from tools.drawing.figure import draw_figure

    task = Task(label_set=args.label_set)
    labels = read_labels(Path(args.labels), task)
    return draw_figure(task, [truth_volume(labels, task, args.visible_only)], {}, str(args.labels))


def save_image(path, image):
    """Write an RGB picture; the suffix names the format."""
    import cv2

    from lib.errors import UserError
    from lib.io import atomic_write

    with atomic_write(path) as temporary:
        try:
            written = cv2.imwrite(str(temporary), image[..., ::-1])
        except cv2.error as error:
            raise UserError(f'{path}: no picture format has this suffix; use .png or .jpg') from error
        if not written:
            raise UserError(f'{path} cannot be written; check the folder and the space left')


def save_video(path, images, fps):
    """Write RGB pictures of equal size as .mp4 or .gif."""
    import cv2
    from PIL import Image

    from lib.errors import UserError
    from lib.io import atomic_write

    with atomic_write(path) as temporary:
        if Path(path).suffix == '.gif':
            frames = [Image.fromarray(image).resize((image.shape[1] // 2, image.shape[0] // 2)) for image in images]
            frames[0].save(str(temporary), save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)
            return
        height, width = (side // 2 * 2 for side in images[0].shape[:2])
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*'mp4v'), fps, (width, height))
        if not writer.isOpened():
            raise UserError(f'{path}: this OpenCV cannot write mp4; use a name that ends in .gif')
        for image in images:
            writer.write(image[:height, :width, ::-1].copy())
        writer.release()


def main():
    args = parse_args()
    from lib.errors import UserError

    if args.labels:
        save_image(args.out, draw_label_file(args))
        print(f'wrote {args.out}')
        return
    if not args.config:
        raise UserError('give --config (and --predictions), or --labels FILE')
    if (Path(args.out).suffix in VIDEO_SUFFIXES) != bool(args.scene):
        raise UserError(
            '--scene writes a video (--out with {}), --sample a picture (.png or .jpg); got --out {}'.format(
                ' or '.join(VIDEO_SUFFIXES), args.out
            )
        )
    from lib.config import load_config
    from lib.metrics.formats import open_predictions
    from lib.task import Task
    from loaders import build_dataset

    cfg = load_config(args.config, args.override)
    task = Task.from_config(cfg.task)
    dataset = build_dataset(cfg.data[args.split], task)
    predictions = open_predictions(args.predictions, task) if args.predictions else None
    images = [
        draw_sample(dataset, i, task, predictions and predictions.read(dataset.sample_token(i)), args.visible_only)
        for i in find_samples(dataset, args.sample, args.scene)
    ]
    if args.scene:
        save_video(args.out, images, args.fps)
    else:
        save_image(args.out, images[0])
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run_main(main)
