"""Makes a toy data set: images and scans spread over processes, a scene's labels once its scans are there.

Images take longest, above all where GPUs render them, and nothing else needs them: the tables are written, and what
is prepared from them is made, while others still render. A run that was stopped goes on where it stopped; a data
root with a work folder in it (``work.FOLDER``) is not complete.
"""

import contextlib
import functools
import time
from collections import Counter
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

from . import tables
from .jobs import IMAGES, LABELS, ROWS, SCANS, Job, Options, run_job
from .labels import OCC3D_GRID
from .pool import Aside, Crew, run_tasks
from .work import WorkFolder

LABEL_SETS = ('occ3d', 'openocc_v2')
# Keyframes of a scene that one process makes in a row: opening a scene takes as long as one scan of it or label.
_AT_ONCE = {IMAGES: 5, SCANS: 10, LABELS: 10}


class Seconds(NamedTuple):
    """How long a run took, in seconds from its start: until the first images were made, until all but images was,
    until the images were too, and until what is prepared from the tables was; ``used``: per kind of job, the seconds
    and the CPU seconds of all its processes."""

    first: float
    tables: float
    keyframes: float
    whole: float
    used: Dict[str, List[float]]


def _nothing() -> None:
    """The default of what may be called."""


def generate(
    options: Options,
    crew: Crew,
    progress: Callable,
    prepare: Optional[Callable[[], None]] = None,
    meanwhile: Callable[[], None] = _nothing,
    compiled: Callable[[], None] = _nothing,
) -> Seconds:
    """Make the data set.

    Args:
        options: what to make.
        crew: the processes that make it.
        progress: ``progress(iterable, total)`` wraps the finished keyframes to show how far they are.
        prepare: what else belongs to it and needs the tables and labels, but no images; in another process.
        meanwhile: called there before.
        compiled: waits for others that run ``COMPILED``.

    Returns:
        How long each phase took.

    Raises:
        UserError: a file cannot be written, a GPU is full, a process was killed, or the folder holds an
            unfinished run with other arguments.
    """
    work = WorkFolder(options.out)
    work.begin(_arguments(options))
    begin = time.monotonic()
    total = len(options.plan.names) * options.keyframes
    with contextlib.ExitStack() as stack:
        aside = stack.enter_context(Aside(meanwhile, prepare)) if prepare and crew.processes > 1 else None
        flow = _Flow(options, work, aside.begin if aside else _nothing)
        _import_renderer()
        for _ in progress(flow.run(crew, functools.partial(_compile_all, compiled)), total):
            pass
        made = time.monotonic()
        finish = aside.finish if aside else prepare or _nothing
        finish()
    work.finish()
    end = time.monotonic()
    return Seconds(
        (flow.first_at or begin) - begin, (flow.tables_at or begin) - begin, made - begin, end - begin, flow.used
    )


def _arguments(options) -> Dict:
    """What decides the content of the files."""
    other = dict(grid=list(options.grid.point_cloud_range) + [options.grid.voxel_size])
    return dict(
        {} if options.grid == OCC3D_GRID else other,
        version=options.plan.version,
        scenes=options.plan.names,
        keyframes=options.keyframes,
        size=list(options.size),
        sweeps=options.sweeps,
        seed=options.seed,
        label_sets=list(options.label_sets),
    )


