"""tools/bench_evaluation.py: the made-up samples are of real size, and the evaluator takes them."""

import json
import sys

import numpy as np

from lib.metrics.command import command
from tools.bench_evaluation import FREE, main


def test_made_up_samples_are_of_real_size_and_can_be_scored(tmp_path, monkeypatch, capsys):
    arguments = ['make', '--out', str(tmp_path), '--samples', '3', '--distinct', '2']
    monkeypatch.setattr(sys, 'argv', ['bench_evaluation.py', *arguments])
    main()
    assert '3 samples' in capsys.readouterr().out
    files = sorted((tmp_path / 'labels').rglob('labels.npz'))
    assert len(files) == 3 and files[0].samefile(files[2]) and not files[0].samefile(files[1])
    with np.load(str(files[1])) as labels:
        assert 30_000 < np.count_nonzero(labels['semantics'] != FREE) < 50_000
    words = ['--predictions', str(tmp_path / 'predictions'), '--labels', str(tmp_path / 'labels'), '--workers', '1']
    words += ['--origins', str(tmp_path / 'poses.json'), '--metrics', 'ray_iou', 'ray_pq', 'miou']
    command([*words, '--json', str(tmp_path / 'scores.json')])
    scores = json.loads((tmp_path / 'scores.json').read_text())
    assert scores['num_samples'] == 3 and all(0.2 < scores[name] < 0.95 for name in ('RayIoU', 'RayPQ', 'mIoU'))
