"""Which box convention an info file follows.

MMDetection3D 1.0 writes ``gt_boxes`` as (x, y, z, length, width, height, yaw about +z). Files of earlier
versions, of which many are still around, hold (x, y, z, width, length, height, -yaw - pi/2). Nothing in a file
says which it is, but cars and buses are longer than wide.
"""

from typing import Dict, List, Sequence

import numpy as np

_LONG_CLASSES = ('car', 'truck', 'bus', 'trailer', 'motorcycle', 'bicycle')


def holds_width_first(infos: Sequence[Dict]) -> bool:
    """The boxes follow the convention before MMDetection3D 1.0: most vehicles would be wider than long."""
    wider = longer = 0
    for info in infos:
        boxes = np.asarray(info.get('gt_boxes', ()), dtype=np.float64).reshape(-1, 7)
        vehicles = boxes[np.isin(np.asarray(info.get('gt_names', ()), dtype=str), _LONG_CLASSES)]
        wider += int((vehicles[:, 3] < vehicles[:, 4]).sum())
        longer += int((vehicles[:, 3] > vehicles[:, 4]).sum())
    return wider > longer


def with_length_first(infos: Sequence[Dict]) -> List[Dict]:
    """The infos with boxes in MMDetection3D 1.0's convention; converted, as new dicts, where they are not."""
    if not holds_width_first(infos):
        return list(infos)
    print('note: these infos hold boxes as (width, length, height), as before MMDetection3D 1.0; they are converted')
    return [_converted(info) if len(info.get('gt_boxes', ())) else info for info in infos]


def _converted(info: Dict) -> Dict:
    boxes = np.array(info['gt_boxes'], dtype=np.float64)
    boxes[:, 3:5] = boxes[:, [4, 3]]
    turned = -boxes[:, 6] - np.pi / 2
    boxes[:, 6] = (turned + np.pi) % (2 * np.pi) - np.pi
    return dict(info, gt_boxes=boxes)
