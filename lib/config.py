"""Configs: mmcv Python files with ``_base_``, checked, with typed ``--override key=value``.

A config may have the top-level keys of ``TOP_LEVEL_KEYS``; names that start with ``_`` are its own helpers
and dropped. What a class of a registry takes is checked when it is built (``lib.registry``).
"""

import ast
import contextlib
import importlib
import os
import pprint
import sys
import traceback
from collections.abc import Mapping
from typing import Any, Sequence, Union

from .errors import ConfigError
from .registry import check_keys, check_value, check_whole, did_you_mean, said_elsewhere, section
from .settings import EvaluationSettings, TrainSettings, setting_names

TOP_LEVEL_KEYS = (
    'task',
    'model',
    'data',
    'optimizer',
    'optimizer_config',
    'lr_config',
    'runner',
    'total_batch_size',
    'train',
    'evaluation',
    'load_from',
    'revise_keys',
    'resume_from',
    'seed',
    'custom_imports',
    'published',
)

# Sections whose keys are known here. Every other mapping is checked by the class that takes it.
SECTION_KEYS = {
    'data': ('workers_per_gpu', 'train', 'val', 'test'),
    'runner': ('max_epochs', 'max_iters'),
    'optimizer_config': ('grad_clip',),
    'custom_imports': ('imports',),
    'train': setting_names(TrainSettings),
    'evaluation': setting_names(EvaluationSettings),
}

# Mappings an override may add a key to although the config does not mention it: their taker checks them.
_OPEN_SECTIONS = (
    'task',
    'optimizer',
    'lr_config',
    'optimizer_config.grad_clip',
    'task.label_set',
    'task.label_set.voxel_counts',
    'optimizer.paramwise_cfg',
    'optimizer.paramwise_cfg.custom_keys',
    'model.data_aug',
    'model.data_aug.img_norm_cfg',
    'model.data_aug.img_pad_cfg',
    'model.auxiliary_losses',
    'model.test_cfg',
    'published',
)


def load_config(path: str, overrides: Sequence[str] = ()):
    """Config read from a Python file, overridden and checked.

    Args:
        path: ``.py`` file.
        overrides: strings ``a.b.c=value``. The value is a Python literal, or else a string. List items are
            addressed by number. The path must exist in the config, unless its parent is a section or a
            component whose keys are checked elsewhere.

    Returns:
        mmcv.Config with only allowed top-level keys.

    Raises:
        ConfigError: missing file, error inside it, unknown key, or a bad override.
    """
    check_config_file(path)
    config = _read(path)
    for name in list(config):
        if name.startswith('_'):
            config.pop(name)
    check_keys(config, TOP_LEVEL_KEYS, path)
    for text in overrides or ():
        apply_override(config, text)
    _check_sections(config)
    _import_modules(config.get('custom_imports'))
    return _as_mmcv(config, path)


def check_config_file(path: str) -> None:
    """Raise ConfigError unless ``path`` is a Python file without syntax errors. Imports nothing heavy."""
    if not os.path.isfile(path):
        raise ConfigError(f'config file {path} does not exist; give the path of a .py file, e.g. one of configs/')
    if not str(path).endswith('.py'):
        raise ConfigError(f'config file {path} is not a Python file; configs end in .py')
    try:
        with open(path, encoding='utf-8') as f:
            ast.parse(f.read(), filename=str(path))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        number = getattr(error, 'lineno', None)
        line = f', line {number},' if number else ''
        reason = getattr(error, 'msg', None) or error
        raise ConfigError(f'config file {path}{line} is not valid Python: {reason}') from error


def _read(path) -> dict:
    """The file's top-level dict with ``_base_`` merged, as mmcv reads it."""
    from .openmmlab import prepare_openmmlab

    prepare_openmmlab()
    from mmcv import Config

    search_path = list(sys.path)
    try:
        with _dicts_replace_values(Config):
            return Config.fromfile(str(path), import_custom_modules=False)._cfg_dict.to_dict()
    except Exception as error:  # a config is a program and may raise anything
        message = _describe(error, path)
        _close_temporary_files(error)
    finally:
        sys.path[:] = search_path  # mmcv leaves its temporary folder there when a config fails
    raise ConfigError(message)


@contextlib.contextmanager
def _dicts_replace_values(config_class):
    """While mmcv merges files, a dict takes the place of a base's text, number or list without ``_delete_``."""
    merge = config_class._merge_a_into_b

    def merge_marked(a, b, allow_list_keys=False):
        for key, value in a.items():
            if isinstance(value, dict):
                replaces = key in b and not isinstance(b[key], dict)
                if replaces:
                    value['_delete_'] = True
                elif key not in b:
                    value.pop('_delete_', None)  # there is nothing to delete
        return merge(a, b, allow_list_keys)

    config_class._merge_a_into_b = staticmethod(merge_marked)
    try:
        yield
    finally:
        config_class._merge_a_into_b = staticmethod(merge)


def _describe(error, path) -> str:
    """One sentence about an error raised while mmcv reads ``path`` or one of its bases."""
    culprit, line = path, ''
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == '_file2dict':
            culprit = os.path.relpath(frame.f_locals['filename'])
        line = '' if 'mmcv' in frame.f_code.co_filename else f', line {number}'
    if isinstance(error, FileNotFoundError):
        return f'config file {path}: the file {culprit} that it builds on does not exist; correct its _base_'
    return f'config file {culprit}{line} cannot be read: {type(error).__name__}: {error}'


