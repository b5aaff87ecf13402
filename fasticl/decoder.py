"""Text generation without Python between the layers: a language model's decoding step as one call into C++, or one
replay of a CUDA graph.

transformers runs a token through some hundred Python modules, which at one token take longer than the arithmetic of a
pruned model. :class:`Decoder` reads the prompt with the model itself, takes over its keys and values, and then decodes
on the weights of the same model, packed or dense, which it shares (csrc/decoder.cpp, fasticl/decoder_cuda.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasticl import _C
from fasticl.architectures import TOLERANCE, Native, check_static_angles, parts_of
from fasticl.decoder_cuda import Graphs, Step
from fasticl.layers import is_adapter
from fasticl.ops._registry import DTYPES
from fasticl.parallel import check_whole

LENGTH = 2048  # positions that a Decoder has room for, unless the model has fewer or the caller wants another number


class Decoder:
    """Decodes with a Hugging Face causal language model on the CPU or a GPU.

    Every step computes, for the token at position n, ``logits = head(norm(block_L(... block_1(embedding))))`` with
    attention over the keys and values of positions 0..n; keys and values have the model's dtype, activations are
    float32 on the CPU and have the model's dtype on a GPU. The model's weights are used where they lie, packed
    (:func:`fasticl.convert`) or dense, int8 values included: change none of them while a Decoder lives.

    On a GPU a step is a CUDA graph, captured when so many sequences are first decoded together, and replayed: see
    :class:`fasticl.decoder_cuda.Step` for what it runs, and for the weights that it holds a second time. Sequences 0 to
    the last that is decoded run in it, also those between that are not. It was not yet run on a GPU.

    Architectures: Llama, Mistral, Qwen2, Qwen3, Gemma 3, GPT-2, GPT-NeoX, OPT, Phi. Making one compares its logits with
    the model's own on a few tokens, so a variant that computes something else is refused, not approximated.

        decoder = fasticl.Decoder(fasticl.convert(model).model)
        for token in decoder.generate(tokenizer(prompt)["input_ids"], max_new_tokens=64):
            print(tokenizer.decode(token), end="", flush=True)

    Args:
        model: in evaluation mode, on the CPU or one CUDA device, in float32, bfloat16 or float16.
        length: positions to have room for; None is the smaller of 2048 and what the model takes.
        sequences: how many to have room for, at any length each; decoded together they share the reading of weights.

    Attributes:
        positions: numbers of tokens that each sequence has read so far.

    Raises:
        TypeError: ``model`` is not such a module.
        ValueError: its architecture is not known, or computes something else; it is one process's part of a model
            (:func:`fasticl.parallelize`), or has adapters of PEFT that are not merged; ``length`` is out of range.
        RuntimeError: on a GPU, a step of the model cannot be captured in a CUDA graph.
    """

    def __init__(self, model: Any, *, length: int | None = None, sequences: int = 1) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(f"model: expected a Hugging Face causal language model, got {type(model).__name__}")
        config: Any = model.config
        text = config.get_text_config()
        check_whole(model, "to decode with")
        if adapter := next((name for name, module in model.named_modules() if is_adapter(module)), None):
            raise ValueError(f"{adapter}: expected no adapter, got one of PEFT; call merge_and_unload()")
        if model.training:
            raise ValueError("model: expected evaluation mode, got training mode; call model.eval()")
        limit = getattr(text, "max_position_embeddings", LENGTH)
        length = min(LENGTH, limit) if length is None else length
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= limit:
            raise ValueError(f"length: expected 1 to {limit} positions, which the model takes, got {length!r}")
        if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
            raise ValueError(f"sequences: expected at least 1, got {sequences!r}")
        self.model, self.length, self.positions = model, length, [0] * sequences
        self._unread: int | None = None  # what generate yielded last for the first sequence
        self._parts = parts_of(model)
        embedding = self._parts.embedding.weight
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(devices) > 1 or embedding.device.type not in ("cpu", "cuda"):
            got = " and ".join(sorted(map(str, devices)))
            raise ValueError(f"model: expected on the CPU or on one CUDA device, got {got}")
        self._device, self._dtype = embedding.device, embedding.dtype
        if self._dtype not in DTYPES:
            raise TypeError(f"model: expected float32, bfloat16 or float16, got {self._dtype}")
        if self._parts.rotary is not None:
            check_static_angles(text)
        with torch.no_grad():
            self._make(model)
            self._check(model, text)

    def _make(self, model: Any) -> None:
        blocks, like = self._parts.blocks, self._parts.embedding.weight
        groups, d, B = blocks[0].groups, blocks[0].head_dim, len(self.positions)
        self._cache = like.new_zeros((2, len(blocks), B, groups, self.length, d))
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        self._static: Step | None = None
        if self._device.type == "cpu":
            self._make_native(model)
        else:
            self._make_static(model)

    def _make_native(self, model: Any) -> None:
        blocks, d, D = self._parts.blocks, self._cache.shape[5], self._parts.embedding.weight.shape[1]
        like, B = self._parts.embedding.weight, len(self.positions)
        self._native = Native()
        made = []
        for block, keys, values in zip(blocks, *self._cache, strict=True):
            cos, sin = self._angles(block.layer_type)
            # Of what sequence a position is, the position says (_step_native): no stride of a sequence.
            made.append(
                self._native.block(
                    block,
                    D,
                    2 * cos.shape[1],
                    window=block.window or 0,
                    cos=cos.data_ptr(),
                    sin=sin.data_ptr(),
                    keys=(keys.data_ptr(), 0, self.length * d),
                    cached_values=(values.data_ptr(), 0, self.length * d),
                )
            )
        head = self._native.linear(model.get_output_embeddings())
        norm = self._native.norm(self._parts.norm, D)
        self._x, self._logits = (like.new_empty(B, n, dtype=torch.float32) for n in (D, head["N"]))
        self._decoder = _C.Decoder(D, d, DTYPES[self._dtype], made, norm, head)

    def _make_static(self, model: Any) -> None:
        angles = {block.layer_type: self._angles(block.layer_type) for block in self._parts.blocks}
        self._static = Step(model, self._parts, self._cache, angles)
        self._replay = Graphs(self._static.run, self._device)

    def _angles(self, layer_type: str | None) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 ``[length, rotary / 2]``."""
        if layer_type not in self._tables:
            cos = sin = torch.empty(self.length, 0, dtype=torch.float32, device=self._device)
            if (rotary := self._parts.rotary) is not None:
                where = torch.arange(self.length, device=self._device)[None]
                extra = () if layer_type is None else (layer_type,)
                cos, sin = (angle[0, :, : angle.shape[-1] // 2] for angle in rotary(cos, where, *extra))
            self._tables[layer_type] = cos.contiguous(), sin.contiguous()
        return self._tables[layer_type]

    def _check(self, model: nn.Module, config: Any) -> None:
        tokens = torch.arange(min(4, self.length), device=self._device) * 7919 % config.vocab_size

        def logits_of(model: nn.Module) -> Tensor:
            logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0, -1].float()
            return logits

        expected = logits_of(model)
        for token in tokens.tolist():
            logits = self.step(token)
        self.position = 0
        error = _difference(logits, expected)
        if error <= TOLERANCE[self._dtype]:
            return
        # In half precision a deep or heavily pruned model may itself be as far from what its weights say.
        try:
            exact = logits_of(copy.deepcopy(model).float())
        except RuntimeError:  # a forward put in by hand still calls the original
            exact = expected
        if not _difference(logits, exact) <= 1.5 * _difference(expected, exact):  # the negation refuses NaN too
            raise ValueError(
                f"model: {type(model).__name__} computes something that fasticl.Decoder does not: logits differ by "
                f"{error:.2g} of the largest, expected at most {TOLERANCE[self._dtype]:g} in {self._dtype}"
            )

    @property
    def position(self) -> int:
        """Number of tokens that the first sequence has read so far."""
        return self.positions[0]

    @position.setter
    def position(self, position: int) -> None:
        self.positions[0], self._unread = position, None

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int] | Tensor, *, sequence: int = 0, append: bool = False) -> Tensor:
        """Reads a prompt of ``[n]`` or ``[1, n]`` tokens with the model itself.

        Args:
            tokens: the prompt.
            sequence: whose prompt it is, 0 to ``sequences - 1``; the others stay as they are.
            append: after what the sequence has read so far, as the next turn of a conversation; else that is forgotten.

        Returns:
            float32 ``[vocabulary]``, the logits of the token after it.

        Raises:
            TypeError: ``tokens`` are no integers.
            ValueError: there is no token, no room for all (``length``), or one that is not in the vocabulary; there are
                several prompts; there is no such sequence.
        """
        row = _row(tokens)
        if not 0 <= sequence < len(self.positions):
            raise ValueError(f"sequence: expected 0 to {len(self.positions) - 1}, got {sequence}")
        first = self.positions[sequence] if append else 0
        if not 1 <= row.numel() <= self.length - first:
            behind = f" behind the {first} read" if first else ""
            raise ValueError(f"tokens: expected 1 to {self.length - first} (length){behind}, got {row.numel()}")
        self._check_tokens(int(row.min()), int(row.max()))
        past, cache = None, self._cache[:, :, sequence]
        if self._static is not None and not first:
            cache.zero_()  # what another text left is masked there, where infinity would still give NaN
        if first:
            from transformers import DynamicCache

            config: Any = self.model.config
            past = DynamicCache(config=config)
            for i, (keys, values) in enumerate(zip(*cache, strict=True)):
                past.update(keys[None, :, :first].clone(), values[None, :, :first].clone(), i)
        prompt = row[None].to(self._device, torch.long)
        output = self.model(input_ids=prompt, past_key_values=past, use_cache=True, logits_to_keep=1)
        end = first + row.numel()
        for layer, keys, values in zip(output.past_key_values.layers, *cache, strict=True):
            kept = layer.keys.shape[2]  # fewer than all if the layer looks through a window
            keys[:, end - kept : end] = layer.keys[0]
            values[:, end - kept : end] = layer.values[0]
        self.positions[sequence] = end
        if sequence == 0:
            self._unread = None
        return output.logits[0, -1].float()

    def step(self, token: int | Sequence[int]) -> Tensor:
        """Reads one more token; or one each of the first sequences, whose weights are then read once for all.

        Returns:
            float32 ``[vocabulary]``, or ``[len(token), vocabulary]`` of several: the logits of what comes after;
            overwritten by the next step.

        Raises:
            ValueError: there is no room, no such sequence, or the token is not in the vocabulary.
        """
        if isinstance(token, Sequence):
            return self._step(range(len(token)), token)
        return self._step((0,), (token,))[0]

    @torch.inference_mode()
    def _step(self, sequences: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Token by token of so many sequences: logits ``[len(tokens), vocabulary]``."""
        M = len(tokens)
        if not 1 <= M <= len(self.positions):
            raise ValueError(f"token: expected 1 to {len(self.positions)} (sequences), got {M}")
        self._check_tokens(min(tokens), max(tokens))
        positions = [self.positions[i] for i in sequences]
        for position in positions:
            if not 0 <= position < self.length:
                raise ValueError(f"position: expected 0 to {self.length - 1} (length), got {position}")
        step = self._step_native if self._static is None else self._step_static
        logits = step(sequences, tokens, positions)
        for i in sequences:
            self.positions[i] += 1
        if 0 in sequences:
            self._unread = None
        return logits

    def _step_native(self, sequences: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        M = len(tokens)
        parts, x = self._parts, self._x[:M]
        scale = getattr(parts.embedding, "scalar_embed_scale", None)
        for m, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            x[m].copy_(parts.embedding.weight[token])
            if scale is not None:
                x[m].mul_(scale)
            if parts.positions is not None:
                x[m].add_(parts.positions.weight[parts.first_position + position])
        stride = self._cache.shape[3] * self.length  # rows of d from one sequence's keys to the next's
        slots = [i * stride + position for i, position in zip(sequences, positions, strict=True)]
        begins = [i * stride for i in sequences]
        places = torch.tensor([positions, slots, begins, [slot + 1 for slot in slots]], device="cpu")
        logits = self._logits[:M]
        self._decoder.step(x.data_ptr(), M, places.data_ptr(), logits.data_ptr(), torch.get_num_threads())
        return logits

    def _step_static(self, sequences: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        assert self._static is not None
        M = max(sequences) + 1
        # Of one between them that is not decoded, keys and values behind its text are written, and never read.
        read, where = [0] * M, [min(max(position, 0), self.length - 1) for position in self.positions[:M]]
        for i, token, position in zip(sequences, tokens, positions, strict=True):
            read[i], where[i] = token, position
        self._static.inputs[: 2 * M].copy_(torch.tensor([*read, *where], device="cpu"))
        self._replay(M)
        logits = self._static.logits[:M]
        return logits if list(sequences) == list(range(M)) else logits[list(sequences)]

    def _check_tokens(self, least: int, most: int) -> None:
        vocabulary = self._parts.embedding.weight.shape[0]
        if least < 0 or most >= vocabulary:
            raise ValueError(f"tokens: expected 0 to {vocabulary - 1}, got {least if least < 0 else most}")

    def generate(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        append: bool = False,
    ) -> Iterator[int]:
        """Tokens after a prompt, one by one as they are decoded; the last may be one of ``stop``.

        Ends too where there is no room for more (``length``).

        Args:
            tokens: the prompt, ``[n]`` or ``[1, n]``.
            temperature: 0 always takes the likeliest; else a token is drawn from softmax(logits / temperature).
            top_k: only among so many of the likeliest; None is all.
            top_p: only among the likeliest whose probabilities add up to this.
            stop: None is the model's end-of-text tokens; empty is none.
            generator: on the CPU, where tokens are drawn; None is torch's default one.
            append: the prompt follows what was read and generated so far, as the next turn of a conversation.

        Raises:
            TypeError, ValueError: an argument is out of its range; see :meth:`prefill`.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        choose = _sampler(temperature, top_k, top_p, generator)
        ends = set(_end_tokens(self.model) if stop is None else stop)
        if append and self._unread is not None:
            tokens = [self._unread, *_row(tokens).tolist()]
        logits = self.prefill(tokens, append=append)
        return self._decode(logits, max_new_tokens, choose, ends)

    def _decode(self, logits: Tensor, count: int, choose: Callable[[Tensor], int], ends: set[int]) -> Iterator[int]:
        for left in range(count, 0, -1):
            self._unread = token = choose(logits)
            yield token
            if token in ends or left == 1 or self.position == self.length:
                return
            logits = self.step(token)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """The tokens after each of any number of prompts, as :meth:`generate` makes them.

        As many as there are ``sequences`` are decoded together; where one ends, the next prompt takes its place.

        Raises:
            ValueError: as :meth:`generate`.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        choose = _sampler(temperature, top_k, top_p, generator)
        ends = set(_end_tokens(self.model) if stop is None else stop)
        texts: list[list[int]] = [[] for _ in prompts]
        waiting, running = list(range(len(prompts)))[::-1], dict[int, int]()  # the text that a sequence decodes
        while waiting or running:
            for i in range(len(self.positions)):
                while waiting and i not in running:
                    text = waiting.pop()
                    texts[text].append(choose(self.prefill(prompts[text], sequence=i)))
                    if not self._ended(texts[text], i, max_new_tokens, ends):
                        running[i] = text
            if running:
                order = list(running)
                logits = self._step(order, [texts[running[i]][-1] for i in order])
                for i, row in zip(order, logits, strict=True):
                    texts[running[i]].append(choose(row))
                    if self._ended(texts[running[i]], i, max_new_tokens, ends):
                        del running[i]
        return texts

    def _ended(self, text: list[int], sequence: int, count: int, ends: set[int]) -> bool:
        if sequence == 0:
            self._unread = text[-1]
        return text[-1] in ends or len(text) == count or self.positions[sequence] == self.length


def _row(tokens: Any) -> Tensor:
    """``[n]``, of a prompt that is ``[n]`` or ``[1, n]``."""
    try:
        row = torch.as_tensor(tokens)
    except (RuntimeError, TypeError, ValueError):  # text, or a tokenizer's whole output
        raise TypeError(f"tokens: expected numbers (input_ids), got {type(tokens).__name__}") from None
    if row.numel() and (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool):
        raise TypeError(f"tokens: expected integers, got {row.dtype}")
    if row.dim() != 1 and (row.dim() != 2 or len(row) != 1):
        raise ValueError(f"tokens: expected one prompt, [n] or [1, n], got {list(row.shape)}")
    return row.reshape(-1)


def _difference(logits: Tensor, expected: Tensor) -> float:
    return (logits - expected).abs().max().item() / expected.abs().max().item()


def _sampler(
    temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Callable[[Tensor], int]:
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected in (0, 1], got {top_p}")
    if temperature == 0:
        return lambda logits: int(logits.argmax())

    def draw(logits: Tensor) -> int:
        count = logits.numel() if top_k is None else min(top_k, logits.numel())
        best, tokens = (found.cpu() for found in (logits / temperature).topk(count))
        chances = best.softmax(0)
        if top_p < 1:  # the first always stays
            chances = torch.where(chances.cumsum(0) - chances < top_p, chances, 0)
        return int(tokens[torch.multinomial(chances, 1, generator=generator)])

    return draw


def _end_tokens(model: Any) -> list[int]:
    found = getattr(model, "generation_config", model.config).eos_token_id
    if found is None:
        return []
    return list(found) if isinstance(found, (list, tuple)) else [found]
