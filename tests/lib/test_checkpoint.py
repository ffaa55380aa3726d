"""Checkpoints: read as data, fitted to a model with every misfit named, written whole or not at all."""

import ast
import errno
import inspect
import os
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmcv import Config
from torch import nn

from lib import checkpoint as ckpt
from lib.checkpoint import other_task
from lib.checkpoint.files import RESTRICTED_PICKLE, read_checkpoint
from lib.errors import CheckpointError, UserError
from lib.run.folder import config_lines
from lib.task import Task
from models.builder import PRETRAINED_NAMES, describe_weights


class Runs:
    """An object whose unpickling runs a command."""

    def __reduce__(self):
        return os.system, ('true',)


class Head(nn.Module):
    """Has the names by which a SparseOcc's release and classes are recognised."""

    def __init__(self, classes=17, release='1.1'):
        super().__init__()
        self.decoder_layer = nn.Module()
        self.decoder_layer.classifier = nn.Linear(4, classes)
        if release == '1.0':
            self.occ_pred_heads = nn.ModuleList([nn.Linear(4, 1)])
        self.seg_pred_heads = nn.ModuleList([nn.Linear(4, classes + (release == '1.1'))])


class Net(nn.Module):
    describe_weights, pretrained_names = staticmethod(describe_weights), PRETRAINED_NAMES

    def __init__(self, classes=17, release='1.1', width=8):
        super().__init__()
        self.img_backbone = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.img_neck = nn.Conv2d(width, 4, 1)
        self.pts_bbox_head = nn.Module()
        self.pts_bbox_head.decoder = Head(classes, release)


@pytest.fixture
def saved(tmp_path):
    def save(content, name='w.pth', **options):
        path = str(tmp_path / name)
        torch.save(content, path, **options)
        return path

    return save


@pytest.mark.parametrize(
    'wrap',
    [
        lambda s: s,
        lambda s: dict(state_dict=s, meta=dict(epoch=3)),
        lambda s: dict(state_dict=OrderedDict(('module.' + k, v) for k, v in s.items())),
        lambda s: dict(model=s),
    ],
)
@pytest.mark.parametrize('zipped', [True, False])
def test_formats(saved, wrap, zipped):
    source, target = Net(), Net()
    path = saved(wrap(source.state_dict()), _use_new_zipfile_serialization=zipped)
    ckpt.load_model_weights(target, path)
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_meta_with_numpy_numbers(saved):
    meta = dict(epoch=3, best=np.float64(0.25), names=('a', 'b'))
    path = saved(dict(state_dict=Net().state_dict(), meta=meta))
    if tuple(int(n) for n in torch.__version__.split('.')[:2]) >= (2, 6):
        assert ckpt.load_model_weights(Net(), path)['best'] == 0.25
    assert load_with_own_unpickler(path)['meta']['best'] == 0.25


def load_with_own_unpickler(path):
    """What serves torch < 1.13, whatever the torch at hand."""
    options = {'weights_only': False} if 'weights_only' in inspect.signature(torch.load).parameters else {}
    return torch.load(path, pickle_module=RESTRICTED_PICKLE, **options)


@pytest.mark.parametrize('content', [dict(state_dict={}, x=Runs()), nn.Linear(2, 2)])
def test_code_is_refused(saved, content):
    path = saved(content)
    with pytest.raises(CheckpointError, match='was refused: it asks for .*--trust-weights'):
        ckpt.read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError, match='it names'):
        load_with_own_unpickler(path)


