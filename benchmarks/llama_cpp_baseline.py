"""llama.cpp on a Llama of transformers: what the users of a CPU would pick instead, in 4 bits a weight (Q4_1).

Its embedding, which is the LM head too, is Q8_0, as in the files that are published. Wants the packages gguf and
llama-cpp-python.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONTEXT = 1024  # positions


def available() -> bool:
    """Warns where it is not."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        warnings.warn(f"llama.cpp is not measured: {error}; pip install gguf llama-cpp-python", stacklevel=2)
        return False
    return True


def quantized(model: Any) -> tuple[nn.Module, list[tuple[str, np.ndarray, Any]]]:
    """The model with its weights rounded, in float32, for the truth; and its tensors by the names of GGUF."""
    import gguf

    rounded = copy.deepcopy(model).float()
    config, tensors = model.config, []

    def put(name: str, parameter: nn.Parameter, kind: Any) -> None:
        weight = parameter.detach().numpy()
        if kind != gguf.GGMLQuantizationType.F32:
            # llama.cpp turns neighbours where transformers turns the halves of a head.
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
                name.split(".")[-2]
            )
            order = np.arange(len(weight))
            if heads is not None:
                order = order.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
            data = gguf.quantize(np.ascontiguousarray(weight[order]), kind)
            with torch.no_grad():
                parameter[torch.from_numpy(order)] = torch.from_numpy(gguf.dequantize(data, kind))
            weight = data
        tensors.append((name, weight, kind))

    full, eight, four = (getattr(gguf.GGMLQuantizationType, kind) for kind in ("F32", "Q8_0", "Q4_1"))
    put("token_embd.weight", rounded.model.embed_tokens.weight, eight)
    put("output_norm.weight", rounded.model.norm.weight, full)
    for i, layer in enumerate(rounded.model.layers):
        put(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight, full)
        put(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight, full)
        for theirs, part in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            put(f"blk.{i}.attn_{theirs}.weight", getattr(layer.self_attn, f"{part}_proj").weight, four)
        for part in ("gate", "up", "down"):
            put(f"blk.{i}.ffn_{part}.weight", getattr(layer.mlp, f"{part}_proj").weight, four)
    return rounded, tensors


class LlamaCpp:
    """A model whose tied embedding and bias-free linears llama.cpp has read from a file of its own.

    Attributes:
        bytes: of the weights that a token reads.
        rounded: the same model for transformers.
    """

    def __init__(self, model: Any) -> None:
        import gguf
        import llama_cpp

        config = model.config
        self.rounded, tensors = quantized(model)
        self.bytes = sum(data.nbytes for _, data, _ in tensors)
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
        for name, data, kind in tensors:
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        threads = torch.get_num_threads()
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._vocabulary = config.vocab_size

    def after(self, prompt: list[int], more: list[int]) -> Callable[[], Tensor]:
        """Logits ``[vocabulary]`` after ``more``, which follows a prompt that is read once."""
        if prompt:
            self._llama.reset()
            self._llama.eval(prompt)

        def call() -> Tensor:
            self._llama.n_tokens = len(prompt)
            self._llama.eval(more)
            logits = np.ctypeslib.as_array(self._llama._ctx.get_logits(), shape=(self._vocabulary,))
            return torch.from_numpy(logits.copy())

        return call
