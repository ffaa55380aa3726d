"""The fused ResNet against mmdet's modules: the same features and gradients.

cuDNN's fused calls exist on GPUs only; on the CPU plain operations take their place, in double.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_model import small_batch, small_model, small_task
from torch import nn

from lib.run.loading import to_device
from models.encoder import fused
from models.encoder.fused import FusedResNet, can_fuse_backbone  # before mmdet: makes it importable

from mmdet.models.builder import build_backbone  # isort: skip

# mmdet's blocks checkpoint without saying which kind; outside tests that warning is filtered
pytestmark = pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
VERSION = tuple(int(n) for n in torch.__version__.split('.')[:2])


def make_resnet(depth=50, frozen_stages=1, with_cp=False, seed=0, **options):
    """A thin ResNet whose norms are far from the identity."""
    torch.manual_seed(depth + seed)
    net = build_backbone(
        dict(
            type='ResNet',
            depth=depth,
            base_channels=8,
            stem_channels=8,
            norm_eval=True,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            **options,
        )
    )
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2.0)
    net.train()  # mmdet's returns nothing
    return net


@pytest.fixture
def plain_operations(monkeypatch):
    """What cuDNN's fused calls compute, where there is no GPU."""

    def convolve_relu(x, weight, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def convolve_add_relu(x, weight, added, alpha, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * added)

    monkeypatch.setattr(torch, 'cudnn_convolution_relu', convolve_relu, raising=False)
    monkeypatch.setattr(torch, 'cudnn_convolution_add_relu', convolve_add_relu, raising=False)


def features_and_gradients(compute, net, images):
    """Stages, and gradients of their weighted sum with respect to images and weights, by name."""
    images = images.clone().requires_grad_()
    net.zero_grad()
    stages = compute(images)
    sum((stage * torch.linspace(-1, 1, stage.numel()).to(stage).view_as(stage)).sum() for stage in stages).backward()
    return stages, images.grad, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same(net, images, tolerance):
    """Relative to each tensor's norm."""

    def distance(a, b):
        return float((a.double() - b.double()).norm().detach() / b.double().norm().detach())

    fused = FusedResNet(net)
    ours = features_and_gradients(fused, net, images)
    theirs = features_and_gradients(net, net, images)
    assert len(ours[0]) == len(theirs[0]) == 4
    assert max(distance(a, b) for a, b in zip(ours[0], theirs[0])) < tolerance
    assert distance(ours[1], theirs[1]) < tolerance
    assert ours[2].keys() == theirs[2].keys()
    assert max(distance(ours[2][name], theirs[2][name]) for name in theirs[2]) < tolerance
    return theirs[2]


needs_backward = pytest.mark.skipif(VERSION < (1, 11), reason='PyTorch 1.10 has no such backward')


@needs_backward
@pytest.mark.parametrize(
    'depth, frozen, with_cp, style',
    [(50, 1, False, 'pytorch'), (50, 1, True, 'pytorch'), (18, -1, False, 'pytorch'), (50, 0, True, 'caffe')],
)
def test_features_and_gradients_are_those_of_the_modules(plain_operations, depth, frozen, with_cp, style):
    """In double; 1e-10 leaves room for rounding through fifty layers."""
    net = make_resnet(depth, frozen, with_cp, style=style).double()
    gradients = assert_same(net, torch.randn(2, 3, 64, 96, dtype=torch.double), 1e-10)
    assert ('conv1.weight' in gradients) == (frozen < 0)
    assert ('layer1.0.conv1.weight' in gradients) == (frozen < 1) and 'layer4.0.conv1.weight' in gradients


@needs_backward
@pytest.mark.parametrize('with_cp, again', [(False, 0), (True, 1)])
def test_the_last_result_of_a_stage_is_not_made_again(plain_operations, monkeypatch, with_cp, again):
    """A stage of n blocks makes n sums with its shortcuts and, for the backward pass, all but the last again."""
    calls, compute = [], torch.cudnn_convolution_add_relu
    monkeypatch.setattr(torch, 'cudnn_convolution_add_relu', lambda *given: calls.append(1) or compute(*given))
    net = make_resnet(50, frozen_stages=1, with_cp=with_cp)
    stages = FusedResNet(net)(torch.randn(1, 3, 32, 32))
    assert len(calls) == 3 + 4 + 6 + 3
    sum(stage.sum() for stage in stages).backward()
    assert len(calls) == 3 + 4 + 6 + 3 + again * (3 + 5 + 2)


@needs_backward
def test_gradients_end_at_the_first_block_that_learns(plain_operations):
    net, images = make_resnet(18).double(), torch.randn(1, 3, 64, 64, dtype=torch.double)
    for part in (net.layer2[0], net.layer3[0].downsample, net.layer3[0].conv1, net.layer3[0].bn1):
        for parameter in part.parameters():
            parameter.requires_grad_(False)
    results = []
    for compute in (FusedResNet(net), net):
        net.zero_grad()
        sum((stage * stage).sum() for stage in compute(images)).backward()
        results.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and 'layer2.1.conv1.weight' in results[0]
    for name, theirs in results[1].items():
        torch.testing.assert_close(results[0][name], theirs, rtol=1e-9, atol=1e-9)  # double


@pytest.mark.parametrize('height, width, calls', [(64, 96, 1), (63, 96, 0)])
def test_the_stem_over_squares_is_the_stem(plain_operations, monkeypatch, height, width, calls):
    """The same sums, as a convolution of 4x4 where the images' sides are even; double."""
    kernels, compute = [], torch.cudnn_convolution_relu
    monkeypatch.setattr(
        torch,
        'cudnn_convolution_relu',
        lambda x, w, *given: kernels.append(tuple(w.shape[2:])) or compute(x, w, *given),
    )
    net, images = make_resnet(18).double(), torch.randn(2, 3, height, width, dtype=torch.double)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ours = FusedResNet(net)._run_stem(images)
        theirs = net.maxpool(F.relu(net.bn1(net.conv1(images))))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert kernels.count((4, 4)) == calls


CHANGES = {
    'nothing': lambda net: None,
    'a weight in place': lambda net: net.layer2[0].conv1.weight.mul_(2.0),
    'a statistic in place': lambda net: net.bn1.running_var.add_(1.0),
    'a new parameter': lambda net: setattr(net.layer3[1].bn2, 'weight', nn.Parameter(torch.rand(32))),
    'loaded weights': lambda net: net.load_state_dict(make_resnet(18, frozen_stages=0, seed=1).state_dict()),
    'another type': lambda net: net.double(),
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_weights_are_seen(plain_operations, change):
    net = make_resnet(18)
    net.eval()
    fused, images = FusedResNet(net), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        fused(images)
        before = fused.version()
        CHANGES[change](net)
        assert (fused.version() == before) == (change == 'nothing')
        assert fused.version() == fused.version()
        images = images.to(net.conv1.weight.dtype)
        for ours, theirs in zip(fused(images), net(images)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # float32 through 18 layers


def test_precisions_do_not_push_each_other_out(plain_operations):
    """A captured graph goes on using the folded weights of its own precision."""
    net = make_resnet(18)
    net.eval()
    fused, images = FusedResNet(net), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        fused(images)
        kept = dict(fused._kept)
        fused(images.double())
        fused(images)
    assert len(fused._kept) == 2 * len(kept)
    assert all(fused._kept[key] is value for key, value in kept.items())


@pytest.mark.skipif(VERSION < (2, 0), reason='older PyTorch pools no bfloat16 on the CPU')
def test_weights_folded_in_place_are_held_once(plain_operations, monkeypatch):
    """To the same bits; the modules by themselves compute the same but for rounding."""
    net = make_resnet(50)
    net.eval()
    twin, images = copy.deepcopy(net), torch.randn(1, 3, 32, 32)
    fused, before = FusedResNet(net), FusedResNet(twin)
    fused.fold_in_place(torch.bfloat16)
    assert net.conv1.weight.dtype == torch.float32  # on the CPU another computes
    monkeypatch.setattr(fused, '_serves_on', lambda device: True)
    with torch.no_grad():
        before(images.bfloat16())
        for _ in range(2):
            fused.fold_in_place(torch.bfloat16)
            ours = fused(images.bfloat16())
            for conv, norm in fused._pairs:
                weight, bias = fused._kept[conv, torch.bfloat16]
                assert weight.data_ptr() == conv.weight.data_ptr() and norm.bias.dtype == torch.float32
            for mine, other in zip(fused._kept.values(), before._kept.values()):
                assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
        for mine, other in zip(ours, net.float()(images)):
            torch.testing.assert_close(mine.float(), other, rtol=0.1, atol=0.1)  # bfloat16 through fifty layers


@needs_backward
def test_folds_made_in_inference_mode_serve_training(plain_operations):
    net = make_resnet(18, frozen_stages=4)
    fused, images = FusedResNet(net), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        fused(images)
    images.requires_grad_()
    fused(images)[-1].sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_copy_computes_with_its_own_weights(plain_operations):
    """Copied twice and loaded: the change counters of copies start anew and must not be mistaken."""
    net = make_resnet(18)
    net.eval()
    fused, images = FusedResNet(net), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        first = fused(images)[0]
        twin = copy.deepcopy(copy.deepcopy(fused))
        assert torch.equal(twin(images)[0], first)
        twin.backbone.load_state_dict(make_resnet(18, seed=1).state_dict())
        assert torch.equal(twin(images)[0], FusedResNet(twin.backbone)(images)[0])
        assert not torch.equal(twin(images)[0], first) and torch.equal(fused(images)[0], first)


def test_a_model_with_it_can_be_stored(tmp_path):
    model = small_model(small_task())
    twin = pickle.loads(pickle.dumps(model))
    assert twin.encoder._fused_backbone.backbone is twin.img_backbone
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)


@pytest.mark.parametrize(
    'options',
    [
        dict(norm_cfg=dict(type='GN', num_groups=2)),
        dict(deep_stem=True),
        dict(avg_down=True),
        dict(plugins=[dict(cfg=dict(type='ContextBlock', ratio=1.0 / 4), position='after_conv3')]),
    ],
)
def test_other_backbones_run_as_they_are(options):
    assert can_fuse_backbone(make_resnet(50))
    torch.manual_seed(0)
    assert not can_fuse_backbone(build_backbone(dict(type='ResNet', depth=50, **options)))
    assert not can_fuse_backbone(build_backbone(dict(type='ResNeXt', depth=50, groups=32, base_width=4)))


def test_on_the_cpu_the_modules_run():
    fused = FusedResNet(make_resnet(18))
    assert fused.is_as_built() and not fused.serves(torch.zeros(1, 3, 32, 32))


def fuse_a_stage(net):
    from mmcv.cnn import fuse_conv_bn

    fuse_conv_bn(net.layer2)


@pytest.mark.parametrize(
    'change',
    [
        lambda net: net.bn1.train(),
        fuse_a_stage,
        lambda net: net.layer1.register_forward_hook(lambda *_: None),
        lambda net: nn.utils.weight_norm(net.layer3[0].conv2),
        lambda net: setattr(net, 'maxpool', nn.Identity()),
    ],
)
def test_modules_that_are_no_longer_as_built_run_themselves(change):
    net = make_resnet(18)
    fused = FusedResNet(net)
    assert fused.is_as_built()
    change(net)
    assert not fused.is_as_built()


@needs_cuda
@pytest.mark.skipif(VERSION < (2, 2), reason='older PyTorch runs the modules')
def test_cuda_takes_what_cudnn_can_do():
    net, images = make_resnet(18).cuda(), torch.zeros(1, 3, 32, 32, device='cuda')
    fused = FusedResNet(net)
    assert fused.serves(images) and fused.serves(images.half())
    assert not fused.serves(images.double())
    assert not fused.serves(images.expand(2**20, 3, 32, 32))
    net.norm_eval = False
    net.train()
    assert not fused.serves(images)
    net.eval()
    assert fused.serves(images)


@needs_cuda
@pytest.mark.parametrize('depth, with_cp', [(50, False), (50, True), (18, False)])
def test_cuda_features_and_gradients_are_those_of_the_modules(depth, with_cp):
    """float32 without TF32: 1e-4 is a hundred times its rounding, which gradients add up over fifty layers."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        net = make_resnet(depth, with_cp=with_cp).cuda().to(memory_format=torch.channels_last)
        images = torch.randn(4, 3, 128, 192, device='cuda').contiguous(memory_format=torch.channels_last)
        assert_same(net, images, 1e-4)
    finally:
        torch.backends.cudnn.allow_tf32 = before


@needs_cuda
@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_cuda_autocast_stays_as_close_to_float32_as_the_modules_do(dtype, tolerance):
    """Compared with float32, whose result the type's 11 or 8 bits blur in each of fifty layers."""
    net = make_resnet(50).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 128, 192, device='cuda').contiguous(memory_format=torch.channels_last)
    fused = FusedResNet(net)
    exact = features_and_gradients(net, net, images)

    def compute(images):
        with torch.autocast('cuda', dtype=dtype):
            return [stage.float() for stage in fused(images)]

    ours = features_and_gradients(compute, net, images)
    for a, b in zip(ours[0], exact[0]):
        assert float((a - b).detach().norm() / b.detach().norm()) < tolerance
    for name, b in exact[2].items():
        assert float((ours[2][name] - b).norm() / b.norm()) < 20 * tolerance


@needs_cuda
def test_cuda_losses_are_those_of_the_model_with_its_modules():
    """The whole small model; TF32 off. Rounding may move a point across an image's border: 1e-3."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        model = small_model(small_task()).cuda().eval()
        batch = to_device(small_batch(model.task, 2), 'cuda')
        ours = model(**batch)
        model.encoder._fused_backbone = None
        for name, theirs in model(**batch).items():
            assert float(ours[name]) == pytest.approx(float(theirs), rel=1e-3), name
    finally:
        torch.backends.cudnn.allow_tf32 = before


@needs_backward
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_cuda)])
def test_more_images_than_cudnn_counts_are_encoded_in_pieces(device, request, monkeypatch):
    """Twelve where five fit: three pieces, and maps and gradients of all (other orders of sums; TF32 on a GPU)."""
    if device == 'cpu':
        request.getfixturevalue('plain_operations')
        monkeypatch.setattr(FusedResNet, 'serves', lambda self, images: images.numel() < fused._MOST_VALUES)
    model = small_model(small_task()).to(device)
    img = small_batch(model.task, 2)['img'].to(device)
    call, sizes, results = FusedResNet.__call__, [], []
    monkeypatch.setattr(FusedResNet, '__call__', lambda self, x: sizes.append(len(x)) or call(self, x))
    for most in (fused._MOST_VALUES, 3 * 64 * 96 * 5 + 1):
        monkeypatch.setattr(fused, '_MOST_VALUES', most)
        model.zero_grad()
        maps = model.encoder.encode(img)
        weights = [torch.linspace(-1, 1, level.numel(), device=device).view_as(level) for level in maps]
        sum((level * weight).sum() for level, weight in zip(maps, weights)).backward()
        learnt = model.img_backbone.conv1.weight, model.img_neck.fpn_convs[0].conv.weight
        results.append([level.detach() for level in maps] + [weight.grad.clone() for weight in learnt])
    assert sizes == [12, 4, 4, 4]
    for together, in_pieces in zip(*results):
        assert float((together - in_pieces).norm() / together.norm()) < (1e-5 if device == 'cpu' else 1e-2)


def test_images_that_are_not_encoded_here_stay_together(monkeypatch):
    """On the CPU, as where norms learn: their statistics are those of the whole batch."""
    monkeypatch.setattr(fused, '_MOST_VALUES', 2)
    backbone, images = FusedResNet(make_resnet(18)), torch.zeros(4, 3, 32, 32)
    assert [len(piece) for piece in backbone.pieces_of(images)] == [4]
    monkeypatch.setattr(FusedResNet, 'serves', lambda self, piece: True)
    assert [len(piece) for piece in backbone.pieces_of(images)] == [1] * 4


@needs_cuda
@pytest.mark.skipif(VERSION < (2, 2), reason='older PyTorch runs the modules')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cuda_relu_passes_on_what_is_not_a_number(dtype):
    """cuDNN's ReLU as PyTorch's: one broken weight breaks its channel, one infinite pixel its neighbours."""

    def random(*shape):
        values = torch.randn(*shape, device='cuda', dtype=dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    images, weight, bias, added = random(2, 64, 32, 88), random(64, 64, 3, 3), random(64), random(2, 64, 32, 88)
    weight[5, 3, 1, 1], images[1, 7, 10, 10] = float('nan'), float('inf')
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    plain = F.conv2d(images, weight, bias, padding=1)
    for ours, theirs in (
        (torch.cudnn_convolution_relu(images, weight, bias, *geometry), F.relu(plain)),
        (torch.cudnn_convolution_add_relu(images, weight, added, 1.0, bias, *geometry), F.relu(plain + added)),
    ):
        assert int(ours.isnan().sum()) == int(theirs.isnan().sum()) == 2 * 32 * 88
        assert int(ours.isinf().sum()) == int(theirs.isinf().sum()) > 0
