"""The images of a sample: the keyframe's own and those of chosen earlier frames, with their projections."""

from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List

import numpy as np
from mmdet.datasets.builder import PIPELINES

from lib.errors import ConfigError
from lib.geometry import invert_rigid
from lib.infos import ego_from_lidar
from lib.task import Task

from ..decode import DecodedImage, check_decoder, read_image
from ..history import choose_test_frames, choose_train_frames
from ..infos import NOWHERE, current_lidar2img, frame_key, past_lidar2img, relocate


@PIPELINES.register_module()
class LoadMultiViewImageFromMultiSweeps:
    """Choose the sample's T frames, decode their images, and compute their projections.

    Adds ``img`` (list of T*N arrays, BGR uint8 [H, W, 3]), ``lidar2img`` float64 [T*N, 4, 4] (LIDAR_TOP of
    the keyframe to pixels of the decoded image), ``ego2lidar`` float64 [T*N, 4, 4], ``frame_keys`` (T*N
    strings); index = t*N + n, newest frame first. A camera that a frame lacks gives a black image in which no
    point is seen.

    Args:
        task: frames and cameras.
        decoder: ``cv2``, ``pillow`` or ``turbojpeg``; the pixels are the same.
        fast_decode: decode JPEGs at half size where that still covers the network's images. Halves the time;
            real images differ by 0.6 grey levels on average and by 15 at most (tools/bench_loading.py).
        threads: threads that decode one sample's images; 1 decodes in the worker itself.
    """

    def __init__(self, task: Task, decoder: str = 'cv2', fast_decode: bool = False, threads: int = 1):
        if threads < 1:
            raise ConfigError(f'LoadMultiViewImageFromMultiSweeps: threads must be at least 1, got {threads!r}')
        check_decoder(decoder)
        self.task = task
        self.decoder = decoder
        self.fast_decode = fast_decode
        self.threads = threads

    def __call__(self, sample: Dict) -> Dict:
        info, cameras = sample['info'], self.task.cameras
        entries = [(frame, name) for frame in self._choose(sample) for name in cameras]
        there = [frame[name]['data_path'] for frame, name in entries if name in frame]
        images = self._read([relocate(path, sample['data_root']) for path in there])
        black = np.zeros_like(images[0].pixels)
        found = iter(images)
        sample['img'], sample['frame_keys'], matrices = [], [], []
        for frame, name in entries:
            if name in frame:
                image, matrix = next(found), _lidar2img(info, frame, name)
                matrix[:2] *= image.factor
            else:
                image, matrix = DecodedImage(black, 1.0), NOWHERE
            sample['img'].append(image.pixels)
            sample['frame_keys'].append(frame_key(frame[name]['data_path']) if name in frame else f'missing/{name}')
            matrices.append(matrix)
        sample['lidar2img'] = np.stack(matrices)
        sample['ego2lidar'] = np.repeat(invert_rigid(ego_from_lidar(info))[None], len(entries), axis=0)
        return sample

    def _choose(self, sample) -> List[Dict]:
        """T dicts {CAM: entry}, newest first."""
        current, history, count = sample['info']['cams'], sample['history'], self.task.num_frames - 1
        if not history:
            return [current] * (1 + count)
        chosen = (
            choose_test_frames(len(history), count)
            if sample['test_mode']
            else choose_train_frames(len(history), count, sample['rng'])
        )
        return [current] + [history[position] for position in chosen]

    def _read(self, paths):
        """One array per path; a path that occurs again is decoded once and shared."""
        different = list(dict.fromkeys(paths))
        if self.threads > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                images = dict(zip(different, pool.map(self._read_one, different)))
        else:
            images = {path: self._read_one(path) for path in different}
        return [images[path] for path in paths]

    def _read_one(self, path):
        return read_image(path, self.decoder, self.task.image_size if self.fast_decode else None)


def _lidar2img(info, frame, name) -> np.ndarray:
    return current_lidar2img(frame[name]) if frame is info['cams'] else past_lidar2img(info, frame[name])
