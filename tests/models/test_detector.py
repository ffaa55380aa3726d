"""The whole detector: batches, determinism, history, masks, other tasks, and errors a user can mend."""

import os
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from small_model import SMALL, sample_of, small_batch, small_config, small_model, small_task

from lib.config import load_config
from lib.errors import ConfigError, DataError
from models import build_model
from models.decoders.draws import RandomDraws
from tools.synthetic import synthetic_meta

IMAGES = ('img', 'lidar2img', 'ego2lidar', 'img_metas')
BOTH = pytest.mark.parametrize('scoring', ['semantic', 'occupancy'])


def predict(model, batch):
    return model.eval()(**{name: batch[name] for name in IMAGES}, return_loss=False)


def assert_same_prediction(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@BOTH
def test_prediction_has_the_documented_arrays(scoring):
    model = small_model(scoring=scoring)
    (prediction,) = predict(model, small_batch(model.task))
    assert {name: (value.dtype.name, value.shape) for name, value in prediction.items()} == dict(
        sem_pred=('uint8', (1, 200)),
        occ_loc=('uint8', (1, 200, 3)),
        pano_inst=('int16', (1, 200)),
        pano_sem=('uint8', (1, 200)),
    )
    semantic = small_model(small_task(panoptic=False), scoring)
    assert set(predict(semantic, small_batch(model.task))[0]) == {'sem_pred', 'occ_loc'}


@BOTH
def test_each_sample_of_a_batch_gets_the_result_it_has_alone(scoring):
    model = small_model(scoring=scoring).eval()
    batch = small_batch(model.task, 3, with_labels=False)
    with torch.no_grad():
        together = model.predict_raw(**batch).output
        for b in range(3):
            alone = model.predict_raw(**sample_of(batch, b)).output
            for ours, theirs in zip(together.stages, alone.stages):
                assert torch.equal(ours.coords[b], theirs.coords[0])
                assert share_apart(ours.seg_logits[b], theirs.seg_logits[0]) < 0.02
            first, last = ([output.layers[i].mask_logits for output in (together, alone)] for i in (0, -1))
            assert share_apart(first[0][b], first[1][0]) < 0.02
            assert share_apart(last[0][b], last[1][0]) < 0.02
            assert share_apart(last[0][b], last[0][b - 1]) > 0.9  # another sample's


def share_apart(a, b):
    """Share of entries that differ by more than rounding.

    Products of other sizes add in another order, which may move a point across the border of an image; mixed-up
    samples change all entries.
    """
    return ((a - b).abs() > 1e-3 * b.abs().max()).float().mean()


def slice_output(output, b):
    """The transformer's output for sample b as a batch of one."""

    def part(record):
        fields = {
            name: value[b : b + 1] if isinstance(value, torch.Tensor) else value for name, value in vars(record).items()
        }
        return type(record)(**fields)

    return type(output)([part(stage) for stage in output.stages], [part(layer) for layer in output.layers])


def slice_targets(targets, b):
    """Labels of sample b as a batch of one."""
    values = {item.name: getattr(targets, item.name) for item in fields(targets)}
    return replace(targets, **{name: None if value is None else value[b : b + 1] for name, value in values.items()})


@BOTH
def test_losses_of_a_batch_are_those_of_its_samples(scoring):
    """Voxel losses are means over the batch; mask losses are sums over instances by their number."""
    model = small_model(scoring=scoring, topk_testing=[10**6] * 3).eval()  # all voxels are kept
    batch = small_batch(model.task, 2)
    targets = replace(batch['targets'], mask_camera=None)
    targets.voxel_instances[1][targets.voxel_instances[1] == 3] = 255
    counts = [sum(int((targets.voxel_instances[b] == i).any()) for i in range(4)) for b in range(2)]
    assert counts == [4, 3]
    head = model.pts_bbox_head
    with torch.no_grad():
        output = model.predict_raw(**{name: batch[name] for name in IMAGES}).output
    together = head.loss(output, targets)
    alone = [head.loss(slice_output(output, b), slice_targets(targets, b)) for b in range(2)]
    for name, value in together.items():
        masks = any(part in name for part in ('loss_mask', 'loss_dice', 'loss_class'))
        weights = [n / sum(counts) for n in counts] if masks else [0.5, 0.5]
        expected = sum(w * losses[name] for w, losses in zip(weights, alone))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@BOTH
def test_two_runs_give_the_same_bits(scoring):
    results = []
    for _ in range(2):
        model = small_model(scoring=scoring)
        torch.manual_seed(11)
        losses = model.train()(**small_batch(model.task, 2))
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((losses, gradients, predict(model, small_batch(model.task))))
    (losses_a, gradients_a, prediction_a), (losses_b, gradients_b, prediction_b) = results
    assert all(torch.equal(losses_a[name], losses_b[name]) for name in losses_a)
    assert all(torch.equal(a, b) for a, b in zip(gradients_a, gradients_b))
    assert_same_prediction(prediction_a[0], prediction_b[0])


def test_a_fresh_model_keeps_its_running_statistics():
    model = small_model()
    assert not any(m.training for m in model.img_backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_every_parameter_learns():
    """As DistributedDataParallel demands without find_unused_parameters."""
    for scoring in ('semantic', 'occupancy'):
        model = small_model(scoring=scoring)
        sum(model(**small_batch(model.task)).values()).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_cached_history_equals_full_history():
    task = small_task(num_frames=3)
    model = small_model(task)
    encoded = []
    extract = model.encoder.encode
    model.encoder.encode = lambda img, graphed=False: encoded.append(img.shape[0] * img.shape[1]) or extract(img)
    drive = [small_batch(task, with_labels=False, first_index=index) for index in range(4)]
    model.history = 'full'
    full = [predict(model, batch)[0] for batch in drive]
    assert encoded == [9, 9, 9, 9]
    encoded.clear()
    model.history = 'cached'
    for batch, expected in zip(drive, full):
        (prediction,) = predict_keeping_history(model, batch)
        assert_same_prediction(prediction, expected)
    assert encoded == [3, 3, 3] + [3, 3, 3] and len(model.encoder.cache) == 3  # one frame at a time: the same bits
    model.reset_history()
    encoded.clear()
    predict_keeping_history(model, drive[0])
    assert encoded == [3, 3, 3]


def _without_held_frames(batch, given, num_cameras):
    """The batch with the images of some frames only."""
    frames = batch['img'].view((1, -1, num_cameras) + batch['img'].shape[2:])[:, given].flatten(1, 2)
    return dict(batch, img=frames, img_metas=[dict(batch['img_metas'][0], given=given)])


def test_in_a_drive_new_frames_are_enough():
    task = small_task(num_frames=3)
    model = small_model(task)
    drive = [small_batch(task, with_labels=False, first_index=index) for index in range(4)]
    model.history = 'cached'
    whole = [predict_keeping_history(model, batch)[0] for batch in drive]
    model.reset_history()
    for index, (batch, expected) in enumerate(zip(drive, whole)):
        left = batch if index == 0 else _without_held_frames(batch, [0], task.num_cameras)
        assert_same_prediction(predict_keeping_history(model, left)[0], expected)


def test_a_frame_that_is_neither_given_nor_held_is_told():
    model = small_model(small_task(num_frames=3)).eval()
    batch = _without_held_frames(small_batch(model.task, with_labels=False), [0, 2], 3)
    model.history = 'cached'
    with pytest.raises(
        DataError, match=f'features of the frame of {batch["img_metas"][0]["frame_keys"][3]} are not held'
    ):
        predict_keeping_history(model, batch)
    model.history = 'full'
    with pytest.raises(DataError, match='does not hold the 9 images'):
        predict_keeping_history(model, batch)


def test_raw_predictions_keep_their_features():
    """Later steps write into the cache, not into what a caller holds; and gradients go around the cache."""
    task = small_task(num_frames=3)
    model = small_model(task).eval()
    drive = [small_batch(task, with_labels=False, first_index=index) for index in range(3)]
    raws = {}
    for model.history in ('cached', 'full'):
        with torch.no_grad():
            raws[model.history] = [model.predict_raw(**{name: batch[name] for name in IMAGES}) for batch in drive]
    for ours, expected in zip(raws['cached'], raws['full']):
        assert ours.features.frame_index is None
        for a, b in zip(ours.features.maps, expected.features.maps):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # encoded in other batches
    model.history = 'cached'
    raw = model.predict_raw(**{name: drive[0][name] for name in IMAGES})
    raw.features.maps[0].sum().backward()
    assert model.img_neck.lateral_convs[0].conv.weight.grad is not None


def predict_keeping_history(model, batch):
    if model.training:
        model.eval()
    return model(**{name: batch[name] for name in IMAGES}, return_loss=False)


def test_history_without_keys_or_with_a_batch_encodes_everything():
    model = small_model().eval()
    model.history = 'cached'
    two = small_batch(model.task, 2, with_labels=False)
    one = sample_of(two, 1)
    results = predict_keeping_history(model, two)
    assert len(results) == 2 and len(model.encoder.cache) == 0
    (expected,) = predict_keeping_history(model, one)
    model.reset_history()
    one['img_metas'] = [dict(sample_token='x')]
    assert_same_prediction(predict_keeping_history(model, one)[0], expected)
    assert len(model.encoder.cache) == 0


@pytest.mark.skipif(int(torch.__version__.split('.')[0]) < 2, reason='no LayerNorm in the CPU autocast of PyTorch 1')
def test_features_of_another_precision_are_not_reused():
    model = small_model().eval()
    model.history = 'cached'
    batch = small_batch(model.task, with_labels=False)
    expected = predict_keeping_history(model, batch)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        predict_keeping_history(model, batch)
    assert_same_prediction(expected[0], predict_keeping_history(model, batch)[0])


def test_repeated_frames_are_encoded_once_and_new_weights_forget_them():
    model = small_model().eval()
    model.history = 'cached'
    batch = small_batch(model.task, with_labels=False)
    batch['img'][:, 3:] = batch['img'][:, :3]
    batch['img_metas'] = [dict(frame_keys=synthetic_meta(model.task, 5)['frame_keys'][:3] * 2)]
    expected = predict_keeping_history(model, batch)
    assert len(model.encoder.cache) == 1
    model.load_state_dict(model.state_dict())
    assert len(model.encoder.cache) == 0
    model.history = 'full'
    assert_same_prediction(expected[0], predict_keeping_history(model, batch)[0])


def test_camera_mask_decides_which_labels_count():
    task = small_task()
    batch = small_batch(task, 2)
    batch['targets'].mask_camera[:, :, :12] = False
    hidden = dict(batch, targets=batch['targets'].map_volumes(lambda volume, _: volume.clone()))
    hidden['targets'].voxel_semantics[:, :, :12] = 2  # labels that must not matter
    hidden['targets'].voxel_instances[:, :, :12] = 2
    for scoring in ('semantic', 'occupancy'):
        model = build_model(dict(small_config(scoring), use_mask_camera=True), task)
        model.pts_bbox_head.transformer.training_draws = model.pts_bbox_head.transformer.testing_draws
        seen, changed = model(**batch), model(**hidden)
        assert all(torch.equal(seen[name], changed[name]) for name in seen)
        model.use_mask_camera = False
        assert any(not torch.equal(value, seen[name]) for name, value in model(**batch).items())


def test_camera_mask_wanted_but_missing_is_a_sentence():
    model = build_model(dict(small_config(), use_mask_camera=True), small_task())
    batch = small_batch(model.task)
    batch['targets'] = replace(batch['targets'], mask_camera=None)
    with pytest.raises(DataError, match='no mask_camera'):
        model(**batch)


def test_training_leaves_the_batch_as_it_was():
    model = small_model()
    batch = small_batch(model.task, 2)
    before = [value.clone() for value in tensors_of(batch)]
    model(**batch)
    after = tensors_of(batch)
    assert len(before) == 3 + 3 + 2  # images and matrices, volumes, class ids of both samples
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def tensors_of(batch):
    targets = batch['targets']
    return [
        *(batch[name] for name in ('img', 'lidar2img', 'ego2lidar')),
        *(targets.voxel_semantics, targets.voxel_instances, targets.mask_camera),
        *targets.instance_class_ids,
    ]


@pytest.mark.parametrize(
    'changes',
    [
        dict(point_cloud_range=[0.0, -9.6, -2.0, 25.6, 9.6, 4.4], voxel_size=0.8),
        dict(cameras=['only'], num_frames=1),
        dict(num_frames=3, cameras=['a', 'b', 'c', 'd', 'e']),
        dict(num_frames=16, cameras=['only']),
        dict(image_size=(96, 160)),
        dict(label_set='openocc_v2'),
        dict(label_set='occ3d', panoptic=False),
    ],
)
def test_other_grids_cameras_frames_sizes_and_classes(changes):
    task = small_task(**changes)
    model = small_model(task)
    batch = small_batch(task, 2)
    losses = model(**batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    prediction = predict(model, batch)[1]
    assert (prediction['occ_loc'].max((0, 1)) < task.grid_shape).all()
    assert prediction['sem_pred'].max() <= task.label_set.free_id


@pytest.mark.skipif(int(torch.__version__.split('.')[0]) < 2, reason='no LayerNorm in the CPU autocast of PyTorch 1')
def test_mixed_precision_stays_finite_and_keeps_losses_in_float32():
    model = small_model()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(**small_batch(model.task))
        (prediction,) = predict(model, small_batch(model.task))
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
    assert prediction['sem_pred'].shape == (1, 200)


def test_builds_through_mmdet_with_the_task_as_a_dict():
    from mmdet.models import build_detector  # importable once models has prepared OpenMMLab

    model = build_detector(dict(small_config(), task=SMALL))
    assert model.task == small_task()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(pts_bbox_hed={}), 'pts_bbox_hed'),
        (dict(type='SparceOcc'), 'SparceOcc'),
        (dict(test_cfg=dict(histroy='full')), 'histroy'),
        (dict(test_cfg=dict(history='some')), "'some'"),
        (dict(test_cfg=dict(merge_stuff='both')), 'merge_stuff'),
        (dict(task={}), 'top-level task'),
        (dict(img_neck=dict(type='FPN', in_channels=[64], num_out=1)), "model.img_neck: FPN: unknown key 'num_out'"),
        (dict(img_neck=dict(type='FPN', in_channels=[64])), "model.img_neck: FPN: key 'out_channels' is missing"),
        (dict(img_backbone=dict(type='ResNett', depth=18)), "model.img_backbone: unknown type 'ResNett'"),
        (dict(img_backbone=None), "model: SparseOcc: key 'img_backbone' must be a dict, got None"),
        (dict(data_aug=dict(img_color_aug=True)), 'img_norm_cfg needs mean and std'),
    ],
)
def test_wrong_configs_are_a_sentence(change, message):
    with pytest.raises(ConfigError, match=message):
        build_model(dict(small_config(), **change), small_task())


