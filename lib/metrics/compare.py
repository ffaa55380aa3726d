"""Results of several models side by side: as text, Markdown, CSV, and one HTML page with charts.

Differences are judged by a paired bootstrap: all models are scored on the same scenes, drawn at random with
replacement again and again; a difference from the first model is called real if the middle 95 % of its resampled
values lie on one side of 0. One in twenty differences between equal models looks real all the same.
"""

import argparse
import csv
import html
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..errors import DataError
from ..io import atomic_write, read_json
from .counts import Tallies, interval, resample, totals
from .result import text_of, text_table

_COLOURS = ('#2a78b5', '#e07b39', '#3a9d6e', '#9467bd', '#c44e52', '#7f7f7f', '#b5a642', '#17a2b8')
_SCORES = ('RayIoU', 'RayPQ', 'RaySQ', 'RayRQ', 'mIoU', 'binary_IoU', 'OccScore_true_positives', 'OccScore_all_rays')
_ERRORS = ('mAVE_true_positives', 'mAVE_all_rays')


@dataclass(frozen=True)
class Result:
    """What a JSON file of ``sparseocc-eval --json`` says.

    Attributes:
        name: what the model is called here.
        content: the file's.
        scenes: {scene: (samples, tallies)}.
    """

    name: str
    content: Mapping[str, Any]
    scenes: Mapping[str, Tuple[int, Tallies]]

    @property
    def thing_ids(self) -> List[int]:
        return [at for at, name in enumerate(self.content['per_class']) if name in self.content['things']]


@dataclass(frozen=True)
class Difference:
    """How much a model's score is above the first one's.

    Attributes:
        value: of the whole, fraction of 1 or m/s.
        bounds: 95 % interval; None where it cannot be told.
    """

    value: float
    bounds: Optional[Tuple[float, float]]

    @property
    def real(self) -> bool:
        """0 is outside the interval."""
        return self.bounds is not None and not self.bounds[0] <= 0 <= self.bounds[1]


@dataclass(frozen=True)
class Comparison:
    """Several results on the same samples.

    Attributes:
        results: in the order given; the first is what others are compared with.
        names: of the scores that all of them have.
        differences: by name of the score, of each result but the first.
        notes: what could not be compared.
    """

    results: Sequence[Result]
    names: Sequence[str]
    differences: Mapping[str, Sequence[Difference]]
    notes: Sequence[str]

    @property
    def classes(self) -> List[str]:
        return list(self.results[0].content['per_class'])

    @property
    def class_columns(self) -> List[str]:
        """Scores by class worth a chart: those of the totals."""
        there = set.intersection(*(set(result.content['per_class'][self.classes[0]]) for result in self.results))
        return [
            name for name in ('RayIoU', 'RayPQ', 'IoU') if name in there and (name != 'IoU' or 'mIoU' in self.names)
        ]


def read_result(path, name: Optional[str] = None) -> Result:
    """A result from a file.

    Raises:
        DataError: it is no JSON file of ``sparseocc-eval``.
    """
    content = read_json(path)
    needed = ('num_samples', 'per_class', 'tallies', 'thresholds', 'things', 'intervals')
    missing = [key for key in needed if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f'{path} has no {missing[0]!r}; give files of "sparseocc-eval --json"')
    try:
        scenes = {
            scene: (
                int(values['samples']),
                {key: np.asarray(value) for key, value in values.items() if key != 'samples'},
            )
            for scene, values in content['tallies'].items()
        }
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: 'tallies' is damaged ({error}); score the predictions again") from error
    return Result(name or Path(path).stem, content, scenes)


def compare(results: Sequence[Result]) -> Comparison:
    """Compare results with the first.

    Raises:
        DataError: they are of different classes, thresholds or samples.
    """
    first, notes = results[0], []
    for other in results[1:]:
        different = [what for what, value in _must_agree(first).items() if value != _must_agree(other)[what]]
        if different:
            raise DataError(
                f'{first.name} and {other.name} have different {different[0]}; score both on the same samples'
            )
    names = [name for name in _SCORES + _ERRORS if all(name in one.content for one in results)]
    masks = {one.content.get('mIoU_voxels') for one in results}
    if 'mIoU' in names and len(masks) > 1:
        names = [name for name in names if name not in ('mIoU', 'binary_IoU')]
        notes.append(f'mIoU is left out: it counts different voxels ({", ".join(sorted(map(str, masks)))})')
    pairs = [_resampled(first, other) for other in results[1:]]
    if any(pair is None for pair in pairs):
        notes.append('no intervals of differences: they need two scenes or more, the same in both results')
    differences = {
        name: [_difference(name, first, other, pair) for other, pair in zip(results[1:], pairs)] for name in names
    }
    return Comparison(results, names, differences, notes)


