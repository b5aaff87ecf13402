"""``nm_linear`` on the GPU: rows are equally long, and 16-bit values are put in their places by byte permutations."""

from torch import Tensor

from fasticl.kernels._packed import launch_packed


def launch(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return launch_packed(x, values, bitmask, None, bias, activation)
