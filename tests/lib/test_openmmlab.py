"""OpenMMLab on current Python: the stand-in for compiled ops, aliases, version check, quiet imports."""

import json
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

from lib import openmmlab
from lib.openmmlab import MMCV_EXT, has_compiled_ops, prepare_openmmlab

ROOT = Path(__file__).resolve().parents[2]
FAKE_PACKAGES = {
    'torch/__init__.py': '',
    'torch/utils/__init__.py': '',
    'torch/utils/cpp_extension.py': 'import sys; print("No CUDA"); print("No CUDA", file=sys.stderr)',
    'mmcv/__init__.py': 'import warnings; __version__ = "1.7.2"; warnings.warn("MMCV will release v2.0.0")',
    'mmcv/utils/__init__.py': '',
    'mmcv/utils/config.py': 'from yapf.yapflib.yapf_api import FormatCode',
    'yapf/__init__.py': '',
    'yapf/yapflib/__init__.py': '',
    'yapf/yapflib/yapf_api.py': 'def FormatCode(text, style_config=None): return text, style_config',
    'mmdet3d/__init__.py': 'import mmcv; assert mmcv.__version__ <= "1.7.0", "mmcv is too new"',
}


def run_with_fakes(folder, code, **extra):
    """stdout, stderr of ``code`` where torch, mmcv 1.7.2 and mmdet3d are the tiny packages above."""
    files = dict(FAKE_PACKAGES, **{name.replace('__', '/') + '.py': text for name, text in extra.items()})
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = f'import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n{textwrap.dedent(code)}'
    result = subprocess.run(
        [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr.strip()


def run_here(code):
    """stdout of ``code`` in a new process in the project's folder."""
    command = [sys.executable, '-c', textwrap.dedent(code)]
    result = subprocess.run(
        command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_packages_that_nothing_uses_are_imported_when_something_of_them_is_asked_for():
    run_here("""
        import sys, torch
        already = set(sys.modules)  # PyTorch 1.10 imports pandas
        import loaders, models
        unused = {'torchvision', 'sklearn', 'pandas', 'torch._dynamo', 'matplotlib', 'yapf', 'scipy.optimize'}
        unused = (unused | {'torch.utils.cpp_extension', 'setuptools'}) - already
        assert not unused & set(sys.modules), unused & set(sys.modules)
        from mmcv.runner import checkpoint
        assert 'resnet50' in checkpoint.get_torchvision_models()
        import torchvision
        assert torchvision.models.resnet50 and checkpoint.torchvision.__version__ == torchvision.__version__
        from mmcv import Config
        assert Config(dict(a=1)).pretty_text == 'a = 1\\n' and 'yapf' in sys.modules
        import mmcv, mmcv.utils
        assert not hasattr(mmcv.utils, 'NoBuilder')
        assert mmcv.utils.CUDAExtension is mmcv.CUDAExtension is torch.utils.cpp_extension.CUDAExtension
    """)


REGISTERED = """
    from mmcv.cnn import PLUGIN_LAYERS
    from mmdet.datasets.builder import DATASETS, PIPELINES
    from mmdet.models.builder import MODELS
    from mmdet.models.utils.builder import TRANSFORMER
    registries = (MODELS, TRANSFORMER, DATASETS, PIPELINES, PLUGIN_LAYERS)
"""


def test_waiting_packages_register_the_same_names_and_hold_the_same():
    tell = """
    import mmdet.core, mmdet.datasets, mmdet.models
    packages = mmdet.core, mmdet.datasets, mmdet.models, mmdet.models.backbones, mmdet.models.necks
    print([sorted(registry.module_dict) for registry in registries])
    print([sorted(name for name in vars(package) if not name.startswith('_')) for package in packages])
    """
    prepared = 'from lib.openmmlab import prepare_openmmlab, import_mmdet; '
    right = run_here(f'    {prepared}prepare_openmmlab(); import mmdet.datasets, mmdet.models\n{REGISTERED}{tell}')
    miss = '    assert MODELS.get("nothing of this name") is None\n'
    found = run_here(f'    {prepared}import_mmdet()\n{REGISTERED}{miss}{tell}')
    assert found == right and 'SwinTransformer' in found and 'RetinaHead' in found


USES = [
    'assert MODELS.get("SwinTransformer").__name__ == "SwinTransformer" and "mmdet.models.detectors" not in there',
    'assert MODELS.get("mmdet.RetinaHead").__name__ == "RetinaHead"',
    'assert "DropBlock" in PLUGIN_LAYERS',
    'assert PIPELINES.get("Mosaic") and DATASETS.get("CocoDataset")',
    'from mmdet.core import bbox_overlaps; assert bbox_overlaps.__module__.startswith("mmdet.core")',
    'from mmdet.models import FPN, build_detector; from mmdet.models.necks import *; assert SSDNeck and FPN',
    'import mmdet; assert mmdet.datasets.pipelines.LoadImageFromFile; assert not hasattr(mmdet.models, "Nothing")',
    'from mmdet.core.bbox.builder import BBOX_ASSIGNERS; assert BBOX_ASSIGNERS.get("HungarianAssigner")',
    'from mmdet.models.dense_heads import paa_head; assert paa_head.skm.GaussianMixture',
    'import mmdet3d.models',
    'import mmdet.models.backbones.swin as swin; assert MODELS.get("SwinTransformer") is swin.SwinTransformer',
    'import mmdet.models.necks.pafpn; assert mmdet.models.necks.pafpn.__spec__.origin.endswith("fpn.py")',
    'import mmdet.models.dense_heads as heads; assert MODELS.get("RetinaHead") is heads.RetinaHead',
]


@pytest.fixture(scope='module')
def what_went_wrong():
    """What each of ``USES`` said, run in a copy of its own of a process that has imported ``loaders`` and ``models``.

    Large packages that mmdet imports, but nothing of mmdet, are there before, so that no copy imports them again.
    """
    printed = run_here(f"""
    import contextlib, importlib, json, os, sys, tempfile, traceback
    import loaders, models
    there = sys.modules
    {REGISTERED}
    for name in ('torchvision', 'sklearn.mixture', 'matplotlib.pyplot', 'scipy.optimize', 'pandas', 'pycocotools'):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    said = {{}}
    for use in {USES!r}:
        with tempfile.TemporaryFile('w+') as file:
            if os.fork() == 0:
                try:
                    exec(use)
                except BaseException:
                    traceback.print_exc(file=file)
                    file.flush()
                os._exit(0)
            status = os.wait()[1]
            file.seek(0)
            said[use] = file.read() or status
    print(json.dumps(said))
    """)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize('use', USES)
def test_what_waits_is_there_when_it_is_asked_for(what_went_wrong, use):
    assert what_went_wrong[use] == 0


def test_compiled_ops_are_used_where_they_can_be_imported(tmp_path):
    out, err = run_with_fakes(
        tmp_path,
        """
        from lib.openmmlab import has_compiled_ops
        print(has_compiled_ops())
        import mmcv._ext
        print(mmcv._ext.nms())
    """,
        mmcv___ext='def nms(): return "compiled"',
    )
    assert (out.split(), err) == (['True', 'compiled'], '')


def test_ops_of_another_torch_give_way_to_the_stand_in_with_a_note(tmp_path):
    out, _ = run_with_fakes(
        tmp_path,
        """
        from lib.openmmlab import has_compiled_ops
        print(has_compiled_ops())
    """,
        mmcv___ext='raise ImportError("undefined symbol: _ZN3c10")',
    )
    note, compiled = out.splitlines()
    assert compiled == 'False'
    assert 'undefined symbol' in note and 'make install MMCV_OPS=1' in note


def test_mmdet3d_accepts_newer_mmcv_whose_version_stays(tmp_path):
    out, err = run_with_fakes(
        tmp_path,
        """
        from lib.openmmlab import prepare_openmmlab
        prepare_openmmlab()
        import mmcv, mmdet3d
        print(mmcv.__version__)
    """,
    )
    assert (out, err) == ('1.7.2', '')  # nothing else shown: no warning, no remark on CUDA


def test_config_text_needs_no_old_yapf(tmp_path):
    out, _ = run_with_fakes(
        tmp_path,
        """
        from lib.openmmlab import prepare_openmmlab
        prepare_openmmlab()
        from mmcv.utils.config import FormatCode
        print(FormatCode('a = 1', style_config='pep8', verify=True))
    """,
    )
    assert out == "('a = 1', 'pep8')"


def test_missing_mmcv_is_one_sentence(tmp_path):
    out, _ = run_with_fakes(
        tmp_path,
        """
        sys.modules['mmcv'] = None
        from lib.openmmlab import prepare_openmmlab
        from lib.errors import UserError
        try:
            prepare_openmmlab()
        except UserError as error:
            print(error)
    """,
    )
    assert 'mmcv' in out and 'make install' in out


def test_stand_in_has_every_op_and_says_what_to_do_when_one_is_called():
    ext = openmmlab.StandInExt()
    assert hasattr(ext, 'sigmoid_focal_loss_forward') and not hasattr(ext, '__path__')
    with pytest.raises(openmmlab.MissingOpError, match="op 'nms'.*MMCV_OPS=1"):
        ext.nms(1, threshold=0.5)
    assert ext.get_compiling_cuda_version() == 'not compiled'


def test_real_libraries_are_prepared_once_and_mmcv_ops_import():
    prepare_openmmlab()
    first = sys.modules[MMCV_EXT]
    prepare_openmmlab()
    assert sys.modules[MMCV_EXT] is first
    assert has_compiled_ops() == (not isinstance(first, openmmlab.StandInExt))
    from mmcv.ops import sigmoid_focal_loss

    assert callable(sigmoid_focal_loss)


def test_compiled_ops_compute_where_they_are_installed():
    if not has_compiled_ops():
        pytest.skip('mmcv has no compiled ops here (make install MMCV_OPS=1)')
    import torch
    from mmcv.ops import nms

    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30.0]])
    kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)[1]
    assert kept.tolist() == [0, 2]


