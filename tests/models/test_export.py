"""Exported files compute what PyTorch computes; those of ONNX are tried where its packages are installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_model import small_model, small_task

from lib.errors import UserError
from models.csrc.msmv_sampling import reference, sample_multi_view
from models.decoders import layers, sparse_voxel_decoder
from models.encoder import ImageFeatures
from tools import export
from tools.exporting import operators
from tools.exporting.comparison import compare
from tools.exporting.parts import Decoders, Encoder

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).resolve().parents[2]
needs_export = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 8), reason='needs PyTorch 2.8 or later'
)


@pytest.fixture(scope='module')
def parts():
    model = small_model(small_task(), num_layers=1).eval()
    encoder = Encoder(model)
    with torch.no_grad():
        return encoder, Decoders(model, encoder(*encoder.example().values())), model


def test_parts_together_are_the_model(parts):
    """The maps of now and of earlier frames, joined, give what the model makes of them."""
    encoder, decoders, model = parts
    inputs = decoders.example()
    with torch.no_grad():
        found = dict(zip(decoders.output_names(), decoders(*inputs.values())))
        joined = [torch.cat([inputs[f'map_{level}'], inputs[f'history_{level}']], dim=1) for level in range(4)]
        output = model.pts_bbox_head(ImageFeatures(joined, inputs['ego2img'], (64, 96)))
        merged = model.pts_bbox_head.merge(output)[0]
    assert torch.equal(found['voxels'].long(), merged.voxels) and torch.equal(found['semantics'], merged.semantics)
    assert torch.equal(found['instances'], merged.pano_inst)
    assert torch.equal(found['mask_logits'], output.layers[-1].mask_logits)
    assert len(set(found['semantics'].tolist())) > 1  # there is something to compare


@pytest.mark.parametrize('count', [5, 512])
def test_table_finds_what_the_search_finds(count):
    generator = torch.Generator().manual_seed(count)
    valid = torch.rand(2, 7, count, generator=generator) < torch.linspace(0, 1, 7).view(1, 7, 1)  # none .. all
    fractions = torch.rand(2, 7, 16, generator=generator)
    index, empty = layers.select_valid(valid, fractions)
    table, none = operators.select_valid_by_table(valid, fractions)
    assert torch.equal(empty, none) and empty.any() and not empty.all()
    assert torch.equal(index[~empty], table[~empty]) and (table < count).all()


@pytest.mark.parametrize('k', [1, 30, 64, 100])
def test_sorting_keeps_what_the_decoder_keeps(k):
    scores = torch.randn(2, 64, generator=torch.Generator().manual_seed(k))
    assert torch.equal(sparse_voxel_decoder.top_in_order(scores, k), operators.top_in_order_by_sorting(scores, k))


def test_gathered_rows_are_those_of_the_bag():
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(20, 8, generator=generator), torch.rand(6, 5, 4, generator=generator)
    index = torch.randint(0, 20, (6, 5, 4), generator=generator)
    one, other = (f(rows, index, weights) for f in (reference._weighted_rows, operators.weighted_rows_by_gathering))
    assert torch.allclose(one, other, rtol=0, atol=1e-6)  # four products, added in another order


def test_substitutes_are_gone_afterwards():
    before = layers.select_valid, sparse_voxel_decoder.top_in_order, layers.sample_multi_view
    with pytest.raises(ZeroDivisionError):
        with operators.traceable('custom'):
            assert layers.sample_multi_view is operators.sampling_node
            raise ZeroDivisionError
    assert before == (layers.select_valid, sparse_voxel_decoder.top_in_order, layers.sample_multi_view)


def _sampling_case():
    """Arguments of ``sample_multi_view``: 2 frames of 3 cameras, 2 levels, 5 queries."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 6, height, 12, 16, generator=generator) for height in (8, 4)]
    points = torch.rand(1, 5, 4, 2, 3, generator=generator) * 20 - 10
    matrices = torch.randn(1, 6, 4, 4, generator=generator) * torch.tensor([50.0, 50, 1, 1]).view(4, 1)
    return maps, points, matrices, torch.randn(1, 5, 4, 2, 2, generator=generator), (64, 96), 3


@pytest.mark.parametrize('order', [True, False])
def test_reference_of_the_node_is_the_operator(order):
    maps, points, matrices, logits, size, cameras = _sampling_case()
    attributes = dict(image_height=64, image_width=96, num_cameras=3, published_weight_order=int(order))
    arrays = [value.numpy() for value in (points, matrices, logits, *maps)]
    expected = sample_multi_view(maps, points, matrices, logits, size, cameras, published_weight_order=order)
    assert expected.abs().max() > 0
    assert np.array_equal(operators.run_sampling_node(arrays, attributes), expected.numpy())


