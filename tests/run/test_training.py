"""The training loop: what it logs and saves, and that it can be stopped and continued without a trace."""

import json
import os
import re
import shlex

import fakes
import pytest
import torch

import train
from lib.errors import CheckpointError, ConfigError, DataError, UserError
from lib.run.processes import RunStopped
from lib.run.train_script import run_training

NOT_RESUMED = ('time', 'data_time', 'update_time', 'samples_per_s', 'memory_mib')


def without_times(records):
    return {i: {k: v for k, v in r.items() if k not in NOT_RESUMED} for i, r in records.items()}


def test_a_run_and_what_it_leaves(workshop):
    assert workshop.train('optimizer_config.grad_clip.max_norm=0.5') == 0
    # 21 samples in batches of 8: three steps an epoch, the last filled up.
    assert len(workshop.curve()) == 9 and workshop.curve()[-1] < workshop.curve()[0]
    assert workshop.files() == ['epoch_3_iter_9.pth', 'latest.pth']
    assert workshop.files('*.*', '.') == ['fake.py']
    assert os.readlink(str(workshop.folder / 'run' / 'latest.pth')) == 'epoch_3_iter_9.pth'
    log = workshop.log()
    for words in (
        'seed 5',
        'total batch 8 = 8 samples x 1 processes x 1',
        'device: CPU',
        'float32',
        'left 0:00:00',
        'RayIoU',
        'saved',
    ):
        assert words in log, words
    assert re.search(r'git: ([0-9a-f]{40}|no git)', (workshop.folder / 'run' / 'environment.txt').read_text())
    assert 'lr' in workshop.records()[1] and workshop.records(kind='eval')[9]['RayIoU'] >= 0
    scores = json.loads((workshop.folder / 'run' / 'evaluation_iter_9.json').read_text())
    assert scores['num_samples'] == 7


def test_best_checkpoint_is_kept_beside_the_newest(workshop):
    """By epochs and by iterations; which is best is read from the scores in the folder, so resuming changes nothing."""
    options = ('evaluation.interval=1', 'evaluation.interval_iters=2')
    workshop.train(*options, 'runner.max_iters=5')
    workshop.train(*options, more=('--resume', 'auto'))
    scores = workshop.records(kind='eval')
    assert sorted(scores) == [2, 3, 4, 5, 6, 8, 9]
    best = max(scores, key=lambda i: (scores[i]['RayIoU'], i))
    assert workshop.load('best.pth')['progress']['iteration'] == best
    assert workshop.files() == ['best.pth', 'epoch_3_iter_9.pth', 'latest.pth']
    assert 'kept as' in workshop.log() and f'RayIoU {100 * scores[9]["RayIoU"]:.2f} %' in workshop.log()


def test_no_best_checkpoint_where_there_is_one_evaluation(workshop):
    workshop.train()
    assert 'best.pth' not in workshop.files()


def test_a_score_that_there_is_not_is_told(workshop):
    workshop.train('evaluation.save_best=RayPQ')
    assert 'evaluation gave no RayPQ' in workshop.log() and 'best.pth' not in workshop.files()


def test_shares_and_warnings_are_logged(workshop):
    workshop.train('model.shares=[0.25, 1.0]')
    record = workshop.records()[9]
    assert (record['recall_0'], record['empty_masks'], record['right_class/car']) == (0.25, 1.0, 0.5)
    log = workshop.log()
    assert 'recall 25 %, empty masks 100 %' in log and log.count('WARNING: almost every mask is empty') == 1
    assert 'numbers of a line are means' in log and record['samples_per_s'] > 0 and record['update_time'] > 0


def test_waiting_for_data_is_worth_a_note(workshop):
    workshop.train('data.train.delay=0.01', 'runner.max_epochs=2', work_dir='slow')
    assert workshop.log('slow').count('of the time goes into waiting for data; data.workers_per_gpu is 0') == 1


def test_no_folder_is_overwritten(workshop):
    for _ in range(3):
        workshop.train('runner.max_epochs=1', work_dir='run')
    folders = sorted(p.name for p in workshop.folder.glob('run*'))
    assert folders == ['run', 'run-1', 'run-2']
    assert workshop.curve('run') == workshop.curve('run-1') == workshop.curve('run-2')


