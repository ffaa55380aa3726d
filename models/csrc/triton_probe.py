"""A small Triton kernel that uses what the others need; import it only where Triton is."""

import torch
import triton
import triton.language as tl


@triton.jit
def _multiply(values_at, out_at, size: tl.constexpr):
    place = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    values = tl.load(values_at + place)
    tl.store(out_at + place, tl.div_rn(tl.dot(values, tl.trans(values), input_precision='tf32x3'), values))


def check_triton(device: torch.device) -> bool:
    """Whether a kernel compiles, runs and computes what it should on the device."""
    with torch.cuda.device(device):
        values = torch.full((16, 16), 2.0, device=device)
        out = torch.empty_like(values)
        _multiply[(1,)](values, out, size=16)
        return bool((out == 32.0).all())
