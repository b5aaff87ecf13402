"""``bitmap_linear`` on the GPU, from the portable form."""

from torch import Tensor

from fasticl.kernels._packed import launch_packed


def launch(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    return launch_packed(x, values, bitmask, row_offsets, bias, activation)
