"""The predictor in a program: its results are those of the scripts; streams, batches, threads, what goes in and out."""

import json
import re
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

import tools.package
from lib.errors import DataError
from lib.io import load_npz_checked
from lib.metrics.formats import open_predictions
from lib.prediction import read_record
from lib.task import Task
from tools.api import Frame, Occupancy, SparseOccPredictor
from tools.api.cameras import choose_history, make_sample, read_cameras
from tools.watch_folder import main as watch_main

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).resolve().parents[2]
CONFIG, WEIGHTS = str(ROOT / 'configs/toybench/demo.py'), str(ROOT / 'weights/toybench_small.pth')
SMALL = ['task.image_size=[64, 160]', 'model.pts_bbox_head.transformer.topk_testing=[60, 150, 400]']
FORWARD, LEFT = [0.5, -0.5, 0.5, -0.5], [0.70710678, -0.70710678, 0.0, 0.0]
CAMERAS = {
    name: dict(
        intrinsic=[[140.0, 0, 80], [0, 140.0, 48], [0, 0, 1]],
        camera2ego=dict(rotation=rotation, translation=[1.0, 0.0, 1.5]),
    )
    for name, rotation in (('front', FORWARD), ('left', LEFT))
}


@pytest.fixture(scope='module')
def predictor():
    return SparseOccPredictor(CONFIG, WEIGHTS, device='cpu', override=SMALL)


def _images(seed):
    """BGR images of blocks of colour, one per camera."""
    blocks = np.random.default_rng(seed).integers(0, 255, (2, 6, 10, 3), dtype=np.uint8)
    return {name: block.repeat(16, 0).repeat(16, 1) for name, block in zip(CAMERAS, blocks)}


def _pose(metres):
    pose = np.eye(4)
    pose[0, 3] = metres
    return pose


def _drive(count, step=0.5):
    return [Frame(_images(i), step * i, _pose(4.0 * step * i)) for i in range(count)]


def _same(one, other):
    assert sorted(one.arrays) == sorted(other.arrays)
    for name, array in one.arrays.items():
        assert np.array_equal(array, other.arrays[name]), name


def _differ(one, other):
    return any(not np.array_equal(array, other.arrays[name]) for name, array in one.arrays.items())


def _write_own(folder, frames):
    for i, frame in enumerate(frames):
        for name, image in frame.images.items():
            cv2.imwrite(str(folder / f'{name}_{i}.png'), image)
    described = [
        dict(
            timestamp=frame.seconds,
            ego2global=np.asarray(frame.ego2global).tolist(),
            images={name: f'{name}_{i}.png' for name in frame.images},
        )
        for i, frame in enumerate(frames)
    ]
    content = dict(cameras=CAMERAS, sequences=[dict(name='drive', frames=described)])
    (folder / 'own.json').write_text(json.dumps(content))
    return described


def test_stream_frames_together_and_file_agree(predictor, tmp_path):
    """Arrays in memory, pushed one by one or given at once, and the same as files through the loader."""
    frames = _drive(3)
    _write_own(tmp_path, frames)
    stream = predictor.stream(CAMERAS)
    pushed = [stream.push(frame.images, frame.seconds, frame.ego2global) for frame in frames]
    for occupancy, other in zip(pushed, predictor.predict_file(str(tmp_path / 'own.json'))):
        _same(occupancy, other)
    _same(pushed[2], predictor.predict(frames[::-1], str(tmp_path / 'own.json')))
    assert [occupancy.name for occupancy in pushed] == ['0', '500000', '1000000'] and len(pushed[2].voxels) > 20
    assert _differ(pushed[2], predictor.predict(frames[2], CAMERAS))  # the history matters


def test_a_stream_sends_new_images_only_and_what_was_forgotten_again(predictor, monkeypatch):
    sent, encoder = [], predictor._model_for(2).encoder
    right = encoder._fetch
    monkeypatch.setattr(encoder, '_fetch', lambda img, *rest: sent.append(img.shape[1]) or right(img, *rest))
    stream, again = predictor.stream(CAMERAS), predictor.stream(CAMERAS)
    for frame in _drive(6):
        _same(stream.push_frame(frame), again.push_frame(frame))
    assert sent == [2] * 12
    again._cache.clear()
    last = Frame(_images(9), 3.0, _pose(12.0))
    _same(stream.push_frame(last), again.push_frame(last))
    assert sent[12:] == [2, 2 * predictor.task.num_frames]


