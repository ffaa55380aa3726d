"""The detector's parts for a run: the one place that knows models, data sets and metrics together."""

from lib.run import Components


def components() -> Components:
    """Builders of the model, the data sets and the evaluator, the check of data files, and pictures."""
    from lib.metrics import Evaluator
    from loaders import build_dataset, collate
    from loaders.preflight import preflight
    from models import build_model
    from tools.drawing.figure import draw_from_above

    return Components(build_model, build_dataset, collate, Evaluator, preflight, draw_from_above)
