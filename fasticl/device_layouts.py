"""What the kernels of a GPU read in place of a weight's portable form: derived from it on the device where it lies."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasticl import gather_layout
from fasticl.cusparselt import derive_compressed, to_compressed
from fasticl.gather_layout import GatherLayout, to_gather
from fasticl.lane_stream import DTYPES, LaneStream, to_lanes
from fasticl.sparse_fragments import PATTERN, to_fragments

if TYPE_CHECKING:
    from fasticl.formats import PackedWeight


@dataclass(frozen=True)
class DeviceLayouts:
    """The layouts that a weight ``[N, K]`` has; the others are None. A weight without any has None in place of this."""

    lanes: LaneStream | None = None  # of bitmap: fasticl/lane_stream.py
    gather: GatherLayout | None = None  # of bitmap or sliced with few values, for few tokens: fasticl/gather_layout.py
    fragments: Tensor | None = None  # of 2:4: fasticl/sparse_fragments.py
    compressed: Tensor | None = None  # of 2:4, cuSPARSELt's: fasticl/cusparselt.py

    @staticmethod
    def derive(packed: PackedWeight) -> DeviceLayouts | None:
        """The layouts for the kernels on the weight's own device, or None where none takes it.

        The kernels in C++ take bfloat16 and float16 on CUDA devices of compute capability 8.0 or newer, where
        ``fasticl._C_cuda`` is built; what cuSPARSELt takes :func:`fasticl.cusparselt.derive_compressed` says.
        """
        made = {**_of_cpp_kernels(packed), "compressed": derive_compressed(packed)}
        return None if all(layout is None for layout in made.values()) else DeviceLayouts(**made)

    def anew(self, packed: PackedWeight) -> DeviceLayouts:
        """The same layouts by the same plans, made of ``packed``."""
        lanes, gather = self.lanes, self.gather
        return DeviceLayouts(
            None if lanes is None else to_lanes(packed, lanes.splits, lanes.blocks),
            None if gather is None else to_gather(packed, (gather.shares, gather.blocks, gather.warps)),
            None if self.fragments is None else to_fragments(packed),
            None if self.compressed is None else to_compressed(packed),
        )

    @property
    def parts(self) -> dict[str, Any]:
        """Tensors and numbers by name: ``"lanes.values"``, ``"gather.shares"``, ``"fragments"``."""
        found: dict[str, Any] = {}
        for name, layout in vars(self).items():
            if isinstance(layout, Tensor):
                found[name] = layout
            elif layout is not None:
                found.update({f"{name}.{part}": value for part, value in vars(layout).items()})
        return found

    @property
    def tensors(self) -> list[Tensor]:
        return [part for part in self.parts.values() if isinstance(part, Tensor)]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the op of the weight's format takes, by the names of its schema."""
        found: dict[str, Any] = {}
        if self.lanes is not None:
            found.update(lanes=self.lanes.tensors, plan=self.lanes.plan)
        if self.gather is not None:
            found.update(gather=self.gather.tensors, gather_plan=self.gather.plan)
        if self.fragments is not None:
            found.update(fragments=self.fragments)
        if self.compressed is not None:
            found.update(compressed=self.compressed)
        return found


def _of_cpp_kernels(packed: PackedWeight) -> dict[str, Any]:
    if packed.device.type != "cuda" or packed.values.dtype not in DTYPES or packed.format == "compact":
        return {}
    properties = torch.cuda.get_device_properties(packed.device)
    if properties.major < 8 or importlib.util.find_spec("fasticl._C_cuda") is None:
        return {}
    if packed.format == "nm":
        return {"fragments": to_fragments(packed)} if packed.pattern == PATTERN else {}
    if int(packed.keep.sum()) != packed.values.numel():
        return {}  # memory that is yet to be filled (nn.Module.to_empty)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 99 << 10)  # at least, from 8.0 on
    gpu: dict[str, Any] = {"multiprocessors": properties.multi_processor_count, "shared_bytes": shared_bytes}
    return {
        "lanes": to_lanes(packed, **gpu) if packed.format == "bitmap" else None,
        "gather": to_gather(packed, **gpu) if gather_layout.takes(packed, shared_bytes) else None,
    }
