"""Triton's kernels of inference against PyTorch's operators, alone and in the whole model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_model import small_batch, small_model, small_task
from torch import nn
from triton_runs import DEVICE, run_interpreted, runs, without_a_gpu

from lib.run.loading import to_device
from models import head
from models.csrc.distance_attention import distance_attention_reference
from models.decoders import fused, layers, mask_decoder, sparse_voxel_decoder
from models.decoders.draws import EvenDraws, RandomDraws, select_valid
from models.decoders.sparse_voxel_decoder import top_in_order
from models.encoder import fused as encoder_fused


@without_a_gpu
def test_by_interpretation_on_the_cpu():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def random_norm(channels):
    norm = nn.LayerNorm(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(DEVICE)


# float32: another order of sums; float16: one rounding of the result
TOLERANCES = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.float16: dict(rtol=2e-3, atol=2e-3)}


@runs
@pytest.mark.parametrize('dtype', list(TOLERANCES), ids=str)
@pytest.mark.parametrize('channels', [32, 40, 256])
def test_norms(channels, dtype):
    from models.decoders import kernels

    norm, (x, added, after) = random_norm(channels), random(3, 2, 7, channels, dtype=dtype)
    plain = kernels.add_and_norm(x, norm, dtype)
    assert plain.dtype == dtype
    torch.testing.assert_close(plain.float(), norm(x.float()), **TOLERANCES[dtype])
    ours = kernels.add_and_norm(x, norm, torch.float32, added=added, positive=True, after=after)
    torch.testing.assert_close(ours, norm(x.float() + added).relu() + after, **TOLERANCES[dtype])
    x[0, 3, 5] = float('nan')
    assert kernels.add_and_norm(x, norm, dtype, positive=True)[0, 3].isnan().all()


@runs
def test_float32_in_parts():
    """One product of rounded parts is nearer to the exact one than a tenth of TF32's error."""
    from models.decoders import kernels

    left, right = random(40, 96), random(24, 96)
    parts = kernels.split_for_tf32(left, False), kernels.split_for_tf32(right, True)
    for large in (parts[0][:, :96], parts[0][:, 192:], parts[1][:, :192]):
        assert not (large.contiguous().view(torch.int32) & 0x1FFF).any()
    assert torch.equal(parts[0][:, :96] + parts[0][:, 96:192], left)
    assert torch.equal(parts[1][:, :96] + parts[1][:, 192:], right)
    exact = left.double() @ right.double().T
    ours = parts[0].double() @ parts[1].double().T
    assert (ours - exact).norm() / exact.norm() < 1e-6


@pytest.mark.skipif(DEVICE.type == 'cpu', reason='needs a GPU')
def test_wide_linear_is_as_precise_as_float32():
    linear, values = nn.Linear(256, 4352).to(DEVICE), random(600, 256)
    exact = values.double() @ linear.weight.double().T + linear.bias.double()
    ours = fused.wide_linear(linear, values)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert (ours - exact).norm() / exact.norm() < 5e-6  # TF32 alone: 3e-4


@runs
def test_positions_and_points():
    from models.decoders import kernels

    linear, norm = nn.Linear(3, 40).to(DEVICE), random_norm(40)
    grid, first = torch.tensor([200.0, 200.0, 16.0]).to(DEVICE), torch.tensor([-40.0, -30.0, -1.0]).to(DEVICE)
    coords = torch.randint(0, 16, (2, 9, 3)).to(DEVICE)
    hidden, corners = kernels.embed_positions(coords, grid, linear, norm, 0.4, torch.float32)
    torch.testing.assert_close(hidden, norm(linear(coords.float() / grid)).relu(), rtol=1e-4, atol=1e-4)  # TF32 of GPUs
    torch.testing.assert_close(corners, coords.float() * 0.4)
    offsets = random(2, 9, 24)
    logits = random(2, 9, 20)
    points, levels = kernels.place_points(corners, first, torch.cat([offsets, logits], -1), 1.6, 24)
    assert torch.equal(levels, logits)
    expected = (corners + first + 0.8).unsqueeze(2) + 1.6 * offsets.view(2, 9, 8, 3)
    torch.testing.assert_close(points.view(expected.shape), expected, rtol=1e-5, atol=1e-5)  # products and sums in one


