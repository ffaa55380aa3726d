"""Settings of a run: the config's ``train`` and ``evaluation`` sections with their defaults, checked."""

from dataclasses import dataclass, fields
from typing import Literal, Mapping, Optional, Tuple, Union

from .errors import ConfigError
from .registry import check_fields, check_keys, check_whole, section


@dataclass(frozen=True)
class TrainSettings:
    """How training runs; only ``amp``, ``tf32``, ``ema_decay``, ``class_balance`` and skipped samples
    change what is learned.

    Attributes:
        amp: None (float32), 'fp16' (with loss scaling) or 'bf16'.
        tf32: 'default' (PyTorch's own: convolutions yes, matrix products no), 'off' or 'on' (both).
        ema_decay: of the moving average of the weights that is evaluated and shipped, e.g. 0.999; 0 keeps none.
        class_balance: share of an epoch's samples that is drawn so that every class with boxes is met alike; 0 takes
            each sample once.
        cudnn_benchmark: let cuDNN time its algorithms; faster, and not repeatable to the bit.
        cuda_graph: replay forward and backward pass up to the losses as CUDA graphs, which small batches gain by; they
            hold the memory of a step all the time. Without an effect on the CPU, with ``model.auxiliary_losses``, and
            with norms that exchange statistics between processes.
        deterministic: repeat to the bit on the same machine and number of GPUs, slower (see
            ``set_deterministic``); without it a GPU adds some gradients up in no fixed order.
        log_interval: optimizer steps between two log lines.
        checkpoint_interval: epochs between two checkpoints; the last epoch always writes one.
        checkpoint_interval_iters: optimizer steps between two checkpoints inside an epoch; 0 writes none.
        max_keep_ckpts: newest checkpoints kept in the run folder; 0 keeps all.
        on_save_error: 'continue' training when a checkpoint cannot be written (disk full), or 'stop'.
        on_data_error: 'stop' at an unreadable sample, or 'skip' it (the next readable one takes its place).
        max_skipped: samples that may be skipped in a run before it stops all the same.
        accumulate: micro-batches per optimizer step, or 'auto'.
        max_samples_per_gpu: with accumulate='auto', the most samples in one forward pass; 0 sets no limit.
        find_unused_parameters: passed on to DistributedDataParallel.
        tensorboard: write TensorBoard event files if the package is installed.
        picture_interval: optimizer steps between two pictures of two validation samples; 0 draws none.
    """

    amp: Optional[Literal['fp16', 'bf16']] = None
    tf32: Literal['default', 'off', 'on'] = 'default'
    ema_decay: float = 0.0
    class_balance: float = 0.0
    cudnn_benchmark: bool = False
    cuda_graph: bool = False
    deterministic: bool = False
    log_interval: int = 50
    checkpoint_interval: int = 1
    checkpoint_interval_iters: int = 0
    max_keep_ckpts: int = 1
    on_save_error: Literal['continue', 'stop'] = 'continue'
    on_data_error: Literal['stop', 'skip'] = 'stop'
    max_skipped: int = 10
    accumulate: Union[Literal['auto'], int] = 'auto'
    max_samples_per_gpu: int = 0
    find_unused_parameters: bool = False
    tensorboard: bool = True
    picture_interval: int = 0

    def __post_init__(self):
        check_fields(self, 'train')
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f'train.ema_decay must be at least 0 and less than 1, got {self.ema_decay!r}')
        if not 0 <= self.class_balance <= 1:
            raise ConfigError(f'train.class_balance must be in 0..1, got {self.class_balance!r}')
        for name, low in (
            ('log_interval', 1),
            ('checkpoint_interval', 1),
            ('checkpoint_interval_iters', 0),
            ('max_keep_ckpts', 0),
            ('max_skipped', 0),
            ('max_samples_per_gpu', 0),
            ('picture_interval', 0),
        ):
            check_whole(getattr(self, name), low, f'train.{name}')
        for name in ('cudnn_benchmark', 'cuda_graph'):
            if self.deterministic and getattr(self, name):
                raise ConfigError(f'train.deterministic and train.{name} exclude each other; set one of them')
        if self.accumulate != 'auto':
            check_whole(self.accumulate, 1, 'train.accumulate')

    @classmethod
    def from_config(cls, cfg: Optional[Mapping]) -> 'TrainSettings':
        return _from_config(cls, cfg, 'train')


@dataclass(frozen=True)
class EvaluationSettings:
    """When and how a run is evaluated.

    Attributes:
        interval: epochs between two evaluations during training; 0 evaluates at the end only, -1 never.
        interval_iters: optimizer steps between two evaluations; 0 goes by ``interval`` alone.
        save_best: score whose best checkpoint is kept as best.pth, e.g. 'RayIoU' or 'mIoU'; 'auto' takes RayIoU
            where a run is evaluated more than once, None keeps none.
        metrics: names that the evaluator knows; None takes what suits the task.
    """

    interval: int = 0
    interval_iters: int = 0
    save_best: Optional[Literal['auto', 'RayIoU', 'RayPQ', 'mIoU']] = 'auto'
    metrics: Optional[Tuple[str, ...]] = None

    def __post_init__(self):
        check_fields(self, 'evaluation')
        check_whole(self.interval, -1, 'evaluation.interval')
        check_whole(self.interval_iters, 0, 'evaluation.interval_iters')
        if self.interval < 0 < self.interval_iters:
            raise ConfigError('evaluation.interval=-1 never evaluates; remove it or evaluation.interval_iters')
        if self.metrics is not None:
            object.__setattr__(self, 'metrics', tuple(self.metrics))

    @property
    def best_by(self) -> Optional[str]:
        """Score that the best checkpoint is chosen by, or None."""
        if self.save_best != 'auto':
            return self.save_best
        return 'RayIoU' if self.interval > 0 or self.interval_iters else None

    def is_due(self, iteration: int, epochs: Optional[int] = None) -> bool:
        """Whether to evaluate after an iteration, which ended so many epochs (None: it is inside one)."""
        by_epoch = epochs is not None and self.interval > 0 and epochs % self.interval == 0
        return by_epoch or (self.interval_iters > 0 and iteration % self.interval_iters == 0)

    @classmethod
    def from_config(cls, cfg: Optional[Mapping]) -> 'EvaluationSettings':
        return _from_config(cls, cfg, 'evaluation')


def setting_names(cls) -> Tuple[str, ...]:
    """Keys that the section of ``cls`` may have."""
    return tuple(f.name for f in fields(cls))


def _from_config(cls, cfg, where):
    cfg = section(cfg, where)
    check_keys(cfg, setting_names(cls), where)
    return cls(**cfg)
