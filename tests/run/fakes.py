"""A model, a data set and an evaluator so small that a run takes milliseconds; also as a script:

    python tests/run/fakes.py train --config C ... + val --config C ...

with the arguments of train.py and val.py; ``+`` separates runs that follow each other in the same process.
``train.py`` and ``val.py`` instead of ``train`` and ``val`` run the real scripts in the same way.

The model has what makes runs hard to repeat: dropout, draws that depend on the epoch, and a loss normaliser
that is not linear in the batch.
"""

import importlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from lib.cli import run_main  # noqa: E402
from lib.dist import count_share, reduce_mean  # noqa: E402
from lib.errors import ConfigError, DataError, UserError  # noqa: E402
from lib.run import Components  # noqa: E402
from lib.run.processes import start_processes  # noqa: E402
from lib.targets import OccupancyTargets  # noqa: E402

CONFIG = """
task = dict(label_set='occ3d', point_cloud_range=[0, 0, 0, 1.6, 1.6, 0.8], voxel_size=0.4)
model = dict(type='Fake')
data = dict(workers_per_gpu=0, train=dict(type='Fake', length=21), val=dict(type='Fake', length=7))
optimizer = dict(type='AdamW', lr=0.01, weight_decay=0.01,
                 paramwise_cfg=dict(custom_keys={'slow': dict(lr_mult=0.1)}))
optimizer_config = dict(grad_clip=dict(max_norm=35, norm_type=2))
lr_config = dict(policy='CosineAnnealing', warmup='linear', warmup_iters=4, warmup_ratio=1.0 / 3,
                 min_lr_ratio=1e-3)
runner = dict(max_epochs=3)
total_batch_size = 8
train = dict(log_interval=1, tensorboard=False)
evaluation = dict(interval=0)
seed = 5
"""


class FakeModel(nn.Module):
    """A small network.

    nan_at: samples whose loss is NaN; normed: with the loss that is not linear; shares: recall, empty masks;
    batch_norm: statistics that each process gathers for itself.
    """

    def __init__(self, dropout=0.3, nan_at=(), normed=True, shares=None, batch_norm=False):
        super().__init__()
        self.first, self.slow, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.dropout, self.nan_at = nn.Dropout(dropout), set(nan_at)
        self.norm = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        self.history, self.normed, self.shares = 'full', normed, shares

    def forward(self, img, lidar2img, ego2lidar, img_metas=None, targets=None, return_loss=True):
        out = self.last(self.dropout(torch.relu(self.slow(torch.relu(self.norm(self.first(img)))))))
        if not return_loss:
            label = int(abs(float(out.sum())) * 1000) % 17
            voxels = np.array([[[0, 0, 0], [0, 0, 1]]], np.uint8)
            return [dict(sem_pred=np.full((1, 2), label, np.uint8), occ_loc=voxels) for _ in img]
        counts = targets.voxel_semantics.float()  # as the number of instances, it differs from sample to sample
        errors = (out - img[:, :3]).pow(2).sum(1)
        if any(meta['index'] in self.nan_at for meta in img_metas):
            errors = errors * float('nan')
        losses = dict(loss_mean=errors.mean())
        if self.shares:
            count_share('recall_0', self.shares[0] * len(img), len(img))
            count_share('empty_masks', torch.tensor(self.shares[1]), 1)
            count_share('right_class/car', counts.sum() * 0 + 1, 2)
            count_share('right_class/bus', 0, 0)
        if self.normed:
            losses['loss_normed'] = (errors * counts).sum() / reduce_mean(counts.sum()).clamp(1)
        return losses

    def reset_history(self):
        """Nothing is kept."""


