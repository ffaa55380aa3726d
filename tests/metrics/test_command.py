"""sparseocc-eval from files to files, and its sentences about what is missing."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lib.errors import ConfigError, DataError, UserError
from lib.io import save_npz, save_pickle, write_json
from lib.labels import read_labels
from lib.metrics import Evaluator
from lib.metrics.command import command, parse, read_task, results_in_order
from lib.metrics.formats import open_predictions
from lib.metrics.origins import read_keyframes
from lib.task import Task

CLASSES = ('car', 'road', 'tree', 'free')
LABEL_SET = dict(name='small', class_names=CLASSES, things=('car',))
GRID = dict(point_cloud_range=[-8.0, -8.0, -1.0, 8.0, 8.0, 1.0], voxel_size=0.5)
TASK = Task.from_config(dict(label_set=LABEL_SET, **GRID))
ABOUT = {
    'method': 'm',
    'team': 't',
    'authors': ['a'],
    'e-mail': 'e',
    'institution / company': 'i',
    'country / region': 'c',
}


def keyframe(number):
    """Two scenes of three keyframes, 1 m apart."""
    return dict(
        token=f'token{number}',
        scene_name=f'scene-{number // 3}',
        timestamp=number * 500_000,
        cams={},
        lidar2ego_rotation=[1.0, 0.0, 0.0, 0.0],
        lidar2ego_translation=[0.5, 0.0, 0.4],
        ego2global_rotation=[1.0, 0.0, 0.0, 0.0],
        ego2global_translation=[float(number), 0.0, 0.0],
    )


def volumes(seed):
    rng = np.random.default_rng(seed)
    semantics = np.full(TASK.grid_shape, 3, np.uint8)
    semantics[:, :, 0] = 1
    semantics[rng.random(TASK.grid_shape) < 0.03] = 0
    instances = np.where(semantics == 0, rng.integers(1, 4, TASK.grid_shape), 0).astype(np.uint8)
    flow = rng.normal(size=TASK.grid_shape + (2,)).astype(np.float32)
    return dict(semantics=semantics, instances=instances, flow=flow)


@pytest.fixture
def data(tmp_path):
    """Labels, predictions, infos and the label set of six samples."""
    for number in range(6):
        truth, prediction = volumes(number), volumes(number)
        lost = np.random.default_rng(number + 50).random(TASK.grid_shape) < 0.2
        prediction['semantics'][lost], prediction['instances'][lost] = 3, 0
        mask = np.random.default_rng(number + 90).random(TASK.grid_shape) < 0.5
        label = tmp_path / 'labels' / f'scene-{number // 3}' / f'token{number}' / 'labels.npz'
        save_npz(label, dict(truth, mask_camera=mask))
        prediction['pred'] = prediction.pop('semantics')
        save_npz(tmp_path / 'predictions' / f'token{number}.npz', prediction)
    save_pickle(tmp_path / 'infos.pkl', dict(infos=[keyframe(number) for number in range(6)], metadata={}))
    write_json(tmp_path / 'small.json', dict(LABEL_SET, **GRID))
    write_json(tmp_path / 'about.json', ABOUT)
    return tmp_path


def run(data, *arguments, infos=True, predictions=True):
    """Run the command on the data; the JSON that it writes."""
    words = ['--labels', str(data / 'labels'), '--label-set', str(data / 'small.json')]
    words += ['--infos', str(data / 'infos.pkl')] if infos else []
    words += ['--predictions', str(data / 'predictions')] if predictions else []
    command([*words, '--json', str(data / 'scores.json'), '--workers', '1', *map(str, arguments)])
    return json.loads((data / 'scores.json').read_text())


def expected(data, metrics, samples=range(6)):
    """The same by the evaluator itself."""
    evaluator, keyframes = (
        Evaluator(TASK, metrics, breakdown=True),
        read_keyframes(data / 'infos.pkl', GRID['point_cloud_range']),
    )
    for number in samples:
        token, scene = f'token{number}', f'scene-{number // 3}'
        labels = read_labels(data / 'labels' / scene / token / 'labels.npz', TASK, evaluator.needed)
        prediction = open_predictions(data / 'predictions', TASK).read(token)
        evaluator.update(prediction, labels, keyframes.origins[token], token, scene)
    return evaluator.compute()


def test_scores_are_those_of_the_evaluator(data, capsys):
    metrics = ['ray_iou', 'ray_pq', 'miou', 'occ_score']
    found = run(data, '--metrics', *metrics)
    result = expected(data, metrics)
    assert {key: value for key, value in found.items() if key != 'run'} == json.loads(
        json.dumps(result.as_dict(details=True))
    )
    assert found['run']['predictions'] == str(data / 'predictions') and len(found['scenes']) == 2
    printed = capsys.readouterr()
    assert result.as_table() in printed.out and 'rings' in printed.out and 'sectors' in printed.out
    assert '6 predictions' in printed.err and 'scored 6 samples' in printed.err


@pytest.mark.parametrize('workers', [1, 3])
def test_any_number_of_threads_and_a_file_of_poses_give_the_same(data, workers):
    by_infos = run(data)
    command(['origins', '--infos', str(data / 'infos.pkl'), '--out', str(data / 'poses.npz')])
    by_poses = run(data, '--origins', data / 'poses.npz', '--workers', workers, infos=False)
    assert dict(by_poses, run=None) == dict(by_infos, run=None)
    assert 'RayIoU' in by_infos and 'mIoU' in by_infos and 'RayPQ' not in by_infos


def test_miou_alone_needs_no_infos(data):
    found = run(data, '--miou-mask', 'none', infos=False)
    assert 'RayIoU' not in found and found['mIoU_voxels'] == 'all' and len(found['scenes']) == 2


def test_scores_go_into_files(data, capsys):
    run(data, '--csv', data / 'scores.csv', '--per-sample', data / 'samples.csv')
    said = capsys.readouterr().err
    assert all(f'wrote {data / name}\n' in said for name in ('scores.json', 'scores.csv', 'samples.csv'))
    rows = list(csv.DictReader((data / 'scores.csv').open()))
    totals = {row['score']: row for row in rows if row['part'] == 'total'}
    found = json.loads((data / 'scores.json').read_text())
    assert float(totals['RayIoU']['value']) == found['RayIoU']
    assert [float(totals['mIoU'][end]) for end in ('low', 'high')] == found['intervals']['mIoU']
    assert {row['part'] for row in rows} == {'total', 'class', 'rings', 'sectors', 'scenes'}
    samples = list(csv.DictReader((data / 'samples.csv').open()))
    alone = expected(data, ['ray_iou', 'miou'], [4]).totals
    assert float(samples[4]['RayIoU']) == alone['RayIoU'] and samples[4]['scene'] == 'scene-1'
    run(data, '--per-sample', data / 'samples.json')
    assert json.loads((data / 'samples.json').read_text())[4]['mIoU'] == alone['mIoU']


def test_missing_predictions_are_an_error_unless_left_out(data, capsys):
    (data / 'predictions' / 'token0.npz').unlink()
    with pytest.raises(DataError, match='1 of 6 samples have no prediction, e.g. token0.*--only-predicted'):
        run(data)
    assert run(data, '--only-predicted')['num_samples'] == 5
    assert 'left out: 1 sample' in capsys.readouterr().err
    assert run(data, '--only-predicted', '--max-samples', 3)['num_samples'] == 2


def test_missing_labels_are_an_error(data):
    (data / 'labels' / 'scene-0' / 'token1' / 'labels.npz').unlink()
    with pytest.raises(DataError, match='1 of 6 samples have no label, e.g. .*token1/labels.npz; fetch them'):
        run(data)
    shutil.rmtree(str(data / 'labels'))
    with pytest.raises(DataError, match='label folder .* does not exist; correct .*--labels'):
        run(data)


def test_a_damaged_file_is_named(data):
    (data / 'predictions' / 'token3.npz').write_bytes(b'PK\x03\x04')
    with pytest.raises(DataError, match='token3.npz is damaged'):
        run(data)


def test_what_cannot_be_scored_is_said_first(data):
    with pytest.raises(UserError, match='give --infos or --origins'):
        run(data, '--metrics', 'ray_iou', infos=False)
    with pytest.raises(UserError, match='cannot write .*infos.pkl/scores.csv: .*infos.pkl is no folder'):
        run(data, '--csv', data / 'infos.pkl' / 'scores.csv')
    with pytest.raises(UserError, match='a submission.gz says whose it is; give --about'):
        run(data, '--submission', data / 'out.gz')
    for words in (
        ['--predictions', 'p'],
        ['--labels', 'l'],
        ['--labels', 'l', '--predictions', 'p', '--infos', 'i', '--origins', 'o'],
    ):
        with pytest.raises(SystemExit):
            parse(words)


@pytest.mark.parametrize(
    'arguments',
    [
        ('--device', 'foo'),
        ('--device', 'cuda:x'),
        ('--max-samples', '0'),
        ('--max-samples', '-1'),
        ('--workers', '0'),
        ('--thresholds', '1', 'nan'),
        ('--thresholds', '0'),
        ('--submission', 'results.tar'),
        ('--submission', 'folder'),
    ],
)
def test_arguments_of_no_use_are_refused(data, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run(data, *arguments)
    assert stop.value.code == 2
    assert f'{arguments[0]}' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('argument', ['--csv', '--per-sample', '--submission'])
def test_outputs_are_looked_at_before_the_work(data, argument, monkeypatch):
    monkeypatch.setattr(Evaluator, 'prepare', None)
    folder = data / 'folder.zip'
    folder.mkdir()
    with pytest.raises(UserError, match='folder.zip, which is a folder'):
        run(data, argument, folder)


def test_packages_that_are_missing_are_named(data, monkeypatch):
    monkeypatch.setattr('lib.metrics.command._PACKAGES', ('numpy', 'a_package_of_nobody'))
    with pytest.raises(UserError, match='pip install a_package_of_nobody'):
        run(data)


def test_without_pytorch_the_cpu_casts_and_says_so(data, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'torch' else name)
    with pytest.warns(RuntimeWarning, match='PyTorch is not installed, so rays are cast on the CPU'):
        found = run(data, '--device', 'cuda')
    assert dict(found, run=None) == dict(run(data), run=None)


def test_submissions_are_written_and_scored(data):
    direct = run(data, '--metrics', 'occ_score', '--submission', data / 'out.gz', '--about', data / 'about.json')
    submitted = run(data, '--score-submission', data / 'out.gz', predictions=False)
    assert dict(submitted, run=None) == dict(direct, run=None) and 'OccScore_true_positives' in direct
    run(data, '--submission', data / 'out.zip')
    whole = run(data)
    by_zip = run(data, '--predictions', data / 'out.zip', predictions=False)
    assert by_zip['RayIoU'] == whole['RayIoU']
    with pytest.raises(UserError, match='leave --metrics out'):
        run(data, '--score-submission', data / 'out.gz', '--metrics', 'miou', predictions=False)


def test_label_sets_by_name_and_file(tmp_path):
    assert read_task('openocc_v2').label_set.free_id == 16
    write_json(tmp_path / 'own.json', dict(LABEL_SET, **GRID))
    assert read_task(str(tmp_path / 'own.json')) == TASK
    with pytest.raises(ConfigError, match='unknown label set'):
        read_task('occ4d')
    write_json(tmp_path / 'own.json', ['car'])
    with pytest.raises(DataError, match='must hold a label set'):
        read_task(str(tmp_path / 'own.json'))


def test_origins_from_infos_or_tables(data):
    with pytest.raises(SystemExit):
        command(['origins'])
    with pytest.raises(DataError, match='scene.json does not exist'):
        command(['origins', '--tables', str(data)])


def test_the_training_loop_of_the_docs(tmp_path, monkeypatch, capsys):
    """The lines of docs/evaluate_your_model.md as they stand."""
    page = (Path(__file__).resolve().parents[2] / 'docs' / 'evaluate_your_model.md').read_text(encoding='utf-8')
    code = page.split('## In a training loop')[1].split('```python\n')[1].split('```')[0]
    monkeypatch.chdir(tmp_path)
    save_pickle('nuscenes_infos_val.pkl', dict(infos=[keyframe(number) for number in range(6)], metadata={}))
    truth = np.full((200, 200, 16), 17, np.uint8)
    truth[:, :, 2] = 11
    names = dict(
        predictions=[(f'token{number}', truth) for number in (0, 4)],
        labels={f'token{number}': dict(semantics=truth, mask_camera=truth < 18) for number in range(6)},
    )
    exec(compile(code.replace('from sparseocc import', 'from tools.package import'), 'the page', 'exec'), names)
    assert names['evaluator'].compute().totals['RayIoU'] == 1.0
    assert '2 samples' in capsys.readouterr().out


def test_results_come_in_order_and_errors_end_the_work():
    assert list(results_in_order(lambda item: item * 2, range(20), workers=3)) == list(range(0, 40, 2))
    done = []

    def work(item):
        done.append(item)
        return 1 // (item - 3)

    with pytest.raises(ZeroDivisionError):
        list(results_in_order(work, range(1000), workers=1))
    assert len(done) < 20
