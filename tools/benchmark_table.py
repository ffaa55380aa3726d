"""The tables of docs/performance.md: what tools/benchmark.py --table times, how two runs compare, and their Markdown.

python tools/benchmark_table.py run.json        # prints what --json stored
"""

import sys
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import make_parser, run_main  # noqa: E402
from lib.errors import DataError  # noqa: E402
from lib.io import read_json  # noqa: E402


class Setting(NamedTuple):
    """A column: arguments of tools/benchmark.py that differ from its defaults, by attribute."""

    name: str
    options: Mapping


_INFERENCE = ('inference', 'encoder')
SETTINGS = (
    Setting('fp32', dict(what=_INFERENCE)),
    Setting('fp32, graph', dict(what=_INFERENCE, cuda_graph=True)),
    Setting('TF32, graph', dict(what=_INFERENCE, cuda_graph=True, tf32='on')),
    Setting('fp16', dict(what=_INFERENCE, amp='fp16')),
    Setting('fp16, graph', dict(what=_INFERENCE, amp='fp16', cuda_graph=True)),
    Setting('bf16, graph', dict(what=_INFERENCE, amp='bf16', cuda_graph=True)),
    Setting('fp32', dict(what=('training',))),
    Setting('TF32', dict(what=('training',), tf32='on')),
    Setting('bf16', dict(what=('training',), amp='bf16')),
    Setting('bf16, graph', dict(what=('training',), amp='bf16', cuda_graph=True)),
)

Row = Dict  # of tools/benchmark.py: 'name', 'median_ms', 'peak_gib'; 'change' and 'setting' where there are several


def read_rows(path: str) -> List[Row]:
    """Rows of a run that tools/benchmark.py --json stored."""
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get('rows'), list):
        raise DataError(f"{path} has no 'rows'; give a file that tools/benchmark.py --json wrote")
    return stored['rows']


def compare(rows: Sequence[Row], stored: Sequence[Row], tolerance: float) -> Tuple[List[str], List[str]]:
    """Lines on every row that both runs have, and which of these is slower or takes more memory than was stored.

    Args:
        tolerance: share that a figure may be higher by.
    """
    before = {_key(row): row for row in stored}
    lines, worse = [], []
    for row in rows:
        old = before.get(_key(row))
        if old is None:
            continue
        factors = [_factor(row[figure], old[figure]) for figure in ('median_ms', 'peak_gib')]
        name = ', '.join(filter(None, _key(row)))
        lines.append(
            f'{name:56s} {old["median_ms"]:9.2f} -> {row["median_ms"]:9.2f} ms ({factors[0]:.2f} x)   '
            f'{old["peak_gib"]:6.2f} -> {row["peak_gib"]:6.2f} GiB ({factors[1]:.2f} x)'
        )
        if max(factors) > 1 + tolerance:
            worse.append(name)
    return lines, worse


def _key(row: Row) -> Tuple[str, str, str]:
    return row.get('change', ''), row['name'], row.get('setting', '')


def _title(row: Row) -> str:
    return ', '.join(filter(None, _key(row)[:2]))


def _factor(now: float, before: float) -> float:
    return now / before if before else 1.0


def markdown(rows: Sequence[Row]) -> str:
    """Tables of median milliseconds and of peak memory; a column for every setting."""
    parts = []
    for is_training, title in ((False, 'inference'), (True, 'training')):
        chosen = [row for row in rows if row['name'].startswith('training') == is_training]
        for figure, unit in (('median_ms', 'milliseconds'), ('peak_gib', 'GiB')) if chosen else ():
            parts.append(_table(chosen, f'{title}, {unit}', figure))
    return '\n\n'.join(parts)


def _table(rows: Sequence[Row], title: str, figure: str) -> str:
    names = list(dict.fromkeys(map(_title, rows)))
    settings = list(dict.fromkeys(row.get('setting', '') for row in rows))
    values = {(_title(row), row.get('setting', '')): row[figure] for row in rows}
    lines = [_line([title, *settings]), _line(['---'] * (1 + len(settings)))]
    return '\n'.join(
        lines + [_line([name, *(_number(values.get((name, setting))) for setting in settings)]) for name in names]
    )


def _number(value: Optional[float]) -> str:
    """Three digits."""
    return '' if value is None else f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def _line(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cells) + ' |'


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument('run', metavar='JSON', help='a run that tools/benchmark.py --json stored')
    return parser.parse_args(argv)


def main():
    print(markdown(read_rows(parse_args().run)))


if __name__ == '__main__':
    run_main(main)
