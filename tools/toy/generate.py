"""Makes a toy data set: keyframes spread over processes, a scene's labels once its scans are there, tables last.

A run that was stopped goes on where it stopped. The tables are written when everything else is, so a new
folder that has them is complete.
"""

import time
from typing import Callable, Dict, List, NamedTuple, Optional

from . import tables
from .jobs import KEYFRAMES, LABELS, ROWS, Job, Options, run_job
from .labels import OCC3D_GRID
from .pool import Crew, run_tasks
from .work import WorkFolder

LABEL_SETS = ('occ3d', 'openocc_v2')
_AT_ONCE = 5  # keyframes of a scene that one process makes, or labels, in a row: opening a scene takes a while


class Seconds(NamedTuple):
    """How long the phases of a run took: until images and scans of the first keyframes were made, until everything
    of every keyframe was, then the tables, and what is prepared from them."""

    first: float
    keyframes: float
    tables: float
    prepare: float


def generate(
    options: Options,
    crew: Crew,
    progress: Callable,
    prepare: Callable[[], None] = lambda: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Seconds:
    """Make the data set.

    Args:
        options: what to make.
        crew: the processes that make it.
        progress: ``progress(iterable, total)`` wraps the finished keyframes to show how far they are.
        prepare: what else belongs to it and needs the tables; called last.
        meanwhile: called in a thread while other processes make keyframes.

    Returns:
        How long each phase took.

    Raises:
        UserError: a file cannot be written, a GPU is full, a process was killed, or the folder holds an
            unfinished run with other arguments.
    """
    work = WorkFolder(options.out)
    work.begin(_arguments(options))
    flow = _Flow(options, work)
    begin = time.monotonic()
    total = len(options.plan.names) * options.keyframes
    for _ in progress(flow.run(crew, meanwhile), total):
        pass
    made = time.monotonic()
    tables.write_tables(
        options.out / options.plan.version, [work.rows(scene) for scene in range(len(options.plan.names))]
    )
    tabled = time.monotonic()
    prepare()
    work.finish()
    end = time.monotonic()
    return Seconds((flow.first_at or begin) - begin, made - begin, tabled - made, end - tabled)


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
    """Which jobs are left, and which may begin when others end."""

    def __init__(self, options: Options, work: WorkFolder):
        self._options, self._work = options, work
        self.first_at: Optional[float] = None  # time.monotonic() when the first job was done
        every = range(options.keyframes)
        self._unmade = {
            scene: {k for k in every if not work.has_keyframe(scene, k)} for scene in range(len(options.plan.names))
        }

    def run(self, crew: Crew, meanwhile: Callable[[], None]):
        """Do what is left; yield once per finished keyframe, those of earlier runs first."""
        scenes, per_scene, labelled = self._unmade, self._options.keyframes, self._options.labelled
        jobs = self._keyframe_jobs(crew.workers)
        jobs += [job for scene, unmade in scenes.items() if not unmade for job in self._closing_jobs(scene)]
        if labelled:
            left = sum(not self._work.has_labels(scene, k) for scene in scenes for k in range(per_scene))
        else:
            left = sum(len(unmade) for unmade in scenes.values())
        for _ in range(per_scene * len(scenes) - left):
            yield
        for job in run_tasks(jobs, run_job, self._following, crew, compile_tracers, meanwhile):
            self.first_at = self.first_at or time.monotonic()
            if job.kind == (LABELS if labelled else KEYFRAMES):
                for _ in range(job.first, job.last):
                    yield

    def _following(self, job: Job) -> List[Job]:
        if job.kind != KEYFRAMES:
            return []
        self._unmade[job.scene].difference_update(range(job.first, job.last))
        return [] if self._unmade[job.scene] else self._closing_jobs(job.scene)

    def _closing_jobs(self, scene) -> List[Job]:
        """What is left to do once the scene's keyframes are made."""
        rows = [] if self._work.has_rows(scene) else [Job(self._options, scene, 0, 0, ROWS)]
        return self._label_jobs(scene) + rows

    def _keyframe_jobs(self, workers) -> List[Job]:
        """Long runs of keyframes first, single ones at last, so that all processes end together."""
        jobs, left = [], sum(len(unmade) for unmade in self._unmade.values())
        for scene, unmade in self._unmade.items():
            left -= len(unmade)
            jobs += self._runs(scene, sorted(unmade), KEYFRAMES, min(max(left // workers, 1), _AT_ONCE))
        return jobs

    def _label_jobs(self, scene) -> List[Job]:
        if not self._options.labelled:
            return []
        unlabelled = [k for k in range(self._options.keyframes) if not self._work.has_labels(scene, k)]
        return self._runs(scene, unlabelled, LABELS, _AT_ONCE)

    def _runs(self, scene, keyframes, kind, most) -> List[Job]:
        """Jobs for the ``keyframes``, each for at most so many that follow one another."""
        jobs: List[Job] = []
        for k in keyframes:
            if jobs and jobs[-1].last == k and k - jobs[-1].first < most:
                jobs[-1] = jobs[-1]._replace(last=k + 1)
            else:
                jobs.append(Job(self._options, scene, k, k + 1, kind))
        return jobs


def compile_tracers() -> None:
    """Import what all processes need, and run every compiled function once on next to nothing."""
    from PIL import Image

    from . import render, trace_torch  # noqa: F401

    Image.preinit()
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
