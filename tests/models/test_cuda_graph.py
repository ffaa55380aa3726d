"""Replayed graphs give the same bits as the model run step by step."""

import contextlib
import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as distributed
from small_model import small_batch, small_config, small_model, small_task

import models.cuda_graph as cuda_graph
from lib.dist import counting_shares, shared_draws
from lib.errors import ConfigError
from lib.run.evaluation import begin, finish_in_order, predict
from lib.run.loading import to_device
from lib.run.step import exchanging_gradients
from models import build_model
from models.cuda_graph import GraphedFunction, GraphedPass, GraphMemory, Stage
from tools.synthetic import synthetic_batch, synthetic_meta

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
captures_stages = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 0),
    reason='training is captured from PyTorch 2.1 on, and imitated here from 2.0 on',
)


def test_tensors_on_the_cpu_call_the_function():
    double = GraphedFunction(lambda x: [2 * x])
    assert double(torch.ones(3))[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_cuda)])
def test_inputs_of_several_types_are_copied(device, monkeypatch):
    sources = [
        torch.arange(6, device=device).view(2, 3).t(),
        torch.rand(4, device=device),
        torch.ones(3, device=device),
    ]
    sources[2] = sources[2].byte()
    for _ in range(2):
        targets = [torch.zeros_like(source) for source in sources]
        cuda_graph._copy_all(targets, sources)
        assert all(map(torch.equal, targets, sources))
        monkeypatch.delattr(torch, '_foreach_copy_', raising=False)  # as before PyTorch 2.1


@needs_cuda
def test_a_replay_sees_new_inputs_and_new_weights():
    layer = torch.nn.Linear(4, 4).cuda()
    graphed = GraphedFunction(lambda x: [layer(x)])
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(5, 4, device='cuda')
            assert torch.equal(graphed(x)[0], layer(x))
            layer.weight.mul_(0.5)


@needs_cuda
def test_tensors_in_place_are_read_where_they_are():
    graphed = GraphedFunction(lambda x, y, z: [x * y + z])
    x, y, z = [torch.randn(5, device='cuda') for _ in range(3)]
    for _ in range(3):
        y.mul_(2)
        assert torch.equal(graphed(x, in_place=(y, z))[0], x * y + z)
    assert len(graphed._graphs) == 1
    moved = y + 1
    assert torch.equal(graphed(x, in_place=(moved, z))[0], x * moved + z) and len(graphed._graphs) == 2


@needs_cuda
def test_what_is_looked_at_while_the_gpu_works_counts():
    """Weights that the function prepares outside the graph: a replay with those of before is not what is given."""
    weight, prepared = torch.ones(3, device='cuda'), {}

    def version():
        if prepared.get('version') != weight._version:
            prepared.update(version=weight._version, double=2 * weight)
        return prepared['version']

    graphed = GraphedFunction(
        lambda x: [prepared['double'] * x], state=version, last_state=lambda: prepared.get('version')
    )
    x = torch.randn(3, device='cuda')
    for _ in range(3):
        for _ in range(2):
            assert torch.equal(graphed(x)[0], 2 * weight * x) and len(graphed._graphs) == 1
        weight.mul_(3)


@needs_cuda
def test_plain_values_and_absent_tensors_are_part_of_the_key():
    def scale(factor, x, shift):
        return [factor * x if shift is None else factor * x + shift, None]

    graphed = GraphedFunction(scale)
    x = torch.randn(5, device='cuda')
    for factor in (2, 3, 2):
        for shift in (None, x + 1, None):
            result, nothing = graphed(x, shift, fixed=(factor,))
            assert torch.equal(result, scale(factor, x, shift)[0]) and nothing is None
    assert len(graphed._graphs) == 4


class ReplayedInPlace:
    """In place of a captured graph, where there is no GPU: the work is done again on tensors of its own."""

    def __init__(self, run, inputs, memory):
        self.run, self.inputs = run, [None if t is None else t.clone() for t in inputs]
        self.outputs = list(run(*self.inputs))

    def replay(self, inputs):
        for own, given in zip(self.inputs, inputs):
            if own is not None:
                own.copy_(given)
        for old, new in zip(self.outputs, self.run(*self.inputs)):
            old.copy_(new)
        return self.outputs


