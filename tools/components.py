"""The detector's parts for a run: the one place that knows models, data sets and metrics together."""

from lib.run import Components


def components() -> Components:
    """Builders of the model, the data sets and the evaluator, and the check of data files."""
    from lib.metrics import Evaluator
    from loaders import build_dataset, collate
    from loaders.preflight import preflight
    from models import build_model

    return Components(build_model, build_dataset, collate, Evaluator, preflight)
