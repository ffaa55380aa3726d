"""Time the compiled operators against their PyTorch references at the sizes of the full model.

    python tools/benchmark_operators.py
    python tools/benchmark_operators.py --types fp16 --repeats 50

For sampling, one row per decoder stage and type: milliseconds of the operator and of the reference, forward
and backward, and the rate at which the operator moves bytes. Bytes are counted as if nothing were cached:
four corners of every level per slot that falls in an image, the output, points and weights; the backward
pass also adds to as many values of gradient as it reads. A rate above the memory's bandwidth means that
caches serve the rest. Then the same for adaptive mixing, forward; its bytes are x, M, S and the result. Then
attention with distances, forward, in float32 and float16; its rate counts the multiplications of both matrix products.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Callable, List, NamedTuple, Tuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.cli import whole_number  # noqa: E402
from models.csrc import compiled_operators  # noqa: E402
from models.csrc.adaptive_mixing import (
    adaptive_mix,  # noqa: E402
    adaptive_mix_reference,  # noqa: E402
)
from models.csrc.distance_attention import (
    distance_attention,  # noqa: E402
    distance_attention_reference,  # noqa: E402
)
from models.csrc.msmv_sampling import sample_multi_view  # noqa: E402
from models.csrc.msmv_sampling.reference import locate_points, sample_multi_view_reference  # noqa: E402

FRAMES, CAMERAS, GROUPS, CHANNELS = 8, 6, 4, 256
IMAGE = (256, 704)
STRIDES = (4, 8, 16, 32)
TYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}


class Stage(NamedTuple):
    """One decoder stage: queries, sampling points per group, their spread in metres, mixed points."""

    name: str
    queries: int
    points: int
    block: float
    mixed_points: int


STAGES = [
    Stage('voxels 1', 1250, 4, 3.2, 128),
    Stage('voxels 2', 2000, 2, 1.6, 64),
    Stage('voxels 3', 8000, 1, 0.8, 32),
    Stage('masks', 100, 4, 20.0, 128),
]


class Inputs(NamedTuple):
    """Arguments of ``sample_multi_view``."""

    features: List[Tensor]
    points: Tensor
    ego2img: Tensor
    level_logits: Tensor
    image_size: Tuple[int, int] = IMAGE
    num_cameras: int = CAMERAS


class Timing(NamedTuple):
    """Median milliseconds, and bytes moved by one pass if nothing is cached."""

    forward_ms: float
    backward_ms: float
    forward_bytes: float
    backward_bytes: float


def camera(index: int) -> Tensor:
    """ego2img [4, 4] of one of six cameras with nuScenes-like optics, 1.5 m above the ground."""
    yaw = 2 * math.pi * index / CAMERAS
    right, forward = [math.sin(yaw), -math.cos(yaw), 0.0], [math.cos(yaw), math.sin(yaw), 0.0]
    rotation = torch.tensor([right, [0.0, 0.0, -1.0], forward])
    intrinsic = torch.tensor([[557.0, 0, IMAGE[1] / 2], [0, 557.0, IMAGE[0] / 2], [0, 0, 1]])
    matrix = torch.eye(4)
    matrix[:3, :3] = intrinsic @ rotation
    matrix[:3, 3] = intrinsic @ (rotation @ torch.tensor([0, 0, -1.5]))
    return matrix


def make_inputs(stage: Stage, dtype: torch.dtype, batch: int) -> Inputs:
    """Random features; blocks near the ground, in the order of a grid as the decoder keeps them."""
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(
            batch, FRAMES * CAMERAS, IMAGE[0] // stride, IMAGE[1] // stride, CHANNELS, device='cuda', dtype=dtype
        )
        for stride in STRIDES
    ]
    centres = torch.rand(batch, stage.queries, 3, generator=generator) * torch.tensor([80.0, 80.0, 4.0])
    centres = centres - torch.tensor([40.0, 40.0, 1.0])
    order = ((centres[..., 0] // 8) * 100 + (centres[..., 1] // 8)).argsort(1)
    centres = centres.gather(1, order.unsqueeze(-1).expand_as(centres))
    offsets = torch.rand(batch, stage.queries, GROUPS, stage.points, 3, generator=generator) - 0.5
    points = centres[:, :, None, None] + stage.block * offsets
    ego2img = torch.stack([camera(index % CAMERAS) for index in range(FRAMES * CAMERAS)])
    logits = torch.randn(points.shape[:4] + (len(STRIDES),), generator=generator)
    return Inputs(features, points.cuda(), ego2img.expand(batch, -1, -1, -1).cuda(), logits.cuda())


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median device time of a call."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def count_bytes(inputs: Inputs) -> Tuple[float, float]:
    """Bytes of a forward and of a backward pass, see the top of this file."""
    located = locate_points(inputs.points, inputs.ego2img, inputs.image_size, inputs.num_cameras)
    inside = float(((located.uv > 0) & (located.uv < 1)).all(-1).sum())
    channels, levels = CHANNELS // GROUPS, len(STRIDES)
    size = inputs.features[0].element_size()
    read = inside * levels * 4 * channels
    output = located.views.numel() * channels * size
    scalars = 4 * (inputs.points.numel() + inputs.level_logits.numel())
    return read * size + output + scalars, read * (size + 4) + output + 2 * scalars


def time_operator(operator: Callable[..., Tensor], inputs: Inputs, repeats: int) -> Timing:
    """Forward without and backward with gradients for features, points and level weights."""
    with torch.no_grad():
        forward = median_ms(lambda: operator(*inputs), repeats)
    leaves = [*inputs.features, inputs.points, inputs.level_logits]
    for leaf in leaves:
        leaf.requires_grad_()
    result = operator(*inputs)
    grad = torch.randn_like(result)
    backward = median_ms(lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True), repeats)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return Timing(forward, backward, *count_bytes(inputs))


def largest_difference(operator: Callable[..., Tensor], reference: Callable[..., Tensor], inputs) -> float:
    """Over the largest value: to know that the timed code is right."""
    with torch.no_grad():
        expected = reference(*inputs).double()
        return float((operator(*inputs).double() - expected).abs().max() / expected.abs().max())


def report_sampling(stage: Stage, name: str, batch: int, repeats: int) -> None:
    inputs = make_inputs(stage, TYPES[name], batch)
    difference = largest_difference(sample_multi_view, sample_multi_view_reference, inputs)
    ours = time_operator(sample_multi_view, inputs, repeats)
    theirs = time_operator(sample_multi_view_reference, inputs, repeats)
    forward_rate = ours.forward_bytes / ours.forward_ms / 1e6
    backward_rate = ours.backward_bytes / ours.backward_ms / 1e6
    print(
        f'{stage.name:9} {name:5} | {ours.forward_ms:9.3f} {theirs.forward_ms:9.3f} {forward_rate:7.0f} | '
        f'{ours.backward_ms:9.3f} {theirs.backward_ms:9.3f} {backward_rate:7.0f} | {difference:9.1e}'
    )


def report_mixing(stage: Stage, name: str, batch: int, repeats: int) -> None:
    width, in_points, out_points = CHANNELS // GROUPS, stage.points * FRAMES, stage.mixed_points
    sampled = torch.randn(batch, stage.queries, GROUPS, in_points, width, device='cuda', dtype=TYPES[name])
    generated = torch.randn(
        batch, stage.queries, GROUPS * (width * width + out_points * in_points), device='cuda', dtype=TYPES[name]
    )
    inputs = (sampled, generated, out_points)
    difference = largest_difference(adaptive_mix, adaptive_mix_reference, inputs)
    with torch.no_grad():
        ours = median_ms(lambda: adaptive_mix(*inputs), repeats)
        theirs = median_ms(lambda: adaptive_mix_reference(*inputs), repeats)
    values = sampled.numel() + generated.numel() + sampled.numel() // in_points * out_points
    rate = values * sampled.element_size() / ours / 1e6
    print(f'{stage.name:9} {name:5} | {ours:9.3f} {theirs:9.3f} {rate:7.0f} | {difference:9.1e}')


def report_attention(queries: int, name: str, batch: int, repeats: int) -> None:
    """Check, time and print one row."""
    heads, width, dtype = 8, CHANNELS // 8, TYPES[name]
    parts = torch.randn(batch, queries, 3, heads, width, device='cuda', dtype=dtype)
    inputs = (
        parts,
        torch.rand(batch, queries, heads, device='cuda', dtype=dtype) * 2,
        torch.rand(1, queries, 3, device='cuda') * 80,
    )
    difference = largest_difference(distance_attention, distance_attention_reference, inputs)
    with torch.no_grad():
        ours = median_ms(lambda: distance_attention(*inputs), repeats)
        theirs = median_ms(lambda: distance_attention_reference(*inputs), repeats)
    products = 2.0 * batch * heads * queries * queries * width
    print(f'{queries:<9} {name:5} | {ours:9.3f} {theirs:9.3f} {products / ours / 1e9:7.1f} | {difference:9.1e}')


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--types', nargs='+', choices=sorted(TYPES), default=['fp32', 'fp16'])
    parser.add_argument('--batch', type=whole_number(1), default=1)
    parser.add_argument('--repeats', type=whole_number(1), default=30)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit('This needs a CUDA device.')
    if len(compiled_operators(torch.device('cuda'))) < 3:
        raise SystemExit('The compiled operators are missing, so there is nothing to compare.')
    print(f'{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, batch {arguments.batch}')
    print('sampling        |    fwd ms  torch ms    GB/s |    bwd ms  torch ms    GB/s |   differs')
    for stage in STAGES:
        for name in arguments.types:
            report_sampling(stage, name, arguments.batch, arguments.repeats)
    print('mixing          |    fwd ms  torch ms    GB/s |   differs')
    for stage in STAGES:
        for name in arguments.types:
            report_mixing(stage, name, arguments.batch, arguments.repeats)
    print('attention       |    fwd ms  torch ms T mul/s |   differs')
    for queries in (1250, 2000):
        for name in (name for name in arguments.types if name != 'bf16'):  # which runs as float32
            report_attention(queries, name, arguments.batch, arguments.repeats)


if __name__ == '__main__':
    main()
