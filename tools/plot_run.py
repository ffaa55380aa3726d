"""Draw how one or several training runs went: losses, scores, shares, learning rate, gradient, time.

    python tools/plot_run.py outputs/CONFIG/20240101_120000
    python tools/plot_run.py outputs/A/RUN outputs/B/RUN --names small large --out compare.svg
    python tools/plot_run.py run/metrics.jsonl --show loss grad_norm --smooth 10

A run is its folder or its metrics.jsonl. Needs matplotlib. (TensorBoard shows the same: tensorboard --logdir outputs)
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

if str(Path(__file__).resolve().parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import make_parser, real_number, run_main, whole_number
from lib.errors import DataError, UserError
from lib.registry import did_you_mean

Curve = List[Tuple[int, float]]  # iteration, value
_TITLES = dict(
    loss='loss, sum of all terms',
    mask='loss of masks, last prediction',
    voxel='loss of voxels, last stage',
    scores='scores, %',
    recall='kept occupied voxels, %',
    right_class='queries, %',
    grad_norm='norm of the gradient',
    lr='learning rate',
    samples_per_s='samples/s',
)
_PANELS = ('loss', 'mask', 'voxel', 'scores', 'recall', 'right_class', 'grad_norm', 'lr', 'samples_per_s')
_STYLES = ('-', '--', ':', '-.', (0, (6, 1)), (0, (1, 3)))
_MASK_TERMS = ('loss_mask', 'loss_dice_mask', 'loss_class')


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='run folders or metrics.jsonl files')
    add('--names', nargs='+', metavar='NAME', help='what to call them (default: their folders)')
    add('--show', nargs='+', metavar='VALUE', help='one panel per value of metrics.jsonl instead of the usual ones')
    add('--smooth', type=whole_number(1), default=1, metavar='N', help='average over so many log lines')
    add('--width', type=real_number(above=0, most=40), default=4.2, help='of a panel, inches (default: %(default)s)')
    add('--out', default='run.png', help='.png, .svg or .pdf (default: %(default)s)')
    return parser.parse_args(argv)


def read_run(path: str) -> Dict[str, Curve]:
    """Curves of a run by name; scores of evaluations are named ``eval/...``, the last value of an iteration counts.

    Raises:
        DataError: no such run, or its file is none.
    """
    file = Path(path) / 'metrics.jsonl' if os.path.isdir(path) else Path(path)
    if not file.is_file():
        raise DataError(f'{file} does not exist; give a run folder or its metrics.jsonl')
    curves: Dict[str, Dict[int, float]] = {}
    for number, line in enumerate(file.read_text(encoding='utf-8', errors='replace').splitlines(), 1):
        try:
            record = json.loads(line)
            kind, iteration = record.pop('kind'), int(record.pop('iteration'))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f'{file}, line {number}, is no record of a run; remove that line') from error
        for name, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name if kind == 'train' else f'{kind}/{name}', {})[iteration] = value
    if not curves:
        raise DataError(f'{file} holds no records yet; wait for the first line of the log')
    return {name: sorted(values.items()) for name, values in curves.items()}


def smooth(curve: Curve, count: int) -> Curve:
    """Each value averaged with the ``count - 1`` before it."""
    values = [value for _, value in curve]
    means = [sum(values[max(0, i + 1 - count) : i + 1]) / min(i + 1, count) for i in range(len(values))]
    return [(iteration, mean) for (iteration, _), mean in zip(curve, means)]


def panel_curves(run: Dict[str, Curve], panel: str) -> Dict[str, Curve]:
    """The curves of a panel, by what the legend calls them; fractions become percent."""
    percent = lambda curve: [(i, 100 * v) for i, v in curve]  # noqa: E731 (one place)
    if panel == 'scores':
        return {n[5:]: percent(c) for n, c in run.items() if n in ('eval/RayIoU', 'eval/RayPQ', 'eval/mIoU')}
    if panel == 'recall':
        return {f'stage {n[7:]}': percent(c) for n, c in run.items() if n.startswith('recall_')}
    if panel == 'right_class':
        names = dict(right_class='right class, %', empty_masks='empty masks, %')
        return {title: percent(run[name]) for name, title in names.items() if name in run}
    terms = {n: c for n, c in run.items() if n.startswith('loss_')}
    is_last = lambda name: name.rsplit('_', 1)[-1] == _last_number(terms, name)  # noqa: E731
    if panel in ('mask', 'voxel'):
        of_masks = {n for n in terms if n.rsplit('_', 1)[0].replace('loss_dn_', 'loss_') in _MASK_TERMS}
        wanted = of_masks if panel == 'mask' else set(terms) - of_masks
        return {n[5:].rsplit('_', 1)[0]: c for n, c in terms.items() if n in wanted and is_last(n)}
    return {panel: run[panel]} if panel in run else {}


def _last_number(terms, name) -> str:
    """The largest number that a term ends in: the last stage or prediction stands for all of them."""
    stem = name.rsplit('_', 1)[0]
    return max((n.rsplit('_', 1)[-1] for n in terms if n.rsplit('_', 1)[0] == stem), key=lambda n: (len(n), n))


def import_pyplot():
    """matplotlib's pyplot, drawing into files; UserError if it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('drawing needs matplotlib; install it with: pip install matplotlib') from error
    matplotlib.use('Agg')
    from matplotlib import pyplot

    matplotlib.rcParams['svg.hashsalt'] = 'run'  # the same file from the same numbers
    return pyplot


