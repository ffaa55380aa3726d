"""OpenMMLab 1.x and nuscenes-devkit on current Python, NumPy and PyTorch.

Call :func:`prepare_openmmlab` before the first ``import mmdet`` / ``mmdet3d``:

    from lib.openmmlab import prepare_openmmlab
    prepare_openmmlab()
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import pkgutil
import sys
import threading
import types
import warnings

from .errors import missing_package

# Newest mmcv that mmdet3d 1.0.0rc6 accepts; its code works with the later 1.7.x.
_NEWEST_MMCV_FOR_MMDET3D = '1.7.0'
MMCV_EXT = 'mmcv._ext'  # the module of mmcv's compiled ops

# NumPy's removed names, and what they meant; mmdet, mmdet3d and nuscenes-devkit still use them.
_SCALARS = {'bool': bool, 'int': int, 'float': float, 'object': object, 'long': int}
_RENAMED = {'int0': 'intp', 'in1d': 'isin'}

_BUILDERS_MODULE, _BUILDERS = 'torch.utils.cpp_extension', ('BuildExtension', 'CppExtension', 'CUDAExtension')

_prepared = False


def prepare_openmmlab() -> None:
    """Make ``import mmdet``, ``mmdet3d`` and ``nuscenes`` work here. Cheap when called again.

    - The compiled ``mmcv._ext`` is used where it can be imported, else a stand-in takes its place.
    - Names of NumPy and of Python's ``pkgutil`` that these libraries need come back.
    - mmdet3d accepts mmcv 1.7.1 and 1.7.2; mmcv's ``Config.pretty_text`` works with every yapf.
    - Warnings they raise while being imported are not shown, nor that mmdet's ResNet leaves a kind of checkpoint open.

    Raises:
        UserError: mmcv, torch or numpy is not installed.
    """
    global _prepared
    if _prepared:
        return
    restore_numpy_names(_import_required('numpy'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        _import_mmcv()
        _use_compiled_ops_or_stand_in()
        _import_mmdet3d()
    warnings.filterwarnings('ignore', message='torch.utils.checkpoint: .*use_reentrant')
    restore_find_loader(pkgutil)
    _prepared = True


def has_compiled_ops() -> bool:
    """mmcv's compiled ops are installed and can be imported."""
    prepare_openmmlab()
    return not isinstance(sys.modules.get(MMCV_EXT), StandInExt)


def _import_mmcv():
    _import_required('torch')  # first: the compiled ops are linked against its libraries
    with _builders_on_use():
        if 'yapf' in sys.modules:
            _import_required('mmcv')
        else:
            with _empty('yapf.yapflib.yapf_api'):
                sys.modules['yapf.yapflib.yapf_api'].FormatCode = _format_code
                _import_required('mmcv')
    importlib.import_module('mmcv.utils.config').FormatCode = _format_code


