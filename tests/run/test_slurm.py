"""Under SLURM: the documented line with made-up srun and scontrol, and tasks of srun without torchrun."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lib.run.folder import resume_command
from lib.run.processes import first_host, variables_of_slurm

ROOT = Path(__file__).resolve().parents[2]
DETERMINISTIC = ('model.dropout=0.0',)
STEP = dict(SLURM_STEP_NUM_TASKS='16', SLURM_PROCID='11', SLURM_LOCALID='3', SLURM_STEP_NODELIST='gpu[07-08]')
STEP.update(SLURM_JOB_ID='123456', SLURM_JOB_NODELIST='gpu[07-12]')


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def test_variables_of_a_task():
    found = variables_of_slurm(STEP)
    assert found == dict(RANK='11', WORLD_SIZE='16', LOCAL_RANK='3', MASTER_ADDR='gpu07', MASTER_PORT='23456')
    assert variables_of_slurm(dict(STEP, CUDA_VISIBLE_DEVICES='3'))['LOCAL_RANK'] == '0'
    assert variables_of_slurm(dict(STEP, CUDA_VISIBLE_DEVICES='0,1,2,3'))['LOCAL_RANK'] == '3'
    given = variables_of_slurm(dict(STEP, MASTER_ADDR='10.0.0.1', MASTER_PORT='29500'))
    assert (given['MASTER_ADDR'], given['MASTER_PORT']) == ('10.0.0.1', '29500')


def test_what_is_no_task_of_several():
    """torchrun under srun, the batch script itself, a shell of salloc, no SLURM at all."""
    batch = dict(SLURM_NTASKS='16', SLURM_PROCID='0', SLURM_JOB_ID='1', SLURM_JOB_NODELIST='a,b')
    for environment in (dict(STEP, RANK='0', WORLD_SIZE='8'), batch, dict(STEP, SLURM_STEP_NUM_TASKS='1'), {}):
        assert variables_of_slurm(environment) == {}


@pytest.mark.parametrize(
    'nodes, first',
    [('a', 'a'), ('a,b', 'a'), ('n[1-3]', 'n1'), ('n[003,007-9],m1', 'n003'), ('r1-n[02-04]-ib,x', 'r1-n02-ib')],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_the_command_to_go_on_with():
    command = resume_command(['train.py', '--config', 'c.py'], Path('run'), variables_of_slurm(STEP))
    assert command == 'srun --ntasks 16 python train.py --config c.py --resume run'


def test_tasks_of_srun_learn_as_one_process(workshop):
    """Two tasks on one node, told apart by SLURM's variables alone."""
    workshop.train(*DETERMINISTIC, work_dir='one')
    common = dict(SLURM_STEP_NUM_TASKS='2', SLURM_STEP_NODELIST='127.0.0.1', MASTER_PORT=str(free_port()))
    tasks = [
        workshop.start(
            ['train'] + workshop.arguments(*DETERMINISTIC, work_dir='two'),
            environment=dict(common, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)),
        )
        for i in (0, 1)
    ]
    texts = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], texts
    assert workshop.curve('two') == pytest.approx(workshop.curve('one'), rel=1e-4)
    assert 'x 2 processes' in workshop.log('two')


SRUN = """#!/bin/bash
# as SLURM's: --nodes 2, one task each; options begin with --, and the command follows them
while [[ $1 == --* ]]; do shift 2; done
export SLURM_NNODES=2 SLURM_JOB_NODELIST='here[0-1]'
SLURM_NODEID=1 "$@" & second=$!
SLURM_NODEID=0 "$@"; first=$?
wait $second && exit $first
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames here[0-1]" ]] && printf '127.0.0.1\\nelsewhere\\n'
"""


def test_the_line_of_the_docs(workshop):
    """``srun ... torchrun`` as it stands in docs/training.md, for two processes in place of sixteen."""
    page = (ROOT / 'docs' / 'training.md').read_text(encoding='utf-8')
    (line,) = re.findall(r'^srun --nodes 2 .*?\'$', page, re.M | re.S)
    tools = workshop.folder / 'bin'
    tools.mkdir()
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL), ('torchrun', torchrun)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    run = ' '.join(['train', *workshop.arguments(*DETERMINISTIC, work_dir='two')])
    assert line.count('train.py --config C --resume auto') == 1
    line = line.replace('train.py --config C --resume auto', f'{ROOT}/tests/run/fakes.py "{run} --resume auto"')
    line = line.replace('--nproc_per_node 8', '--nproc_per_node 1').replace('29500', str(free_port()))
    environment = dict(os.environ, PATH=f'{tools}:{os.environ["PATH"]}', OMP_NUM_THREADS='1')
    process = subprocess.Popen(
        ['bash', '-c', line],
        cwd=str(workshop.folder),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        text = process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, text
    assert text.count('training is complete') == 1 and 'x 2 processes' in workshop.log('two'), text