def save_figure(figure, out: str) -> None:
    """Write a figure to a .png, .svg or .pdf and close it; UserError if that cannot be."""
    try:
        figure.savefig(out, metadata={'Date': None} if out.endswith('.svg') else None)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {out}: {error}; give a .png, .svg or .pdf in an existing folder') from error
    import_pyplot().close(figure)


def draw(runs: Dict[str, Dict[str, Curve]], panels: Sequence[str], count: int, width: float, out: str) -> None:
    """One panel beside the other; a colour per run, or per curve where there is one run.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    pyplot = import_pyplot()
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, 0.68 * width * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        _draw_panel(axis, {name: panel_curves(run, panel) for name, run in runs.items()}, panel, count)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    if len(runs) > 1:
        handles = [pyplot.Line2D([], [], color=f'C{i}') for i in range(len(runs))]
        figure.legend(handles, list(runs), loc='lower center', ncol=len(runs), frameon=False)
    figure.tight_layout(rect=(0, 0.06 if len(runs) > 1 else 0, 1, 1))
    save_figure(figure, out)


def _draw_panel(axis, runs, panel, count) -> None:
    """Curves of one run in colours; of several runs a colour each, and a line style per curve."""
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    several = len(runs) > 1
    for i, curves in enumerate(runs.values()):
        for name, curve in curves.items():
            k = names.index(name)
            iterations, values = zip(*smooth(curve, count))
            style = _STYLES[k % len(_STYLES)] if several else '-'
            axis.plot(iterations, values, linestyle=style, color=f'C{i if several else k}', lw=1.2)
    if len(names) > 1:
        colours = ['black' if several else f'C{k}' for k in range(len(names))]
        styles = [_STYLES[k % len(_STYLES)] if several else '-' for k in range(len(names))]
        lines = [axis.plot([], [], linestyle=style, color=colour, lw=1.2)[0] for style, colour in zip(styles, colours)]
        axis.legend(lines, names, fontsize=7)
    axis.set_title(_TITLES.get(panel, panel.replace('_', ' ')), fontsize=10)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if panel in ('loss', 'mask', 'grad_norm'):  # they begin far above where they go
        axis.set_yscale('log')
        low, high = axis.get_ylim()
        axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if high < 100 * low else (1,))
        axis.yaxis.set_major_formatter('{x:g}')
        axis.tick_params(axis='y', which='minor', labelleft=False)


def main():
    args = parse_args()
    names = args.names or [Path(path).parent.name if path.endswith('.jsonl') else Path(path).name for path in args.runs]
    if len(names) != len(args.runs) or len(set(names)) != len(names):
        raise UserError(f'{len(args.runs)} runs need as many different --names, got {", ".join(names)}')
    runs = {name: read_run(path) for name, path in zip(names, args.runs)}
    known = set().union(*runs.values())
    unknown = [name for name in args.show or () if name not in known]
    if unknown:
        raise UserError(f'no run has {unknown[0]!r}{did_you_mean(unknown[0], known)}; --show takes {sorted(known)}')
    panels = args.show or [p for p in _PANELS if any(panel_curves(run, p) for run in runs.values())]
    draw(runs, panels, args.smooth, args.width, args.out)
    print(f'wrote {args.out}: {len(runs)} runs, {len(panels)} panels')


if __name__ == '__main__':
    run_main(main)