def _must_agree(result: Result) -> Dict[str, Any]:
    content = result.content
    return {
        'classes': list(content['per_class']),
        'thresholds': content['thresholds'],
        'numbers of samples': content['num_samples'],
    }


def _resampled(first: Result, other: Result) -> Optional[Tuple[Dict[str, np.ndarray], Dict[str, np.ndarray]]]:
    """Totals of both over the same resampled scenes; None where scenes do not fit."""
    scenes = sorted(first.scenes)
    if len(scenes) < 2 or any(first.scenes[name][0] != other.scenes.get(name, (0,))[0] for name in scenes):
        return None
    if len(scenes) != len(other.scenes):
        return None
    first_totals, other_totals = (
        totals(resample([one.scenes[name][1] for name in scenes]), one.content['thresholds'], one.thing_ids)
        for one in (first, other)
    )
    return first_totals, other_totals


def _difference(name, first, other, pair) -> Difference:
    ours, theirs = (_number(one.content[name]) for one in (first, other))
    bounds = (
        None if pair is None or name not in pair[0] or name not in pair[1] else interval(pair[1][name] - pair[0][name])
    )
    return Difference(theirs - ours, bounds)


def _number(value) -> float:
    return float('nan') if value is None else float(value)


# -- written out


def tables(comparison: Comparison) -> List[Tuple[str, List[List[str]]]]:
    """(title, rows) of the tables: totals, differences from the first, and scores by class; the first row heads."""
    results, first = comparison.results, comparison.results[0]
    head = [''] + [result.name for result in results]
    rows = [[_title(name, first)] + [_with_bounds(name, result) for result in results] for name in comparison.names]
    found = [('Scores', [head] + rows)]
    if len(results) > 1:
        rows = [
            [_title(name, first)] + [_verdict(name, one) for one in comparison.differences[name]]
            for name in comparison.names
        ]
        found.append((f'Difference from {first.name}', [[''] + head[2:]] + rows))
    for column in comparison.class_columns:
        rows = [
            [label] + [text_of(column, _number(result.content['per_class'][label][column])) for result in results]
            for label in comparison.classes
        ]
        found.append((f'{_title(column, first)} by class', [head] + rows))
    return found


def _title(name, result: Result) -> str:
    """A score's name, with the voxels that it counts where it counts voxels."""
    return f'{name} ({result.content.get("mIoU_voxels")})' if name in ('mIoU', 'IoU', 'binary_IoU') else name


def _with_bounds(name, result: Result) -> str:
    bounds = result.content['intervals'].get(name)
    text = text_of(name, _number(result.content[name]))
    return text + (f' [{text_of(name, bounds[0])}, {text_of(name, bounds[1])}]' if bounds else '')


def _verdict(name, one: Difference) -> str:
    text = f'{"+" if one.value > 0 else ""}{text_of(name, one.value)}'
    if one.bounds is None:
        return text
    return f'{text} [{text_of(name, one.bounds[0])}, {text_of(name, one.bounds[1])}] {"real" if one.real else "chance"}'


def as_text(comparison: Comparison) -> str:
    """Tables for a terminal."""
    blocks = []
    for title, rows in tables(comparison):
        blocks.append('\n'.join([title, *text_table([rows[0]], rows[1:])]))
    return '\n\n'.join(blocks + list(_notes(comparison)))


def as_markdown(comparison: Comparison) -> str:
    """Tables for a README."""
    blocks = []
    for title, rows in tables(comparison):
        lines = ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows]
        blocks.append('\n'.join([f'### {title}', '', lines[0], '|' + ' --- |' * len(rows[0]), *lines[1:]]))
    return '\n\n'.join(blocks + list(_notes(comparison))) + '\n'


def _notes(comparison: Comparison) -> List[str]:
    samples = comparison.results[0].content['num_samples']
    scenes = len(comparison.results[0].scenes)
    notes = [f'{samples} samples, {scenes} scenes; percent, mAVE in m/s; in brackets 95 % intervals over scenes']
    return notes + list(comparison.notes)


def csv_rows(comparison: Comparison) -> List[List[Any]]:
    """Rows of a CSV file: model, class ('' for totals), score, value, interval, difference from the first, interval."""
    rows: List[List[Any]] = [
        ['model', 'class', 'score', 'value', 'low', 'high', 'above_first', 'above_low', 'above_high']
    ]
    for position, result in enumerate(comparison.results):
        for name in comparison.names:
            bounds = result.content['intervals'].get(name) or ['', '']
            row = [result.name, '', name, result.content[name], *bounds]
            if position:
                one = comparison.differences[name][position - 1]
                row += [one.value, *(one.bounds or ('', ''))]
            rows.append(row)
        for label, values in result.content['per_class'].items():
            rows += [[result.name, label, name, values[name]] for name in comparison.class_columns]
    return rows


