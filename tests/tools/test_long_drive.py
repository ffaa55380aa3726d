"""Memory stays flat, however long a drive: pushed frame by frame, read from a file, and evaluated with labels.

    SPARSEOCC_DRIVE_FRAMES=3000 pytest tests/tools/test_long_drive.py    # prints the memory of the process

The tests of every day drive less far, and count what a leak would leave behind: the tensors that are alive, and the
bytes that Python and NumPy hold.
"""

import gc
import json
import os
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lib.io import load_pickle_safe, save_pickle
from lib.metrics import Evaluator
from lib.run import Components
from lib.run.evaluation import Evaluation
from lib.run.processes import Processes
from loaders import build_dataset, collate
from loaders.prepare.sweep_infos import write_sweep_infos
from models import build_model
from tools.api import Frame, SparseOccPredictor

sys.path.append(str(Path(__file__).resolve().parents[1] / 'loaders'))

from fake_nuscenes import FakeNuScenes  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / 'configs/toybench/demo.py')
SMALL = (
    'task.image_size=[64, 96]',
    'task.num_frames=3',
    'task.point_cloud_range=[-16, -16, -1, 16, 16, 5.4]',
    'model.pts_bbox_head.transformer.topk_testing=[20, 40, 80]',
)
LONG = int(os.environ.get('SPARSEOCC_DRIVE_FRAMES', 0))
WARM_UP, MEASURED = 12, 24
FRAMES = LONG or WARM_UP + MEASURED
MOST_BYTES = 3000  # that a frame may leave behind: its token and its counts; its images take 18,000 a camera
MOST_RESIDENT = 24 << 20  # bytes between a tenth and the end of a long drive: what allocators keep
CAMERAS = {
    'front': dict(
        intrinsic=[[70.0, 0, 48], [0, 70.0, 32], [0, 0, 1]],
        camera2ego=dict(rotation=[0.5, -0.5, 0.5, -0.5], translation=[1.0, 0.0, 1.5]),
    )
}


class MemoryWatch:
    """Looks at the memory at some frames of a drive; ``step`` once a frame."""

    def __init__(self):
        self.done = 0
        self.tensors, self.held, self.resident = {}, {}, {}

    def __enter__(self):
        if not LONG:
            tracemalloc.start()
        return self

    def __exit__(self, *exception):
        tracemalloc.stop()

    def step(self):
        self.done += 1
        if LONG and self.done % max(FRAMES // 10, 1) == 0:
            gc.collect()
            with open('/proc/self/statm') as file:
                self.resident[self.done] = int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
        if not LONG and self.done in (WARM_UP, FRAMES):
            gc.collect()
            alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
            self.tensors[self.done], self.held[self.done] = len(alive), tracemalloc.get_traced_memory()[0]

    def check(self, what, capsys):
        """Fail where memory grew with the number of frames."""
        assert self.done == FRAMES
        if LONG:
            with capsys.disabled():
                print(f'{what}: ' + ', '.join(f'{n} frames {used >> 20} MiB' for n, used in self.resident.items()))
            used = list(self.resident.values())
            assert used[-1] - used[0] < MOST_RESIDENT
            return
        assert self.tensors[FRAMES] <= self.tensors[WARM_UP]
        assert self.held[FRAMES] - self.held[WARM_UP] < MEASURED * MOST_BYTES


@pytest.fixture(scope='module')
def predictor():
    return SparseOccPredictor(CONFIG, None, device='cpu', override=SMALL)


def drive():
    """Frames at 2 Hz, with an image of coloured blocks each."""
    rng = np.random.default_rng(0)
    for number in range(FRAMES):
        pose = np.eye(4)
        pose[0, 3] = 2.0 * number
        image = rng.integers(0, 255, (4, 6, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        yield Frame(dict(front=image), 0.5 * number, pose)


def test_stream(predictor, capsys):
    stream = predictor.stream(CAMERAS)
    with MemoryWatch() as memory:
        for frame in drive():
            stream.push_frame(frame)
            memory.step()
    memory.check('stream', capsys)


def test_file(predictor, capsys, tmp_path):
    """As ``tools/infer.py --own`` goes through it."""
    described = []
    for number, frame in enumerate(drive()):
        cv2.imwrite(str(tmp_path / f'{number}.png'), frame.images['front'])
        images = dict(front=f'{number}.png')
        described.append(dict(timestamp=frame.seconds, ego2global=frame.ego2global.tolist(), images=images))
    content = dict(cameras=CAMERAS, sequences=[dict(name='drive', frames=described)])
    (tmp_path / 'own.json').write_text(json.dumps(content))
    with MemoryWatch() as memory:
        for _ in predictor.predict_file(str(tmp_path / 'own.json')):
            memory.step()
    memory.check('file', capsys)


def labelled(root, predictor):
    """Data set of the keyframes of two short scenes again and again, as scenes of their own."""
    fake = FakeNuScenes(root, keyframes=6, scenes=('scene-0103', 'scene-0553'))
    fake.write()
    fake.write_labels(predictor.task)
    write_sweep_infos(root, 'v1.0-mini', root, processes=1)
    content = load_pickle_safe(root / 'nuscenes_infos_val_sweep.pkl')
    infos = []
    for number in range(FRAMES):
        again, position = divmod(number, len(content['infos']))
        info = content['infos'][position]
        scene, token = f'{info["scene_name"]}-{again}', f'{info["token"]}-{again}'
        (root / 'occ3d' / scene).mkdir(exist_ok=True)
        (root / 'occ3d' / scene / token).symlink_to(root / 'occ3d' / info['scene_name'] / info['token'])
        infos.append(dict(info, scene_name=scene, scene_token=scene, token=token, timestamp=500_000 * number))
    save_pickle(root / 'infos.pkl', dict(content, infos=infos))
    section = dict(predictor.config.data.val, data_root=str(root), ann_file='infos.pkl', occ_gt_root='occ3d')
    return build_dataset(dict(section, test_mode=True), predictor.task)


def test_evaluation(predictor, capsys, tmp_path, monkeypatch):
    """As ``val.py`` goes through it."""
    dataset = labelled(tmp_path, predictor)
    model = build_model(predictor.config.model, dataset.task).eval()
    parts = Components(None, None, collate, Evaluator)
    evaluation = Evaluation(parts, dataset.task, dataset, Processes(), lambda line: None, ('ray_iou', 'miou'))
    take_in = evaluation.evaluator.add
    with MemoryWatch() as memory:
        monkeypatch.setattr(evaluation.evaluator, 'add', lambda sample: (take_in(sample), memory.step()))
        assert evaluation.run(model).num_samples == FRAMES
    memory.check('evaluation', capsys)