def test_only_motion_matters(predictor):
    """A drive somewhere else on earth is the same drive; one that stands still is another."""
    frames = _drive(2)
    away = np.array([[0.0, -1, 0, 700], [1, 0, 0, -300], [0, 0, 1, 20], [0, 0, 0, 1]])
    elsewhere = [Frame(frame.images, frame.seconds + 50, away @ frame.ego2global) for frame in frames]
    here = predictor.predict(frames, CAMERAS)
    _same(here, predictor.predict(elsewhere, CAMERAS))
    standing = [Frame(frame.images, frame.seconds) for frame in frames]
    assert _differ(here, predictor.predict(standing, CAMERAS))


def test_points_are_seen_where_they_were(predictor):
    """A point ahead, in the image of now and in that of 2 m ago; the other camera, dropped, sees nothing."""
    calibration = read_cameras(CAMERAS)
    before, now = (
        predictor.read(Frame(dict(front=_images(0)['front']), s, _pose(4 * s)), calibration) for s in (0.0, 0.5)
    )
    matrices = make_sample([now, before], list(CAMERAS))['lidar2img'].double().numpy()
    u, v, depth, _ = (matrices @ [12.0, 0.5, 1.5, 1.0]).T
    assert depth[[0, 2]] == pytest.approx([11.0, 13.0]) and (depth[[1, 3]] == 0).all()
    assert (u / np.maximum(depth, 1e-5))[0] == pytest.approx(80 - 140 * 0.5 / 11.0, abs=1e-3)
    assert (v / np.maximum(depth, 1e-5))[2] == pytest.approx(48 - 32, abs=1e-3)  # the crop keeps the bottom


@pytest.mark.parametrize(
    'times, now, chosen',
    [
        ([0.0, 0.5, 1.0], 1.5, [1.0, 0.5, 0.0]),
        ([0.0, 0.45, 1.05], 1.5, [1.05, 0.45, 0.0]),  # jitter is no reason to leave one out
        ([i / 10 for i in range(20)], 2.0, [1.5, 1.0, 0.5]),
        ([0.0, 3.0], 3.5, [3.0, 0.0, 0.0]),
        ([], 1.0, [1.0, 1.0, 1.0]),
    ],
)
def test_frames_of_the_history(times, now, chosen):
    frames = [Frame({}, time) for time in times]
    assert [frame.seconds for frame in choose_history(frames, Frame({}, now), 3, 0.5)] == chosen


def test_late_frame_takes_its_place(predictor):
    frames = _drive(4)
    in_order, late = predictor.stream(CAMERAS), predictor.stream(CAMERAS)
    expected = [in_order.push_frame(frame) for frame in frames]
    got = {i: late.push_frame(frames[i]) for i in (0, 2, 1, 3)}
    _same(expected[1], got[1])
    _same(expected[3], got[3])
    assert _differ(expected[2], got[2])  # it had to do without frame 1


def test_frame_sent_again_replaces_the_first(predictor):
    frames = _drive(2)
    stream, plain = predictor.stream(CAMERAS), predictor.stream(CAMERAS)
    stream.push(_images(9), 0.0, np.eye(4))
    for frame in frames:
        again, first = stream.push_frame(frame), plain.push_frame(frame)
    _same(again, first)
    assert len(stream) == 2


@pytest.mark.parametrize('seconds', [100.5, -100.0])
def test_history_ends_at_a_long_gap_and_where_the_clock_restarts(predictor, seconds):
    stream, (before, after) = predictor.stream(CAMERAS), _drive(2)
    stream.push_frame(before)
    _same(stream.push(after.images, seconds, np.eye(4)), predictor.predict(after.images, CAMERAS))
    assert len(stream) == 1


def test_fast_frames_keep_history_and_store_small(predictor):
    """21 frames at 10 Hz: the frames kept span what the model looks back at, and no more."""
    stream, images = predictor.stream(CAMERAS), _images(0)
    for i in range(21):
        last = stream.push(images, i / 10, _pose(i / 10))
    assert 4 <= len(stream) <= 7
    wanted = [Frame(images, s, _pose(s)) for s in (0.8, 1.2, 1.6, 2.0)]
    _same(last, predictor.predict(wanted, CAMERAS))


def test_dropped_camera_and_what_is_wrong(predictor):
    stream, frames = predictor.stream(CAMERAS), _drive(2)
    stream.push_frame(frames[0])
    for images, words in (
        (dict(fron=frames[1].images['front']), "'fron' has an image but no calibration.*front"),
        (dict(front=None), 'no camera has an image'),
        (dict(front='no.jpg'), 'no.jpg does not exist'),
        (dict(front=np.zeros((4, 4))), 'uint8'),
    ):
        with pytest.raises(DataError, match=words):
            stream.push(images, 0.5, np.eye(4))
    with pytest.raises(DataError, match='rigid|rotation'):
        stream.push(frames[1].images, 0.5, 2 * np.eye(4))
    assert len(stream) == 1  # as it was before
    one = dict(front=frames[1].images['front'], left=None)
    assert _differ(stream.push(one, 0.5, frames[1].ego2global), predictor.predict(frames, CAMERAS))