@runs
@pytest.mark.parametrize('batch, count, k', [(2, 3000, 700), (1, 2048, 1), (1, 1000, 999)])
def test_the_best_are_chosen(batch, count, k):
    from models.decoders import kernels

    scores = random(batch, count, 1)
    assert torch.equal(kernels.best_in_order(scores, k, softmaxes=False).long(), top_in_order(scores[..., 0], k))
    logits = 3 * random(batch, count, 18)
    chosen = kernels.best_in_order(logits, k, softmaxes=True).long()
    assert (chosen.diff() > 0).all()
    scores = 1 - logits.softmax(-1)[..., -1]
    ours, theirs = scores.gather(1, chosen), scores.gather(1, top_in_order(scores, k))
    # a rounding of the scores may exchange the last ones
    torch.testing.assert_close(ours.sort(1).values, theirs.sort(1).values, rtol=1e-6, atol=1e-6)


@runs
def test_of_equal_scores_the_first_are_chosen():
    from models.decoders import kernels

    scores = torch.tensor([0.0, 1, 1, 1, -1, 2, 1, 1]).repeat(300).to(DEVICE)
    chosen = kernels.best_in_order(scores.view(1, -1, 1), 900, softmaxes=False)[0].long()
    assert torch.equal(chosen, scores.argsort(descending=True, stable=True)[:900].sort().values)
    same = kernels.best_in_order(torch.zeros(1, 5000, 1, device=DEVICE), 4999, softmaxes=False)[0]
    assert torch.equal(same.long().cpu(), torch.arange(4999))


@runs
def test_children_are_taken():
    from models.decoders import kernels

    coords = 4 * torch.randint(0, 16, (2, 50, 3)).to(DEVICE)
    logits, features = random(2, 400, 18, dtype=torch.float16), random(2, 400, 40, dtype=torch.float16)
    index = torch.stack([torch.randperm(400)[:77].sort().values for _ in range(2)]).to(DEVICE)
    kept = kernels.take_children(index.int(), coords, 2, logits, features)
    steps = torch.tensor(sparse_voxel_decoder._CHILDREN).to(DEVICE)
    children = ((coords // 2).unsqueeze(2) + steps).flatten(1, 2)
    for ours, values in zip(kept, (children, logits.float(), features)):
        assert torch.equal(ours, values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1])))


@runs
@pytest.mark.parametrize('draws', [EvenDraws(), RandomDraws()], ids=lambda draws: type(draws).__name__)
@pytest.mark.parametrize('count', [1000, 2048])
def test_drawn_points(count, draws):
    from models.decoders import kernels

    logits = random(2, 5, count) - 1
    logits[0, 3] = logits[1, 2] = -1
    logits[1, 2, -1] = 1
    fractions, anywhere = draws.fractions(2, 5, 6, DEVICE), draws.positions(2, 5, 6, DEVICE)
    voxels, offsets = torch.randint(0, 16, (2, count, 3)).to(DEVICE), random(2, 5, 18)
    grid, first, span = random(3).abs() + 8, random(3), random(3).abs() + 8
    asked, volume = torch.cat([offsets, random(2, 5, 24)], -1), kernels.Volume(grid, first, span)
    points, levels = kernels.draw_points(logits, fractions, anywhere, voxels, asked, volume)
    assert torch.equal(levels, asked[..., 18:])
    index, empty = select_valid(logits > 0, fractions)
    drawn = voxels.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, 3)).view(2, 5, 6, 3).float()
    drawn = torch.where(empty[:, :, None, None], anywhere * grid, drawn)
    expected = (drawn + offsets.view(drawn.shape)) / grid * span + first
    torch.testing.assert_close(points, expected, rtol=1e-5, atol=1e-5)  # products and sums in one


