"""The recipes of docs/architecture.md, carried out: their blocks are written to a folder of one's own and used."""

import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lib.config import load_config
from lib.errors import DataError
from lib.io import save_npz, save_pickle
from lib.labels import read_labels
from lib.metrics import Evaluator
from lib.prediction import to_dense
from lib.run import Components
from lib.run.evaluation import Evaluation
from lib.run.processes import Processes
from lib.targets import stack_targets
from lib.task import Task
from loaders import build_dataset, collate
from loaders.own_data import read_own_data
from loaders.pipelines.augmentation import BEVAug, BEVTransform
from models import build_model
from tools.synthetic import synthetic_batch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests' / 'models'))

from small_model import small_batch, small_config, small_task  # noqa: E402

PAGE = (ROOT / 'docs/architecture.md').read_text(encoding='utf-8')
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def carry_out(tmp_path, monkeypatch):
    """Write the blocks of a recipe, and give the config that one of them is."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(title, config):
        section = PAGE.split(f'\n### {title}\n')[1].split('\n### ')[0]
        for block in re.findall(r'^```python\n(.*?)^```$', section, re.M | re.S):
            name = re.match(r'# (\w+\.py)\n', block).group(1)
            (tmp_path / name).write_text(block.replace("_base_ = './", f"_base_ = '{ROOT.as_posix()}/configs/"))
        return load_config(str(tmp_path / config), [])

    yield write
    for name in set(sys.modules) - before:
        if name.startswith('my_'):
            del sys.modules[name]


def small_version(cfg):
    """The small model with what the recipe's config says of the head."""
    small = small_config()
    head = {key: value for key, value in cfg.model.pts_bbox_head.items() if key not in ('transformer', 'embed_dims')}
    small['pts_bbox_head'].update(head)
    return small


def built(cfg, task):
    torch.manual_seed(0)
    return build_model(cfg, task)


def test_every_recipe_is_carried_out_here():
    assert re.findall(r'^### (.*)$', PAGE.split('## Five recipes')[1], re.M) == [
        'A loss',
        'An output',
        'A data set',
        'A camera rig',
        'A label set',
    ]


def test_a_loss(carry_out):
    task = small_task()
    losses = built(small_version(carry_out('A loss', 'flat_world.py')), task)(**small_batch(task))
    assert {'loss_flat_0', 'loss_flat_1', 'loss_flat_2', 'loss_sem_ce_0', 'loss_mask_0'} < set(losses)
    assert losses['loss_flat_0'] > 0 and losses['loss_flat_0'].requires_grad


def test_an_auxiliary_loss(carry_out):
    task, cfg = small_task(), carry_out('A loss', 'small_features.py')
    model = built(dict(small_version(cfg), auxiliary_losses=cfg.model.auxiliary_losses), task)
    losses = model(**small_batch(task))
    losses['loss_features'].backward()
    assert model.img_neck.fpn_convs[0].conv.weight.grad.abs().sum() > 0 and 'loss_sem_ce_0' in losses


def test_an_output(carry_out, tmp_path):
    task = small_task(panoptic=False)
    cfg = carry_out('An output', 'openocc_flow.py')
    assert [step['type'] for step in cfg.data.train.pipeline][2] == 'LoadFlow'
    import my_flow

    # the field: read from a file, turned with the volume, stacked
    batch = small_batch(task)
    semantics = batch['targets'].voxel_semantics[0].numpy()
    flow = np.broadcast_to(np.float32([2.0, -1.0]), task.grid_shape + (2,))
    save_npz(tmp_path / 'labels.npz', dict(semantics=semantics, flow=flow))
    folder = type('Folder', (), dict(path=lambda self, info: tmp_path / 'labels.npz'))()
    one = type(batch['targets'])(semantics, batch['targets'].voxel_instances[0].numpy(), np.arange(4))
    sample = my_flow.LoadFlow(task)(dict(info={}, label_folder=folder, targets=one, ego2lidar=np.eye(4)[None]))
    turned = BEVAug(task).apply(dict(sample), BEVTransform(np.pi / 4, False, True))['targets']
    assert (
        turned.voxel_flow.shape == flow.shape and (turned.voxel_flow == 0).any() and (turned.voxel_flow == flow).any()
    )
    batch['targets'] = stack_targets([sample['targets']])
    assert batch['targets'].voxel_flow.dtype == torch.float32

    # the head and its loss
    model = built(small_version(cfg), task)
    losses = model(**batch)
    losses['loss_flow'].backward()
    assert model.pts_bbox_head.flow.weight.grad.abs().sum() > 0 and 'loss_sem_ce_2' in losses
    with torch.no_grad():
        model.pts_bbox_head.flow.weight.zero_()
        model.pts_bbox_head.flow.bias.copy_(torch.tensor([2.0, -1.0]))
    assert model(**batch)['loss_flow'] == 0

    # the prediction and its score
    prediction = model.eval()(return_loss=False, **{key: batch[key] for key in ('img', 'lidar2img', 'ego2lidar')})[0]
    dense = to_dense(prediction, task)
    assert dense['flow'].shape == task.grid_shape + (2,)
    evaluator = Evaluator(task, ('occ_score',))
    evaluator.update(dense, read_labels(tmp_path / 'labels.npz', task, ('flow',)), np.array([[0.0, 0.0, 1.0]]))
    assert evaluator.compute().num_samples == 1


