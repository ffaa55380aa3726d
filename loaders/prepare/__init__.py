"""Making the project's own files from nuScenes (info files with camera sweeps, panoptic labels), on all cores."""

import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Callable, Iterator, Optional, Sequence

from tqdm import tqdm

from lib.cli import end_with_parent
from lib.errors import UserError

_LARGEST_CHUNK = 64  # items handed to a worker at once
_job = {}


def parallel_map(
    function: Callable, items: Sequence, shared, label: str, processes: Optional[int] = None, progress: bool = True
) -> Iterator:
    """Yield ``function(shared, item)`` for each item, in order.

    Args:
        function: a module-level function.
        items: small picklable things.
        shared: what every call needs, however large; worker processes inherit it.
        label: shown beside the progress bar.
        processes: worker processes; None = all cores, 1 = none.
        progress: show a bar with the remaining time.

    Raises:
        UserError: a worker was killed.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(items))
    if processes <= 1:
        for item in tqdm(items, desc=label, disable=not progress):
            yield function(shared, item)
        return
    chunk = max(1, min(_LARGEST_CHUNK, len(items) // (8 * processes)))
    method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_keep, initargs=(function, shared)) as pool:
        try:
            results = pool.map(_call, items, chunksize=chunk)
            yield from tqdm(results, total=len(items), desc=label, disable=not progress)
        except BrokenProcessPool as error:
            raise UserError(
                f'{label}: a worker process was killed, most likely for want of memory; run the command '
                f'again with fewer --processes (now {processes})'
            ) from error


def _keep(function, shared):
    end_with_parent()
    gc.freeze()  # looking for garbage among what the parent made, such as all tables, would copy it
    _job.update(function=function, shared=shared)


def _call(item):
    return _job['function'](_job['shared'], item)