def damage(kind, path):
    data = bytearray(open(path, 'rb').read())
    if kind == 'half':
        data = data[: len(data) // 2]
    elif kind == 'one byte':
        data[len(data) // 2] ^= 0xFF
    elif kind == 'text':
        data = b'<html>not found</html>'
    elif kind == 'empty':
        data = b''
    open(path, 'wb').write(data)


@pytest.mark.parametrize(
    'kind, words',
    [('half', 'cut short or damaged'), ('one byte', 'check sum'), ('text', 'damaged or no'), ('empty', 'is empty')],
)
def test_damaged_file(saved, kind, words):
    path = saved(dict(state_dict=dict(a=torch.zeros(4000))))
    assert ckpt.is_complete(path)
    damage(kind, path)
    with pytest.raises(CheckpointError, match=words) as error:
        ckpt.read_checkpoint(path)
    assert path in str(error.value)
    assert not ckpt.is_complete(path)


def test_missing_file_folder_and_no_weights(tmp_path, saved):
    with pytest.raises(CheckpointError, match='none.pth does not exist'):
        ckpt.read_checkpoint(str(tmp_path / 'none.pth'))
    with pytest.raises(CheckpointError, match='is a folder'):
        ckpt.read_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match='holds no weights .its keys: epoch'):
        ckpt.load_model_weights(Net(), saved(dict(epoch=1)))
    with pytest.raises(CheckpointError, match='holds a list'):
        ckpt.read_checkpoint(saved([1]))


@pytest.mark.parametrize(
    'theirs, ours, words',
    [
        (('1.0', 17), ('1.1', 17), ['release 1.0 model with 17', 'builds a release 1.1', '704x256_8f.py']),
        (('1.1', 17), ('1.0', 17), ['release 1.1 model with 17', 'builds a release 1.0', '8f_v1.1.py']),
        (('1.1', 16), ('1.1', 17), ['with 16 classes', 'with 17 classes', 'openocc.py']),
    ],
)
def test_other_release_is_named(saved, theirs, ours, words):
    path = saved(dict(state_dict=Net(theirs[1], theirs[0]).state_dict()))
    with pytest.raises(CheckpointError) as error:
        ckpt.load_model_weights(Net(ours[1], ours[0]), path)
    for word in words + [path]:
        assert word in str(error.value)


def test_misfit_lists_names(saved):
    state = Net().state_dict()
    state['extra'] = state.pop('img_neck.bias')
    state['img_neck.weight'] = torch.zeros(4, 9, 1, 1)
    path = saved(state)
    with pytest.raises(CheckpointError) as error:
        ckpt.load_model_weights(Net(), path)
    for word in ('1 missing (img_neck.bias)', '1 unexpected (extra)', '[4, 9, 1, 1] there and [4, 8, 1, 1] here'):
        assert word in str(error.value)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(saved, value):
    """By both ways in; nothing is loaded."""
    weights = Net().state_dict()
    weights['img_backbone.0.bias'][3] = value
    path = saved(weights)
    for load in (ckpt.load_model_weights, ckpt.load_pretrained):
        net = Net()
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        with pytest.raises(CheckpointError, match=r'w\.pth holds NaN or infinite.*1 tensors \(img_backbone\.0\.bias'):
            load(net, path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_another_network_is_recognised(saved):
    with pytest.raises(CheckpointError, match='not of a Net .it holds backbone 1'):
        ckpt.load_model_weights(Net(), saved({'backbone.conv1.weight': torch.zeros(1)}))


def test_old_files_lack_batch_counters(saved):
    source, target = Net(), Net()
    state = {k: v for k, v in source.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert len(state) == len(source.state_dict()) - 1
    ckpt.load_model_weights(target, saved(state))
    assert all(torch.equal(target.state_dict()[name], value) for name, value in state.items())
    del state['img_backbone.1.running_mean']  # but no other statistic may be missing
    with pytest.raises(CheckpointError, match='1 missing .img_backbone.1.running_mean'):
        ckpt.load_model_weights(Net(), saved(state))


def test_pretrained_backbone_and_neck(saved):
    source, target = Net(), Net()
    head = 'pts_bbox_head.decoder.decoder_layer.classifier.weight'
    untouched = target.state_dict()[head].clone()
    state = {}
    for name, value in source.state_dict().items():
        if name.startswith('img_'):
            state[name[len('img_') :]] = value
    state['rpn_head.conv.weight'] = torch.zeros(3)
    report = ckpt.load_pretrained(target, saved(dict(state_dict=state)), [('backbone', 'img_backbone')])
    for name, value in target.state_dict().items():
        if name.startswith('img_'):
            assert torch.equal(value, source.state_dict()[name]), name
    assert torch.equal(target.state_dict()[head], untouched)
    assert (len(report.used), report.reshaped, report.unknown) == (9, [], ['rpn_head.conv.weight'])
    text = '\n'.join(report.lines())
    assert 'img_backbone 7, img_neck 2' in text and 'rpn_head 1' in text and 'pts_bbox_head 4' in text


def test_pretrained_of_another_width(saved):
    state = {
        'backbone.' + k[len('img_backbone.') :]: v
        for k, v in Net(width=8).state_dict().items()
        if k.startswith('img_backbone')
    }
    state['neck.bias'] = torch.ones(4)
    report = ckpt.load_pretrained(Net(width=6), saved(state), [('backbone', 'img_backbone')])
    # The batch counter is a scalar and fits whatever the width.
    assert report.used == ['img_backbone.1.num_batches_tracked', 'img_neck.bias']
    assert len(report.reshaped) == 6


def test_pretrained_that_does_not_fit_or_exist(saved, tmp_path):
    with pytest.raises(CheckpointError, match='none of the 1 tensors'):
        ckpt.load_pretrained(Net(), saved({'other': torch.zeros(1)}))
    with pytest.raises(CheckpointError, match='load_from=None'):
        ckpt.load_pretrained(Net(), str(tmp_path / 'none.pth'))


class FullDisk:
    """A file that takes ``room`` bytes and then fails as a full disk does."""

    def __init__(self, path, room):
        self.file, self.room = open(path, 'wb'), room

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.file.close()

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize('room', [0, 3000])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, room):
    path = tmp_path / 'a.pth'
    ckpt.save_checkpoint(str(path), dict(state_dict=dict(a=torch.zeros(5))))
    before = path.read_bytes()
    monkeypatch.setattr(
        'lib.checkpoint.files.open', lambda p, mode: FullDisk(p, room) if 'w' in mode else open(p, mode), raising=False
    )
    with pytest.raises(UserError, match='a.pth.*free some space'):
        ckpt.save_checkpoint(str(path), dict(state_dict=dict(a=torch.zeros(5000))))
    assert path.read_bytes() == before and ckpt.is_complete(str(path))
    assert os.listdir(str(tmp_path)) == ['a.pth']  # nothing half-written is left


def backbone(depth=1):
    """A model with a backbone of so many layers, as another library names them without a prefix."""
    layers = torch.nn.ModuleDict({f'layer{i}': torch.nn.Linear(2, 3 + i) for i in range(depth)})
    return torch.nn.ModuleDict(dict(img_backbone=layers, head=torch.nn.Linear(7, 7)))


@pytest.mark.parametrize('prefix', ['', 'encoder.', 'model.backbone.', 'module.base.'])
def test_the_prefix_that_would_fit_is_proposed_and_fits(prefix, tmp_path):
    model, path = backbone(2), str(tmp_path / 'w.pth')
    weights = {prefix + name: value for name, value in model['img_backbone'].state_dict().items()}
    torch.save(dict(weights, **{'fc.weight': torch.zeros(10, 9)}), path)
    with pytest.raises(CheckpointError, match=r'revise_keys=\[.*would make 4 of them fit') as error:
        ckpt.load_pretrained(backbone(2), path)
    keys = ast.literal_eval(re.search(r'revise_keys=(\[.*?\)\])', str(error.value)).group(1))
    report = ckpt.load_pretrained(backbone(2), path, keys)
    assert len(report.used) == 4 and report.hint == ''


def test_a_backbone_that_is_filled_in_part_is_named(tmp_path):
    path = str(tmp_path / 'w.pth')
    torch.save({f'img_backbone.{k}': v for k, v in backbone(1)['img_backbone'].state_dict().items()}, path)
    text = '\n'.join(ckpt.load_pretrained(backbone(3), path).lines())
    assert 'WARNING: img_backbone is filled in part; 4 of its tensors' in text and 'layer1.weight' in text
    assert 'head is filled' not in text


def test_what_a_checkpoint_was_trained_for_comes_from_its_own_record(tmp_path, capsys):
    own = dict(name='own', class_names=['road', 'car', 'free'], things=['car'])
    theirs = Config(dict(task=dict(label_set=own, voxel_size=0.8)))
    path, model = str(tmp_path / 'w.pth'), torch.nn.Linear(2, 2)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(config=config_lines(theirs))), path)
    model.task = Task.from_config(theirs.task)
    ckpt.load_model_weights(model, path)
    assert 'warning' not in capsys.readouterr().out
    model.task = Task.from_config(dict(label_set='occ3d'))
    ckpt.load_model_weights(model, path)
    printed = capsys.readouterr().out
    assert "label set 'own' (2 classes" in printed and '100x100x8 voxels' in printed and 'not 200x200x16' in printed
    other = torch.nn.Linear(2, 3)
    other.task = model.task
    with pytest.raises(CheckpointError, match="was trained for label set 'own'"):
        ckpt.load_model_weights(other, path)
    assert other_task(dict(config='task.label_set = (('), model.task) == '' == other_task({}, model.task)


@pytest.mark.parametrize('first', [b'\x8d' + b'\xff' * 6 + b'\x7f\x00', b'X\xff\xff\xff\x7f', b'B\xff\xff\xff\x7f'])
def test_sizes_beyond_the_end_are_found_before_memory_is_asked_for(tmp_path, first):
    """A text or bytes of two gigabytes and more, as the first thing of a file that is no zip."""
    path = tmp_path / 'w.pth'
    path.write_bytes(first + b'abc.')
    with pytest.raises(CheckpointError, match='w.pth is cut short, damaged or no PyTorch checkpoint; fetch') as error:
        read_checkpoint(str(path))
    assert error.value.__cause__ is None
