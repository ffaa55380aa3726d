"""See samples: as a picture, a film, an interactive page, or in other viewers.

    python tools/visualize.py --predictions DIR --out sample.png            # the first sample, beside its truth
    python tools/visualize.py --predictions DIR --html drive.html --scene scene-0103
    python tools/visualize.py --predictions DIR --out drive.mp4 --scene scene-0103
    python tools/visualize.py --config C --html truth.html --samples 40     # truth alone, the first 40 samples
    python tools/visualize.py --labels labels.npz --html labels.html        # a label file, no data set
    python tools/visualize.py --predictions DIR --rerun drive.rrd --ply voxels.ply --gltf voxels.glb

DIR is what val.py --save-predictions or tools/infer.py wrote, and then says itself which config, split and data it is
of; with predictions of another project (lib/metrics/formats.py lists the forms) give --config. The data set may lack
labels (test split, own data); then the prediction is shown alone. docs/viewer.md describes the page.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import make_parser, real_number, run_main, whole_number  # noqa: E402

VIDEO_SUFFIXES = ('.mp4', '.gif')
DEFAULT_PICTURE = 'outputs/pictures/sample.png'


def parse_args(argv=None):
    parser = make_parser(__doc__, 'override')
    what = parser.add_argument_group('what is shown')
    what.add_argument('--predictions', metavar='DIR', help='folder or zip of predictions')
    what.add_argument('--config', help='config whose data set holds the samples (default: that of the predictions)')
    what.add_argument(
        '--split', choices=('train', 'val', 'test'), help='data.<split> (default: the predicted one, val)'
    )
    what.add_argument('--infos', metavar='PKL', help='another info file of this split, absolute or in the data root')
    what.add_argument('--sample', help='sample token, or its number in the data set (default: the first)')
    what.add_argument('--samples', type=whole_number(1), metavar='N', help='the first N samples')
    what.add_argument('--scene', help='all samples of this scene (name or token)')
    what.add_argument('--labels', metavar='FILE', help='this label file alone; no config needed')
    what.add_argument('--label-set', default='occ3d', help='with --labels: occ3d (default), or as in sparseocc-eval')
    what.add_argument('--visible-only', action='store_true', help='leave out true voxels that no camera saw')
    where = parser.add_argument_group('what is written')
    where.add_argument('--out', help=f'.png or .jpg, of several samples .mp4 or .gif (default: {DEFAULT_PICTURE})')
    where.add_argument('--fps', type=real_number(above=0), default=2.0, help='frames per second of a film (default 2)')
    where.add_argument('--html', metavar='FILE', help='interactive page that needs nothing but a browser')
    where.add_argument('--rerun', metavar='RRD', help='recording for the Rerun viewer (needs rerun-sdk)')
    where.add_argument('--ply', metavar='FILE', help='voxels of one sample as a point cloud')
    where.add_argument('--gltf', metavar='GLB', help='voxels of one sample as a mesh')
    where.add_argument(
        '--image-width', type=whole_number(1), default=480, help='of images in pages and recordings (default 480)'
    )
    return parser.parse_args(argv)


def check_arguments(args):
    """Raise UserError for arguments that do not fit together; give --out its default."""
    from lib.errors import UserError

    several = args.scene is not None or args.samples is not None
    if sum(value is not None for value in (args.sample, args.samples, args.scene)) > 1:
        raise UserError('--sample, --samples and --scene each choose samples; give one of them')
    if args.samples is not None and args.samples < 1:
        raise UserError(f'--samples must be at least 1, got {args.samples}')
    if args.labels and (several or args.predictions):
        raise UserError('--labels shows one label file alone; leave out --predictions, --samples and --scene')
    if not (args.out or args.html or args.rerun or args.ply or args.gltf):
        args.out = DEFAULT_PICTURE
    if args.out and (Path(args.out).suffix in VIDEO_SUFFIXES) != several:
        raise UserError(
            f'--scene and --samples write a film (--out with {" or ".join(VIDEO_SUFFIXES)}), one sample a picture '
            f'(.png or .jpg); got --out {args.out}'
        )
    if several and (args.ply or args.gltf):
        raise UserError('--ply and --gltf write one sample; choose it with --sample')


def find_samples(dataset, sample, scene):
    """Numbers of the samples that --sample or --scene names."""
    from lib.errors import DataError

    if scene:
        infos = [dataset.info(i) for i in range(len(dataset))]
        found = [i for i, info in enumerate(infos) if scene in (info.get('scene_name'), info.get('scene_token'))]
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


def choose_samples(args, dataset, predictions):
    """Numbers of the samples to show; where several are asked for, those that have a prediction."""
    from lib.errors import DataError

    if args.sample is not None:
        return find_samples(dataset, args.sample, None)
    chosen = find_samples(dataset, None, args.scene) if args.scene else list(range(len(dataset)))
    if predictions is not None:
        chosen = [index for index in chosen if dataset.sample_token(index) in predictions]
        if not chosen:
            where = f'scene {args.scene}' if args.scene else f'{dataset.ann_file}'
            raise DataError(
                f'none of the {len(predictions)} predictions in {predictions.path} is of {where}; choose the split '
                'that they are of with --split, or another info file with --infos'
            )
    return chosen if args.scene else chosen[: args.samples or 1]


def open_data(args):
    """(task, data set, predictions or None) that the arguments name."""
    from lib.errors import UserError
    from lib.metrics.formats import open_predictions
    from lib.task import Task
    from loaders import build_dataset
    from tools.components import config_of_predictions

    if not args.config and not args.predictions:
        raise UserError('give --predictions DIR, --config, or --labels FILE')
    cfg, split = config_of_predictions(args.predictions, args.config, args.override, args.split)
    task = Task.from_config(cfg.task)
    section = dict(cfg.data[split], test_mode=True)
    if args.infos:
        section['ann_file'] = args.infos
    dataset = build_dataset(section, task)
    return task, dataset, open_predictions(args.predictions, task) if args.predictions else None


class Frames:
    """Samples of a data set, read anew whenever one goes through them."""

    def __init__(self, dataset, indices, predictions, visible_only, say):
        self._dataset, self._indices, self._predictions = dataset, indices, predictions
        self._visible_only, self._say = visible_only, say

    def __iter__(self):
        from tools.drawing.frames import read_frame

        for index in self._indices:
            dense = self._predictions.read(self._dataset.sample_token(index)) if self._predictions else None
            yield read_frame(self._dataset, index, dense, self._visible_only, self._say)


def label_frame(args):
    """(task, [frame]) of a label file alone."""
    from lib.labels import read_labels
    from lib.metrics.command import read_task
    from tools.drawing.frames import Frame, truth_volume

    task = read_task(args.label_set)
    volume = truth_volume(read_labels(Path(args.labels), task), task, args.visible_only)
    return task, [Frame(token=str(args.labels), truth=volume)]


def write_all(args, task, frames, title, say):
    """Write every kind of file that was asked for; yields a line for each."""
    from tools.drawing.figure import draw_frame
    from tools.drawing.html import write_html
    from tools.drawing.pictures import save_image, save_video
    from tools.drawing.recording import write_recording

    if args.out:
        images = [draw_frame(frame, task, say) for frame in frames]
        if Path(args.out).suffix in VIDEO_SUFFIXES:
            save_video(args.out, images, args.fps)
        else:
            save_image(args.out, images[0])
        yield f'wrote {args.out}'
    if args.html:
        count = write_html(args.html, task, frames, title, args.image_width, say)
        yield f'wrote {args.html}: {count} samples, {Path(args.html).stat().st_size / 1e6:.1f} MB'
    if args.rerun:
        yield f'wrote {args.rerun}: {write_recording(args.rerun, task, frames, title, args.image_width, say)} samples'
    if args.ply or args.gltf:
        yield from write_exports(args, task, next(iter(frames)))


def write_exports(args, task, frame):
    """--ply and --gltf of one sample; with truth and prediction each has a file, named after it."""
    from tools.drawing.export import write_gltf, write_ply

    for path, write, unit in ((args.ply, write_ply, 'points'), (args.gltf, write_gltf, 'faces')):
        for volume in frame.volumes if path else ():
            own = Path(path)
            if len(frame.volumes) > 1:
                own = own.with_name(f'{own.stem}_{volume.title}{own.suffix}')
            yield f'wrote {own}: {write(own, task, volume)} {unit}'


def main():
    args = parse_args()
    check_arguments(args)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    if args.labels:
        task, frames = label_frame(args)
        title = Path(args.labels).name
    else:
        task, dataset, predictions = open_data(args)
        indices = choose_samples(args, dataset, predictions)
        frames = Frames(dataset, indices, predictions, args.visible_only, say)
        title = args.scene or ('Predictions' if predictions else 'Labels')
    for line in write_all(args, task, frames, title, say):
        print(line, flush=True)


if __name__ == '__main__':
    run_main(main)