def test_batch_and_other_numbers_of_cameras(predictor):
    samples = [_images(0), _drive(2), _images(1)]
    together = predictor.predict_batch(samples, CAMERAS, names=['a', 'b', 'c'])
    assert [occupancy.name for occupancy in together] == ['a', 'b', 'c']
    for sample, occupancy in zip(samples, together):
        alone = predictor.predict(sample, CAMERAS)
        # images encoded together are rounded otherwise, which moves voxels at the edge of the top k
        assert (alone.semantics == occupancy.semantics).mean() > 0.9995
    one = predictor.predict(dict(front=_images(0)['front']), dict(front=CAMERAS['front']))
    assert one.task.cameras == ('front',) and len(one.voxels)


def test_rgb_arrays_and_files_are_the_same_images(predictor, tmp_path):
    images = _images(3)
    for name, image in images.items():
        cv2.imwrite(str(tmp_path / f'{name}.png'), image)
    expected = predictor.predict(images, CAMERAS)
    _same(expected, predictor.predict({name: tmp_path / f'{name}.png' for name in images}, CAMERAS))
    rgb = SparseOccPredictor(CONFIG, WEIGHTS, device='cpu', override=SMALL, rgb=True)
    _same(expected, rgb.predict({name: image[..., ::-1] for name, image in images.items()}, CAMERAS))


def test_threads_get_their_own_results(predictor):
    """Streams of two drives and single frames at once give what they give alone."""
    expected = [predictor.predict(_images(seed), CAMERAS) for seed in range(2)]
    drives = [[Frame(_images(10 * d + i), i / 2, _pose(i)) for i in range(3)] for d in range(2)]
    alone = [predictor.predict(drive, CAMERAS) for drive in drives]
    results = {}

    def single(seed):
        results[seed] = predictor.predict(_images(seed), CAMERAS)

    def stream(number):
        line = predictor.stream(CAMERAS)
        results['drive', number] = [line.push_frame(frame) for frame in drives[number]][-1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2) for work in (single, stream)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        _same(expected[i], results[i])
        _same(alone[i], results['drive', i])


def _occupancy():
    """Three voxels of two cars and a road, handmade."""
    task = Task.from_config(dict(label_set='occ3d', panoptic=True))
    car, road = (task.label_set.class_names.index(name) for name in ('car', 'driveable_surface'))
    arrays = dict(
        occ_loc=np.array([[[0, 0, 0], [100, 120, 3], [101, 120, 3], [199, 199, 15]]], np.uint8),
        sem_pred=np.array([[road, car, car, task.label_set.free_id]], np.uint8),
        pano_sem=np.array([[road, car, car, task.label_set.free_id]], np.uint8),
        pano_inst=np.array([[3, 1, 2, 0]], np.int16),
    )
    return Occupancy(arrays, task, 'handmade', source=dict(config='c.py', weights='w.pth'))


def test_occupancy_answers_in_metres_and_voxels():
    occupancy = _occupancy()
    assert occupancy.voxels.tolist() == [[0, 0, 0], [100, 120, 3], [101, 120, 3]]
    assert np.allclose(occupancy.centres[1], [0.2, 8.2, 0.4])
    assert np.array_equal(occupancy.to_voxels(occupancy.centres), occupancy.voxels)
    points = [[0.2, 8.2, 0.4], [0.2, 8.2, 0.9], [-40.1, 0, 0], [0, 0, 99.0]]
    named = [occupancy.class_names[number] for number in occupancy.classes_at(points)]
    assert named == ['car', 'free', 'free', 'free']
    things = [(thing.id, thing.class_name, thing.is_thing, len(thing.voxels)) for thing in occupancy.list_instances()]
    assert things == [(1, 'car', True, 1), (2, 'car', True, 1), (3, 'driveable_surface', False, 1)]


def test_occupancy_is_saved_as_predictions_are(tmp_path):
    occupancy = _occupancy()
    path = occupancy.save(tmp_path / 'out')
    assert path.name == 'handmade.npz' and read_record(tmp_path / 'out')['weights'] == 'w.pth'
    files = open_predictions(str(tmp_path / 'out'), occupancy.task)
    assert np.array_equal(files.read('handmade')['semantics'], occupancy.semantics)
    other = Occupancy(occupancy.arrays, Task.from_config(dict(label_set='openocc_v2')), 'other')
    with pytest.raises(DataError, match='label set'):
        other.save(tmp_path / 'out')
    with pytest.raises(Exception, match='escape'):
        occupancy.save(tmp_path / 'out', '../escape')