def imitate_replays(model, monkeypatch):
    """On the CPU: captures are imitated, and frames written without kernels; gives how many each time."""
    encoder, written = model.encoder, []

    def write_maps(frames, slots, *maps):
        written.append(len(frames))
        for stored, level in zip(maps, encoder._encode(frames.flatten(0, 1).unsqueeze(0))):
            stored[slots] = level[0].view((len(frames), -1) + level.shape[2:])
        return ()

    monkeypatch.setattr(cuda_graph, '_Captured', ReplayedInPlace)
    monkeypatch.setattr(cuda_graph, '_captures_on', lambda device: True)
    monkeypatch.setattr(encoder, 'can_replay', lambda img: True)
    monkeypatch.setattr(encoder, '_can_write', lambda img: True)
    monkeypatch.setattr(encoder, '_write_maps', write_maps)
    monkeypatch.setattr(encoder._graphed_writing, 'function', write_maps)
    return written


@pytest.mark.parametrize('panoptic, history', [(True, 'cached'), (True, 'full'), (False, 'cached')])
@pytest.mark.parametrize(
    'device, precision',
    [
        ('cpu', None),
        pytest.param('cuda', None, marks=needs_cuda),
        pytest.param('cuda', torch.float16, marks=needs_cuda),
    ],
)
def test_predictions_are_equal_with_and_without_graphs(device, precision, panoptic, history, monkeypatch):
    """The same kernels in the same order: no tolerance. The second drive begins with several new frames."""
    task = small_task(panoptic=panoptic, num_frames=3)
    model = small_model(task).to(device).eval()
    model.history = history
    written = imitate_replays(model, monkeypatch) if device == 'cpu' else []
    results = {}
    for graphed in (False, True):
        model.cuda_graph = graphed
        model.reset_history()
        results[graphed] = []
        for index in (0, 1, 1, 2, 9, 10):
            data = to_device(synthetic_batch(task, first_index=index), device)
            data['img_metas'] = [synthetic_meta(task, index)]
            with torch.autocast(device, dtype=precision) if precision else contextlib.nullcontext():
                results[graphed].append(model(return_loss=False, **data)[0])
    if device == 'cpu':
        assert set(written) == {1 if history == 'cached' else task.num_frames}
        assert len(model._replayed.replayed._graphs) == 2  # with new frames, and without
    for plain, replayed in zip(results[False], results[True]):
        assert plain.keys() == replayed.keys()
        for name in plain:
            np.testing.assert_array_equal(plain[name], replayed[name])


@pytest.mark.parametrize('history', ['cached', 'full'])
@pytest.mark.parametrize('graphed', [False, True])
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_cuda)])
def test_a_prediction_is_the_same_where_the_next_one_has_begun(device, graphed, history):
    task = small_task()
    model = small_model(task).to(device).eval()
    model.cuda_graph, model.history = graphed, history
    data = [synthetic_batch(task, first_index=index) for index in range(4)] * 3  # what was kept comes again, too
    batches = [dict(to_device(batch, device), img_metas=[synthetic_meta(task, i)]) for i, batch in enumerate(data)]
    expected = [predict(model, batch, torch.device(device), None)[0] for batch in batches]
    assert any((one['sem_pred'] != expected[0]['sem_pred']).any() for one in expected[1:])
    model.reset_history()
    begun = (begin(model, batch, torch.device(device), None) for batch in batches)
    found = [predictions[0] for predictions in finish_in_order(begun, torch.device('cuda'))]  # ahead on the CPU as well
    assert len(found) == len(expected)
    for one, right in zip(found, expected):
        assert one.keys() == right.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], right[name])


def test_frames_that_may_not_have_been_written_are_forgotten(monkeypatch):
    task = small_task(num_frames=3)
    model = small_model(task).eval()
    imitate_replays(model, monkeypatch)
    model.history, model.cuda_graph = 'cached', True
    predict = model.pts_bbox_head.predict

    def fail(features):
        raise RuntimeError('out of memory')

    for index, how in ((0, predict), (1, fail), (1, predict)):
        monkeypatch.setattr(model.pts_bbox_head, 'predict', how)
        data = dict(
            synthetic_batch(task, first_index=index, with_labels=False), img_metas=[synthetic_meta(task, index)]
        )
        with pytest.raises(RuntimeError, match='out of memory') if how is fail else contextlib.nullcontext():
            result = model(return_loss=False, **data)[0]
        assert len(model.encoder.cache) == (0 if how is fail else 3)
    model.cuda_graph = False
    model.reset_history()
    expected = model(return_loss=False, **data)[0]
    assert all(np.array_equal(result[name], expected[name]) for name in expected)


