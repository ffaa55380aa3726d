"""What tools/study.py works through: the variants of a study file, and the runs of each.

Here are a run's files and its state; tools/study.py starts the processes, ``table`` puts what they say into one table.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from lib.errors import ConfigError, UserError
from lib.io import read_json, write_json
from lib.registry import check_keys
from lib.run.folder import checkpoint_iteration, checkpoints


@dataclass(frozen=True)
class Variant:
    """One row of the table; see the head of tools/study.py."""

    name: str
    config: str
    about: str = ''
    override: Tuple[str, ...] = ()
    val_override: Tuple[str, ...] = ()
    seeds: Tuple[int, ...] = (0,)
    val_seeds: Tuple[int, ...] = ()
    weights_of: Optional[str] = None


_KEYS = tuple(Variant.__dataclass_fields__)


def read_study(path: str) -> Tuple[List[Variant], str]:
    """Variants of a study file in its order, and the name of the one that others are compared with.

    Raises:
        ConfigError: it is not as it should be.
    """
    content = read_json(path)
    check_keys(content, ('config', 'base', 'variants'), path)
    rows = content.get('variants')
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f'{path}: variants must be a list of at least one variant, got {rows!r}')
    variants = [_variant(row, content.get('config'), f'{path}: variants[{i}]') for i, row in enumerate(rows)]
    names = [variant.name for variant in variants]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f'{path}: the name {repeated[0]} is given twice; rename one of the variants')
    base = content.get('base', names[0])
    trained = {variant.name for variant in variants if variant.weights_of is None}
    for name, wanted in [('base', base)] + [(f'weights_of of {v.name}', v.weights_of) for v in variants]:
        if wanted is not None and wanted not in trained:
            raise ConfigError(f'{path}: {name} is {wanted!r}, which is none of the trained variants {sorted(trained)}')
    return variants, base


def _variant(row, config: Optional[str], where: str) -> Variant:
    check_keys(row, _KEYS, where)
    values: Dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    values.setdefault('config', config)
    for key in ('name', 'config'):
        if not isinstance(values.get(key), str):
            raise ConfigError(f'{where}: {key} must be a text, got {values.get(key)!r}')
    for key, kind in (('override', str), ('val_override', str), ('seeds', int), ('val_seeds', int)):
        given = values.get(key, ())
        if not isinstance(given, tuple) or not all(isinstance(item, kind) for item in given):
            raise ConfigError(f'{where}: {key} must be a list of {kind.__name__}, got {row[key]!r}')
    return Variant(**values)


@dataclass
class Run:
    """One training with its score, or one score of another run's weights.

    Attributes:
        variant: what it is of.
        seed: of the training.
        val_seed: of val.py, or None.
        out: folder of the study.
        parent: the run whose weights it scores; None: it trains itself.
        state: what is known of it, as kept in NAME.json: ``status`` (waiting, training, stopped, trained, scoring,
            scored, failed), ``of`` (steps wanted), ``seconds`` (of training), ``commands``, ``recipe``, ``error``.
    """

    variant: Variant
    seed: int
    val_seed: Optional[int]
    out: Path
    parent: Optional['Run'] = None
    state: Dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        drawn = '' if self.val_seed is None else f'_val{self.val_seed}'
        return f'{self.variant.name}_seed{self.seed}{drawn}'

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def scores(self) -> Path:
        return self.folder / 'scores.json'

    @property
    def log(self) -> Path:
        return self.out / f'{self.name}.txt'

    @property
    def trainer(self) -> 'Run':
        """The run that its weights are of."""
        return self.parent or self

    @property
    def weights(self) -> Optional[Path]:
        """Newest checkpoint, or None."""
        return next(iter(checkpoints(self.trainer.folder)), None)

    def is_trained(self) -> bool:
        """Whether the weights that it is about are those of a finished training."""
        return bool(self.trainer.state.get('trained'))

    def is_scored(self) -> bool:
        """Whether its score is that of the newest weights."""
        if self.weights is None or not self.scores.exists():
            return False
        return read_json(self.scores)['run']['iteration'] == checkpoint_iteration(self.weights)

    def note(self, **changes) -> None:
        """Change the state, and keep it."""
        self.state.update(changes)
        write_json(self.out / f'{self.name}.json', self.state)


def make_runs(variants: Sequence[Variant], args) -> List[Run]:
    """Runs of the wanted variants, those that train first, with the states that an earlier start left.

    Raises:
        UserError: an unknown name in --only, or runs that were made with other settings.
    """
    known = [variant.name for variant in variants]
    wanted = set(args.only or known)
    if wanted - set(known):
        raise UserError(f'--only {min(wanted - set(known))}: the study {args.study} has {", ".join(known)}')
    wanted |= {variant.weights_of for variant in variants if variant.name in wanted and variant.weights_of}
    trained: Dict[Tuple[str, int], Run] = {}
    scored: List[Run] = []
    for variant in (v for v in variants if v.name in wanted and v.weights_of is None):
        for seed in args.seeds or variant.seeds:
            trained[variant.name, seed] = Run(variant, seed, None, args.out)
    for variant in (v for v in variants if v.name in wanted and v.weights_of is not None):
        parents = [run for (name, _), run in trained.items() if name == variant.weights_of]
        parents = [run for run in parents if args.seeds or run.seed in variant.seeds]
        for parent in parents:
            scored += [Run(variant, parent.seed, draw, args.out, parent) for draw in variant.val_seeds or (None,)]
    runs = [*trained.values(), *scored]
    for run in runs:
        _recall(run, args)
    return runs


def _recall(run: Run, args) -> None:
    """State of an earlier start; refuses one of other settings."""
    variant = run.variant
    own = [*variant.override, *args.override]
    recipe = dict(config=variant.config, override=own, val_override=list(variant.val_override), iters=args.iters)
    path = args.out / f'{run.name}.json'
    if path.exists():
        run.state = read_json(path)
        before = run.state.get('recipe')
        if run.state.get('status') in ('training', 'scoring'):
            run.state['status'] = 'stopped'  # this script was killed then
        if not args.table:
            run.state['error'] = None
        if before != recipe and not args.table:
            raise UserError(
                f'{path} is of a run with other settings ({before}, now {recipe}); give them again, '
                f'choose another --out, or remove {run.folder} and this file'
            )
    run.state.setdefault('recipe', recipe)
