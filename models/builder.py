"""The detector and its parts from their configs, and the config from a checkpoint's weights.

Whether parts fit together is told in one sentence when the detector is built, not as a shape ten layers down.
"""

import inspect
import logging
import os
from typing import List, Literal, Mapping, NamedTuple, Optional, Sequence

import torch
from mmcv.cnn.bricks.registry import ACTIVATION_LAYERS, CONV_LAYERS, NORM_LAYERS
from mmcv.cnn.utils.weight_init import INITIALIZERS
from mmdet.models.builder import DETECTORS
from torch import Tensor, nn

from lib.checkpoint import WeightsKind
from lib.errors import ConfigError, reason
from lib.registry import build_checked, check_component, check_keys, check_value, look_up
from lib.task import Task

# Another detector's names for the parts: mmdet calls the pyramid 'neck'. Its weights fit where the widths agree.
PRETRAINED_NAMES = ((r'^neck\.', 'img_neck.'),)

_HEAD_SETTINGS = ('draws', 'merge_stuff', 'overlap_threshold', 'score_threshold')

_LAYERS = dict(norm_cfg=NORM_LAYERS, act_cfg=ACTIVATION_LAYERS, conv_cfg=CONV_LAYERS, init_cfg=INITIALIZERS)
_ADDED_BY_MMCV = ('requires_grad', 'layer', 'override')  # beside what the layer itself takes
_TRIAL_SIZE = 64  # pixels; small, and a multiple of every usual stride

_CONFIGS = {
    ('1.0', 17): 'configs/r50_nuimg_704x256_8f.py (or _pano.py)',
    ('1.1', 17): 'configs/r50_nuimg_704x256_8f_v1.1.py (or _v1.1_pano.py)',
    ('1.1', 16): 'configs/r50_nuimg_704x256_8f_openocc.py',
}


def build_model(cfg: Mapping, task: Task):
    """SparseOcc from the config's ``model`` dict.

    Args:
        cfg: ``model`` dict of a config file, with ``type`` and without ``task``.
        task: classes, range, grid, cameras and frames; handed to every part that needs them.

    Returns:
        the module with initialised weights, on the CPU, in training mode.

    Raises:
        ConfigError: an unknown or missing key, or a value that does not fit the task.
    """
    if isinstance(cfg, Mapping) and 'task' in cfg:
        raise ConfigError('model.task must not be given: the task comes from the top-level task dict')
    model = build_checked(cfg, DETECTORS, dict(task=task), 'model')
    if hasattr(model, 'check_parts'):
        model.check_parts()
    _init_quietly(model)
    return model.train()  # a ResNet fixes its running statistics (norm_eval) only when told to train


def build_part(cfg: Mapping, registry, where: str, task: Optional[Task] = None, sizes=None):
    """A registered part of the model.

    Args:
        cfg: dict with ``type`` and the arguments of its constructor.
        registry: mmcv Registry.
        where: key of ``cfg`` in the config, for messages.
        task: handed over if the constructor has an argument of that name.
        sizes: ``DecoderSizes``, handed over likewise.
    """
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    cls = kind if inspect.isclass(kind) else look_up(kind, registry)
    asked = () if cls is None else inspect.signature(cls.__init__).parameters
    offered = dict(task=task, sizes=sizes)
    given = {name: value for name, value in offered.items() if name in asked and value is not None}
    return build_checked(cfg, registry, given, where)


def build_encoder_part(cfg: Mapping, registry, where: str):
    """A backbone or neck of mmdet's, whose layers are checked first; what its constructor refuses is one sentence.

    Raises:
        ConfigError: it cannot be built as configured.
    """
    if isinstance(cfg, Mapping):
        check_layers(cfg, where)
    return build_part(cfg, registry, where)


class InferenceSettings(NamedTuple):
    """``model.test_cfg``.

    history     'cached' keeps the features of earlier frames between calls with batch 1, 'full' encodes all frames of
                every sample
    cuda_graph  replay the encoder of new frames and the head as one CUDA graph at batch 1: the same numbers sooner,
                for more memory; off by default
    head        draws ('even' or 'random'), merge_stuff ('published' or 'labelled'), overlap_threshold and
                score_threshold, where they are given
    """

    history: str
    cuda_graph: bool
    head: Mapping

    @staticmethod
    def from_config(test_cfg: Optional[Mapping]) -> 'InferenceSettings':
        """The settings, or ConfigError for a key or history that there is not."""
        cfg = dict(test_cfg or {})
        check_keys(cfg, ('history', 'cuda_graph', *_HEAD_SETTINGS), 'model.test_cfg')
        history = cfg.get('history', 'full')
        check_value(history, Literal['full', 'cached'], 'model.test_cfg.history')
        head = {key: cfg[key] for key in _HEAD_SETTINGS if key in cfg}
        return InferenceSettings(history, bool(cfg.get('cuda_graph', False)), head)


def hand_down(cfg: Mapping, where: str, values: Mapping, source: str) -> Mapping:
    """The config of an inner part with the values that an outer one gives it; None is not given.

    Args:
        cfg: of the inner part.
        where: its key in the config.
        values: by key.
        source: where in the config they come from.

    Raises:
        ConfigError: the inner config has the value, too; it names both places.
    """
    given = {key: value for key, value in values.items() if value is not None}
    for key in given:
        if key in cfg:
            raise ConfigError(
                f'{key} is given twice, by {where} ({cfg[key]!r}) and by {source} ({given[key]!r}); remove one of them'
            )
    return dict(cfg, **given)