@needs_cuda
def test_graphs_that_share_memory():
    """Each is replayed in turn; what one had in between may lie where the other has it."""
    memory = GraphMemory()
    results = [
        GraphedFunction(f, memory=memory, clones=False) for f in (lambda x: [(x * 2).exp() + 1], lambda x: [x - 1])
    ]
    for _ in range(3):
        x = torch.randn(1000, device='cuda')
        assert torch.equal(results[0](x)[0], (x * 2).exp() + 1) and torch.equal(results[1](x)[0], x - 1)
    assert len(memory.graphs) == 2 and len({graph.graph.pool() for graph in memory.graphs}) == 1
    for graphed in results:
        graphed.clear()
    assert memory.pool() is None and torch.equal(results[0](x)[0], (x * 2).exp() + 1)
    assert not copy.deepcopy(memory).graphs


# -- training: forward and backward pass


class DoneAgain:
    """In place of a recorded graph, where there is no GPU: a replay does the work again and writes where it wrote."""

    def __init__(self, run, pool):
        with torch.random.fork_rng(devices=[]):  # a graph is recorded without doing the work
            self.run, self.results = run, list(run())

    def replay(self):
        with torch.enable_grad():
            for old, new in zip(self.results, self.run()):
                assert (old is None) == (new is None)
                if old is not None:
                    old.detach().copy_(new)

    @staticmethod
    def pool():
        return None

    @staticmethod
    @contextlib.contextmanager
    def apart(device):
        with torch.random.fork_rng(devices=[]):
            yield


@pytest.fixture
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda_graph, '_Recorded', DoneAgain)
    for module in ('models.cuda_graph', 'models.graphed_steps'):
        monkeypatch.setattr(f'{module}.can_capture', lambda device: True)


on_cpu_or_gpu = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_cuda)])


def imitate_graphs(device, request):
    if device == 'cpu':
        request.getfixturevalue('without_a_gpu')


@on_cpu_or_gpu
def test_gradients_pass_through_a_captured_pass(device, request):
    """Inputs, weights, weights changed in place, results without gradients or tensors, unused inputs: as uncaptured."""
    imitate_graphs(device, request)
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2).to(device)

    def function(x, nothing, y):
        assert nothing is None
        return [layer(x), None, (2 * x).detach(), x.long()]

    graphed, results = GraphedPass(Stage(function, [layer])), []
    for compute in (graphed, function):
        torch.manual_seed(1)
        layer.load_state_dict({'weight': torch.ones(2, 3), 'bias': torch.zeros(2)})
        found = []
        for _ in range(3):
            x, y = [torch.randn(4, 3, device=device, requires_grad=True) for _ in range(2)]
            layer.zero_grad()
            out, none, fixed, whole = compute(x * 1, None, y * 1)
            assert none is None and not fixed.requires_grad and whole.dtype == torch.int64
            (out**2).sum().backward()
            with torch.no_grad():
                layer.weight.sub_(0.1 * layer.weight.grad)
            found += [out.detach().clone(), fixed.clone(), x.grad, layer.weight.grad, layer.bias.grad]
            assert y.grad is None or not y.grad.any()
        results.append(found)
    assert graphed._captured is not None and graphed._captured.replays == 3
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # the same kernels; cuBLAS may choose anew


@on_cpu_or_gpu
def test_gradients_of_several_passes_add_up(device, request):
    """What a pass gave is not overwritten by the next one's backward pass."""
    imitate_graphs(device, request)
    layer = torch.nn.Linear(2, 1, bias=False).to(device)
    graphed = GraphedPass(Stage(lambda x: [layer(x).sum()], [layer]))
    given = [torch.full((2,), value, device=device) for value in (1.0, 2.0, 4.0)]
    for x in given:
        graphed(x)[0].backward()
    assert layer.weight.grad.tolist() == [[7.0, 7.0]]
    kept = [torch.autograd.grad(graphed(x)[0], layer.weight)[0] for x in given]
    assert [grad.tolist() for grad in kept] == [[x.tolist()] for x in given]


