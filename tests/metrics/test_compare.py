"""Results side by side: what is called real, what cannot be compared, and what is written."""

import csv
import html.parser
import json

import numpy as np
import pytest

from lib.errors import DataError
from lib.metrics import Evaluator
from lib.metrics.command import command
from lib.metrics.compare import as_html, as_markdown, as_text, compare, csv_rows, read_result
from lib.task import Task

LABELS = dict(name='small', class_names=('car', 'road', 'free'), things=('car',))
TASK = Task(LABELS, point_cloud_range=(-8.0, -8.0, -1.0, 8.0, 8.0, 1.0), voxel_size=0.5)
ORIGINS = np.array([[0.0, 0.0, 0.4], [2.0, 1.0, 0.4]])


def street(seed):
    rng = np.random.default_rng(seed)
    semantics = np.full(TASK.grid_shape, 2, np.uint8)
    semantics[:, :, 0] = 1
    semantics[rng.random(TASK.grid_shape) < 0.02] = 0
    return semantics


def scored(path, quality, metrics=('ray_iou', 'miou'), scenes=8, mask='none', thresholds=(1, 2, 4), seed=0):
    """The file of a model that gets a voxel right with this probability."""
    evaluator = Evaluator(TASK, metrics, miou_mask=mask, thresholds=thresholds)
    for number in range(2 * scenes):
        truth, other = street(number), street(number + 1000)
        wrong = np.random.default_rng([number, 5 + seed]).random(TASK.grid_shape) > quality
        labels = dict(semantics=truth, mask_camera=np.ones(TASK.grid_shape))
        scene = f'scene {number // 2}' if scenes > 1 else ''
        evaluator.update(np.where(wrong, other, truth), labels, ORIGINS, f'token {number}', scene)
    path.write_text(json.dumps(evaluator.compute().as_dict(details=True)))
    return path


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('results')
    models = (('a', 0.9, 0), ('b', 0.9, 1), ('c', 0.97, 0))  # the second errs as often, elsewhere
    return [scored(folder / f'{name}.json', quality, seed=seed) for name, quality, seed in models]


@pytest.fixture(scope='module')
def comparison(files):
    return compare([read_result(path) for path in files])


def test_scores_and_differences_are_those_of_the_files(files, comparison):
    contents = [json.loads(path.read_text()) for path in files]
    assert list(comparison.names) == ['RayIoU', 'mIoU', 'binary_IoU']
    for name in comparison.names:
        for content, one in zip(contents[1:], comparison.differences[name]):
            assert one.value == content[name] - contents[0][name]
            assert one.bounds[0] <= one.value <= one.bounds[1]


def test_large_differences_are_real_and_small_ones_chance(comparison):
    small, large = comparison.differences['mIoU']
    assert large.real and large.value > 0.02
    assert not small.real and small.bounds[0] < 0 < small.bounds[1]
    assert 'real' in as_text(comparison) and 'chance' in as_text(comparison)


def test_pairs_are_judged_more_sharply_than_their_intervals(files):
    """The same scenes are hard for all models: the paired interval is narrower than those of the scores."""
    first, third = read_result(files[0]), read_result(files[2])
    (one,) = compare([first, third]).differences['RayIoU']
    apart = [result.content['intervals']['RayIoU'] for result in (first, third)]
    assert one.bounds[1] - one.bounds[0] < sum(high - low for low, high in apart)


def test_a_model_is_no_better_than_itself(files):
    (one,) = compare([read_result(files[0], 'x'), read_result(files[0], 'y')]).differences['RayIoU']
    assert one.value == 0 and one.bounds == (0, 0) and not one.real


def test_what_does_not_fit_is_named(files, tmp_path):
    first = read_result(files[0])
    with pytest.raises(DataError, match='different numbers of samples'):
        compare([first, read_result(scored(tmp_path / 'd.json', 0.9, scenes=3))])
    with pytest.raises(DataError, match='different thresholds'):
        compare([first, read_result(scored(tmp_path / 'd.json', 0.9, thresholds=[1, 2]))])
    (tmp_path / 'e.json').write_text('{"num_samples": 5}')
    with pytest.raises(DataError, match="e.json has no 'per_class'; give files of"):
        read_result(tmp_path / 'e.json')
    (tmp_path / 'e.json').write_text(json.dumps(dict(first.content, tallies=dict(scene=5))))
    with pytest.raises(DataError, match="'tallies' is damaged"):
        read_result(tmp_path / 'e.json')


def test_other_masks_are_not_compared(files, tmp_path):
    other = read_result(scored(tmp_path / 'd.json', 0.9, mask='camera'))
    found = compare([read_result(files[0]), other])
    assert list(found.names) == ['RayIoU'] and 'mIoU is left out: it counts different voxels' in as_text(found)


def test_without_scenes_there_are_no_verdicts(tmp_path):
    one, two = (scored(tmp_path / f'{name}.json', 0.9, scenes=1) for name in 'ab')
    found = compare([read_result(one), read_result(two)])
    assert all(one.bounds is None for ones in found.differences.values() for one in ones)
    assert 'no intervals of differences' in as_text(found)


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and notes what the page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.fetched = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.fetched += [value for name, value in attributes if name in ('src', 'href')]
        if tag != 'meta':
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file(comparison):
    page = Page()
    text = as_html(comparison)
    page.feed(text)
    assert page.open == [] and page.fetched == [] and 'url(' not in text and '@import' not in text
    assert page.seen.count('svg') == 4 and page.seen.count('table') == 4  # scores, differences, two by class
    assert page.seen.count('circle') == 6 and page.seen.count('rect') == 3 * (3 + 2 + 2)


def test_names_are_text_in_the_page(files):
    text = as_html(compare([read_result(path, '<script>alert(1)</script>') for path in files[:2]]))
    assert '<script' not in text and '&lt;script&gt;' in text


def test_command_writes_all_forms(files, tmp_path, capsys):
    out = {suffix: tmp_path / f'comparison.{suffix}' for suffix in ('md', 'csv', 'html')}
    arguments = ['--markdown', str(out['md']), '--csv', str(out['csv']), '--html', str(out['html'])]
    command(['compare', *map(str, files), '--names', 'one', 'two', 'three', *arguments])
    printed = capsys.readouterr()
    assert 'Difference from one' in printed.out and all(f'wrote {path}\n' in printed.err for path in out.values())
    table = out['md'].read_text().splitlines()
    assert '| | one | two | three |' in [line.replace('  ', ' ') for line in table]
    rows = list(csv.DictReader(out['csv'].open()))
    row = next(row for row in rows if row['model'] == 'three' and row['score'] == 'mIoU' and not row['class'])
    assert float(row['above_low']) <= float(row['above_first']) <= float(row['above_high'])
    assert out['html'].read_text().startswith('<!doctype html>')
    with pytest.raises(SystemExit):
        command(['compare', str(files[0]), '--names', 'one', 'two'])


def test_rows_and_markdown_agree(comparison):
    value = next(row for row in csv_rows(comparison) if row[:3] == ['c', '', 'RayIoU'])[3]
    assert f'{100 * value:.2f} [' in as_markdown(comparison)
