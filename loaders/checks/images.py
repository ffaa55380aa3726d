"""Are the images there, and whole?"""

from typing import Dict, Iterable, List

from lib.errors import DataError
from lib.infos import camera_sweeps

from ..decode import check_whole, read_image
from ..infos import relocate
from ..prepare import parallel_map
from . import OK, Finding, Look, name_some


def image_paths(dataset, positions: Iterable[int]) -> List[str]:
    """Paths of the images of keyframes and of the sweeps before them, each once."""
    paths: Dict[str, None] = {}
    for position in positions:
        info = dataset.infos[position]
        for cams in [info['cams']] + camera_sweeps(info):
            for name in dataset.task.cameras:
                if name in cams:
                    paths[relocate(cams[name]['data_path'], dataset.data_root)] = None
    return list(paths)


def check_images(paths: List[str], total: int, look: Look) -> List[Finding]:
    """Findings on image files ``paths`` of a data set that has ``total``."""
    results = parallel_map(_problem_of_image, paths, look, 'images', look.processes, look.full)
    problems = [problem for problem in results if problem]
    if problems:
        return name_some(problems, 'images are missing or damaged', look.level, look.shown)
    how = 'decoded' if look.decode else 'both ends of each file'
    return [Finding(OK, f'{len(paths)} of {total} images looked at ({how}): all there and whole')]


def _problem_of_image(look, path) -> str:
    """'' or what is wrong."""
    try:
        if look.decode:
            read_image(path)
        else:
            check_whole(path)
    except DataError as error:
        return str(error)
    return ''