@pytest.mark.parametrize(
    'place, key, message',
    [
        ('transformer', 'embed_dims', r'by model.pts_bbox_head.transformer \(64\) and by model.pts_bbox_head \(32\)'),
        ('transformer', 'draws', r"by model.pts_bbox_head.transformer \('even'\) and by model.test_cfg"),
        ('pts_bbox_head', 'draws', r"by model.pts_bbox_head \('even'\) and by model.test_cfg \('random'\)"),
        ('pts_bbox_head', 'score_threshold', r'by model.pts_bbox_head \(0.5\) and by model.test_cfg \(0.3\)'),
    ],
)
def test_a_setting_given_twice_is_a_sentence_that_names_both_places(place, key, message):
    cfg = small_config()
    cfg['test_cfg'] = dict(draws='random', score_threshold=0.3)
    part = cfg['pts_bbox_head'] if place == 'pts_bbox_head' else cfg['pts_bbox_head']['transformer']
    part[key] = dict(embed_dims=64, draws='even', score_threshold=0.5)[key]
    with pytest.raises(ConfigError, match=f'{key} is given twice, {message}'):
        build_model(cfg, small_task())


def test_settings_of_an_inner_part_are_heeded_where_no_outer_one_gives_them():
    cfg = small_config(draws='random', embed_dims=32)
    del cfg['pts_bbox_head']['embed_dims']
    cfg['pts_bbox_head']['overlap_threshold'] = 0.5
    head = build_model(cfg, small_task()).pts_bbox_head
    assert type(head.transformer.testing_draws) is RandomDraws and head.overlap_threshold == 0.5
    assert head.transformer.decoder.query_feat.weight.shape[1] == 32