def test_a_data_set(carry_out, tmp_path):
    cfg = carry_out('A data set', 'my_folder.py')
    task = small_task(panoptic=False)
    for number in range(3):
        batch = synthetic_batch(task, with_labels=True, first_index=number)
        arrays = {key: batch[key][0].numpy() for key in ('img', 'lidar2img', 'ego2lidar')}
        (tmp_path / 'val').mkdir(exist_ok=True)
        np.savez(tmp_path / 'val' / f'token-{number}.npz', semantics=batch['targets'].voxel_semantics[0], **arrays)
    dataset = build_dataset(dict(cfg.data.val, folder=str(tmp_path / 'val'), test_mode=True), task)
    model = built(small_config(), task)
    losses = model(**collate([dataset[0], dataset[1]]))
    assert all(torch.isfinite(value) for value in losses.values())
    components = Components(build_model, build_dataset, collate, Evaluator)
    result = Evaluation(components, task, dataset, Processes(), say=print, metrics=('miou', 'ray_iou')).run(model)
    assert result.num_samples == 3


def rig_file(folder, cameras):
    """A JSON file of three frames of a car with one camera to each side, and their images."""
    facing = [[0.5, -0.5, 0.5, -0.5], [0.0, 0.0, 0.7071067811865476, -0.7071067811865476]]
    content = dict(
        cameras={
            name: dict(
                intrinsic=[[80.0, 0, 48], [0, 80.0, 32], [0, 0, 1]],
                camera2ego=dict(rotation=facing[number % 2], translation=[0.1 * number, 0, 1.5]),
            )
            for number, name in enumerate(cameras)
        },
        sequences=[dict(name='drive', frames=[])],
    )
    for frame in range(3):
        images = {name: f'{name}_{frame}.jpg' for name in cameras}
        for number, image in enumerate(images.values()):
            noise = np.random.default_rng(10 * frame + number).integers(0, 256, (64, 96, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / image), noise)
        pose = dict(rotation=[1, 0, 0, 0], translation=[2.0 * frame, 0, 0])
        content['sequences'][0]['frames'].append(dict(timestamp=0.5 * frame, ego2global=pose, images=images))
    (folder / 'rig.json').write_text(json.dumps(content))
    return str(folder / 'rig.json')


def test_a_camera_rig(carry_out, tmp_path):
    cfg = carry_out('A camera rig', 'my_rig.py')
    rig = Task.from_config(cfg.task)
    assert rig.num_cameras == 4 and rig.image_size == (64, 96) and rig.grid_shape == (200, 200, 16)
    task = small_task(panoptic=False, cameras=list(rig.cameras), image_size=rig.image_size)
    own = read_own_data(rig_file(tmp_path, rig.cameras))
    assert own.cameras == rig.cameras
    save_pickle(tmp_path / 'infos.pkl', dict(infos=own.infos, metadata={}))
    changes = dict(data_root=own.data_root, ann_file=str(tmp_path / 'infos.pkl'), occ_gt_root=None)
    dataset = build_dataset(dict(cfg.data.val, **changes), task)
    sample = dataset[2]
    assert sample['img'].shape == (2 * 4, 3, 64, 96)
    model = built(small_config(), task).eval()
    batch = collate([sample])
    prediction = model(return_loss=False, **batch)[0]
    black = model(return_loss=False, **dict(batch, img=torch.zeros_like(batch['img'])))[0]
    assert prediction['occ_loc'].shape == (1, 200, 3)
    assert not all(np.array_equal(prediction[key], black[key]) for key in ('occ_loc', 'sem_pred'))


def test_a_label_set(carry_out, tmp_path):
    farm = Task.from_config(carry_out('A label set', 'my_labels.py').task).label_set
    assert farm.free_id == 4 and farm.thing_ids == (0, 1)
    task = small_task(label_set=farm, panoptic=True)
    model = built(small_config(), task)
    batch = small_batch(task)
    losses = model(**batch)
    assert all(torch.isfinite(value) for value in losses.values())
    labels = dict(semantics=batch['targets'].voxel_semantics[0].numpy())
    evaluator = Evaluator(task, ('miou',), miou_mask='none')
    evaluator.update(labels, labels)
    table = evaluator.compute().as_table()
    assert all(name in table for name in ('tractor', 'animal', 'fence', 'field'))
    wrong = np.full(task.grid_shape, 5, np.uint8)
    save_npz(tmp_path / 'labels.npz', dict(semantics=wrong, instances=wrong))
    with pytest.raises(DataError, match="label set 'farm' has ids"):
        read_labels(tmp_path / 'labels.npz', task)
