"""The viewer's page: what is packed into it, and the page itself in a headless Chromium."""

import base64
import gzip
import html
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from lib.errors import UserError
from lib.geometry import make_transform
from lib.task import Task
from tools.drawing.frames import CameraView, Frame, Volume
from tools.drawing.html import write_html

TASK = Task('occ3d', panoptic=True, point_cloud_range=(-16, -16, -1, 16, 16, 2.2), voxel_size=0.4)
FREE, CAR, ROAD, MANMADE = 17, 4, 11, 15
# Ego axes (x forward, y left, z up) of a camera (x right, y down, z forward) that looks ahead.
AHEAD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
CHROMIUM = [shutil.which(name) for name in ('chromium', 'chromium-browser', 'google-chrome', 'chrome')]
FLAGS = [
    '--headless',
    '--no-sandbox',
    '--use-angle=swiftshader',
    '--enable-unsafe-swiftshader',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--virtual-time-budget=20000',
    '--dump-dom',
]


def _truth(shift=0):
    """A road, two cars and a wall; ``shift`` moves the cars ahead."""
    semantics = np.full(TASK.grid_shape, FREE, np.uint8)
    instances = np.zeros(TASK.grid_shape, np.int32)
    semantics[:, 20:60, 0] = ROAD
    semantics[20:60, 66:68, 1:7] = MANMADE
    for number, (x, y) in enumerate(((50, 28), (20, 46)), 1):
        box = np.s_[x + shift : x + shift + 10, y : y + 5, 1:4]
        semantics[box], instances[box] = CAR, number
    mask = np.zeros(TASK.grid_shape, bool)
    mask[40:] = True
    return Volume('truth', semantics, instances, mask)


def _prediction(truth):
    """A row of road missing, a piece of wall called a car, a car too many, other ids."""
    semantics, instances = truth.semantics.copy(), truth.instances.copy()
    semantics[:, 20, 0] = FREE
    semantics[20:24, 66:68, 1:7] = CAR
    semantics[40:46, 70:74, 1:4] = CAR
    instances[40:46, 70:74, 1:4] = 3
    instances[instances > 0] += 70000
    return Volume('prediction', semantics, instances)


def _frames(folder, has_truth=True, has_prediction=True, cameras=1):
    image = np.full((90, 160, 3), 120, np.uint8)
    cv2.imwrite(str(folder / 'image.png'), image)
    intrinsics = np.array([[100.0, 0, 80], [0, 100, 45], [0, 0, 1]])
    camera = CameraView('CAM_FRONT', str(folder / 'image.png'), intrinsics, make_transform(AHEAD, (1.5, 0, 1.6)))
    for i in range(3):
        truth = _truth(shift=i)
        yield Frame(
            token=f'token{i}',
            scene='drive </script><b>&',
            seconds=0.5 * i,
            global_from_ego=make_transform(np.eye(3), (2.0 * i, 0, 0)),
            truth=truth if has_truth else None,
            prediction=_prediction(truth) if has_prediction else None,
            cameras=(camera,) * cameras,
        )


def _embedded(text):
    """{id: value} of the JSON in a page."""
    found = re.findall(r'<script type="application/json" id="([^"]*)">(.*?)</script>', text, re.DOTALL)
    return {name: json.loads(content) for name, content in found}


def _unpack(text, dtype):
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype).reshape(TASK.grid_shape)


def test_page_holds_the_volumes_and_nothing_from_elsewhere(tmp_path):
    assert write_html(tmp_path / 'page.html', TASK, _frames(tmp_path), 'A <title>') == 3
    text = (tmp_path / 'page.html').read_text(encoding='utf-8')
    data = _embedded(text)
    assert set(data) == {'drive', 'sample-0', 'sample-1', 'sample-2'}
    assert '<h1>A &lt;title&gt;</h1>' in text and '{{' not in text
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', text)
    truth = _truth(shift=1)
    packed = data['sample-1']['truth']
    assert (_unpack(packed['semantics'], 'u1') == truth.semantics).all()
    assert (_unpack(packed['instances'], '<u2') == truth.instances).all()
    assert (_unpack(packed['mask'], 'u1') == truth.mask_camera).all()
    assert data['drive']['samples'][2]['position'] == [4.0, 0.0, 0.0]
    assert data['drive']['samples'][0]['scene'] == 'drive </script><b>&'