class _Flow:
    """Which jobs are left, and which may begin when others end.

    ``tabled`` is called when all but images is made, and the tables are written.
    """

    def __init__(self, options: Options, work: WorkFolder, tabled: Callable[[], None] = _nothing):
        self._options, self._work, self._tabled = options, work, tabled
        self.first_at: Optional[float] = None  # time.monotonic() when the first images were made
        self.tables_at: Optional[float] = None  # when the tables were
        self.used: Dict[str, List[float]] = {}
        self._open: Counter = Counter()  # jobs that are not of images, by scene
        scenes, every = range(len(options.plan.names)), range(options.keyframes)
        self._unscanned = {scene: {k for k in every if not work.has_scans(scene, k)} for scene in scenes}
        self._unseen = {scene: {k for k in every if not work.has_images(scene, k)} for scene in scenes}

    def run(self, crew: Crew, prepare: Callable[[], None]) -> Iterator[None]:
        """Do what is left; yield once per keyframe with images, those of earlier runs first."""
        scans = self._spread(self._unscanned, SCANS, crew.workers)
        closing = [job for scene, left in self._unscanned.items() if not left for job in self._closing_jobs(scene)]
        images = self._spread(self._unseen, IMAGES, len(crew.devices) or crew.workers)
        for _ in range(self._options.keyframes * len(self._unseen) - sum(len(left) for left in self._unseen.values())):
            yield
        self._open = Counter(job.scene for job in scans + closing)
        if not self._open:
            self._write_tables()
        for done in run_tasks(
            closing + scans + images, run_job, self._following, crew, prepare, lambda job: job.kind == IMAGES
        ):
            used = self.used.setdefault(done.task.kind, [0.0, 0.0])
            self.used[done.task.kind] = [used[0] + done.seconds, used[1] + done.cpu_seconds]
            if done.task.kind == IMAGES:
                self.first_at = self.first_at or time.monotonic()
                for _ in range(done.task.first, done.task.last):
                    yield

    def _following(self, job: Job) -> List[Job]:
        if job.kind == IMAGES:
            return []
        self._open[job.scene] -= 1
        jobs = []
        if job.kind == SCANS:
            self._unscanned[job.scene].difference_update(range(job.first, job.last))
            jobs = [] if self._unscanned[job.scene] else self._closing_jobs(job.scene)
        self._open[job.scene] += len(jobs)
        if not any(self._open.values()):
            self._write_tables()
        return jobs

    def _write_tables(self):
        options = self._options
        parts = [self._work.rows(scene) for scene in range(len(options.plan.names))]
        tables.write_tables(options.out / options.plan.version, parts)
        self.tables_at = time.monotonic()
        self._tabled()

    def _closing_jobs(self, scene) -> List[Job]:
        """What is left to do once the scene's scans are made."""
        rows = [] if self._work.has_rows(scene) else [Job(self._options, scene, 0, 0, ROWS)]
        return self._label_jobs(scene) + rows

    def _spread(self, keyframes, kind, workers) -> List[Job]:
        """Long runs of keyframes first, single ones at last, so that all processes end together.

        ``keyframes``: by scene, those to be made.
        """
        jobs, left = [], sum(len(some) for some in keyframes.values())
        for scene, some in keyframes.items():
            left -= len(some)
            jobs += self._runs(scene, sorted(some), kind, min(max(left // max(workers, 1), 1), _AT_ONCE[kind]))
        return jobs

    def _label_jobs(self, scene) -> List[Job]:
        if not self._options.labelled:
            return []
        unlabelled = [k for k in range(self._options.keyframes) if not self._work.has_labels(scene, k)]
        return self._runs(scene, unlabelled, LABELS, _AT_ONCE[LABELS])

    def _runs(self, scene, keyframes, kind, most) -> List[Job]:
        """Jobs for the ``keyframes``, each for at most so many that follow one another."""
        jobs: List[Job] = []
        for k in keyframes:
            if jobs and jobs[-1].last == k and k - jobs[-1].first < most:
                jobs[-1] = jobs[-1]._replace(last=k + 1)
            else:
                jobs.append(Job(self._options, scene, k, k + 1, kind))
        return jobs


def _import_renderer() -> None:
    """Import what all processes need that make images."""
    from PIL import Image

    from . import render, trace_torch  # noqa: F401

    Image.preinit()


def _compile_all(compiled) -> None:
    """Run every compiled function once on next to nothing, when others have filled the cache."""
    compiled()
    for function in COMPILED:
        function()


def _compile_rays() -> None:
    import numpy as np

    from .trace import PackedScene
    from .trace_cpu import trace_fan, trace_image, trace_rays

    scene = PackedScene(np.zeros(1, np.int32), np.ones((1, 11), np.float32), np.zeros((5, 3), np.float32))
    trace_image(scene, np.eye(3), np.eye(3), (2, 2))
    trace_rays(scene, np.eye(3))
    trace_fan(scene, np.eye(3), np.ones((1, 1, 3)), 10.0)


def _compile_voxels() -> None:
    import numpy as np

    from .trace_voxels import first_of_each, mark_in_view, mark_passed, vote

    first_of_each(np.zeros(1, np.int64))
    mark_passed(np.ones(3), np.eye(3), np.ones(3), np.zeros((2, 2, 2), np.uint8))
    votes = vote(np.ones((1, 3), np.float32), np.array([0, 1]), np.eye(4)[None, :3], np.zeros(1, np.int64), (2, 2, 2))
    mark_in_view(votes, np.eye(4)[None, :3], np.ones((1, 2, 2), np.float32), (0.1, 0.1))


# They share no compiled function, so processes side by side may fill numba's cache with them.
COMPILED = (_compile_rays, _compile_voxels)