def test_an_error_inside_a_part_is_told_as_it_is():
    """A depth that mmdet does not know is no matter of a wrong key, but of its value."""
    cfg = small_config()
    cfg['img_backbone']['depth'] = 19
    with pytest.raises(ConfigError, match='model.img_backbone: ResNet cannot be built .*KeyError: .invalid depth 19'):
        build_model(cfg, small_task())


OWN_LOSS = """
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES


@LOSSES.register_module()
class HeightLoss(BaseModule):
    def __init__(self, task, loss_weight=1.0):
        super().__init__()
        self.height, self.loss_weight = task.grid_shape[2], loss_weight

    def forward(self, stage, labels):
        occupied = 1 - stage.seg_logits.softmax(-1)[..., -1]
        height = stage.coords[..., 2] * stage.scale / self.height
        return self.loss_weight * (occupied * height * (labels.counts[..., -1] > 0)).mean()
"""


def test_a_loss_of_ones_own_takes_a_module_and_a_line_of_config(tmp_path, monkeypatch):
    (tmp_path / 'flat_world.py').write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(str(tmp_path))
    release = os.path.join(os.path.dirname(__file__), '..', '..', 'configs', 'r50_nuimg_704x256_8f_v1.1.py')
    (tmp_path / 'config.py').write_text(
        f'_base_ = {os.path.abspath(release)!r}\n'
        "custom_imports = dict(imports=['flat_world'])\n"
        "model = dict(pts_bbox_head=dict(loss_cfgs=dict(loss_height=dict(type='HeightLoss', loss_weight=2.0))))\n"
    )
    release_terms, terms = (
        load_config(path, []).model.pts_bbox_head.loss_cfgs for path in (release, tmp_path / 'config.py')
    )
    assert set(terms) == set(release_terms) | {'loss_height'}
    cfg = small_config()
    cfg['pts_bbox_head']['loss_cfgs'] = terms
    torch.manual_seed(0)
    losses = build_model(cfg, small_task())(**small_batch(small_task()))
    assert {f'loss_height_{i}' for i in range(3)} < set(losses) and {'loss_sem_ce_0', 'loss_mask_0'} < set(losses)
    assert losses['loss_height_0'] > 0 and losses['loss_height_0'].requires_grad


def test_training_without_labels_is_a_sentence():
    model = small_model()
    with pytest.raises(DataError, match='no labels'):
        model(**small_batch(model.task, with_labels=False))


def test_images_and_labels_that_do_not_fit_the_task_are_a_sentence():
    model = small_model()
    batch = small_batch(model.task)
    with pytest.raises(DataError, match='2 frames x 3 cameras'):
        model(**dict(batch, img=batch['img'][:, :5]))
    with pytest.raises(DataError, match=r'have \(16, 24, 4\) voxels, the task has \(16, 24, 8\)'):
        model(**dict(batch, targets=batch['targets'].map_volumes(lambda volume, _: volume[..., :4])))