def _close_temporary_files(error) -> None:
    """Let go of mmcv's temporary file now, or its end would print that its folder is gone already."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_locals.get('temp_config_file')
        if frame.f_code.co_name == '_file2dict' and file is not None:
            try:
                file.close()
            except FileNotFoundError:
                continue


def _as_mmcv(config: dict, path: str):
    from mmcv import Config

    with open(path, encoding='utf-8') as f:
        return Config(config, cfg_text=f.read(), filename=str(path))


def _import_modules(custom_imports) -> None:
    """Import the modules of ``custom_imports = dict(imports=[...])``, which register a user's components."""
    if custom_imports is None:
        return
    names = custom_imports.get('imports', [])
    check_value(names, Union[str, Sequence[str]], 'custom_imports.imports')
    for name in [names] if isinstance(names, str) else names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f'custom_imports: module {name!r} cannot be imported ({error}); install it or correct its name'
            ) from error


def _check_sections(config):
    for name, keys in SECTION_KEYS.items():
        value = config.get(name)
        check_keys(section(value, name), keys, name)
    data = section(config.get('data'), 'data')
    for split in ('train', 'val', 'test'):
        section(data.get(split), f'data.{split}')
    check_whole(data.get('workers_per_gpu', 0), 0, 'data.workers_per_gpu')
    TrainSettings.from_config(config.get('train'))
    EvaluationSettings.from_config(config.get('evaluation'))


def apply_override(config: dict, text: str) -> None:
    """Set one ``a.b.c=value`` in a nested dict, in place.

    Raises:
        ConfigError: no ``=``, or a path that does not exist.
    """
    name, equals, value = text.partition('=')
    if not equals or not name.strip():
        raise ConfigError(f'override {text!r} is not of the form key=value')
    parts = name.strip().split('.')
    parent = config
    for depth, part in enumerate(parts[:-1]):
        parent = _step(parent, parts[:depth], part, text)
    _assign(parent, parts, parse_value(value.strip()), text)


def parse_value(text: str) -> Any:
    """Python literal if it is one (``3``, ``1e-4``, ``None``, ``[1, 2]``), true/false, or else the text."""
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _step(parent, path, part, text):
    """The child ``part`` of ``parent``; known but absent sections are created."""
    key = _index(parent, path, part, text) if isinstance(parent, (list, tuple)) else part
    if isinstance(parent, Mapping) and parent.get(part) is None and _is_section(path + [part]):
        parent[part] = {}
    if isinstance(parent, Mapping) and part not in parent:
        raise _unknown_path(parent, path, part, text)
    child = parent[key]
    if not isinstance(child, (Mapping, list)):
        where = '.'.join(path + [part])
        raise ConfigError(f'override {text!r}: {where} is {child!r}, not a dict or list')
    return child


def _assign(parent, parts, value, text):
    path, last = parts[:-1], parts[-1]
    if isinstance(parent, list):
        parent[_index(parent, path, last, text)] = value
        return
    if last not in parent and not _accepts(parent, path, last):
        raise _unknown_path(parent, path, last, text)
    parent[last] = value


def _is_section(path) -> bool:
    """Whether the mapping at ``path`` is one that a config may leave out and an override may begin."""
    return '.'.join(path) in _OPEN_SECTIONS or '.'.join(path) in SECTION_KEYS


def _accepts(parent, path, key) -> bool:
    """Whether ``key`` may be added to the mapping at ``path``: its taker knows and checks its keys."""
    dotted = '.'.join(path)
    if not path:
        return key in TOP_LEVEL_KEYS
    if dotted in SECTION_KEYS:
        return key in SECTION_KEYS[dotted]
    return 'type' in parent or dotted in _OPEN_SECTIONS or dotted.endswith('_cfgs')  # components by names of their own


def _index(items, path, part, text):
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(
            f'override {text!r}: {".".join(path)} is a list of {len(items)} items, numbered from 0; {part!r} '
            'is none of them'
        )
    return int(part)


def _unknown_path(parent, path, key, text):
    known = set(map(str, parent)) | set(SECTION_KEYS.get('.'.join(path), () if path else TOP_LEVEL_KEYS))
    where, remedy = '.'.join(path) or 'the config', said_elsewhere([key]) or did_you_mean(key, known)
    keys = ', '.join(sorted(known))
    return ConfigError(f'override {text!r}: {where} has no key {key!r}{remedy} (the keys are {keys})')


def require_keys(cfg, keys: Sequence[str]) -> None:
    """Raise ConfigError naming the first of the dotted ``keys`` that is missing from a config, or None."""
    for key in keys:
        node = cfg
        for part in key.split('.'):
            node = node.get(part) if hasattr(node, 'get') else None
        if node is None:
            where = f' {cfg.filename}' if getattr(cfg, 'filename', None) else ''
            raise ConfigError(f'the config{where} has no {key!r}; add it, or build on a base that has it')


def dump_config(cfg, path: str) -> None:
    """Write a config as one flat Python file that ``load_config`` reads back to the same values."""
    plain = cfg._cfg_dict.to_dict() if hasattr(cfg, '_cfg_dict') else dict(cfg)
    with open(path, 'w', encoding='utf-8') as f:
        for name, value in plain.items():
            f.write(f'{name} = {pprint.pformat(value, width=110, compact=True)}\n\n')