def test_large_instance_ids_are_numbered_anew(tmp_path):
    write_html(tmp_path / 'page.html', TASK, _frames(tmp_path), 'page')
    packed = _embedded((tmp_path / 'page.html').read_text(encoding='utf-8'))['sample-0']['prediction']
    instances, ours = _unpack(packed['instances'], '<u2'), _prediction(_truth()).instances
    assert instances.max() < 10 and ((instances > 0) == (ours > 0)).all()
    assert len(np.unique(instances[ours == 70001])) == 1 and len(np.unique(instances)) == 4


def test_stuff_has_no_instances(tmp_path):
    """Label files may number all segments; the page lists things."""
    volume = _truth()
    volume.instances[volume.semantics == ROAD] = 9
    write_html(tmp_path / 'page.html', TASK, [Frame('token', truth=volume)], 'page')
    packed = _embedded((tmp_path / 'page.html').read_text(encoding='utf-8'))['sample-0']['truth']
    assert np.unique(_unpack(packed['instances'], '<u2')).tolist() == [0, 1, 2]


def test_missing_image_is_said_and_left_out(tmp_path):
    frames = list(_frames(tmp_path))
    (tmp_path / 'image.png').unlink()
    lines = []
    write_html(tmp_path / 'page.html', TASK, frames, 'page', say=lines.append)
    assert len(lines) == 3 and 'image.png' in lines[0]
    camera = _embedded((tmp_path / 'page.html').read_text(encoding='utf-8'))['sample-0']['cameras'][0]
    assert camera['image'] is None and (camera['width'], camera['height']) == (480, 270)


def test_no_samples_and_too_large_a_grid_are_refused(tmp_path):
    with pytest.raises(UserError, match='no samples'):
        write_html(tmp_path / 'page.html', TASK, [], 'page')
    large = Task('occ3d', point_cloud_range=(0, 0, 0, 1100, 10, 10), voxel_size=1.0)
    with pytest.raises(UserError, match='1100'):
        write_html(tmp_path / 'page.html', large, [], 'page')
    assert not (tmp_path / 'page.html').exists()