def test_occupancy_is_drawn(tmp_path):
    picture = _occupancy().plot(tmp_path / 'p.png', images=dict(front=np.full((90, 160, 3), 90, np.uint8)))
    assert np.array_equal(cv2.imread(str(tmp_path / 'p.png'))[..., ::-1], picture) and picture.std() > 1


def test_names_of_the_package():
    assert tools.package.SparseOccPredictor is SparseOccPredictor and tools.package.Frame is Frame


def test_folder_is_followed(predictor, tmp_path, monkeypatch, capsys):
    """Frames as a recorder leaves them, one damaged; the result is the stream's."""
    frames = _drive(3)
    described = _write_own(tmp_path, frames)
    (tmp_path / 'cameras.json').write_text(json.dumps(dict(cameras=CAMERAS)))
    (tmp_path / 'own.json').unlink()
    for i, frame in enumerate(described):
        (tmp_path / f'frame_{i}.json').write_text(json.dumps(frame))
    (tmp_path / 'frame_1b.json').write_text('{"timestamp": 0.7')
    arguments = ['--config', CONFIG, '--weights', WEIGHTS, '--device', 'cpu', '--override', *SMALL]
    arguments += ['--watch', str(tmp_path), '--out', str(tmp_path / 'out'), '--idle', '0', '--pictures']
    monkeypatch.setattr(sys, 'argv', ['watch_folder.py', *arguments])
    watch_main()
    said = capsys.readouterr()
    assert 'wrote 3 predictions' in said.out and 'frame_1b.json' in said.err
    arrays = load_npz_checked(tmp_path / 'out' / 'frame_2.npz')
    assert np.array_equal(arrays['occ_loc'], predictor.predict(frames, CAMERAS).arrays['occ_loc'])
    assert (tmp_path / 'out' / 'frame_2.png').is_file()


def test_page_of_the_documentation_runs(tmp_path, monkeypatch):
    """Its Python as it stands, but for the paths of config and weights and a smaller network."""
    text = (ROOT / 'docs/api.md').read_text(encoding='utf-8')
    code = '\n'.join(re.findall(r'^```python\n(.*?)^```$', text, re.M | re.S))
    made = "SparseOccPredictor('configs/toybench/demo.py', 'weights/toybench_small.pth')"
    assert code.count(made) == 1
    code = code.replace(made, 'SparseOccPredictor(CONFIG, WEIGHTS, override=SMALL)')
    code = code.replace('from sparseocc import', 'from tools.package import')
    for i in range(4):
        cv2.imwrite(str(tmp_path / f'front_{i}.jpg'), cv2.resize(_images(i)['front'], (800, 450)))
    monkeypatch.chdir(tmp_path)
    names = dict(CONFIG=CONFIG, WEIGHTS=WEIGHTS, SMALL=SMALL)
    exec(compile(code, 'docs/api.md', 'exec'), names)
    assert (tmp_path / 'occupancy.png').is_file() and list((tmp_path / 'predictions').glob('*.npz'))
    assert names['occupancy'].seconds == 1.5 and len(names['both']) == 2


def test_lines_of_the_readme_run(tmp_path, monkeypatch):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    code = re.search(r'^```python\n(.*?)^```$', text, re.M | re.S).group(1)
    made = "SparseOccPredictor('configs/toybench/demo.py', 'weights/toybench_small.pth', amp=None)"
    assert code.count(made) == 1
    code = code.replace(made, 'SparseOccPredictor(CONFIG, WEIGHTS, override=SMALL)')
    code = code.replace('from sparseocc import', 'from tools.package import')
    cameras = dict(zip(('CAM_FRONT', 'CAM_BACK'), CAMERAS.values()))
    (tmp_path / 'my_cameras.json').write_text(json.dumps(dict(cameras=cameras)))
    front, back = _images(0).values()
    cv2.imwrite(str(tmp_path / 'front.jpg'), front)
    monkeypatch.chdir(tmp_path)
    names = dict(CONFIG=CONFIG, WEIGHTS=WEIGHTS, SMALL=SMALL, array=back, seconds=0.0, ego2global=_pose(0.0))
    exec(compile(code, 'README.md', 'exec'), dict(names, images=dict(CAM_FRONT=front, CAM_BACK=back)))
    assert (tmp_path / 'picture.png').is_file()