@runs
@pytest.mark.parametrize('queries, classes, voxels', [(100, 17, 300), (8, 4, 1000)])
def test_merging(queries, classes, voxels, monkeypatch):
    from models.decoders import kernels

    class_logits, mask_logits = random(queries, classes) - 2, 5 * random(queries, voxels) - 6
    mask_logits[:, :50] = -20
    monkeypatch.setattr(head, 'kernels_for', lambda values: None)
    expected = head.merge_semantic(class_logits, mask_logits, 0.3)
    ours = kernels.merge_labels(class_logits, mask_logits, 0.3, 0.01)
    assert 0 < (ours == classes).sum() < voxels
    assert (ours == expected).float().mean() > 0.995  # sums in another order may turn a close one


@runs
def test_mixing_passes_on_what_is_not_a_number():
    from models.csrc.adaptive_mixing.fused import FusedMixing

    sampled, generated = random(2, 8, 64, dtype=torch.float16), random(2, 64 * 64 + 32 * 8, dtype=torch.float16)
    sampled[0, 3, 5] = float('nan')
    mixed = FusedMixing.apply(sampled, generated, 32, 1e-5)
    assert mixed[0].isnan().all() and mixed[1].isfinite().all()


@runs
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize('count', [100, 192])
def test_attention(count, dtype):
    from models.csrc.distance_attention.fused import attend

    parts, reach = random(2, count, 3, 2, 32, dtype=dtype), random(2, count, 2, dtype=dtype).abs()
    positions = 10 * random(1, count, 3)
    ours = attend(parts, reach, positions)
    expected = distance_attention_reference(parts.double(), reach.double(), positions.double())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=1e-2)  # products of 11 bits


