"""What knows nothing of the detector: task, labels, files, configs, checkpoints, runs, metrics."""

__version__ = '1.0.0'
