"""The run set-up that the scripts share: processes, seeds, run folder, training and evaluation loops.

Nothing here knows a detector or a data set by name: the scripts build the model, the data sets and the evaluator and
hand them in as :class:`Components`.
"""

from typing import Any, Callable, NamedTuple, Optional

from ..config import require_keys
from ..errors import DataError
from ..task import Task


class Components(NamedTuple):
    """Builders of a project's parts.

    build_model      (model config, task) -> module on the CPU
    build_dataset    (section of ``data``, task) -> data set
    collate          list of samples -> batch
    build_evaluator  (task, metrics=..., device=...) -> evaluator
    preflight        (data set, name, config) raises DataError where files are missing; None checks nothing
    draw             (task, truth, prediction, title) -> uint8 [height, width, 3] RGB, of two volumes as data sets and
                     ``lib.prediction.to_dense`` give them; None draws nothing
    """

    build_model: Callable
    build_dataset: Callable
    collate: Callable
    build_evaluator: Callable
    preflight: Optional[Callable[[Any, str, Any], None]] = None
    draw: Optional[Callable] = None


def read_task(cfg) -> Task:
    """Task of a config that has everything a run needs.

    Raises:
        ConfigError: a section is missing, or the task is not consistent.
    """
    require_keys(cfg, ('task', 'model', 'data'))
    return Task.from_config(cfg.task)


def open_dataset(components: Components, cfg, split: str, task: Task, changes: dict, check_files: bool):
    """Data set of ``data.<split>``.

    Args:
        changes: arguments that replace the config's.
        check_files: run the preflight on it.

    Raises:
        ConfigError: the section is missing or wrong.
        DataError: its files are missing or damaged, or it has no samples.
    """
    require_keys(cfg, (f'data.{split}',))
    dataset = components.build_dataset(dict(cfg.data[split], **changes), task)
    if len(dataset) == 0:
        raise DataError(f'data.{split} has no samples; check ann_file, load_interval and max_samples')
    if check_files and components.preflight is not None:
        components.preflight(dataset, split, cfg)
    return dataset


def default_metrics(task: Task) -> tuple:
    """RayIoU and mIoU, and RayPQ for panoptic tasks."""
    return ('ray_iou', 'ray_pq', 'miou') if task.panoptic else ('ray_iou', 'miou')