@captures_stages
@on_cpu_or_gpu
@pytest.mark.parametrize('learns', [True, False])
def test_stages_give_gradients_one_after_the_other(device, learns, request):
    """Of a later stage's weights before those of an earlier one's, also where nothing flows back that far."""
    imitate_graphs(device, request)
    first, second = [torch.nn.Linear(3, 3).to(device) for _ in range(2)]
    first.requires_grad_(learns)
    stages = [Stage(lambda x, y: [first(x), y, None], [first]), Stage(lambda x, y, _: [second(x) + y, x], [second])]
    weights, arrived, results = [second.weight, first.weight][: 1 + learns], [], []
    for weight in weights:
        weight.register_hook(lambda grad, weight=weight: arrived.append(weight))
    for compute in (GraphedPass(*stages), lambda x, y: stages[1].function(*stages[0].function(x, y))):
        for value in (1.0, 2.0):
            arrived.clear()
            x, y = [torch.full((2, 3), value * factor, device=device) for factor in (1, 2)]
            out, middle = compute(x, y)
            assert middle.requires_grad == learns
            grads = torch.autograd.grad((out**2).sum() + middle.sum() * value, weights)
            assert all(a is b for a, b in zip(arrived, weights)) and len(arrived) == len(weights)
            results.append([out.detach().clone(), *(grad.clone() for grad in grads)])
    for ours, theirs in zip(results[:2], results[2:]):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nothing_of_warming_up_is_left_when_a_graph_is_recorded(without_a_gpu, monkeypatch):
    """Neither tensors, also those that only the collector finds, nor the nodes at which gradients arrived."""
    layer, left, known = torch.nn.Linear(2, 2), [], []

    class Watched(DoneAgain):
        def __init__(self, run, pool):
            left.append(sum(reference() is not None for reference in known))
            super().__init__(run, pool)

    def function(x):
        middle = layer(x)
        loop = [middle]
        loop.append(loop)
        known.append(weakref.ref(middle))
        return [middle.relu()]

    monkeypatch.setattr(cuda_graph, '_Recorded', Watched)
    gc.disable()
    try:
        GraphedPass(Stage(function, [layer]))(torch.ones(1, 2))
    finally:
        gc.enable()
    assert left[0] == 0 and len(left) == 2 and len(known) > 3


def test_other_shapes_run_as_they_are(without_a_gpu):
    calls = []
    graphed = GraphedPass(Stage(lambda x: calls.append(len(x)) or [x.sum()]))
    for count in (3, 3, 2, 3):
        assert graphed(torch.ones(count, requires_grad=True))[0].item() == count
    assert calls[-3:] == [3, 2, 3] and graphed._captured.replays == 3
    graphed.clear()
    assert graphed(torch.ones(2, requires_grad=True))[0].item() == 2 and graphed._captured.replays == 1


def test_a_late_backward_pass_is_refused(without_a_gpu):
    graphed = GraphedPass(Stage(lambda x: [x * 2]))
    first = graphed(torch.ones(1, requires_grad=True))[0]
    graphed(torch.ones(1, requires_grad=True))
    with pytest.raises(RuntimeError, match='was replayed before'):
        first.backward()


def test_what_cannot_be_captured_ends_in_one_sentence(without_a_gpu, monkeypatch):
    def refuse(run, pool):
        raise RuntimeError('operation not permitted\nmore of it')

    refuse.pool, refuse.apart = DoneAgain.pool, DoneAgain.apart
    monkeypatch.setattr(cuda_graph, '_Recorded', refuse)
    graphed = GraphedPass(Stage(lambda x: [2 * x]))
    with pytest.raises(ConfigError, match='not permitted more of it.*set train.cuda_graph=False'):
        graphed(torch.ones(1, requires_grad=True))


def losses_and_gradients(model, batch, seed, amp=None, count=False):
    device = batch['img'].device
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    amp = torch.autocast(device.type, dtype=amp) if amp else contextlib.nullcontext()
    size = len(batch['img'])
    with amp, shared_draws(seed, 0, size, size, device), counting_shares(count) as counted:
        losses = model(**batch)
    sum(losses.values()).backward()
    losses = {name: float(value.detach()) for name, value in losses.items()}
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, counted


def rays(config):
    """A term that no graph can hold beside those that one can."""
    config['pts_bbox_head']['loss_cfgs']['loss_ray'] = dict(type='RayConsistencyLoss', num_rays=64)
    return config


def learning_norms(config):
    """Statistics that a step changes, and nothing computed twice."""
    config['img_backbone'].update(norm_eval=False, with_cp=False)
    return config


