"""Configs: what is allowed, how overrides are typed, and that every mistake is named."""

from typing import Dict, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import pytest
from mmcv.utils import Registry

from lib.config import apply_override, check_config_file, dump_config, load_config, parse_value
from lib.errors import ConfigError
from lib.registry import build_checked

GOOD = """
_helper = 3
task = dict(label_set='occ3d')
model = dict(type='Thing', width=_helper, test_cfg=dict(history='full'))
data = dict(workers_per_gpu=0, train=dict(type='Set', pipeline=[dict(type='A'), dict(type='B')]))
optimizer = dict(type='AdamW', lr=1e-3)
total_batch_size = 8
"""


@pytest.fixture
def write(tmp_path):
    def write_config(text, name='c.py'):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_config


def test_reads_and_drops_helpers(write):
    cfg = load_config(write(GOOD))
    assert cfg.model.width == 3 and '_helper' not in cfg
    assert cfg.filename.endswith('c.py')


def test_child_overrides_its_base(write):
    write(GOOD, 'base.py')
    cfg = load_config(write("_base_ = './base.py'\nmodel = dict(width=5)\n"))
    assert (cfg.model.type, cfg.model.width) == ('Thing', 5)


@pytest.mark.parametrize(
    'override, path, value',
    [
        ('total_batch_size=4', 'total_batch_size', 4),
        ('optimizer.lr=3e-4', 'optimizer.lr', 3e-4),
        ('model.test_cfg.history=cached', 'model.test_cfg.history', 'cached'),
        ('model.new_argument=[1,2]', 'model.new_argument', [1, 2]),
        ('data.train.max_samples=None', 'data.train.max_samples', None),
        ('data.train.pipeline.1.flag=true', 'data.train.pipeline.1.flag', True),
        ('train.amp=bf16', 'train.amp', 'bf16'),
        ('evaluation.interval=2', 'evaluation.interval', 2),
        ('load_from=a=b.pth', 'load_from', 'a=b.pth'),
    ],
)
def test_override(write, override, path, value):
    node = load_config(write(GOOD), [override])
    for part in path.split('.'):
        node = node[int(part)] if part.isdigit() else node[part]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    'override, words',
    [
        ('totl_batch_size=4', ["'totl_batch_size'", "did you mean 'total_batch_size'"]),
        ('optimizr.lr=1', ["'optimizr'", "did you mean 'optimizer'"]),
        ('model.test_cfg.history.x=1', ['model.test_cfg.history', 'not a dict']),
        ('model.tst_cfg.history=1', ["'tst_cfg'", "did you mean 'test_cfg'"]),
        ('data.train.pipeline.7.flag=1', ['list of 2 items', "'7'"]),
        ('data.trian.load_interval=1', ["'trian'", "did you mean 'train'"]),
        ('train.ampp=fp16', ["'ampp'", "did you mean 'amp'"]),
        ('train.amp=fp8', ['train.amp', 'fp8', "'bf16'"]),
        ('train.log_interval=0', ['train.log_interval', '0']),
        ('nonsense', ['key=value']),
    ],
)
def test_bad_override_is_named(write, override, words):
    with pytest.raises(ConfigError) as error:
        load_config(write(GOOD), [override])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    'text, words',
    [
        ('modle = dict()\n', ['c.py', "'modle'", "did you mean 'model'"]),
        ('model = dict(\n', ['c.py', 'not valid Python', 'line']),
        ('x = undefined_name\n', ['c.py', 'line 1', 'undefined_name']),
        ("_base_ = './nowhere.py'\n", ['nowhere.py', '_base_']),
        ('train = dict(log_intervall=3)\n', ["'log_intervall'", "did you mean 'log_interval'"]),
        ('data = 3\n', ['data must be a dict']),
        ('custom_imports = dict(imports=["no_such_module_here"])\n', ['no_such_module_here']),
    ],
)
def test_bad_file_is_named(write, text, words):
    path = write(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    for word in words:
        assert word in str(error.value)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(ConfigError, match='does not exist'):
        check_config_file(str(tmp_path / 'none.py'))
    (tmp_path / 'a.yaml').write_text('a: 1')
    with pytest.raises(ConfigError, match='not a Python file'):
        check_config_file(str(tmp_path / 'a.yaml'))


def test_dump_reads_back(write, tmp_path):
    cfg = load_config(write(GOOD), ['optimizer.lr=0.1'])
    dump_config(cfg, str(tmp_path / 'dump.py'))
    assert load_config(str(tmp_path / 'dump.py'))._cfg_dict == cfg._cfg_dict


@pytest.mark.parametrize(
    'text, value',
    [
        ('3', 3),
        ('1e-3', 1e-3),
        ('None', None),
        ('False', False),
        ('true', True),
        ('(1, 2)', (1, 2)),
        ('a/b.pth', 'a/b.pth'),
        ('', ''),
        ("'3'", '3'),
    ],
)
def test_values_are_typed(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_absent_section_is_created():
    config = {}
    apply_override(config, 'train.amp=fp16')
    assert config == {'train': {'amp': 'fp16'}}


REGISTRY = Registry('widget')


@REGISTRY.register_module()
class Widget:
    def __init__(self, task, size, colour='red'):
        self.task, self.size, self.colour = task, size, colour


@REGISTRY.register_module()
class Nested:
    def __init__(self, child: dict):
        self.child = Widget(task=1, **child)


def test_build_checked():
    widget = build_checked(dict(type='Widget', size=2), REGISTRY, dict(task='t'))
    assert (widget.task, widget.size, widget.colour) == ('t', 2, 'red')


@pytest.mark.parametrize(
    'cfg, words',
    [
        (dict(type='Wigdet', size=1), ["'Wigdet'", "did you mean 'Widget'"]),
        (dict(type='Widget', size=1, color='blue'), ['Widget', "'color'", "did you mean 'colour'"]),
        (dict(type='Widget'), ["'size' is missing"]),
        (dict(type='Widget', size=1, task=3), ["'task' is filled in"]),
        (dict(size=1), ["'type'"]),
    ],
)
def test_build_checked_names_the_key(cfg, words):
    with pytest.raises(ConfigError) as error:
        build_checked(cfg, REGISTRY, dict(task='t'), where='model.part')
    for word in words + ['model.part']:
        assert word in str(error.value)


@REGISTRY.register_module()
class Typed:
    """With annotations of every kind that configs have."""

    def __init__(
        self,
        number: float = 1.0,
        count: Optional[int] = None,
        name: str = 'x',
        flag: bool = False,
        sizes: Sequence[int] = (),
        pair: Tuple[int, str] = (1, 'a'),
        steps: Sequence[Dict] = (),
        either: Union[str, Sequence[float]] = 'a',
        part: Optional[Mapping] = None,
        anything=None,
    ):
        self.given = (number, count, name, flag, sizes, pair, steps, either, part, anything)


@pytest.mark.parametrize(
    'value',
    [
        dict(number=1),
        dict(number=np.float32(2)),
        dict(count=None),
        dict(count=np.int64(3)),
        dict(sizes=[1, 2]),
        dict(sizes=()),
        dict(pair=[1, 'b']),
        dict(steps=[dict(type='x')]),
        dict(either=[1, 2.5]),
        dict(part={}),
        dict(anything=object()),
    ],
)
def test_values_of_the_right_type_are_taken(value):
    assert list(value.values())[0] in build_checked(dict(value, type='Typed'), REGISTRY).given


@pytest.mark.parametrize(
    'value, words',
    [
        (dict(number='1'), "part: Typed: key 'number' must be a finite number, got '1'"),
        (dict(number=True), 'a finite number'),
        (dict(number=float('nan')), 'a finite number'),
        (dict(count=1.5), 'an integer or None'),
        (dict(count=False), 'an integer or None'),
        (dict(name=3), 'a text'),
        (dict(flag=1), 'True or False'),
        (dict(flag=None), 'True or False'),
        (dict(sizes=3), 'a list .an integer, each'),
        (dict(sizes='12'), 'a list'),
        (dict(sizes=[1, '2']), 'a list'),
        (dict(pair=[1]), 'a list'),
        (dict(pair=['b', 1]), 'a list'),
        (dict(steps=[3]), 'a list .a dict, each'),
        (dict(either=3), 'a text or a list'),
        (dict(part=[]), 'a dict or None'),
    ],
)
def test_values_of_another_type_than_annotated_are_named(value, words):
    with pytest.raises(ConfigError, match=words):
        build_checked(dict(value, type='Typed'), REGISTRY, where='part')


@pytest.mark.parametrize('name', ['', '.', '../../outside', 'mmdet.Nothing'])
def test_a_type_of_another_registry_is_unknown(name):
    with pytest.raises(ConfigError, match='unknown type'):
        build_checked(dict(type=name), REGISTRY, where='part')


@pytest.mark.parametrize('kind', [3, None, ['Typed'], {}])
def test_a_type_that_is_no_name_is_named(kind):
    with pytest.raises(ConfigError, match="'type' must be the name of a"):
        build_checked(dict(type=kind), REGISTRY)


def test_what_a_class_without_annotations_says_of_its_values_is_passed_on():
    def picky(depth):
        raise KeyError(f'invalid depth {depth}')

    with pytest.raises(ConfigError, match="part: picky cannot be built .*'invalid depth 19'.; correct"):
        build_checked(dict(type=picky, depth=19), REGISTRY, where='part')


def test_an_error_inside_a_constructor_is_not_called_a_wrong_key():
    with pytest.raises(TypeError, match='sizze'):
        build_checked(dict(type='Nested', child=dict(sizze=1)), REGISTRY)


@pytest.mark.parametrize('value', ["'occ3d'", '3', 'None', '[1, 2]'])
def test_a_dict_replaces_what_is_none(write, value):
    write(GOOD.replace("'occ3d'", value), 'base.py')
    own = "task = dict(label_set=dict(name='own', things=['a']), voxels=dict(_delete_=True, x=1))"
    cfg = load_config(write(f"_base_ = './base.py'\n{own}\n"))
    assert cfg.task.label_set == dict(name='own', things=['a']) and cfg.task.voxels == dict(x=1)


PUBLISHED = """
dataset_type = 'NuSceneOcc'
point_cloud_range = [-40, -40, -1.0, 40, 40, 5.4]
img_norm_cfg = dict(mean=[1, 2, 3])
total_epochs = 24
batch_size = 8
"""


def test_a_published_config_is_recognised(write):
    with pytest.raises(ConfigError) as error:
        load_config(write(PUBLISHED))
    for words in ('published code', 'data.train', 'task (', 'model.data_aug', 'runner.max_epochs', 'total_batch_size'):
        assert words in str(error.value)


@pytest.mark.parametrize(
    'override, words',
    [
        ('batch_size=8', 'total_batch_size'),
        ('data.samples_per_gpu=2', 'total_batch_size'),
        ('total_epochs=3', 'runner.max_epochs'),
        ('log_config.interval=1', 'train.log_interval'),
    ],
)
def test_published_keys_in_overrides(write, override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(write(GOOD), [override])
