"""Adaptive mixing against loops over queries and groups, and in checkpointed pieces."""

import torch
import torch.nn.functional as F

from models.decoders.layers import AdaptiveMixing


def naive_mixing(layer, sampled, query):
    batch, count, groups, in_points, width = sampled.shape
    mixed = torch.zeros(batch, count, query.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for q in range(count):
            generated = layer.parameter_generator(query[b, q]).view(groups, -1)
            out = []
            for g in range(groups):
                channel_mix = generated[g, : width * width].view(width, width)
                point_mix = generated[g, width * width :].view(layer.out_points, in_points)
                x = sampled[b, q, g] @ channel_mix
                x = F.relu((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt())
                x = point_mix @ x
                out.append(F.relu((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()))
            mixed[b, q] = layer.out_proj(torch.stack(out).flatten()) + query[b, q]
    return mixed


def make(chunk=0):
    torch.manual_seed(3)
    layer = AdaptiveMixing(16, in_points=6, out_points=5, num_groups=2, chunk=chunk).double()
    sampled = torch.randn(2, 7, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    return layer, sampled, query


def test_equals_loops_over_queries_and_groups():
    layer, sampled, query = make()
    # double precision: only the order of additions differs
    expected = naive_mixing(layer, sampled, query)
    torch.testing.assert_close(layer(sampled, query), expected, rtol=1e-10, atol=1e-10)


def test_pieces_give_the_same_result_and_gradients():
    results = []
    for chunk in (0, 4):
        layer, sampled, query = make(chunk)
        out = layer(sampled, query)
        out.square().sum().backward()
        results.append([out, sampled.grad, query.grad, layer.parameter_generator.weight.grad])
    for whole, pieces in zip(*results):
        torch.testing.assert_close(whole, pieces, rtol=1e-10, atol=1e-10)  # double precision, sums reordered


def test_generator_starts_from_its_bias_alone():
    layer = AdaptiveMixing(16, in_points=6, out_points=5, num_groups=2)
    layer.init_weights()
    generator = layer.parameter_generator
    assert not generator.weight.detach().any() and generator.bias.detach().any()