@runs
@pytest.mark.parametrize(
    'height, width, depth, channels', [(4, 6, 20, 24), (16, 24, 40, 64), (48, 96, 16, 20), (10, 14, 32, 256)]
)
def test_levels_are_merged(height, width, depth, channels, monkeypatch):
    """The last one by programs, too, that go over the pixels."""
    from models.encoder.kernels import merge_large_level, merge_level

    monkeypatch.setattr('models.encoder.kernels._FEW', 4)

    layout = dict(memory_format=torch.channels_last)
    stage = random(2, depth, height, width, dtype=torch.float16).contiguous(**layout)
    coarse = random(2, channels, height // 2, width // 2, dtype=torch.float16).contiguous(**layout)
    weight, bias = random(channels, depth, dtype=torch.float16), random(channels)
    expected = torch.einsum('nkhw,ck->nchw', stage.double(), weight.double()) + bias.view(-1, 1, 1)
    tolerance = dict(rtol=2e-3, atol=2e-3)  # the result is rounded to float16
    expected += F.interpolate(coarse.double(), scale_factor=2, mode='nearest')
    for merge in (merge_level, merge_large_level) if channels == 256 else (merge_level,):
        ours = merge(stage, weight, bias, coarse)
        assert ours.is_contiguous(**layout)
        torch.testing.assert_close(ours.double(), expected, **tolerance)


CHANNELS_LAST = dict(memory_format=torch.channels_last)


def random_layer(channels, depth, size=1, stride=1):
    weight = random(channels, depth, size, size, dtype=torch.float16) / (depth**0.5 * size)
    geometry = encoder_fused._Geometry((stride, stride), (size // 2, size // 2), (1, 1), 1)
    return encoder_fused._Layer(weight.contiguous(**CHANNELS_LAST), random(channels, dtype=torch.float16), geometry)


def convolve_relu(x, weight, bias, geometry, added=None):
    y = F.conv2d(x.float(), weight.float(), bias.float(), *geometry)
    return F.relu(y if added is None else y + added).to(x.dtype).contiguous(**CHANNELS_LAST)


@pytest.mark.skipif(not hasattr(F, 'scaled_dot_product_attention'), reason='from PyTorch 2.0')
def test_attention_of_the_mask_queries():
    attention = mask_decoder.QueryAttention(64).eval().to(DEVICE)
    nn.init.normal_(attention.self_attn.in_proj_bias)
    query, position = random(2, 9, 64), random(2, 9, 64)
    torch.testing.assert_close(attention.attend_fused(query, position), attention.attend(query, position))


@runs
@pytest.mark.parametrize('height, width', [(5, 260), (18, 3), (33, 64), (2, 8)])
def test_the_first_convolution_and_its_pooling(height, width):
    """In more programs than one, down and across; of odd sizes; NaN as in PyTorch."""
    from models.encoder.kernels import convolve_and_pool

    layer, squares = random_layer(64, 16, 4), random(2, 16, height + 3, width + 3, dtype=torch.float16)
    squares = squares.contiguous(**CHANNELS_LAST)
    squares[0, 3, height // 2, width // 2] = float('nan')
    ours = convolve_and_pool(squares, layer.weight, layer.bias)
    assert ours.is_contiguous(**CHANNELS_LAST)
    convolved = convolve_relu(squares, layer.weight, layer.bias, ((1, 1), (0, 0), (1, 1), 1))
    expected = F.max_pool2d(convolved.float(), 3, 2, 1).half()
    assert 0 < ours.isnan().sum() < ours.numel()
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3, equal_nan=True)  # one rounding to float16


@runs
@pytest.mark.parametrize('stride', [0, 1, 2], ids=['shortcut', 'projection', 'strides'])
def test_ends_of_blocks(stride):
    from models.encoder.kernels import finish_block

    height, width = 9, 17  # more than one program
    expand, project = random_layer(128, 16), random_layer(128, 32, 1, stride or 1)
    x = random(2, 16, height, width, dtype=torch.float16).contiguous(**CHANNELS_LAST)
    source = random(2, 32, height * stride, width * stride) if stride else random(2, 128, height, width)
    source = source.half().contiguous(**CHANNELS_LAST)
    ours = finish_block(x, expand.weight, expand.bias, source, project.weight if stride else None)
    added = F.conv2d(source.float(), project.weight.float(), None, *project.geometry) if stride else source.float()
    assert ours.is_contiguous(**CHANNELS_LAST)
    torch.testing.assert_close(ours, convolve_relu(x, *expand, added), rtol=2e-3, atol=2e-3)  # one rounding to float16


@runs
def test_stages_whose_blocks_end_in_one_kernel(monkeypatch):
    """Bottlenecks with projections with and without strides, an odd size, and a stage that is too wide for it."""
    monkeypatch.setattr(encoder_fused, 'has_triton', lambda device: True)
    x, depth = random(1, 32, 9, 12, dtype=torch.float16).contiguous(**CHANNELS_LAST), 32
    for inner, stride, calls in ((16, 1, 4), (32, 2, 4), (128, 2, 6)):
        blocks = [[random_layer(inner, depth), random_layer(inner, inner, 3, stride), random_layer(4 * inner, inner)]]
        blocks[0].append(random_layer(4 * inner, depth, 1, stride))
        depth = 4 * inner
        blocks.append([random_layer(inner, depth), random_layer(inner, inner, 3), random_layer(depth, inner)])
        plans = [encoder_fused._BlockPlan([layer.geometry for layer in block], 3) for block in blocks]
        weights = [value for block in blocks for layer in block for value in layer[:2]]
        called = []
        monkeypatch.setattr(encoder_fused, '_convolve_relu', lambda *args: called.append(args) or convolve_relu(*args))
        ours = encoder_fused._run_stage(plans, x, weights, infers=True)
        assert len(called) == calls
        x = encoder_fused._run_stage(plans, x, weights)
        torch.testing.assert_close(ours, x, rtol=2e-2, atol=2e-2)  # roundings to float16 of all convolutions


@runs
def test_products_of_matrices():
    from models.encoder.kernels import multiply_matrices

    left, right = random(1, 48, 4, 4), random(1, 48, 4, 4)
    assert (multiply_matrices(left, right) - left.double() @ right.double()).abs().max() < 1e-6


@runs
def test_levels_are_stored():
    from models.encoder.kernels import store_level

    level = random(6, 24, 5, 7, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    bias, stored = random(24, dtype=torch.float16), torch.zeros(4, 3, 5, 7, 24, device=DEVICE, dtype=torch.float16)
    store_level(level, bias, stored, torch.tensor([3, 1], device=DEVICE))
    expected = (level.permute(0, 2, 3, 1) + bias).view(2, 3, 5, 7, 24)
    assert torch.equal(stored[3], expected[0]) and torch.equal(stored[1], expected[1])
    assert not stored[0].any() and not stored[2].any()


@runs
@pytest.mark.parametrize('graphed', [False, True])
def test_frames_are_written_where_they_are_stored(graphed, monkeypatch):
    """By the kernels from the second on, and all at once where a graph wants them in one place."""
    task = small_task(num_frames=3)
    model = small_model(task).eval().to(DEVICE)
    encoder, written = model.encoder, []
    monkeypatch.setattr(encoder, '_can_write', lambda img: True)
    write = encoder._write_maps
    monkeypatch.setattr(
        encoder, '_write_maps', lambda frames, *rest: written.append(len(frames)) or write(frames, *rest)
    )
    monkeypatch.setattr(encoder._graphed_writing, 'function', encoder._write_maps)
    drive = [to_device(small_batch(task, with_labels=False, first_index=index), DEVICE) for index in range(3)]
    expected = [encoder.encode(batch['img']) for batch in drive]
    metas = [batch['img_metas'] for batch in drive] + ([None] if graphed else [])  # the last without a history
    for batch, maps, known_by in zip([*drive, drive[1]], [*expected, expected[1]], metas):
        image, *matrices = [batch[name] for name in ('img', 'lidar2img', 'ego2lidar')]
        if graphed:
            with encoder.arriving(image, known_by) as arrival:
                features = encoder.receive(arrival, *matrices)
        else:
            features = encoder(image, *matrices, known_by)
        for mine, other in zip(features.in_order(task.num_cameras).maps, maps):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)  # other numbers of images at a time
        torch.testing.assert_close(features.ego2img, matrices[0].float() @ matrices[1].float(), rtol=1e-4, atol=1e-4)
    assert written == [1, 1] + [3] * graphed and len(encoder.cache) == (0 if graphed else 3)


@pytest.fixture
def predictor(monkeypatch):
    """Function from a model and a batch to one from whether Triton's kernels run to a raw prediction."""
    from models.decoders import kernels

    def make(model, batch):
        asked = []

        def run(with_kernels):
            def find(values):
                asked.append(with_kernels)
                return kernels if with_kernels else None

            for module in (layers, mask_decoder, sparse_voxel_decoder, head):
                monkeypatch.setattr(module, 'kernels_for', find)
            result = model.predict_raw(batch['img'], batch['lidar2img'], batch['ego2lidar'])
            assert asked[-1] == with_kernels
            return result

        return run

    return make


def model_and_batch(size, *args, **changes):
    task = small_task()
    model = small_model(task, *args, **changes).eval().to(DEVICE)
    return model, to_device(small_batch(task, size=size, with_labels=False), DEVICE)


def assert_as_rounded(mine, other):
    """Equal but for the rounding of all stages, which a single query here and there makes more of than the others."""
    off = (mine - other).abs() - 1e-3 * other.abs()
    assert off.max() < 1e-2 and (off > 1e-3).float().mean() < 1e-3


@runs
def test_what_is_the_same_for_all_images_is_made_of_the_weights_there_are(predictor):
    model, batch = model_and_batch(size=1, num_layers=1)
    predict, transformer = predictor(model, batch), model.pts_bbox_head.transformer
    decoder, of_masks = transformer.voxel_decoder, transformer.decoder
    predict(True)
    version = transformer.version()
    assert transformer.last_version() == version
    made = decoder._placed, of_masks._begun
    kept = [next(iter(each.kept.values()))[0] for each in made]
    predict(True)
    assert all(next(iter(each.kept.values()))[0] is one for each, one in zip(made, kept))
    decoder.decoder_layers[0].norm1.weight.mul_(-0.5)
    of_masks.query_feat.weight.mul_(-0.5)
    assert transformer.last_version() == version != transformer.version()
    ours, theirs = predict(True), predict(False)
    for mine, other in zip(ours.output.stages, theirs.output.stages):
        assert_as_rounded(mine.features, other.features)
    assert_as_rounded(ours.output.layers[0].mask_logits, theirs.output.layers[0].mask_logits)
    assert_as_rounded(ours.output.layers[0].class_logits, theirs.output.layers[0].class_logits)
    twin = copy.deepcopy(transformer)
    assert not twin.voxel_decoder._placed.kept and not twin.decoder._begun.kept
    model.pts_bbox_head.forget_weights()
    assert not any(each.kept for each in made)
    assert transformer.last_version() != transformer.version()


@runs
@pytest.mark.parametrize('scoring', ['semantic', 'occupancy'])
def test_predictions_of_the_model(predictor, scoring):
    predict = predictor(*model_and_batch(2, scoring))
    ours, theirs = predict(True), predict(False)
    for mine, other in zip(ours.output.stages, theirs.output.stages):
        assert torch.equal(mine.coords, other.coords)
        assert_as_rounded(mine.features, other.features)
        assert_as_rounded(mine.seg_logits, other.seg_logits)
        if mine.occ_logits is not None:
            assert_as_rounded(mine.occ_logits, other.occ_logits)
    # a mask logit that rounds to the other side of 0 changes at which voxels its query looks, and so all that the
    # sample's queries find later: from there on only samples whose masks are the same are the same
    same = torch.ones(len(ours.merged), dtype=torch.bool, device=DEVICE)
    for layer, (mine, other) in enumerate(zip(ours.output.layers, theirs.output.layers)):
        if not layer:
            assert_as_rounded(mine.mask_logits, other.mask_logits)
        assert (mine.class_logits - other.class_logits)[same].abs().max() < 1e-2
        turned = (mine.mask_logits > 0) != (other.mask_logits > 0)
        assert turned[same].float().mean() < 1e-3
        same &= ~turned.flatten(1).any(1)
        if not same.any():
            break
    assert same.all() or DEVICE.type == 'cuda'  # TF32 in convolutions and products turns a few
    for alike, mine, other in zip(same, ours.merged, theirs.merged):
        assert torch.equal(mine.voxels, other.voxels)
        assert not alike or (mine.semantics == other.semantics).float().mean() > 0.99


def test_modules_run_without_triton_and_with_gradients(monkeypatch):
    values = torch.zeros(2, 3)
    assert fused.kernels_for(values) is None
    monkeypatch.setattr(fused, 'has_triton', lambda device: True)
    assert fused.kernels_for(values) is None  # on the CPU
    if torch.cuda.is_available():
        assert fused.kernels_for(values.cuda()) is not None
        assert fused.kernels_for(values.cuda().double()) is None
        with torch.enable_grad():
            assert fused.kernels_for(values.cuda()) is None


@runs
def test_kept_matrices_of_the_first_mixing_change_no_bit(monkeypatch):
    from models.decoders import kernels

    task = small_task()
    model = small_model(task).eval().to(DEVICE)
    batch = to_device(small_batch(task, with_labels=False), DEVICE)
    for module in (layers, mask_decoder, sparse_voxel_decoder, head):
        monkeypatch.setattr(module, 'kernels_for', lambda values: kernels)
    decoder, results = model.pts_bbox_head.transformer.voxel_decoder, []
    for decoder.keeps_matrices in (False, True):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            results.append(model.predict_raw(batch['img'], batch['lidar2img'], batch['ego2lidar']).output)
    assert [made.matrices is not None for made in decoder._placed.kept.values()] == [False, True]
    for one, other in zip(results[0].stages, results[1].stages):
        assert torch.equal(one.features, other.features) and torch.equal(one.coords, other.coords)
