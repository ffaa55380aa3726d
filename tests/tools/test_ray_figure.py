"""The picture of docs/metrics.md is what its script makes."""

from pathlib import Path

from tools.drawing.ray_figure import figure

PICTURE = Path(__file__).resolve().parents[2] / 'docs' / 'images' / 'ray_iou.svg'


def test_picture_of_the_docs_is_up_to_date():
    assert figure() == PICTURE.read_text(encoding='utf-8')