def test_importing_the_libraries_shows_nothing():
    code = (
        'from lib.openmmlab import prepare_openmmlab; prepare_openmmlab(); '
        'import mmdet.models, mmdet.datasets, nuscenes.nuscenes'
    )
    for _ in range(2):  # in a first import Python remarks on the libraries' syntax while it compiles them
        result = subprocess.run(
            [sys.executable, '-c', code],
            cwd=str(ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        if not result.stdout:
            break
    assert (result.returncode, result.stdout) == (0, '')


def test_numpy_aliases_come_back_and_present_names_keep_their_meaning():
    new = types.SimpleNamespace(bool='its own', intp=np.intp, isin=np.isin)
    openmmlab.restore_numpy_names(new)
    assert new.bool == 'its own'
    assert (new.int, new.float, new.object) == (int, float, object)
    assert (new.int0, new.in1d) == (np.intp, np.isin)


def test_numpy_has_what_the_libraries_use():
    prepare_openmmlab()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # NumPy 1.23 warns when np.int is looked at
        assert np.array([1.5]).astype(np.float).dtype == np.float64
        assert np.zeros(1, dtype=np.int).dtype == np.int64
        assert np.int0(3.7) == 3 and np.ones(1, dtype=np.bool).all()


def test_mmcv_finds_whether_its_ops_are_compiled_on_python_3_14():
    """Python 3.14 has no ``pkgutil.find_loader``."""
    new = types.SimpleNamespace()
    openmmlab.restore_find_loader(new)
    assert new.find_loader('json') is not None and new.find_loader('no_such_module') is None
    prepare_openmmlab()
    from mmcv.utils.ext_loader import check_ops_exist

    assert check_ops_exist() == has_compiled_ops()