def _import_required(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing_package(error) from error


@contextlib.contextmanager
def _builders_on_use():
    """mmcv's modules have PyTorch's builders of extensions, which bring setuptools: imported when one is asked for."""
    if _BUILDERS_MODULE in sys.modules:
        yield
        return
    stand_in = sys.modules[_BUILDERS_MODULE] = types.ModuleType(_BUILDERS_MODULE)
    vars(stand_in).update(dict.fromkeys(_BUILDERS))
    try:
        yield
    finally:
        del sys.modules[_BUILDERS_MODULE]
        of_mmcv = [(name, module) for name, module in sys.modules.items() if name.partition('.')[0] == 'mmcv']
        for name, module in of_mmcv:
            if all(builder in getattr(module, '__dict__', ()) for builder in _BUILDERS):
                for builder in _BUILDERS:
                    delattr(module, builder)
                vars(module)['__getattr__'] = functools.partial(_import_builder, name)


def _import_builder(module: str, name: str):
    if name in _BUILDERS:
        return getattr(importlib.import_module(_BUILDERS_MODULE), name)
    raise AttributeError(f'module {module!r} has no attribute {name!r}')


def _use_compiled_ops_or_stand_in():
    try:
        importlib.import_module(MMCV_EXT)
    except ModuleNotFoundError:
        _put_stand_in()
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        _put_stand_in()
        print(
            f'note: the compiled ops of mmcv cannot be loaded and are not used ({str(error).splitlines()[0]}); '
            '"make install MMCV_OPS=1" compiles them for the torch present'
        )


def _import_mmdet3d():
    """Import mmdet3d's top module (small) while mmcv, if newer, shows the version that it asserts."""
    mmcv = importlib.import_module('mmcv')
    version = mmcv.__version__
    parts = tuple(int(part) for part in version.split('.')[:3] if part.isdigit())
    if parts <= tuple(int(part) for part in _NEWEST_MMCV_FOR_MMDET3D.split('.')):
        return
    mmcv.__version__ = _NEWEST_MMCV_FOR_MMDET3D
    try:
        importlib.import_module('mmdet3d')
    except ModuleNotFoundError as error:
        if error.name != 'mmdet3d':
            raise
    finally:
        mmcv.__version__ = version


def _format_code(text, style_config=None, verify=None):
    """yapf's FormatCode, which is imported when a config is written; 0.40.2 dropped the argument ``verify``."""
    format_code = importlib.import_module('yapf.yapflib.yapf_api').FormatCode
    takes_verify = 'verify' in inspect.signature(format_code).parameters
    return format_code(text, style_config=style_config, **(dict(verify=verify) if takes_verify else {}))


# -- what is imported when it is used
#
# mmdet's packages import all of their modules, and with them matplotlib, SciPy and scikit-learn. A few modules are
# needed here. The packages around them wait until something else of theirs is asked for, be it by a name in a config.
# torchvision takes as long to import as PyTorch itself; mmcv lists its models for URLs of weights.

_WAITING = ('mmdet.core', 'mmdet.models', 'mmdet.models.backbones', 'mmdet.models.necks', 'mmdet.datasets')
_NEEDED = (
    *('mmdet.models.builder', 'mmdet.models.utils.builder', 'mmdet.models.backbones.resnet'),
    *('mmdet.models.necks.fpn', 'mmdet.datasets.builder'),
)
_FILLED_FIRST = ('mmdet.models.backbones', 'mmdet.models.necks', 'mmdet.models', 'mmdet.datasets', 'mmdet.core')
_filling = threading.RLock()


class _OnUse:
    """Stands for a module, which is imported when something of it is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self._name), attribute)


class _WaitingPackage(types.ModuleType):
    """A package whose own file runs when something of it is asked for, be it a module, that is not there yet.

    While it has a ``__path__`` modules of it can be imported without that.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.util.find_spec(name)
        self.__loader__, self.__file__ = self.__spec__.loader, self.__spec__.origin
        self.__package__, self.__path__ = name, self.__spec__.submodule_search_locations or []
        self._is_filled = False

    def __getattr__(self, attribute):
        if not attribute.startswith('__') or attribute in ('__all__', '__path__'):
            self.fill()
            if attribute in self.__dict__:
                return self.__dict__[attribute]
        raise AttributeError(f'module {self.__name__!r} has no attribute {attribute!r}')

    def fill(self) -> None:
        """Run the package's file unless that was done."""
        with _filling:
            if not self._is_filled:
                self._is_filled = True
                self.__path__ = self.__spec__.submodule_search_locations or []
                self.__spec__.loader.exec_module(self)


class _ImportedMeanwhile(importlib.abc.Loader):
    """Finder and loader of a module that is there already: the import of it asked its package, which waited, where to
    look, and the package's file has imported it. It is not run a second time."""

    def __init__(self, module: types.ModuleType):
        self._module, self._spec = module, module.__spec__

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        """As Python's finders; ``target`` is given where a module is reloaded, which is to run it again."""
        package, module = sys.modules.get(name.rpartition('.')[0]), sys.modules.get(name)
        if target is not None or module is None or not isinstance(package, _WaitingPackage):
            return None
        return importlib.machinery.ModuleSpec(name, cls(module))

    def create_module(self, spec) -> types.ModuleType:
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._spec


def import_mmdet() -> None:
    """``prepare_openmmlab``, and import of mmdet what is needed here; its packages wait.

    A registry of mmcv's that does not know a name looks for it again in what was waiting.
    """
    prepare_openmmlab()
    if 'mmcv.runner.checkpoint' not in sys.modules and 'torchvision' not in sys.modules:
        with _empty('torchvision'):
            checkpoint = importlib.import_module('mmcv.runner.checkpoint')
        vars(checkpoint)['torchvision'] = _OnUse('torchvision')
    importlib.import_module('mmdet')
    if any(name in sys.modules for name in _WAITING):
        return
    packages = [_put_waiting(name) for name in _WAITING]
    for name in _NEEDED:
        importlib.import_module(name)
    for package in packages:
        if not package._is_filled:
            del package.__path__
    sys.meta_path.insert(0, _ImportedMeanwhile)
    _look_again(importlib.import_module('mmcv.utils').Registry)


def _put_waiting(name: str) -> _WaitingPackage:
    sys.modules[name] = package = _WaitingPackage(name)
    parent, _, child = name.rpartition('.')
    setattr(sys.modules[parent], child, package)
    return package


def _look_again(registry_class) -> None:
    """Names that no registry knows are looked for again after each waiting package that is imported."""
    get = registry_class.get

    def get_from_all(self, key):
        found = get(self, key)
        for name in _FILLED_FIRST:
            if found is not None:
                break
            package = sys.modules[name]
            if not package._is_filled:
                package.fill()
                found = get(self, key)
        return found

    registry_class.get = get_from_all


@contextlib.contextmanager
def _empty(package: str):
    """Imports of the package, and of those around it, find empty modules meanwhile."""
    parts = package.split('.')
    names = ['.'.join(parts[: count + 1]) for count in range(len(parts))]
    there = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: types.ModuleType(name) for name in names})
    for name, inner in zip(names, parts[1:]):
        setattr(sys.modules[name], inner, sys.modules[f'{name}.{inner}'])
    try:
        yield
    finally:
        for name, module in there.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


