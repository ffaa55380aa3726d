"""How cost grows with the work: what tools/benchmark.py --grow times, and its plots.

    python tools/benchmark.py --config CONFIG --grow --no-cudnn-benchmark --steps 4 --warmup 2 --json growth.json
    python tools/benchmark_growth.py growth.json --out growth.svg

One quantity grows at a time, from the config as it is. Needs matplotlib.
"""

import sys
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

if str(Path(__file__).resolve().parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import make_parser, run_main
from lib.errors import DataError
from lib.io import read_json
from tools.benchmark_table import Row, Setting, read_rows
from tools.plot_run import import_pyplot, save_figure

VOXELS = (0.5, 2, 4)  # times what each stage keeps
FRAMES = (1, 2, 4, 8, 16)
IMAGES = ((384, 1056), (512, 1408), (900, 1600))
BATCHES = (1, 2, 4, 8, 16)
SETTINGS = (
    Setting('bf16, graph', dict(what=('training',), amp='bf16', cuda_graph=True)),
    Setting('fp16, graph', dict(what=('inference',), amp='fp16', cuda_graph=True)),
)

_AXES = dict(voxels='voxels kept (thousands)', frames='frames', image='image (megapixels)', batch='samples in a batch')
_CURVES = dict(training='training step', full='inference, all frames', cached='inference, cached history')
_FIGURES = dict(median_ms='milliseconds', held_gib='GiB held')


def points(cfg: Mapping) -> Dict[str, List[str]]:
    """Overrides of the configs to be timed beside ``cfg``, by name; what takes most memory comes last."""
    transformer = 'model.pts_bbox_head.transformer'
    kept = {key: cfg['model']['pts_bbox_head']['transformer'][key] for key in ('topk_training', 'topk_testing')}
    found = {f'frames {n}': [f'task.num_frames={n}'] for n in FRAMES if n != cfg['task'].get('num_frames', 8)}
    for factor in VOXELS:
        scaled = {key: [int(factor * count) for count in counts] for key, counts in kept.items()}
        found[f'voxels x {factor:g}'] = [f'{transformer}.{key}={counts}' for key, counts in scaled.items()]
    found.update({f'image {height}x{width}': [f'task.image_size=[{height}, {width}]'] for height, width in IMAGES})
    return found


def curves(rows: Sequence[Row], axis: str) -> Dict[str, List[Row]]:
    """Rows in which nothing but ``axis`` differs from the first of their kind, by kind, from little to much."""
    found = {}
    for kind in _CURVES:
        of_kind = [row for row in rows if kind in row['name']]
        same = [row for row in of_kind if all(row[key] == of_kind[0][key] for key in _AXES if key != axis)]
        by_amount = {amount(row, axis): row for row in reversed(same)}  # of several runs the first counts
        found[kind] = [by_amount[key] for key in sorted(by_amount)]
    return found


def amount(row: Row, axis: str) -> float:
    """Where a row is on an axis, in its unit."""
    if axis == 'image':
        return row['image'][0] * row['image'][1] / 1e6
    return row['voxels'] / 1e3 if axis == 'voxels' else row[axis]


def draw(rows: Sequence[Row], title: str, out: str) -> None:
    """Time above memory, a column for every quantity that grows.

    Args:
        rows: of the config as it is first; those without figures are marked at the upper edge.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    pyplot = import_pyplot()
    figures = {key: label for key, label in _FIGURES.items() if any(row.get(key) for row in rows)}  # a CPU has no GiB
    size = (11, 0.4 + 2.6 * len(figures))
    figure, axes = pyplot.subplots(len(figures), len(_AXES), figsize=size, sharex='col', sharey='row', squeeze=False)
    for column, (axis, label) in zip(axes.T, _AXES.items()):
        found = curves(rows, axis)
        for panel, key in zip(column, figures):
            for i, kind in enumerate(_CURVES):
                base = next((row for row in rows if kind in row['name']), None)
                _draw_curve(panel, [(amount(row, axis), row.get(key)) for row in found[kind]], f'C{i}')
                _draw_proportion(panel, base, found[kind], axis, key, f'C{i}')
            panel.set_xscale('log', base=2)
            panel.set_yscale('log')
            panel.grid(alpha=0.3)
            panel.tick_params(labelsize=8)
        amounts = sorted({amount(row, axis) for of_kind in found.values() for row in of_kind})
        column[-1].set_xticks(amounts, [f'{value:.3g}' for value in amounts])
        column[-1].set_xlabel(label, fontsize=9)
    for panel, label in zip(axes[:, 0], figures.values()):
        panel.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
        panel.set_ylabel(label, fontsize=9)
    _draw_legend(figure, pyplot.Line2D, lost=any('ended' in row for row in rows))
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save_figure(figure, out)


def _draw_curve(panel, points: Sequence[Tuple[float, Optional[float]]], colour: str) -> None:
    """Points (amount, figure); a cross for a figure that is None."""
    known = [point for point in points if point[1] is not None]
    panel.plot([x for x, _ in known], [y for _, y in known], color=colour, marker='o', ms=3, lw=1.3)
    lost = [x for x, y in points if y is None]
    panel.plot(lost, [0.96] * len(lost), 'x', color=colour, transform=panel.get_xaxis_transform())


def _draw_proportion(panel, base: Optional[Row], rows: Sequence[Row], axis: str, key: str, colour: str) -> None:
    """From the config as it is upwards, what the figure would be if it grew as the amount does."""
    if base is not None and key in base and rows:
        ends = amount(base, axis), amount(rows[-1], axis)
        panel.plot(ends, [base[key], base[key] * ends[1] / ends[0]], color=colour, ls=':', lw=1)


def _draw_legend(figure, line, lost: bool) -> None:
    handles = [line([], [], color=f'C{i}', marker='o', ms=3) for i in range(len(_CURVES))]
    handles += [line([], [], color='grey', ls=':'), *([line([], [], color='grey', marker='x', ls='')] if lost else [])]
    names = [*_CURVES.values(), 'in proportion', *(['does not fit'] if lost else [])]
    figure.legend(handles, names, loc='lower center', ncol=len(names), frameon=False, fontsize=9)


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument('runs', nargs='+', metavar='JSON', help='what tools/benchmark.py --grow --json stored')
    parser.add_argument('--title', help='above the plots (default: device and config)')
    parser.add_argument('--out', default='growth.svg', help='.png, .svg or .pdf (default: %(default)s)')
    return parser.parse_args(argv)


def main():
    args = parse_args()
    rows, ended = [], []
    for path in args.runs:
        rows += read_rows(path)
        stored = read_json(path)
        ended += [row for row in stored.get('ended', ()) if 'name' in row]
        if not all(key in row for row in rows for key in _AXES) or not rows:
            raise DataError(f'{path} does not say how much work its rows are; run tools/benchmark.py --grow again')
    title = args.title or f'{stored.get("device")}, {Path(str(stored.get("config"))).stem}'
    draw([*rows, *ended], title, args.out)
    print(f'wrote {args.out}: {len(rows)} rows')


if __name__ == '__main__':
    run_main(main)
