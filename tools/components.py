"""The detector's parts for a run: the one place that knows models, data sets and metrics together.

And for scripts that score or show saved predictions the config that those are of.
"""

import os
from typing import Optional

from lib.errors import UserError
from lib.run import Components


def components() -> Components:
    """Builders of the model, the data sets and the evaluator, the check of data files, and pictures."""
    from lib.metrics import Evaluator
    from loaders import build_dataset, collate
    from loaders.preflight import preflight
    from models import build_model
    from tools.drawing.figure import draw_from_above

    return Components(build_model, build_dataset, collate, Evaluator, preflight, draw_from_above)


def config_of_predictions(predictions: Optional[str], config: Optional[str], override, split: Optional[str]):
    """The config and the split (``data.<split>``) that predictions are of.

    What the user names comes first; the rest is what the record beside the predictions says, unless the user names
    another config than the recorded one. Where inference needed no labels, those of ``data.val`` are looked up.

    Args:
        predictions: folder or zip, or None.
        config, override, split: as given on the command line; None and empty where not given.

    Returns:
        (config, split name).

    Raises:
        UserError: no config is named anywhere, or it cannot be read.
    """
    from lib.config import load_config
    from lib.metrics.formats import find_record

    record = (find_record(predictions) if predictions else None) or {}
    if config is None and not record.get('config'):
        raise UserError(f'nothing beside the predictions in {predictions} says which config they are of; give --config')
    if config is None or os.path.abspath(config) == os.path.abspath(record.get('config') or ''):
        config = record['config']
        override = list(record.get('override') or []) + list(override)
        split = split or record.get('split')
    cfg, split = load_config(config, override), split or 'val'
    if split not in cfg.data:
        raise UserError(f'{config} has no data.{split}, which the predictions are said to be of; choose --split')
    section = cfg.data[split]
    if predictions and section.get('occ_gt_root') is None:
        labels = (cfg.data.get('val') or {}).get('occ_gt_root')
        if labels and os.path.isdir(os.path.join(section['data_root'], labels)):
            section['occ_gt_root'] = labels
    return cfg, split