def _run_page(page, profile, options='', size='700,500'):
    """Report of the page's self-test in Chromium."""
    chromium = next(filter(None, CHROMIUM), None)
    if chromium is None:
        pytest.skip('no Chromium on this machine (apt-get install chromium)')
    flags = FLAGS + [f'--user-data-dir={profile}', f'--window-size={size}']
    address = f'{page.as_uri()}#selftest&frames=2{options}'
    done = subprocess.run(
        [chromium, *flags, address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=240
    )
    found = re.search(r'data-report="([^"]*)"', done.stdout)
    assert found, f'the page wrote no report: {done.stdout[-300:]} {done.stderr[-600:]}'
    report = json.loads(html.unescape(found.group(1)))
    if 'WebGL' in report.get('error', ''):
        pytest.skip('this Chromium has no WebGL 2, not even in software')
    assert 'error' not in report, report['error']
    return report


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """Of a drive with truth, prediction and a camera."""
    folder = tmp_path_factory.mktemp('viewer')
    write_html(folder / 'page.html', TASK, _frames(folder), 'page')
    return _run_page(folder / 'page.html', folder / 'profile')


def test_every_mode_draws(report):
    assert list(report['modes']) == ['truth', 'prediction', 'both', 'difference', 'distance', 'offset']
    for name, mode in report['modes'].items():
        assert mode['glError'] == 0, name
        assert mode['filled'] > 0.05 and mode['colours'] > 50, name
    occupied = [int((v.semantics != FREE).sum()) for v in (_truth(), _prediction(_truth()))]
    shown = {name: [pane['voxels'] for pane in mode['panes']] for name, mode in report['modes'].items()}
    assert shown['truth'] == occupied[:1] and shown['prediction'] == occupied[1:] and shown['both'] == occupied
    assert report['overflow'] <= 0


def test_hidden_faces_are_left_out(report):
    """The faces drawn are those between a voxel and nothing; from below nobody looks."""
    padded = np.pad(_truth().semantics != FREE, 1)
    bare = sum(int((padded & ~np.roll(padded, shift, axis)).sum()) for axis in range(3) for shift in (1, -1))
    lowest = int((_truth().semantics[:, :, 0] != FREE).sum())
    assert report['modes']['truth']['panes'][0]['faces'] == bare - lowest


def test_comparison_in_the_page_is_that_of_numpy(report):
    truth, prediction = _truth().semantics, _prediction(_truth()).semantics
    there, predicted = truth != FREE, prediction != FREE
    kinds = [
        (there & (truth == prediction)).sum(),
        (there & predicted & (truth != prediction)).sum(),
        (there & ~predicted).sum(),
        (~there & predicted).sum(),
    ]
    assert report['kinds'][1:] == [int(k) for k in kinds]
    assert np.array(report['rings']).sum(axis=0)[1:].tolist() == report['kinds'][1:]
    union = ((truth == CAR) | (prediction == CAR)).sum()
    assert report['ious'][CAR] == pytest.approx(((truth == CAR) & (prediction == CAR)).sum() / union)
    assert report['ious'][0] is None  # a class that does not occur


def test_offsets_are_distances_to_the_nearest_voxel(report):
    from scipy.ndimage import distance_transform_edt

    there, predicted = _truth().semantics != FREE, _prediction(_truth()).semantics != FREE
    to_truth, to_prediction = (distance_transform_edt(~v) * TASK.voxel_size for v in (there, predicted))
    metres = np.where(predicted, to_truth, to_prediction)[there | predicted]
    ends = np.digitize(metres, [1e-6, 1.0001, 2.0001, 4.0001])
    assert report['offsets'] == np.bincount(ends, minlength=5).tolist()


def test_classes_are_switched_off_and_on(report):
    count = int((_truth().semantics == ROAD).sum())
    switched = report['withoutLargest']
    assert switched['of'] == count and switched['before'] - switched['after'] == count
    assert report['restored'] == switched['before']


def test_switches_of_legend_and_display(report):
    truth, given = _truth(), report['switches']
    occupied = truth.semantics != FREE
    assert (given['none'], given['all']) == (0, occupied.sum())
    assert given['things'] == (truth.semantics == CAR).sum()
    assert given['withoutGround'] == (occupied & (truth.semantics != ROAD)).sum()
    assert given['lowestLayer'] == occupied[:, :, 0].sum()
    assert given['masked'] == (occupied & truth.mask_camera).sum()
    near = given['nearest']
    assert near['classId'] == CAR and near['voxels'] == (truth.instances == near['id']).sum()
    assert given['withoutNearest'] == occupied.sum() - near['voxels']
    assert given['nearestAlone'] == occupied.sum() - (truth.instances > 0).sum() + near['voxels']


def test_playing_goes_on(report):
    assert report['played'] != 'token0'


def test_mouse_fingers_and_keys(report):
    given = report['input']
    assert given['drag']['azimuth'] != 0 and given['drag']['elevation'] != 0 and given['drag']['moved'] == 0
    assert given['shiftDrag']['azimuth'] == 0 and given['shiftDrag']['moved'] > 0
    assert given['pinch']['zoomed'] == pytest.approx(0.5, abs=0.01)
    assert given['wheel']['zoomed'] < 0.9
    assert given['keys']['moved'] > 0 and given['keys']['azimuth'] < 0 and given['keys']['zoomed'] < 1
    assert given['mode'][0] != given['mode'][1] and given['theme'][0] != given['theme'][1]
    assert given['token'] == ['token0', 'token1']


def test_voxel_under_the_pointer_and_overlay(report):
    assert 'driveable surface' in report['picked'] or 'car' in report['picked']
    assert len(report['overlays']) == 1 and 0.2 < report['overlays'][0] < 0.9
    assert report['last']['token'] == 'token2' and report['otherTheme']['filled'] > 0.05


def test_page_without_labels_on_a_narrow_screen(tmp_path):
    write_html(tmp_path / 'page.html', TASK, _frames(tmp_path, has_truth=False, cameras=0), 'page')
    report = _run_page(tmp_path / 'page.html', tmp_path / 'profile', '&theme=dark', size='500,800')
    assert list(report['modes']) == ['prediction'] and report['modes']['prediction']['filled'] > 0.05
    assert report['overflow'] <= 0 and report['overlays'] == []


def test_page_with_labels_alone(tmp_path):
    write_html(tmp_path / 'page.html', TASK, [Frame('labels.npz', truth=_truth())], 'page', image_width=0)
    report = _run_page(tmp_path / 'page.html', tmp_path / 'profile')
    assert list(report['modes']) == ['truth'] and report['samples'] == 1