def test_node_in_a_file_runs_in_both_runtimes(tmp_path):
    """``onnx.reference`` with the operator, and ONNX Runtime on the pieces around the node."""
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    from tools.exporting.onnx_files import cut_graph, list_operators, run_file

    maps, points, matrices, logits, size, cameras = _sampling_case()
    values = dict(points=points, matrices=matrices, logits=logits, map_0=maps[0], map_1=maps[1])
    inputs = {name: value.numpy() for name, value in values.items()}
    described = [helper.make_tensor_value_info(name, 1, value.shape) for name, value in inputs.items()]
    node = helper.make_node(
        operators.NODE,
        ['twice', 'matrices', 'logits', 'map_0', 'map_1'],
        ['sampled'],
        domain=operators.DOMAIN,
        **dict(image_height=64, image_width=96, num_cameras=3, published_weight_order=1),
    )
    nodes = [helper.make_node('Add', ['points'] * 2, ['twice']), node, helper.make_node('Neg', ['sampled'], ['out'])]
    output = helper.make_tensor_value_info('out', 1, (1, 5, 4, 4, 4))
    imports = [helper.make_opsetid('', 18), helper.make_opsetid(operators.DOMAIN, 1)]
    model = helper.make_model(helper.make_graph(nodes, 'g', described, [output]), opset_imports=imports, ir_version=9)
    onnx.save(model, str(tmp_path / 'm.onnx'))
    expected = -sample_multi_view(maps, 2 * points, matrices, logits, size, cameras).numpy()
    assert [len(piece) for piece in cut_graph(model.graph.node)] == [1, 1, 1]
    assert list_operators(str(tmp_path / 'm.onnx')) == {'Add': 1, 'sparseocc::MultiViewSampling': 1, 'Neg': 1}
    assert np.array_equal(run_file(str(tmp_path / 'm.onnx'), inputs)[0], expected)
    evaluator = ReferenceEvaluator(model, new_ops=[operators.reference_op()])
    assert np.array_equal(evaluator.run(None, inputs)[0], expected)


@needs_export
@pytest.mark.parametrize('part', [0, 1], ids=['encoder', 'decoders'])
def test_program_of_torch_export_is_the_same_to_the_bit(parts, part, tmp_path):
    path = str(tmp_path / 'part.pt2')
    expected = export.export_part(parts[part], path, 'standard')
    for name, one, other in zip(parts[part].output_names(), export.run_part(parts[part], path), expected):
        assert np.array_equal(one, other.numpy()), name


@needs_export
@pytest.mark.parametrize('part, how', [(0, 'standard'), (1, 'standard'), (1, 'custom')])
def test_onnx_file_gives_the_same_labels(parts, part, how, tmp_path):
    """Logits differ by the rounding of another library, grown in three stages: 2e-5 of the largest was seen."""
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    from tools.exporting.onnx_files import list_operators

    path = str(tmp_path / 'part.onnx')
    expected = export.export_part(parts[part], path, how)
    for one in export.check_part(parts[part], path, expected):
        is_label = one.name in ('voxels', 'semantics', 'instances', 'pano_semantics')
        assert one.equal == 1 if is_label else one.largest <= 1e-4 * max(one.scale, 1), one
    own = {name: count for name, count in list_operators(path).items() if '::' in name}
    assert own == ({'sparseocc::MultiViewSampling': 4} if how == 'custom' else {})


def test_differences_are_counted_and_other_shapes_refused():
    (one,) = compare(['a'], [np.array([1, 2, 4], np.float32)], [np.array([1, 2, -3], np.float32)])
    assert (one.equal, one.largest, one.scale) == (pytest.approx(2 / 3), 7, 3) and 'a [3]' in str(one)
    with pytest.raises(ValueError, match='instead of'):
        compare(['a'], [np.zeros(3)], [np.zeros(4)])


@pytest.mark.parametrize(
    'arguments, missing, words',
    [
        (['--format', 'onnx'], 'onnxruntime', 'onnxruntime; pip install -r requirements/export.txt'),
        (['--format', 'torch', '--sampling', 'custom'], '', 'leave it out with --format torch'),
    ],
)
@needs_export
def test_what_is_missing_is_said_before_work_starts(arguments, missing, words, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == missing else name)
    args = export.parse_args(['--config', 'C', '--random-weights', '--out', 'O', *arguments])
    with pytest.raises(UserError, match=words):
        export.check_packages(args)


@needs_export
def test_script_writes_a_program_and_its_description(tmp_path, monkeypatch, capsys):
    arguments = ['--config', str(ROOT / 'configs/toybench/small.py'), '--weights']
    arguments += [str(ROOT / 'weights/toybench_small.pth'), '--override', 'task.image_size=[64, 160]']
    arguments += ['--out', str(tmp_path), '--format', 'torch', '--parts', 'encoder']
    monkeypatch.setattr(sys, 'argv', ['export.py', *arguments])
    export.main()
    about = json.loads((tmp_path / 'export.json').read_text())
    assert about['encoder']['inputs'] == dict(img=dict(shape=[1, 6, 3, 64, 160], dtype='uint8'))
    assert about['encoder']['differences']['map_3']['equal'] == 1 and (tmp_path / 'encoder.pt2').is_file()
    assert 'map_0' in capsys.readouterr().out