@captures_stages
@on_cpu_or_gpu
@pytest.mark.parametrize(
    'scoring, amp, change',
    [('semantic', None, rays), ('occupancy', torch.bfloat16, dict), ('semantic', torch.bfloat16, learning_norms)],
    ids=['rays', 'bf16', 'norms'],
)
def test_losses_and_gradients_with_and_without_graphs(device, scoring, amp, change, request):
    """Steps with weights that change in between, colour jitter and dropout on: the same draws, the same losses.

    On a GPU gradients of the maps are added up in no fixed order: 1e-3, and 5e-2 in bfloat16. Weights change by the
    first run's gradients in both, lest what is rounded otherwise in one step lets a mask look elsewhere in the next.
    """
    imitate_graphs(device, request)
    torch.manual_seed(0)
    config = change(small_config(scoring, dropout=0.1, mixing_chunk=0))
    model = build_model(config, small_task()).to(device).train()
    model.image_input.color_aug = True
    batches = [to_device(small_batch(model.task, 2, first_index=i), device) for i in (0, 2)]
    start, results, buffers = {name: value.clone() for name, value in model.state_dict().items()}, [], []
    for model.graphs_training in (False, True):
        model.load_state_dict(start)
        found = []
        results.append(found)
        for step, batch in enumerate([*batches, batches[0]]):
            found.append(losses_and_gradients(model, batch, step, amp, count=step == 1))
            with torch.no_grad():
                for name, gradient in results[0][step][1].items():
                    model.get_parameter(name).sub_(gradient, alpha=1e-4)
        buffers.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    assert model._graphed.replayed._captured.replays == 3
    tolerance = 1e-5 if device == 'cpu' else 1e-3 if amp is None else 5e-2
    for (losses, grads, counted), (replayed, again, counted_again) in zip(*results):
        assert losses.keys() == replayed.keys() and grads.keys() == again.keys()
        assert counted.keys() == counted_again.keys()
        assert replayed == pytest.approx(losses, rel=tolerance, abs=1e-6)
        for name in grads:
            size = float(grads[name].norm())
            assert float((grads[name] - again[name]).norm()) <= 10 * tolerance * size + 1e-6, name
    for name, buffer in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], buffer, rtol=tolerance, atol=tolerance)
    learns = change is learning_norms
    assert all(int(value) == 3 * learns for name, value in buffers[0].items() if name.endswith('batches_tracked'))


@captures_stages
def test_terms_that_a_graph_holds_are_asked_once(without_a_gpu):
    model, asked = small_model().train(), []
    model.graphs_training = True
    losses_and_gradients(model, small_batch(model.task, 1), 0)
    head = model.pts_bbox_head
    for term in head.voxel_losses.terms.values():
        term.register_forward_hook(lambda *_: asked.append(1))
    losses_and_gradients(model, small_batch(model.task, 1), 1)
    assert len(asked) == len(head.voxel_losses.terms) * len(head.transformer.voxel_decoder.scales)


@pytest.fixture
def alone():
    """A group of this process alone, which DDP exchanges gradients in."""
    backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@on_cpu_or_gpu
def test_gradients_are_exchanged_beside_graphs(device, request, alone):
    """DDP meets every gradient once in every step, with graphs as without: the same gradients, in DDP's buckets."""
    imitate_graphs(device, request)
    model, met = small_model(mixing_chunk=0).to(device).train(), []
    batch, results = to_device(small_batch(model.task, 2), device), []
    wrapped = exchanging_gradients(model)
    wrapped.register_comm_hook(met, count_and_pass_on)
    for model.graphs_training in (False, True):
        for step in range(2):
            met.clear()
            results.append(losses_and_gradients(wrapped, batch, step)[:2])
            learning = [p for p in model.parameters() if p.requires_grad]
            assert sum(met) == sum(p.numel() for p in learning)
    assert model._graphed.replayed._captured.replays == 2
    for (losses, grads), (replayed, again) in zip(results[:2], results[2:]):
        assert replayed == pytest.approx(losses, rel=1e-4) and grads.keys() == again.keys()
        for name, grad in grads.items():
            assert float((grad - again[name]).norm()) <= 1e-3 * float(grad.norm()) + 1e-6, name


@pytest.mark.parametrize('learns', [True, False])
def test_buffers_that_no_step_changes_are_not_exchanged(learns, alone):
    config = learning_norms(small_config()) if learns else small_config()
    model = build_model(config, small_task()).to('cuda' if torch.cuda.is_available() else 'cpu').train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    exchanging_gradients(model)
    kept_back = set(model._ddp_params_and_buffers_to_ignore)
    model(**to_device(small_batch(model.task, 2), next(model.parameters()).device))
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert kept_back == before.keys() - changed and bool(changed) == learns


def count_and_pass_on(met, bucket):
    met.append(bucket.buffer().numel())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@captures_stages
def test_evaluation_and_copies_know_nothing_of_graphs(without_a_gpu):
    model = small_model().train()
    model.graphs_training = True
    losses_and_gradients(model, small_batch(model.task, 1), 0)
    assert model._graphed.replayed._captured is not None
    twin = copy.deepcopy(model)
    assert twin._graphed.replayed._captured is None
    assert all(stage.function.__self__ is twin._graphed for stage in twin._graphed.replayed.stages)
    model.eval()
    assert model._graphed.replayed._captured is None