# -- a stand-in for mmcv's compiled ops
#
# mmdet and mmdet3d import ``mmcv.ops`` when they are imported, and ``mmcv.ops`` wants ``mmcv._ext``. None of those
# ops is called here, so a module whose functions fail with a clear sentence when called is enough.


class MissingOpError(RuntimeError):
    """One of mmcv's compiled ops was called, and they are not installed."""


class StandInExt(types.ModuleType):
    """Has every public name, as mmcv asks at import; calling one raises :class:`MissingOpError`."""

    def __init__(self):
        super().__init__(MMCV_EXT, 'Stand-in: mmcv was installed without its compiled ops.')
        self.__spec__ = importlib.machinery.ModuleSpec(MMCV_EXT, loader=None)

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return _missing_op(name)

    @staticmethod
    def get_compiler_version():
        """For mmcv's report of the environment."""
        return 'not compiled'

    @staticmethod
    def get_compiling_cuda_version():
        """For mmcv's report of the environment."""
        return 'not compiled'


def _missing_op(name):
    def missing_op(*args, **kwargs):
        raise MissingOpError(
            f'mmcv.ops needs the compiled op {name!r}, and this mmcv has no compiled '
            'ops; run "make install MMCV_OPS=1" to compile them (about 20 minutes)'
        )

    missing_op.__name__ = name
    return missing_op


def _put_stand_in() -> None:
    """Put the stand-in where ``import mmcv._ext`` finds it."""
    sys.modules[MMCV_EXT] = StandInExt()


def restore_find_loader(pkgutil) -> None:
    """Add ``find_loader``, gone from Python 3.14, by which mmcv looks for its compiled ops."""
    if hasattr(pkgutil, 'find_loader'):
        return

    def find_loader(name):
        spec = importlib.util.find_spec(name)
        return spec and spec.loader

    pkgutil.find_loader = find_loader


def restore_numpy_names(numpy) -> None:
    """Add each missing alias to the module ``numpy``; names that exist keep their meaning."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # old NumPy warns when a deprecated alias is looked at
        for name, scalar in _SCALARS.items():
            if not hasattr(numpy, name):
                setattr(numpy, name, scalar)
        for name, current in _RENAMED.items():
            if not hasattr(numpy, name):
                setattr(numpy, name, getattr(numpy, current))
