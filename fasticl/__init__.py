"""FastICL turns a pruned Transformer into a faster one.

model = AutoModelForCausalLM.from_pretrained(...)
fasticl.sparsify_(model, fasticl.Wanda(0.5), calibration)   # which weights go
fasticl.convert(model)                                      # store and compute what is left
"""

import torch  # first: its OpenMP runtime is the one that the kernels then share

from fasticl import nn, ops
from fasticl.checkpoint import from_pretrained, register_when_imported, save_pretrained
from fasticl.convert import ConversionReport, convert, explain
from fasticl.decoder import Decoder
from fasticl.formats import PackedWeight, pack
from fasticl.ops import implementations
from fasticl.parallel import parallelize
from fasticl.prune import Magnitude, NeuronActivation, RouterNorm, SparseGPT, Wanda, sparsify_

__version__ = "0.1.0"
__all__ = [
    "ConversionReport",
    "Decoder",
    "Magnitude",
    "NeuronActivation",
    "PackedWeight",
    "RouterNorm",
    "SparseGPT",
    "Wanda",
    "__version__",
    "convert",
    "explain",
    "from_pretrained",
    "implementations",
    "nn",
    "ops",
    "pack",
    "parallelize",
    "save_pretrained",
    "sparsify_",
]
register_when_imported()
del register_when_imported, torch