def _init_quietly(model):
    """mmcv logs one message per parameter while it initialises; nobody reads them."""
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        model.init_weights()
    except OSError as error:
        raise ConfigError(
            f'model: the weights that an init_cfg names cannot be read or fetched ({reason(error)}); give a file that '
            'is there, or set init_cfg=None'
        ) from error
    finally:
        logging.disable(previous)


def describe_weights(weights: Mapping[str, Tensor]) -> Optional[WeightsKind]:
    """Release (1.0 scores children by occupancy) and class count, without free; None for another network's weights.

    Semantic and panoptic models have the same weights, so nothing tells these apart.
    """
    classifier = [v for k, v in weights.items() if k.endswith('decoder_layer.classifier.weight')]
    if not classifier:
        return None
    release, classes = '1.0' if any('.occ_pred_heads.' in k for k in weights) else '1.1', int(classifier[0].shape[0])
    return WeightsKind(f'a release {release} model with {classes} classes', _CONFIGS.get((release, classes)))


def check_layers(cfg: Mapping, where: str) -> None:
    """Check the layers that a part's config names: their types and keys, and the files that they start from.

    Args:
        cfg: of a backbone or neck.
        where: its key in the config.

    Raises:
        ConfigError: an unknown layer or key, or a file of ``init_cfg`` that is not there.
    """
    for name, registry in _LAYERS.items():
        layers = cfg.get(name)
        for layer in layers if isinstance(layers, (list, tuple)) else [layers]:
            if isinstance(layer, Mapping):
                check_component(layer, registry, f'{where}.{name}', _ADDED_BY_MMCV)
                _check_start(layer.get('checkpoint'), f'{where}.{name}.checkpoint')


def _check_start(path, key):
    """``init_cfg=dict(type='Pretrained', checkpoint=...)``: a path without a scheme must be a file."""
    if isinstance(path, str) and '://' not in path and not os.path.isfile(os.path.expanduser(path)):
        raise ConfigError(f'{key}: the file {path} does not exist; correct it, or set init_cfg=None and use load_from')


def check_graph(cuda_graph: bool, keep_threshold: Optional[float]) -> None:
    """Raise ConfigError where CUDA graphs are to replay what a threshold makes vary."""
    if cuda_graph and keep_threshold is not None:
        raise ConfigError(
            'model.test_cfg.cuda_graph replays work of one size, which transformer.keep_threshold makes vary; use one '
            'of them'
        )


def check_maps(backbone: nn.Module, neck: nn.Module, sizes, neck_cfg: Mapping) -> None:
    """Run backbone and neck on one tiny image and compare what comes out with what comes next.

    Args:
        backbone, neck: as built, on the CPU; left in evaluation mode.
        sizes: ``DecoderSizes``: how many maps of how many channels the head looks at.
        neck_cfg: config of the neck.

    Raises:
        ConfigError: they do not fit; it names the keys and what to set them to.
    """
    given = _describe(backbone)
    maps = _try(backbone, torch.zeros(1, 3, _TRIAL_SIZE, _TRIAL_SIZE), 'model.img_backbone')
    if not maps:
        return
    wanted = neck_cfg.get('in_channels')
    widths = [int(level.shape[1]) for level in maps]
    if isinstance(wanted, (list, tuple)) and list(wanted) != widths:
        raise ConfigError(
            f'model.img_backbone ({given}) gives {len(widths)} maps of {widths} channels, but '
            f'model.img_neck.in_channels is {list(wanted)}; set model.img_neck.in_channels={widths}'
        )
    num_levels, channels = sizes.num_levels, sizes.embed_dims
    outs = _try(neck, tuple(maps), 'model.img_neck')
    if len(outs) != num_levels:
        raise ConfigError(
            f'model.img_neck gives {len(outs)} maps, but model.pts_bbox_head.transformer.num_levels is {num_levels}; '
            f'set num_levels={len(outs)}, or model.img_neck.num_outs={num_levels}'
        )
    if any(level.shape[1] != channels for level in outs):
        raise ConfigError(
            f'model.img_neck gives maps of {outs[0].shape[1]} channels, but model.pts_bbox_head.embed_dims is '
            f'{channels}; set model.img_neck.out_channels={channels}'
        )


def _describe(backbone: nn.Module) -> str:
    depth = getattr(backbone, 'depth', None)
    return type(backbone).__name__ + (f', depth {depth}' if depth else '')


def _try(part: nn.Module, inputs, where: str) -> Sequence[Tensor]:
    """Maps of a part; none where it cannot be tried on a CPU.

    Raises:
        ConfigError: it cannot work on such input, or gives no maps.
    """
    try:
        part.eval()
        with torch.no_grad():
            maps = part(inputs)
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        if 'on GPU' in str(error) or 'CUDA' in str(error):  # e.g. SyncBN of old PyTorch releases
            return []
        raise ConfigError(f'{where} ({type(part).__name__}) cannot work as configured: {reason(error)}') from error
    levels: List[Tensor] = list(maps) if isinstance(maps, (list, tuple)) else []
    if not levels or any(not isinstance(level, Tensor) or level.dim() != 4 for level in levels):
        raise ConfigError(f'{where} ({type(part).__name__}) must give a list of maps [n, C, H, W]; choose another type')
    return levels
