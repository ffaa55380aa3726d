"""Every key of the shipped configs, misspelt in the file or on the command line, is answered with its right name."""

import copy
import os
import re

import pytest
import torch

from lib.config import TOP_LEVEL_KEYS, apply_override, load_config
from lib.errors import ConfigError
from lib.run.optimizer import Schedule, build_optimizer, clip_norm
from lib.run.train_script import run_length
from lib.task import Task
from loaders import build_dataset
from loaders.pipelines import build_pipeline
from models import build_model

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ['task.image_size=[64, 96]', 'task.num_frames=1']
NAMES = ('configs/toy/semantic.py', 'configs/r50_nuimg_704x256_8f_v1.1.py')
FREE = ('published', 'optimizer.paramwise_cfg.custom_keys', 'model.pts_bbox_head.loss_cfgs')  # names are the user's


@pytest.fixture(autouse=True)
def no_random_weights(monkeypatch):
    """Models are built and thrown away; drawing weights of layers is half of the work."""
    monkeypatch.setattr(torch.nn.init, 'kaiming_uniform_', lambda tensor, *_, **__: tensor)


def read(path):
    """A config with a label set of its own, whose keys count too."""
    cfg = load_config(os.path.join(ROOT, path), SMALL)
    plain = cfg._cfg_dict.to_dict()
    plain['task']['label_set'] = dict(
        name='own', class_names=['a', 'car', 'free'], things=['car'], colours={'a': (1, 2, 3)}
    )
    return plain


def misspell(name):
    """Without its second letter; still nearest to what it was."""
    return name[:1] + name[2:] if len(name) > 4 else name + name[-1]


def key_paths(node, path=()):
    """Dotted keys of every mapping, those inside lists included."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in items:
        here = (*path, str(key))
        if isinstance(node, dict) and '.'.join(path) not in FREE and path[-1:] not in (('colours',), ('voxel_counts',)):
            yield here
        if '.'.join(here) != 'published':
            yield from key_paths(value, here)


def at(node, path):
    for part in path:
        node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
    return node


def build(cfg, part):
    """What the scripts do with a section of a config, as far as keys are concerned."""
    if part == 'task':
        Task.from_config(cfg['task'])
    elif part == 'model':
        build_model(cfg['model'], Task.from_config(cfg['task']))
    elif part == 'data':
        task = Task.from_config(cfg['task'])
        for name in ('train', 'val', 'test'):
            section = dict(cfg['data'][name])
            build_pipeline(section.get('pipeline', []), task)
            try:
                build_dataset(section, task)
            except ConfigError:
                raise
            except Exception:  # no data here: the keys were right
                continue
    elif part == 'lr_config':
        Schedule.from_config(cfg['lr_config'], 1, 1, 1)
    elif part == 'optimizer':
        names = ('img_backbone', 'sampling_offset')
        model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in names})
        build_optimizer(model, cfg['optimizer'])
    elif part == 'optimizer_config':
        clip_norm(cfg['optimizer_config'])
    elif part == 'runner':
        run_length(cfg['runner'], 1)


def write(cfg, folder):
    path = folder / 'c.py'
    path.write_text('\n'.join(f'{name} = {value!r}' for name, value in cfg.items()))
    return str(path)


def answer(action):
    """The sentence that a user reads, or nothing."""
    try:
        action()
    except ConfigError as error:
        return str(error)
    return ''


def check_answers(answers):
    """By the dotted right name; each names the right key."""
    assert len(answers) > 90
    unclear = {path: text for path, text in answers.items() if path.split('.')[-1] not in re.findall(r'\w+', text)}
    assert not unclear


@pytest.mark.parametrize('name', NAMES)
def test_in_the_file(name, tmp_path):
    config, answers = read(name), {}
    for path in key_paths(config):
        cfg = copy.deepcopy(config)
        parent = at(cfg, path[:-1])
        parent[misspell(path[-1])] = parent.pop(path[-1])
        answers['.'.join(path)] = answer(lambda: (load_config(write(cfg, tmp_path)), build(cfg, path[0])))  # noqa: B023
    check_answers(answers)


def test_on_the_command_line():
    """Where the key is there already, and where it might be added; what is accepted is refused when it is built."""
    config, answers = read(NAMES[0]), {}
    for path in key_paths(config):
        cfg = copy.deepcopy(config)
        override = '.'.join((*path[:-1], misspell(path[-1]))) + '=1'
        answers['.'.join(path)] = answer(lambda: (apply_override(cfg, override), build(cfg, path[0])))  # noqa: B023
    check_answers(answers)


def test_every_section_by_its_name():
    for key in TOP_LEVEL_KEYS:
        with pytest.raises(ConfigError, match=f'did you mean {key!r}'):
            apply_override({}, misspell(key) + '=1')
