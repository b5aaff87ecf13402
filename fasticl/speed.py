"""How fast language models read a prompt and answer it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fasticl.decoder import Decoder
from fasticl.timing import Timing, interleaved


@torch.inference_mode()
def language_model_timings(
    models: Mapping[str, nn.Module],
    prompt: Tensor,
    decode: int,
    *,
    seconds: float,
    synchronize: Callable[[], object] | None = None,
    decoders: Mapping[str, Decoder] = MappingProxyType({}),
) -> dict[str, dict[str, Timing]]:
    """Of each model ``"prefill"``, ``prompt`` read at once, and ``"decode"``, greedy, after all of it but a token.

    Args:
        models: of transformers; they take turns.
        prompt: ``[1, L]`` int64, on their device.
        decode: tokens, one by one, of one call.
        seconds: for each of the two, all models together.
        synchronize: as of :func:`fasticl.timing.interleaved`.
        decoders: of some of the models, by name; these decode by them, the others by transformers.
    """

    def read(name: str) -> Callable[[], object]:
        return lambda: models[name](input_ids=prompt, use_cache=False, logits_to_keep=1)

    def answer(name: str) -> Callable[[], object]:
        return by_transformers(models[name]) if name not in decoders else by_decoder(decoders[name])

    def by_decoder(decoder: Decoder) -> Callable[[], object]:
        decoder.prefill(prompt[:, :-1])
        start = decoder.position

        def steps() -> None:
            token = int(prompt[0, -1])
            for _ in range(decode):
                token = int(decoder.step(token).argmax())
            decoder.position = start

        return steps

    def by_transformers(model: nn.Module) -> Callable[[], object]:
        output = model(input_ids=prompt[:, :-1], use_cache=True, logits_to_keep=1)
        cache = output.past_key_values

        def steps() -> None:
            token = prompt[:, -1:]
            for _ in range(decode):
                token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            cache.crop(-decode)

        return steps

    timings: dict[str, dict[str, Timing]] = {name: {} for name in models}
    for path, contender in (("prefill", read), ("decode", answer)):
        contenders = {name: contender(name) for name in models}
        for name, timing in interleaved(contenders, seconds=seconds, synchronize=synchronize).items():
            timings[name][path] = timing
    return timings


def megabytes(model: nn.Module) -> float:
    """Size of the parameters and buffers, those that share memory counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6
