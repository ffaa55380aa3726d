"""The test suite on every stack of the support table, one command each (pip install nox).

    nox -s py314-torch2.14         # or py313-, py312-, py311-torch2.14, and py312-, py311-, py310-torch2.11
    nox -s py38-torch2.0.0         # or py38-torch1.10.2
    nox -s py38-torch2.0.0 -- tests/models
    nox                            # all of them

A stack's Python (python3.8, ...) must be on the path. Without nox the same is
"make test PYTHON=python3.8 STACK=py38-torch2.0.0 VENV=.venv-py38-torch2.0.0".
"""

import nox

STACKS = {  # session -> (Python, set of pins in tools/install.py)
    'py314-torch2.14': ('3.14', 'torch2.14'),
    'py313-torch2.14': ('3.13', 'torch2.14'),
    'py312-torch2.14': ('3.12', 'torch2.14'),
    'py311-torch2.14': ('3.11', 'torch2.14'),
    'py312-torch2.11': ('3.12', 'torch2.11'),
    'py311-torch2.11': ('3.11', 'torch2.11'),
    'py310-torch2.11': ('3.10', 'torch2.11'),
    'py38-torch2.0.0': ('3.8', 'py38-torch2.0.0'),
    'py38-torch1.10.2': ('3.8', 'py38-torch1.10.2'),
}
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True


def add_session(name, python, stack):
    @nox.session(name=name, python=python, venv_backend='venv')
    def tests(session):
        session.run('python', 'tools/install.py', '--stack', stack)
        session.run('python', '-m', 'pytest', *session.posargs)


for _name, (_python, _stack) in STACKS.items():
    add_session(_name, _python, _stack)