def test_default_folder(workshop):
    for _ in range(2):
        arguments = ['--config', str(workshop.config), '--max-epochs', '1', '--no-eval']
        run_training(train.parse_args(arguments), fakes.components)
    runs = sorted(p.name for p in (workshop.folder / 'outputs' / 'fake').iterdir())
    assert len(runs) == 2 and all(re.match(r'\d{8}_\d{6}(-1)?$', name) for name in runs)


def test_random_seed_is_printed_and_kept(workshop):
    workshop.train('seed=None', 'runner.max_epochs=1')
    seed = int(re.search(r'seed (\d+)', workshop.log()).group(1))
    assert workshop.load('latest.pth')['meta']['seed'] == seed
    workshop.train(f'seed={seed}', 'runner.max_epochs=1', work_dir='again')
    assert workshop.curve('again') == workshop.curve('run')


@pytest.mark.parametrize('accumulate', [2, 3, 8])
def test_accumulation_gives_the_same_curve(workshop, accumulate):
    options = ('model.dropout=0', 'model.normed=False')  # what is left is linear in the samples
    workshop.train(*options, work_dir='one')
    workshop.train(*options, work_dir='many', more=('--accumulate', str(accumulate)))
    assert f'x {accumulate} accumulation steps' in workshop.log('many')
    # float32 sums in another order; AdamW's steps do not shrink, so rounding is carried along for nine steps
    assert workshop.curve('many') == pytest.approx(workshop.curve('one'), rel=1e-4)


@pytest.mark.parametrize('interval, sample', [(1, 0), (2, 9), (5, 9), (4, 20)])
def test_stop_and_resume_leaves_no_trace(workshop, interval, sample):
    """A run cut at any iteration, also inside an epoch and between two log lines, ends as if never cut."""
    options = (
        'train.checkpoint_interval_iters=1',
        'train.max_keep_ckpts=0',
        f'train.log_interval={interval}',
        'evaluation.interval=1',
    )
    workshop.train(*options, work_dir='whole')
    with pytest.raises(SystemExit):
        workshop.train(
            *options, f"data.train.trouble={{{sample}: 'crash'}}", 'data.train.trouble_epoch=1', work_dir='cut'
        )
    assert max(workshop.records('cut')) < 6 and 'evaluation_iter_3.json' in workshop.files('*.json', 'cut')
    assert workshop.train(*options, work_dir='cut', more=('--resume', 'auto')) == 0
    whole, cut = workshop.records('whole'), workshop.records('cut')
    assert without_times(cut) == without_times(whole)
    states = [workshop.load('epoch_3_iter_9.pth', run)['state_dict'] for run in ('whole', 'cut')]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert workshop.records('whole', 'eval')[9] == workshop.records('cut', 'eval')[9]
    assert 'continuing from' in workshop.log('cut')


def test_graphs_where_there_can_be_none(workshop, monkeypatch):
    options = ('train.cuda_graph=True', 'runner.max_iters=1')
    with pytest.raises(ConfigError, match='FakeModel cannot be captured'):
        workshop.train(*options)
    monkeypatch.setattr(fakes.FakeModel, 'graphs_training', False, raising=False)
    workshop.train(*options)
    assert 'train.cuda_graph has no effect on the CPU' in workshop.log()


def test_balanced_sampling_and_its_resumption(workshop):
    options = ('train.class_balance=1.0', 'train.checkpoint_interval_iters=1')
    workshop.train(*options, work_dir='whole')
    with pytest.raises(SystemExit):
        workshop.train(*options, "data.train.trouble={14: 'crash'}", 'data.train.trouble_epoch=1', work_dir='cut')
    assert 0 < max(workshop.records('cut')) < 6
    workshop.train(*options, work_dir='cut', more=('--resume', 'auto'))
    assert workshop.curve('cut') == workshop.curve('whole')
    # 21 samples with a car, 3 of them with a bus: 10.5 draws go to either class
    assert 'by class, 2 classes; a sample is met 0.50 to 4.00 times an epoch' in workshop.log('whole')
    with pytest.raises(ConfigError, match='class_balance'):
        workshop.train(*options, 'data.train.with_objects=False')


def test_resume_from_a_file_goes_to_a_new_folder(workshop):
    workshop.train('train.max_keep_ckpts=0', work_dir='a')
    first = workshop.folder / 'a' / 'epoch_1_iter_3.pth'
    workshop.train(work_dir='b', more=('--resume', str(first)))
    assert workshop.curve('a')[3:] == [workshop.records('b')[i]['loss'] for i in range(4, 10)]


