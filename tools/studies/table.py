"""The table of tools/study.py: one row a variant, the mean over its runs, how far they differ, and what is missing."""

import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from lib.io import atomic_write, read_json, write_json

TOTALS = ('RayIoU', 'RayIoU@1', 'RayIoU@2', 'RayIoU@4', 'RayPQ', 'mIoU')


def write_table(runs: Sequence, about: Mapping, out: Path) -> str:
    """Write ``study.md`` and ``study.json`` of what is there, and return the former.

    Args:
        runs: of tools/study.py.
        about: ``study`` (file), ``command``, ``commit``, ``machine``, ``note``, ``base`` (name of the variant that
            others are compared with).
        out: folder.
    """
    rows = summarize(runs, about['base'])
    text = as_markdown(rows, runs, about)
    with atomic_write(out / 'study.md') as temporary:
        temporary.write_text(text, encoding='utf-8')
    write_json(out / 'study.json', dict(about, rows=rows, runs={run.name: _facts(run) for run in runs}))
    return text


def summarize(runs: Sequence, base: str) -> List[Dict[str, Any]]:
    """A row per variant in the order of the runs.

    ``name``, ``about``, ``runs``, ``steps``, ``of``, ``seconds``, and for every total a dict of ``mean``, ``spread``
    (half the range over the runs; None for one) and ``difference`` to the base.
    """
    of_variant: Dict[str, List[Dict]] = {}
    variants = {}
    for run in runs:
        variants[run.variant.name] = run.variant
        of_variant.setdefault(run.variant.name, []).append(_facts(run))
    rows = [_row(variant, of_variant[name]) for name, variant in variants.items()]
    compared = next((row for row in rows if row['name'] == base), None)
    for row in rows:
        for name in TOTALS:
            ours, theirs = row[name]['mean'], compared and compared[name]['mean']
            known = row is not compared and ours is not None and theirs is not None
            row[name]['difference'] = ours - theirs if known else None
    return rows


def _row(variant, facts: Sequence[Mapping]) -> Dict[str, Any]:
    scored = [fact for fact in facts if fact['scores']]
    row: Dict[str, Any] = dict(name=variant.name, about=variant.about, runs=len(scored), of_runs=len(facts))
    row.update(steps=_most_and_least(scored, 'steps'), of=facts[0]['of'], seconds=_mean(facts, 'seconds'))
    row['zero_classes'] = _mean(scored, 'zero_classes')
    row['mIoU_voxels'] = next((fact['mIoU_voxels'] for fact in scored), None)
    for name in TOTALS:
        values = [fact['scores'][name] for fact in scored if fact['scores'].get(name) is not None]
        spread = (max(values) - min(values)) / 2 if len(values) > 1 else None
        row[name] = dict(mean=statistics.fmean(values) if values else None, spread=spread)
    return row


def _mean(facts: Sequence[Mapping], name: str) -> Optional[float]:
    values = [fact[name] for fact in facts if fact[name] is not None]
    return statistics.fmean(values) if values else None


def _most_and_least(facts: Sequence[Mapping], name: str) -> List[int]:
    values = [fact[name] for fact in facts if fact[name] is not None]
    return sorted({min(values), max(values)}) if values else []


def _facts(run) -> Dict[str, Any]:
    """What is known of one run; ``scores`` is empty where it has none."""
    scores = read_json(run.scores) if run.scores.exists() else {}
    classes = scores.get('per_class', {})
    known = [row.get('RayIoU') for row in classes.values() if row.get('RayIoU') is not None]
    return dict(
        seed=run.seed,
        val_seed=run.val_seed,
        status=run.state.get('status', 'waiting'),
        error=run.state.get('error'),
        steps=scores.get('run', {}).get('iteration'),
        of=(run.parent or run).state.get('of'),
        seconds=run.state.get('seconds'),
        zero_classes=sum(value == 0 for value in known) if known else None,
        mIoU_voxels=scores.get('mIoU_voxels'),
        scores={name: scores[name] for name in TOTALS if name in scores},
        per_class={name: row.get('RayIoU') for name, row in classes.items()},
        commands=run.state.get('commands', {}),
        recipe=run.state.get('recipe'),
    )


def as_markdown(rows: Sequence[Mapping], runs: Sequence, facts: Mapping) -> str:
    """The table, what is not as it should be, and where the numbers are from; percent and points."""
    shown = [name for name in TOTALS if any(row[name]['mean'] is not None for row in rows)]
    voxels = next((row['mIoU_voxels'] for row in rows if row['mIoU_voxels']), None)
    titles = [f'mIoU ({voxels})' if name == 'mIoU' and voxels else name for name in shown]
    base = facts['base']
    head = ['variant', 'runs', 'steps', *titles, f'RayIoU: difference to {base}', 'mIoU: difference']
    head += ['classes at 0', 'training']
    lines = [_line(head), _line(['---'] * len(head))]
    lines += [_line(_cells(row, shown)) for row in rows]
    notes = [f'- {run.name}: {_told(run)}' for run in runs if _told(run)]
    texts = [f'- {row["name"]}: {row["about"]}' for row in rows if row['about']]
    machine = '; '.join(filter(None, (facts['machine'], facts['note'])))
    origin = (
        f'Mean over the runs, ± half their range; percent. {facts["study"]}, base {base}, commit {facts["commit"]}, '
        f'{machine}; made with `{facts["command"]}`. Seeds, classes and commands of every run: study.json.'
    )
    parts = [lines, texts, ['Not finished:', *notes] if notes else [], [origin]]
    return '\n\n'.join('\n'.join(part) for part in parts if part) + '\n'


def _cells(row: Mapping, shown: Sequence[str]) -> List[str]:
    steps = ' to '.join(f'{steps:,}' for steps in row['steps'])
    cut = row['of'] is not None and row['steps'] and row['steps'][0] < row['of']
    seconds, zero = row['seconds'], row['zero_classes']
    return [
        row['name'],
        f'{row["runs"]}' if row['runs'] == row['of_runs'] else f'{row["runs"]} of {row["of_runs"]}',
        f'{steps} (**cut off**, of {row["of"]:,})' if cut else steps or '-',
        *[_percent(row[name]) for name in shown],
        *[_points(row[name]['difference']) for name in ('RayIoU', 'mIoU')],
        '-' if zero is None else f'{zero:g}',
        '-' if seconds is None else f'{seconds:.0f} s',
    ]


def _percent(score: Mapping) -> str:
    if score['mean'] is None:
        return '-'
    spread = '' if score['spread'] is None else f' ± {100 * score["spread"]:.2f}'
    return f'{100 * score["mean"]:.2f}{spread}'


def _points(difference: Optional[float]) -> str:
    return '' if difference is None else f'{100 * difference:+.2f}'


def _told(run) -> str:
    """What is not as it should be with a run, or nothing."""
    status = run.state.get('status', 'waiting')
    if run.state.get('error'):
        return f'**failed**: {run.state["error"]}; see {run.log.name}'
    return '' if status == 'scored' else status


def _line(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'
