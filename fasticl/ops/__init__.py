"""The ops: functions on tensors and packed weights, one file each."""

from fasticl.ops._registry import implementations
from fasticl.ops.attention_mlp import attention_mlp
from fasticl.ops.bitmap_linear import bitmap_linear
from fasticl.ops.decoder_block import BlockWeights, decoder_block
from fasticl.ops.fused_mlp import fused_mlp
from fasticl.ops.nm_linear import nm_linear
from fasticl.ops.sliced_linear import sliced_linear

__all__ = [
    "BlockWeights",
    "attention_mlp",
    "bitmap_linear",
    "decoder_block",
    "fused_mlp",
    "implementations",
    "nm_linear",
    "sliced_linear",
]