class FakeDataset:
    """Random samples that depend on (seed, epoch, index).

    ``trouble`` maps an index to what goes wrong there, in epoch ``trouble_epoch`` (0-based) or in all.
    """

    def __init__(
        self,
        task,
        length,
        seed=0,
        on_error='stop',
        max_skipped=10,
        max_samples=None,
        test_mode=False,
        trouble=None,
        trouble_epoch=None,
        delay=0.0,
        with_objects=True,
    ):
        self.length, self.seed, self.epoch = min(length, max_samples or length), seed, 0
        self.on_error, self.trouble, self.delay = on_error, dict(trouble or {}), delay
        self.trouble_epoch, self.with_objects = trouble_epoch, with_objects

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        time.sleep(self.delay)
        if self.trouble_epoch in (None, self.epoch):
            self._trouble(self.trouble.get(index))
        draws = np.random.default_rng([self.seed, self.epoch, index]).standard_normal(6).astype(np.float32)
        return dict(
            img=torch.from_numpy(draws),
            lidar2img=torch.eye(4),
            ego2lidar=torch.eye(4),
            targets=OccupancyTargets(voxel_semantics=torch.tensor(index % 5)),
            img_metas=dict(sample_token=f'token{index}', index=index),
        )

    def _trouble(self, kind):
        if kind == 'unreadable':
            raise DataError('images/a.jpg is damaged; fetch it again')
        if kind == 'files':
            raise OSError(24, 'Too many open files')
        if kind == 'crash':
            raise SystemExit(9)
        if kind == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == 'sigterm':
            os.kill(os.getpid(), signal.SIGTERM)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def object_classes(self, index):
        return ['car', *(['bus'] if index % 7 == 0 else [])] if self.with_objects else []

    def sample_token(self, index):
        return f'token{index}'

    def scene_name(self, index):
        return ''

    def ground_truth(self, index, names=()):
        return dict(semantics=np.full((4, 4, 2), index % 17, np.uint8))

    def ray_origins(self, index):
        return np.zeros((1, 3))


def collate(samples):
    """As the project's own, of the keys there are here."""
    batch = {key: torch.stack([s[key] for s in samples]) for key in ('img', 'lidar2img', 'ego2lidar')}
    targets = OccupancyTargets(voxel_semantics=torch.stack([s['targets'].voxel_semantics for s in samples]))
    return dict(batch, img_metas=[s['img_metas'] for s in samples], targets=targets)


class FakeResult:
    def __init__(self, scores):
        self.scores, self.num_samples = scores, len(scores)

    def as_dict(self, details=False):
        return dict(
            RayIoU=sum(self.scores) / len(self.scores),
            order=[float(s) for s in self.scores],
            num_samples=len(self.scores),
        )

    def as_table(self):
        return f'scores {self.scores}'


class FakeEvaluator:
    def __init__(self, task, metrics, device):
        self.metrics = metrics
        self.reset()

    def reset(self):
        self.scores = {}

    def update(self, prediction, labels, origins, token, scene):
        assert token not in self.scores
        self.scores[token] = float(prediction['semantics'].mean() + 0.01 * labels['semantics'].mean())

    def merge(self, *others):
        for other in others:
            assert not set(other.scores) & set(self.scores)
            self.scores.update(other.scores)

    def compute(self):
        return FakeResult([self.scores[token] for token in sorted(self.scores, key=lambda token: int(token[5:]))])


def build_model(cfg, task):
    if cfg['type'] != 'Fake':
        raise ConfigError('unknown type {!r}'.format(cfg['type']))
    return FakeModel(**{key: value for key, value in cfg.items() if key != 'type'})


def build_dataset(cfg, task):
    return FakeDataset(task, **{key: value for key, value in cfg.items() if key != 'type'})


def components():
    return Components(build_model, build_dataset, collate, FakeEvaluator, draw=draw)


def draw(task, truth, prediction, title):
    """A picture of two rows of grey: true classes and predicted ones."""
    rows = [volume['semantics'].reshape(1, -1, 1) for volume in (truth, prediction)]
    return np.concatenate(rows).repeat(3, axis=2)


def run_script(name, arguments):
    """One of the scripts with the fake parts, or ``train.py``, ``val.py`` themselves; the exit status."""
    if name.endswith('.py'):
        sys.argv = [name] + arguments
        try:
            importlib.import_module(name[:-3]).main()
        except SystemExit as stop:
            return stop.code
    if name == 'train':
        import train
        from lib.run.train_script import run_training

        return run_training(train.parse_args(arguments), components)
    import val
    from lib.run.evaluation import run_validation

    return run_validation(val.parse_args(arguments), components)


def main():
    """Runs separated by ``+``; one that fails prints its sentence and the next one begins."""
    runs, status = ' '.join(sys.argv[1:]).split(' + '), 0
    with start_processes('cpu'):
        for run in runs:
            name, *arguments = shlex.split(run)
            try:
                status = run_script(name, arguments)
            except UserError as error:
                print(f'error: {error}', flush=True)
                status = 2
    sys.exit(status)


if __name__ == '__main__':
    run_main(main)
