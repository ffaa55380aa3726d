"""The list of compiled operators, on a machine with or without a GPU."""

import importlib.util
from pathlib import Path

import torch

from models import csrc

ROOT = Path(__file__).resolve().parents[3]


def test_no_operator_is_compiled_for_the_cpu():
    assert csrc.compiled_operators(torch.device('cpu')) == []


def test_interface_versions_are_those_of_the_headers():
    for name, version in csrc.INTERFACE_VERSIONS.items():
        header = (ROOT / 'models' / 'csrc' / name[1:] / (name[1:] + '.h')).read_text()
        assert f'kInterfaceVersion = {version};' in header


def test_every_source_is_listed_for_building():
    folder = ROOT / 'models' / 'csrc'
    spec = importlib.util.spec_from_file_location('operators_setup', folder / 'setup.py')
    operators = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(operators)
    listed = {name for sources in operators.OPERATORS.values() for name in sources} | set(operators.HEADERS)
    suffixes = ('.h', '.cpp', '.cu')
    present = {path.relative_to(folder).as_posix() for suffix in suffixes for path in folder.rglob('*' + suffix)}
    assert listed == present
    assert set(operators.OPERATORS) == set(csrc.INTERFACE_VERSIONS)