def test_auto_without_a_checkpoint_starts_anew(workshop):
    """The log says so, and where it was looked for."""
    workshop.train(more=('--resume', 'auto'))
    (line,) = [line for line in workshop.log().splitlines() if 'no checkpoint to continue from' in line]
    assert str(workshop.folder / 'run') in line and 'starting anew' in line and len(workshop.curve()) == 9


def test_auto_finds_a_run_that_lies_elsewhere(workshop):
    """Without --work-dir, and with it where the run got a number because the folder was there already."""
    (workshop.folder / 'run').mkdir()
    (workshop.folder / 'run' / 'note').write_text('')
    workshop.train('runner.max_iters=4')
    arguments = ['--config', str(workshop.config), '--resume', 'auto']
    assert run_training(train.parse_args([*arguments, '--max-iters', '6']), fakes.components) == 0
    assert workshop.train('runner.max_iters=9', more=('--resume', 'auto')) == 0
    assert len(workshop.curve('run-1')) == 9 and workshop.files('*', 'run') == ['note']


def test_the_command_that_is_printed_goes_on(workshop, capsys, monkeypatch):
    arguments = workshop.arguments(
        "data.train.trouble={4: 'sigterm'}", 'data.train.trouble_epoch=1', work_dir='my run', more=('--resume=auto',)
    )
    monkeypatch.setattr('sys.argv', ['train.py', *arguments])
    assert run_training(train.parse_args(arguments), fakes.components) == 143
    printed = capsys.readouterr().out.strip().splitlines()[-1].split('continue with: ')[1]
    program, script, *again = shlex.split(printed)
    assert (program, script) == ('python', 'train.py') and again.count('--resume') == 1
    args = train.parse_args([*again, '--max-iters', '9'])
    args.override = []  # the trouble is over
    assert run_training(args, fakes.components) == 0
    assert len(workshop.curve('my run')) == 9


def test_resuming_a_finished_run_does_nothing(workshop):
    workshop.train()
    before = workshop.curve()
    assert workshop.train(more=('--resume', 'auto')) == 0
    assert workshop.curve() == before and workshop.log().count('evaluated 7 samples') == 1


def test_half_written_checkpoint_does_not_shadow_a_good_one(workshop, capsys):
    options = ('train.max_keep_ckpts=0',)
    workshop.train(*options, work_dir='whole')
    workshop.train(*options, more=('--max-epochs', '2', '--no-eval'))
    folder = workshop.folder / 'run'
    newest = folder / 'epoch_2_iter_6.pth'
    newest.write_bytes(newest.read_bytes()[:2000])
    (folder / '.epoch_3_iter_9.77.tmp.pth').write_bytes(b'cut off by a kill')
    # The cosine of the cut run was shorter, so take the schedule that both share.
    workshop.train(*options, more=('--resume', 'auto'))
    assert 'epoch_2_iter_6.pth is not whole' in capsys.readouterr().out
    assert 'epoch_1_iter_3.pth' in workshop.log() and 'continuing at iteration 3' in workshop.log()
    assert not list(folder.glob('.*.tmp.pth'))
    assert len(workshop.curve()) == 9


@pytest.mark.parametrize(
    'change, words',
    [
        (('total_batch_size=4',), 'total_batch_size = 8, this run has 4'),
        (('data.train.length=20',), 'num_samples = 21, this run has 20'),
    ],
)
def test_resume_with_other_samples_is_refused(workshop, change, words):
    workshop.train(more=('--max-epochs', '1'))
    with pytest.raises(CheckpointError, match=words):
        workshop.train(*change, more=('--resume', 'auto'))


def test_resume_with_another_seed_is_refused_and_changes_are_told(workshop):
    workshop.train(more=('--max-epochs', '1'))
    with pytest.raises(CheckpointError, match='seed = 5, this run has 6'):
        workshop.train(more=('--resume', 'auto', '--seed', '6'))
    workshop.train('optimizer.lr=0.02', more=('--resume', 'auto'))
    assert '- optimizer.lr = 0.01' in workshop.log() and '+ optimizer.lr = 0.02' in workshop.log()
    assert workshop.records()[9]['lr'] > 0.005 * 0.02  # the new rate counts