# -- one HTML page


def as_html(comparison: Comparison) -> str:
    """A page that needs no other file: charts as inline SVG, then the tables."""
    names = [result.name for result in comparison.results]
    parts = [
        f'<h1>{html.escape(" · ".join(names))}</h1>',
        *(f'<p>{html.escape(text)}</p>' for text in _notes(comparison)),
    ]
    shown = [name for name in comparison.names if name not in _ERRORS]
    parts += ['<h2>Scores</h2>', _legend(names), _bars(comparison, shown)]
    if len(names) > 1:
        parts += [f'<h2>Difference from {html.escape(names[0])}</h2>', _differences(comparison, shown)]
    for column in comparison.class_columns:
        title = html.escape(_title(column, comparison.results[0]))
        parts += [f'<h2>{title} by class</h2>', _legend(names), _class_bars(comparison, column)]
    parts.append('<h2>Tables</h2>')
    parts += [f'<h3>{html.escape(title)}</h3>{_html_table(rows)}' for title, rows in tables(comparison)]
    return _PAGE.format(title=html.escape(' · '.join(names)), body='\n'.join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --ink: #222; --line: #ccc; --paper: #fff; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #ddd; --line: #555; --paper: #181818; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2em auto;
  max-width: 1000px; padding: 0 1em; }}
