import shutil

import pytest


@pytest.fixture
def root(source, tmp_path):
    """A copy of a module's data set ``source``, to spoil."""
    shutil.copytree(str(source), str(tmp_path / 'nuscenes'))
    return tmp_path / 'nuscenes'