def test_resume_from_bare_weights_is_refused(workshop, tmp_path):
    path = str(tmp_path / 'w.pth')
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), path)
    with pytest.raises(CheckpointError, match='no training state.*--load-from'):
        workshop.train(more=('--resume', path))


def test_load_from(workshop):
    workshop.train(work_dir='a')
    workshop.train(work_dir='b', more=('--load-from', str(workshop.folder / 'a' / 'latest.pth')))
    assert 'used:      6 tensors' in workshop.log('b')
    assert workshop.curve('b')[0] != workshop.curve('a')[0]


def test_old_checkpoints_go_only_as_new_ones_come(workshop):
    workshop.train('train.max_keep_ckpts=2', 'train.checkpoint_interval_iters=2')
    assert workshop.files() == ['epoch_3_iter_9.pth', 'iter_8.pth', 'latest.pth']


@pytest.mark.parametrize('workers', [0, 1])
def test_nan_loss_stops_with_tokens_and_state(workshop, workers):
    with pytest.raises(RunStopped) as error:
        workshop.train('model.nan_at=[4]', f'data.workers_per_gpu={workers}')
    text = str(error.value)
    assert 'the loss is not finite at iteration' in text and 'token4' in text and 'loss_mean' in text
    (facts,) = workshop.files('nonfinite_iter_*.json')
    facts = json.loads((workshop.folder / 'run' / facts).read_text())
    tokens = facts['sample_tokens_by_process_and_pass'][0][0]
    assert 'token4' in tokens and len(tokens) == 8
    # The state saved is the one before the bad step, and --resume does not take it for a checkpoint.
    (state,) = workshop.files('nonfinite_iter_*.pth')
    saved = workshop.load(state)
    assert saved['progress']['iteration'] == facts['iteration'] - 1
    assert all(torch.isfinite(v).all() for v in saved['state_dict'].values())


def test_infinite_gradient_stops_before_the_step(workshop, monkeypatch):
    monkeypatch.setattr('torch.nn.utils.clip_grad_norm_', lambda *a, **k: torch.tensor(float('inf')))
    with pytest.raises(RunStopped, match='the gradient is not finite at iteration 1 .grad_norm.'):
        workshop.train()


def test_unreadable_sample_stops_after_saving(workshop):
    with pytest.raises(
        RunStopped, match=r'a.jpg is damaged.*stopped after iteration [12];.*continue with: .* --resume .*run'
    ):
        workshop.train("data.train.trouble={4: 'unreadable'}", 'seed=11')
    assert any(name.startswith('iter_') for name in workshop.files())


def test_killed_worker_is_explained(workshop, monkeypatch):
    wait = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, '__defaults__', (0.1,))  # seconds until PyTorch looks whether its workers are there
    with pytest.raises(RunStopped, match='data-loading worker was killed.*workers_per_gpu'):
        workshop.train("data.train.trouble={4: 'killed'}", 'data.workers_per_gpu=1')


@pytest.mark.parametrize('workers', [0, 1])
def test_too_many_open_files_is_explained(workshop, workers):
    with pytest.raises(RunStopped, match='too many open files.*ulimit -n'):
        workshop.train("data.train.trouble={4: 'files'}", f'data.workers_per_gpu={workers}')


def test_sigterm_saves_and_leaves(workshop, capsys):
    options = ('train.max_keep_ckpts=0',)
    workshop.train(*options, work_dir='whole')
    assert workshop.train(*options, "data.train.trouble={4: 'sigterm'}", 'data.train.trouble_epoch=1') == 143
    assert 'stopped by SIGTERM after iteration' in capsys.readouterr().out
    iteration = max(workshop.records())
    assert f'iter_{iteration}.pth' in ' '.join(workshop.files())
    workshop.train(*options, more=('--resume', 'auto'))
    assert workshop.curve() == workshop.curve('whole')


def fail_to_save(*arguments):
    from lib.errors import UserError

    raise UserError('cannot write a.pth: No space left on device; free some space')


