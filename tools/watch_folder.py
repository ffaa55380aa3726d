"""Predict occupancy live: follow a folder into which a recorder writes images, without ROS.

    python tools/watch_folder.py --config C --weights W --watch recording/ --out outputs/live --pictures

The recorder writes into the folder

    cameras.json              {"cameras": {"CAM_FRONT": {"intrinsic": ..., "camera2ego": ...}, ...}}, once
    any/where/f.jpg           images
    frame_000.json            {"timestamp": 12.5, "ego2global": {...}, "images": {"CAM_FRONT": "any/where/f.jpg", ...}}

in the form of docs/own_data.md; a frame's file last, when its images are complete (best under another name, then
renamed). Frames are taken as they appear; those that are late, lack a camera or come after a gap are coped with.
Writes DIR/<name of the frame's file>.npz, and with --pictures .png. Ends with Ctrl-C, or after --idle seconds without a
new frame; --idle 0 takes what is there.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import check_files, make_parser, real_number, run_main  # noqa: E402

CAMERAS = 'cameras.json'
SHARED = ('config', 'override', 'amp', 'tf32', 'device', 'trust-weights')


def parse_args(argv=None):
    parser = make_parser(__doc__, *SHARED)
    add = parser.add_argument
    add('--weights', required=True, help='checkpoint of the model')
    add('--watch', required=True, metavar='FOLDER', help='where frames appear')
    add('--out', required=True, metavar='DIR', help='where predictions go')
    add('--pictures', action='store_true', help='also draw every frame')
    add('--poll', type=real_number(least=0), default=0.05, help='seconds between looks (default: 0.05)')
    add('--idle', type=real_number(least=0), help='end after so many seconds without a new frame (default: never)')
    return parser.parse_args(argv)


def read_frame(path):
    """``Frame`` of a frame's file; image paths are relative to its folder.

    Raises:
        DataError: it is damaged, or lacks something.
    """
    from lib.errors import DataError
    from lib.io import read_json
    from tools.api import Frame

    content = read_json(path)
    kinds = dict(timestamp=(int, float), ego2global=(dict, list), images=dict)
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise DataError(f'{path}: "{key}" is missing or wrong; see docs/own_data.md')
    images = {camera: _image(image, path.parent) for camera, image in content['images'].items()}
    return Frame(images, content['timestamp'], content['ego2global'])


def _image(image, folder):
    if isinstance(image, dict):
        return dict(image, path=_image(image.get('path'), folder))
    return folder / image if isinstance(image, str) else image


def new_frames(folder, poll, idle):
    """Paths of frames' files, by name, as they appear; ends after ``idle`` seconds without one (None: never)."""
    done, last = set(), time.monotonic()
    while True:
        names = sorted(path for path in folder.glob('*.json') if path.name != CAMERAS and path not in done)
        for path in names:
            done.add(path)
            yield path
        last = time.monotonic() if names else last
        if idle is not None and time.monotonic() - last >= idle:
            return
        time.sleep(poll)


def main():
    args = parse_args()
    check_files(args.config, None, args.weights)
    from lib.errors import DataError
    from tools.api import SparseOccPredictor

    folder, out = Path(args.watch), Path(args.out)
    predictor = SparseOccPredictor(
        args.config, args.weights, args.device, args.amp, args.override, args.tf32, args.trust_weights
    )
    stream = predictor.stream(folder / CAMERAS)
    count = 0
    for path in new_frames(folder, args.poll, args.idle):
        begin = time.monotonic()
        try:
            occupancy = stream.push_frame(read_frame(path), path.stem)
        except DataError as error:  # of this frame; the drive goes on
            print(f'left out: {error}', file=sys.stderr, flush=True)
            continue
        occupancy.save(out)
        if args.pictures:
            occupancy.plot(out / f'{path.stem}.png')
        count += 1
        spent = 1000 * (time.monotonic() - begin)
        print(f'{path.stem}  {len(occupancy.voxels)} voxels  {spent:.0f} ms', flush=True)
    print(f'wrote {count} predictions to {out}')


if __name__ == '__main__':
    run_main(main)