table {{ border-collapse: collapse; margin-bottom: 1.5em; }}
td, th {{ padding: 0.2em 0.8em; border-bottom: 1px solid var(--line); text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
svg {{ width: 100%; height: auto; }} svg text {{ fill: var(--ink); font: 12px system-ui, sans-serif; }}
svg line {{ stroke: var(--line); }} svg .whisker {{ stroke: var(--ink); }} svg .zero {{ stroke: var(--ink); }}
.legend span {{ display: inline-block; margin-right: 1.5em; }}
.legend i {{ display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em; }}
</style></head><body>
{body}
</body></html>
"""
_LEFT, _RIGHT, _WIDTH, _BAR = 190, 760, 1000, 14  # of charts, in units of their own


def _legend(names) -> str:
    boxes = (
        f'<span><i style="background:{_colour(at)}"></i>{html.escape(name)}</span>' for at, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(boxes)}</p>'


def _colour(position: int) -> str:
    return _COLOURS[position % len(_COLOURS)]


def _bars(comparison: Comparison, names) -> str:
    groups = [
        (
            _title(name, comparison.results[0]),
            [(_number(one.content[name]), one.content['intervals'].get(name)) for one in comparison.results],
        )
        for name in names
    ]
    return _bar_chart(groups)


def _class_bars(comparison: Comparison, column) -> str:
    groups = [
        (label, [(_number(one.content['per_class'][label][column]), None) for one in comparison.results])
        for label in comparison.classes
    ]
    return _bar_chart([group for group in groups if any(value == value for value, _ in group[1])])


def _bar_chart(groups) -> str:
    """Horizontal bars in groups: (label, [(value, bounds or None) of each model])."""
    most = max((value for _, bars in groups for value, _ in bars if value == value), default=0.0)
    top = max(0.1, np.ceil(10 * most) / 10)
    x_of = lambda value: _LEFT + (_RIGHT - _LEFT) * max(value, 0.0) / top  # noqa: E731
    shapes, y = [], 24.0
    for label, bars in groups:
        middle = y + _BAR * len(bars) / 2 + 4
        shapes.append(f'<text x="{_LEFT - 8}" y="{middle:.0f}" text-anchor="end">{html.escape(label)}</text>')
        for position, (value, bounds) in enumerate(bars):
            if value == value:
                shapes += _bar(x_of, y, value, bounds, _colour(position))
            y += _BAR
        y += 10
    grid = _grid(np.linspace(0, top, 6), x_of, y, lambda value: f'{100 * value:.0f}')
    return f'<svg viewBox="0 0 {_WIDTH} {y + 10:.0f}" role="img">{"".join(grid + shapes)}</svg>'


def _bar(x_of, y, value, bounds, colour) -> List[str]:
    end, middle = x_of(value), y + _BAR / 2
    shapes = [
        f'<rect x="{_LEFT}" y="{y + 1:.1f}" width="{end - _LEFT:.1f}" height="{_BAR - 2}" fill="{colour}"/>',
        f'<text x="{x_of(bounds[1] if bounds else value) + 6:.1f}" y="{middle + 4:.1f}">{100 * value:.2f}</text>',
    ]
    return shapes + (_whisker(x_of, middle, bounds) if bounds else [])


def _whisker(x_of, y, bounds) -> List[str]:
    low, high = x_of(bounds[0]), x_of(bounds[1])
    ends = [f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3:.1f}" y2="{y + 3:.1f}"/>' for x in (low, high)]
    return [f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>', *ends]


def _grid(values, x_of, bottom, text) -> List[str]:
    shapes = []
    for value in values:
        x = x_of(value)
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom:.0f}"/>')
        shapes.append(f'<text x="{x:.1f}" y="12" text-anchor="middle">{text(value)}</text>')
    return shapes


def _differences(comparison: Comparison, names) -> str:
    """Points with intervals around 0: filled where the difference is real."""
    shown = [(name, one) for name in names for one in comparison.differences[name] if one.value == one.value]
    reach = max([abs(end) for _, one in shown for end in (one.bounds or (one.value, one.value))] + [0.005]) * 1.1
    x_of = lambda value: (_LEFT + _RIGHT) / 2 + (_RIGHT - _LEFT) / 2 * value / reach  # noqa: E731
    shapes, y = [], 24.0
    for name in names:
        title = html.escape(_title(name, comparison.results[0]))
        shapes.append(f'<text x="{_LEFT - 8}" y="{y + 10:.0f}" text-anchor="end">{title}</text>')
        for position, one in enumerate(comparison.differences[name], start=1):
            if one.value == one.value:
                fill = _colour(position) if one.real else 'none'
                if one.bounds is not None:
                    shapes += _whisker(x_of, y + 6, one.bounds)
                shapes.append(
                    f'<circle cx="{x_of(one.value):.1f}" cy="{y + 6:.1f}" r="5" fill="{fill}" '
                    f'stroke="{_colour(position)}" stroke-width="2"/>'
                    f'<text x="{_RIGHT + 12}" y="{y + 10:.1f}">{html.escape(_verdict(name, one))}</text>'
                )
            y += 18
        y += 6
    zero = f'<line class="zero" x1="{x_of(0):.1f}" x2="{x_of(0):.1f}" y1="18" y2="{y:.0f}"/>'
    grid = _grid(np.linspace(-reach, reach, 5), x_of, y, lambda value: f'{100 * value:+.1f}')
    return f'<svg viewBox="0 0 {_WIDTH} {y + 10:.0f}" role="img">{"".join(grid)}{zero}{"".join(shapes)}</svg>'


def _html_table(rows) -> str:
    head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in rows[0])
    body = ''.join('<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>' for row in rows[1:])
    return f'<table><tr>{head}</tr>{body}</table>'


# -- the command


def parse_compare(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of ``sparseocc-eval compare``."""
    parser = argparse.ArgumentParser(
        'sparseocc-eval compare', description='Results side by side, and which differences from the first are real.'
    )
    add = parser.add_argument
    add('results', nargs='+', metavar='JSON', help='files of sparseocc-eval --json, val.py --out or tools/evaluate.py')
    add('--names', nargs='+', metavar='NAME', help='what the models are called (default: the names of the files)')
    add('--markdown', metavar='FILE', help='write the tables as Markdown')
    add('--csv', metavar='FILE', help='write the scores as CSV')
    add('--html', metavar='FILE', help='write a page with charts that needs no other file')
    add('--debug', action='store_true', help='show the traceback of an error')
    args = parser.parse_args(argv)
    if args.names and len(args.names) != len(args.results):
        parser.error(f'--names gives {len(args.names)} names for {len(args.results)} results')
    return args


def compare_command(args: argparse.Namespace) -> None:
    """Compare results and write what is asked for."""
    names = args.names or _short_names(args.results)
    comparison = compare([read_result(path, name) for path, name in zip(args.results, names)])
    print(as_text(comparison))
    for path, text in ((args.markdown, as_markdown), (args.html, as_html)):
        if path:
            with atomic_write(path) as temporary:
                temporary.write_text(text(comparison), encoding='utf-8')
    if args.csv:
        with atomic_write(args.csv) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as stream:
            csv.writer(stream).writerows(csv_rows(comparison))
    for path in filter(None, (args.markdown, args.html, args.csv)):
        print(f'wrote {path}', file=sys.stderr)


def _short_names(paths) -> List[str]:
    """Names of the files, with their folders where two are alike."""
    stems = [Path(path).stem for path in paths]
    return [str(path) if stems.count(stem) > 1 else stem for path, stem in zip(paths, stems)]