def test_full_disk_goes_on_and_keeps_the_old(workshop, monkeypatch):
    workshop.train(more=('--max-epochs', '1', '--no-eval'))
    monkeypatch.setattr('lib.run.folder.save_checkpoint', fail_to_save)
    workshop.train(more=('--resume', 'auto'))
    assert 'WARNING: cannot write a.pth: No space left' in workshop.log()
    assert len(workshop.curve()) == 9 and workshop.files() == ['epoch_1_iter_3.pth', 'latest.pth']


def test_full_disk_stops_by_option(workshop, monkeypatch):
    monkeypatch.setattr('lib.run.folder.save_checkpoint', fail_to_save)
    with pytest.raises(RunStopped, match='No space left on device.*stopped after iteration 3'):
        workshop.train('train.on_save_error=stop')


@pytest.mark.skipif(torch.__version__ < '2', reason='PyTorch 1.10 has no LayerNorm of bfloat16 on the CPU')
def test_bfloat16_on_the_cpu(workshop):
    workshop.train(more=('--amp', 'bf16'), work_dir='bf16')
    workshop.train(work_dir='fp32')
    assert 'mixed bfloat16' in workshop.log('bf16')
    # bfloat16 keeps 8 bits: the first loss agrees to about a percent, and not exactly.
    half, full = workshop.curve('bf16')[0], workshop.curve('fp32')[0]
    assert half == pytest.approx(full, rel=0.05) and half != full


def test_bfloat16_is_refused_on_the_cpu_by_old_pytorch(workshop, monkeypatch):
    monkeypatch.setattr('lib.run.numerics._CPU_HAS_BF16', False)
    with pytest.raises(ConfigError, match='--amp bf16 on the CPU needs PyTorch 2.0 or newer'):
        workshop.train(more=('--amp', 'bf16'))
    assert not (workshop.folder / 'run').exists()


@pytest.mark.parametrize(
    'overrides, more, error, words',
    [
        (('total_batch_size=0',), (), ConfigError, 'total_batch_size'),
        ((), ('--accumulate', '9'), ConfigError, 'too small for 1 processes x 9'),
        ((), ('--accumulate', 'x'), ConfigError, 'train.accumulate'),
        ((), ('--amp', 'fp16'), ConfigError, 'fp16 needs a GPU'),
        (('runner.max_epochs=0',), (), ConfigError, 'runner.max_epochs'),
        (('optimizer.type=Adan',), (), ConfigError, "'Adan'; did you mean 'Adam'"),
        (('optimizer.lrr=1',), (), ConfigError, 'lrr'),
        (("optimizer.paramwise_cfg.custom_keys={'nowhere': dict()}",), (), ConfigError, 'custom_keys'),
        (("optimizer.paramwise_cfg.custom_keys={'nowhere': {'lr_mult': 1}}",), (), ConfigError, "'nowhere'"),
        (('lr_config=3',), (), ConfigError, 'lr_config must be a dict'),
        (('lr_config.policy=Step',), (), ConfigError, "lr_config.policy must be.*'Step'; did you mean 'step'"),
        (('lr_config.warmup_iter=3',), (), ConfigError, "did you mean 'warmup_iters'"),
        (('optimizer_config.grad_clip.max_norm=0',), (), ConfigError, 'max_norm'),
        (('task.voxel_size=0',), (), ConfigError, 'voxel_size'),
        (('data.train.length=0',), (), DataError, 'data.train has no samples'),
        (('data.val.length=0',), (), DataError, 'data.val has no samples'),
        ((), ('--load-from', 'none.pth'), CheckpointError, 'none.pth'),
        ((), ('--resume', 'none.pth'), CheckpointError, 'none.pth'),
    ],
)
def test_bad_input_ends_before_training(workshop, overrides, more, error, words):
    with pytest.raises(error, match=words):
        workshop.train(*overrides, more=more)
    assert not (workshop.folder / 'run').exists()


@pytest.mark.parametrize('seed', ["'abc'", '-1', '1.5', 'True', '2**63', '[1]', '99999999999999999999'])
def test_seeds_that_are_none_are_named(workshop, seed):
    with pytest.raises(UserError, match='^seed must be a whole number from 0 to 2'):
        workshop.train(f'seed={seed}')


@pytest.mark.parametrize('override', ['data.train=3', 'data.val=[1]', "data.test='x'"])
def test_sections_of_data_are_dicts(workshop, override):
    with pytest.raises(UserError, match=r'data\.(train|val|test).* must be a dict, got'):
        workshop.train(override)
