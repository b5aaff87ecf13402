"""The ``fasticl`` command. Results go to stdout, progress and errors to stderr; ``--json`` prints JSON and no more."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="FastICL: turns a pruned Transformer into a faster one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def of_torch(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.value]


def _available(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise typer.BadParameter(f"{device!r} is not available: {error}") from error
    return device


class Format(str, Enum):
    auto = "auto"
    bitmap = "bitmap"
    sliced = "sliced"
    nm = "nm"
    compact = "compact"
    dense = "dense"


class Values(str, Enum):
    int8 = "int8"


class SaveFormat(str, Enum):
    fasticl = "fasticl"
    sparse_bitmask = "sparse-bitmask"
    sparse_24_bitmask = "sparse-24-bitmask"


class Method(str, Enum):
    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    neurons = "neurons"
    router_norm = "router-norm"


class Allocation(str, Enum):
    uniform = "uniform"
    sensitivity = "sensitivity"


class Pattern(str, Enum):
    unstructured = "unstructured"
    two_four = "2:4"
    four_eight = "4:8"
    eight_sixteen = "8:16"
    neuron = "neuron"
    head = "head"


Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of weights and activations.")]
Device = Annotated[str, typer.Option(callback=_available, help="Where tensors live: cpu, cuda, cuda:1.")]
OwnDtype = Annotated[Dtype | None, typer.Option("--dtype", help="Of the weights; default: as they are stored.")]
ModelFolder = Annotated[Path, typer.Argument(help="Folder of a Hugging Face causal language model, packed or not.")]
OutFolder = Annotated[Path, typer.Argument(help="New folder for the result; it appears when it is complete.")]
Threads = Annotated[int | None, typer.Option(min=1, help="torch.set_num_threads; default: torch's own.")]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else, to stdout.")]


def main() -> None:
    app()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html, its plots and results.json.")] = Path("runs/demo"),
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a Hugging Face causal language model, instead of SmolLM2-135M-Instruct."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small settings: shows that all works; the numbers mean little.")] = False,
    skip_lm: Annotated[bool, typer.Option(help="Only the paper's one-layer model.")] = False,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.float32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Prune a Transformer, run it on FastICL, and compare its answers, quality and speed with the dense model's."""
    from fasticl.demo import DemoError, Settings, run

    try:
        settings = Settings(out, model, quick, skip_lm, seed, dtype.of_torch, device)
        results = run(settings, Console(file=sys.stderr))  # of now: loading a model silences what others print there
    except DemoError as error:
        _fail(str(error))
    if as_json:
        _print_json(results)
    else:
        _print_demo(results, Console())
        Console().print(f"report: {out / 'report.html'}", soft_wrap=True, highlight=False)
    for failure in results["failures"]:
        _error(failure)
    if results["failures"]:
        raise typer.Exit(1)


@app.command()
def reproduce(
    figures: Annotated[list[str] | None, typer.Argument(help="Only these; none is all.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, a PNG and a CSV per figure.")] = Path(
        "runs/reproduce"
    ),
    seeds: Annotated[int | None, typer.Option(min=1, help="Of each setting; default 5, quick 2.")] = None,
    quick: Annotated[bool, typer.Option(help="Small settings: shows that all works; the numbers mean little.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at a time; default: one per CPU.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on this Ray cluster: local, auto, ...")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a Hugging Face causal language model, instead of SmolLM2-135M-Instruct."),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train the paper's models; set its figures beside ours, with a verdict on each claim. Goes on where it stopped."""
    from fasticl.reproduce import ReproduceError, Settings, run

    try:
        settings = Settings(tuple(figures or ()), out, seeds, quick, device, workers, ray, model)
        results = run(settings, Console(file=sys.stderr))
    except ReproduceError as error:
        _fail(str(error))
    if as_json:
        _print_json(results)
    else:
        verdicts = ("reproduced", "in trend", "not reproduced")
        rows = []
        for name, claims in results["figures"].items():
            found = [claim["verdict"] for claim in claims]
            rows.append((name, *(str(found.count(verdict)) for verdict in verdicts)))
        Console().print(_table("claims of the paper, by figure", ("figure", *verdicts), rows))
        Console().print(f"report: {out / 'report.html'}", soft_wrap=True, highlight=False)
    for failure in results["failures"]:
        _error(failure)
    if results["failures"]:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, the processor and its instruction sets, the GPU, and which implementation each op runs and why."""
    from fasticl.doctor import diagnose

    found = diagnose()
    if as_json:
        _print_json(found)
        return
    console = Console()
    cpu = found["cpu"]
    console.print(
        _table(
            "versions",
            ("package", "version"),
            [(name, number or "[dim]not installed[/]") for name, number in found["versions"].items()],
        ),
        _table(
            "machine",
            ("", ""),
            [
                ("cpu", cpu["model"]),
                ("cores, threads used", f"{cpu['cores']}, {cpu['threads']}{'' if cpu['openmp'] else ' (no OpenMP)'}"),
                ("instruction sets", " ".join(cpu["isa"]) or "[dim]unknown[/]"),
                ("kernels", f"{cpu['target']}, of {', '.join(cpu['targets'])}"),
                ("gpu", ", ".join(found["gpus"]) or "[dim]none[/]"),
            ],
        ),
        _table(
            "ops",
            ("op", "device", "runs", "why"),
            [
                (op, device, entry["runs"], entry["why"])
                for op, by_device in found["implementations"].items()
                for device, entry in by_device.items()
            ],
        ),
    )


@app.command()
def bench(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given several times.")] = None,
    quick: Annotated[bool, typer.Option(help="A tenth of the time; noisier.")] = False,
    threads: Threads = None,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.float32,
    device: Device = "cpu",
    as_json: Json = False,
    tune: Annotated[
        bool, typer.Option(help="Measure launch configurations on the GPU at hand instead, and write them to --out.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Of --tune; default: named after the GPU's architecture, sm_90.json.")
    ] = None,
) -> None:
    """Check and time each op against PyTorch's dense layer on this machine: interleaved calls, ratio of medians."""
    if tune:
        _tune(op, dtype, out)
        return
    from fasticl.bench import OPS, WrongResult, run

    ops = op or list(OPS)
    if unknown := [name for name in ops if name not in OPS]:
        raise typer.BadParameter(f"expected one of {', '.join(OPS)}, got {', '.join(unknown)}", param_hint="--op")
    _set_threads(threads)
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    try:
        with console.status("measuring ..."):
            for case, row in run(ops, dtype.of_torch, device, seed, 0.2 if quick else 2.0):
                rows.append(row)
                console.print(f"{case}: {row['speedup']:.2f}x", highlight=False)
    except WrongResult as error:
        _fail(str(error))
    if as_json:
        _print_json({"threads": torch.get_num_threads(), "device": device, "rows": rows})
        return
    Console().print(
        _table(
            f"{dtype.value}, {torch.get_num_threads()} threads, against dense torch",
            ("op", "shape", "batch", "zeros", "FastICL ms", "torch ms", "speed-up"),
            [
                (
                    row["op"],
                    row["shape"],
                    str(row["batch"]),
                    ""
                    if row["sparsity"] is None
                    else f"{row['sparsity']:.0%} {row['pattern'].removeprefix('unstructured')}",
                    f"{row['fasticl_ms']:.3g}",
                    f"{row['torch_ms']:.3g}",
                    f"{row['speedup']:.2f}",
                )
                for row in rows
            ],
        )
    )


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(metavar="IN", help="Folder of a Hugging Face model with zeros.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the packed model.")],
    format: Annotated[
        Format, typer.Option(help="To compute in; auto measures those that suit the zeros; dense: int8 values only.")
    ] = Format.auto,
    values: Annotated[
        Values | None,
        typer.Option(help="To store the values as: int8 rounds them, and packs layers without zeros too."),
    ] = None,
    min_speedup: Annotated[
        float, typer.Option(min=0, help="Layers that gain less stay dense; 0 packs all that have zeros.")
    ] = 1.0,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Batch size to measure; several times.")] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Layer to leave alone; several times. Default: lm_head; a name that no layer has: none."),
    ] = None,
    save_format: Annotated[
        SaveFormat, typer.Option(help="Of the files: FastICL's own, or one of compressed-tensors.")
    ] = SaveFormat.fasticl,
    compress: Annotated[
        bool, typer.Option("--compress", help="Code bfloat16 weights without loss: smaller files, slower to load.")
    ] = False,
    threads: Threads = None,
    dtype: OwnDtype = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Pack the pruned layers of a model folder where that is faster, and save it; from_pretrained loads the result."""
    import fasticl
    from fasticl import checkpoint
    from fasticl.convert import SKIP, TOKENS, table
    from fasticl.stages import Stages

    if compress and save_format != SaveFormat.fasticl:
        raise typer.BadParameter(f"expected --save-format fasticl, got {save_format.value}", param_hint="--compress")
    _set_threads(threads)
    with _reported(), Stages(Console(stderr=True)) as stages:
        _check_free(out)
        with stages.stage(f"load {model}"):
            loaded, tokenizer = checkpoint.load(model, dtype=_of_torch(dtype), device=device)
        with stages.stage("measure and pack its layers"):
            report = fasticl.convert(
                loaded,
                format=format.value,
                values=values and values.value,
                min_speedup=min_speedup,
                tokens=tokens or TOKENS,
                skip=skip or SKIP,
            )
        with stages.stage(f"save {out}"):
            fasticl.save_pretrained(report.model, out, tokenizer=tokenizer, format=save_format.value, compress=compress)
    sizes = {"bytes_before": _weight_bytes(model), "bytes_after": _weight_bytes(out)}
    if as_json:
        layers = [{**asdict(layer), "dtype": str(layer.dtype).removeprefix("torch.")} for layer in report.layers]
        found = {"linears": len(report.layers), "packed": len(report.converted), "fused_mlps": report.fused_mlps}
        _print_json({**found, **sizes, "layers": layers, "seconds": stages.seconds})
        return
    typer.echo(table([*report.layers, *report.mlps]))
    typer.echo(
        f"{len(report.converted)} of {len(report.layers)} linears packed, {len(report.fused_mlps)} MLPs as one op; "
        f"{sizes['bytes_before'] / 1e6:.1f} MB before, {sizes['bytes_after'] / 1e6:.1f} MB in {out}"
    )


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(metavar="IN", help="Folder of a Hugging Face model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the pruned model.")],
    method: Annotated[
        Method,
        typer.Option(
            help="The score: weights' size, Wanda's, SparseGPT's, neurons by their activations, or experts by how "
            "fine-tuning changed the norms of their router vectors."
        ),
    ],
    sparsity: Annotated[float, typer.Option(min=0, max=1, help="Fraction to remove, below 1; 2:4 and its kin: 0.5.")],
    pattern: Annotated[
        Pattern | None, typer.Option(help="What goes together; default: unstructured, or neuron for neurons.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file that all but magnitude and router-norm look at the model with.")
    ] = None,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of the model that fine-tuning began with; for router-norm alone."
        ),
    ] = None,
    allocation: Annotated[
        Allocation, typer.Option(help="sensitivity: wanda and sparsegpt take less of blocks that the model needs more.")
    ] = Allocation.uniform,
    windows: Annotated[int, typer.Option(min=1, help="Calibration texts, consecutive in the file.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    dtype: OwnDtype = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Set the least important weights of a model folder to zero, or remove experts, and save it.

    convert then makes it faster; without some of its experts it is smaller as it is.
    """
    import fasticl
    from fasticl import checkpoint, evaluate
    from fasticl.stages import Stages

    if method not in (Method.magnitude, Method.router_norm) and calibration is None:
        raise typer.BadParameter(f"expected a text file with {method.value}", param_hint="--calibration")
    with _reported(), Stages(Console(stderr=True)) as stages:
        config = _config(method, sparsity, pattern, allocation, pretrained)
        _check_free(out)
        text = None if calibration is None else calibration.read_text(encoding="utf-8")
        with stages.stage(f"load {model}"):
            loaded, tokenizer = checkpoint.load(model, dtype=_of_torch(dtype), device=device)
        batches = None
        if text is not None:
            if tokenizer is None:
                raise ValueError(f"{model}: expected a tokenizer for the calibration text, got none")
            batches = evaluate.windows(tokenizer, text, windows, length).to(device)
        steps = -(-windows // 4) + (len(_blocks(loaded)) if method == Method.sparsegpt else 0)
        with stages.stage(f"prune it with {method.value}", total=steps) as advance:
            calibrating = None if batches is None else evaluate.calibration_batches(batches, advance)
            report = fasticl.sparsify_(loaded, config, calibrating, advance=advance)
        with stages.stage(f"save {out}"):
            fasticl.save_pretrained(loaded, out, tokenizer=tokenizer)
    if as_json:
        _print_json({"sparsity": report.total, "layers": [asdict(layer) for layer in report.layers]})
    else:
        what = "experts' weights of {} layers are gone from" if pretrained else "weights of {} layers are zero in"
        typer.echo(f"{report}\n{report.total:.1%} of the {what.format(len(report.layers))} {out}")


def _blocks(model: Any) -> list[Any]:
    from fasticl.layers import default_filter, find_blocks, find_layers

    return find_blocks(model, find_layers(model, default_filter(model)))


def _config(
    method: Method, sparsity: float, pattern: Pattern | None, allocation: Allocation, pretrained: Path | None
) -> Any:
    import fasticl

    if allocation != Allocation.uniform and method not in (Method.wanda, Method.sparsegpt):
        raise typer.BadParameter(
            f"expected uniform with {method.value}, got {allocation.value}", param_hint="--allocation"
        )
    if (pretrained is not None) != (method == Method.router_norm):
        expected = "a model's folder" if pretrained is None else "no folder"
        raise typer.BadParameter(f"expected {expected} with {method.value}", param_hint="--pretrained")
    if pretrained is not None:
        if pattern is not None:
            raise typer.BadParameter(f"expected none with router-norm, got {pattern.value}", param_hint="--pattern")
        return fasticl.RouterNorm(sparsity, pretrained)
    if method == Method.neurons:
        if pattern not in (None, Pattern.neuron):
            raise typer.BadParameter(f"expected neuron with neurons, got {pattern.value}", param_hint="--pattern")
        return fasticl.NeuronActivation(sparsity)
    name = (pattern or Pattern.unstructured).value
    if method == Method.magnitude:
        return fasticl.Magnitude(sparsity, name)
    return (fasticl.Wanda if method == Method.wanda else fasticl.SparseGPT)(sparsity, name, allocation.value)


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Argument(help="What to go on from; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most.")] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")] = True,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among so many of the likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that have this probability together.")] = 1.0,
    threads: Threads = None,
    seed: Seed = 0,
    dtype: OwnDtype = None,
    device: Device = "cpu",
) -> None:
    """Continue a text with a model, packed or not; tokens appear as they are decoded."""
    import time

    import fasticl

    _set_threads(threads)
    with _reported():
        loaded, tokenizer = _load_for_eval(model, dtype, device)
        text = sys.stdin.read() if prompt == "-" else prompt
        if chat and tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            tokens = tokenizer(text)["input_ids"]
        decoder = fasticl.Decoder(loaded)
        start = time.perf_counter()
        steps = decoder.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator().manual_seed(seed),
        )
        read, said, shown = 0.0, list[int](), ""
        for token in steps:
            read = read or time.perf_counter() - start  # a GPU is waited for when the first token is chosen
            said.append(token)
            text = tokenizer.decode(said, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half of a character
                typer.echo(text[len(shown) :], nl=False)
                shown = text
    typer.echo()
    spent = time.perf_counter() - start - read
    rate = f"{(len(said) - 1) / spent:.1f} tokens/s" if len(said) > 1 else "one token"
    typer.echo(f"prompt: {len(tokens)} tokens in {read:.2f} s; answer: {len(said)} tokens, {rate}", err=True)


evaluate_app = typer.Typer(
    help="Measure a model's quality: perplexity, few-shot accuracy, or both against speed.", no_args_is_help=True
)
app.add_typer(evaluate_app, name="eval")


@evaluate_app.command()
def ppl(
    model: ModelFolder,
    text: Annotated[Path, typer.Option(help="Text file, UTF-8.")],
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens seen at once; default: 1024, or the model's.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="By which it moves; default: half of it.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of the text; default: all.")] = None,
    threads: Threads = None,
    dtype: OwnDtype = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Perplexity of a text by a sliding window: each token counts once, with the tokens before it."""
    from fasticl import evaluate

    _set_threads(threads)
    with _reported():
        content = text.read_text(encoding="utf-8")
        loaded, tokenizer = _load_for_eval(model, dtype, device)
        with Console(stderr=True).status("reading ..."):
            found = evaluate.perplexity(loaded, tokenizer, content, window=window, stride=stride, max_tokens=max_tokens)
    if as_json:
        _print_json({"model": str(model), "text": str(text), **asdict(found)})
    else:
        typer.echo(
            f"perplexity {found.perplexity:.3f} (loss {found.loss:.4f} nats) over {found.tokens} tokens, "
            f"window {found.window}, stride {found.stride}"
        )


@evaluate_app.command()
def icl(
    model: ModelFolder,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be given several times.")] = None,
    shots: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Examples before a question; several times. Default: 0 1 2 4 8 16 32."),
    ] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Questions of each task; default: all.")] = None,
    threads: Threads = None,
    seed: Seed = 0,
    dtype: OwnDtype = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Few-shot accuracy on FastICL's own tasks, with 95 % intervals: what the model learns from its context."""
    from fasticl import evaluate
    from fasticl.stages import Stages

    names = task or evaluate.task_names()
    _check_tasks(names)
    _set_threads(threads)
    counts = sorted(set(shots or evaluate.SHOTS))
    results = []
    with _reported(), Stages(Console(stderr=True)) as stages:
        with stages.stage(f"load {model}"):
            loaded, tokenizer = _load_for_eval(model, dtype, device)
        for name in names:
            with stages.stage(name, total=len(counts) * evaluate.FOLDS) as advance:
                results += evaluate.few_shot_accuracy(
                    loaded, tokenizer, evaluate.load_task(name), counts, items=items, seed=seed, advance=advance
                )
    results += [evaluate.pooled(results, k) for k in counts]
    if as_json:
        rows = [{**asdict(row), "accuracy": row.accuracy, "interval": row.interval} for row in results]
        _print_json({"model": str(model), "seed": seed, "results": rows})
        return
    cells = {
        (row.task, row.shots): "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in (row.accuracy, *row.interval)))
        for row in results
    }
    columns = ("task", "items", *(f"k = {k}" for k in counts))
    asked = {row.task: row.count for row in results}
    Console().print(
        _table(
            "right answers after k examples, in %, with 95 % intervals",
            columns,
            [(name, str(asked[name]), *(cells[name, k] for k in counts)) for name in asked],
        )
    )


@evaluate_app.command()
def sweep(
    model: ModelFolder,
    text: Annotated[Path, typer.Option(help="Text file whose perplexity is taken.")],
    calibration: Annotated[Path, typer.Option(help="Another, which methods that look at activations see.")],
    out: Annotated[Path, typer.Option(help="Folder for sweep.csv and sweep.png; a sweep goes on where it stopped.")],
    method: Annotated[list[Method] | None, typer.Option(help="Several times; default: wanda and sparsegpt.")] = None,
    pattern: Annotated[list[Pattern] | None, typer.Option(help="Several times; default: unstructured and 2:4.")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Several times; default: 0.4 to 0.8; N:M patterns: 0.5.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Few-shot task to ask, too; several times.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Calibration texts, consecutive in the file.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of the text; default: all.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of timing, for each point's prefill and decode.")] = 12.0,
    threads: Threads = None,
    dtype: OwnDtype = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Perplexity against measured speed over methods, patterns and sparsities: a CSV, and a plot of the best."""
    from fasticl.stages import Stages
    from fasticl.sweep import PATTERNS, Measure, check_packages, grid, pareto, run

    _check_tasks(task or [])
    patterns = [chosen.value for chosen in pattern or (Pattern.unstructured, Pattern.two_four)]
    if other := [name for name in patterns if name not in PATTERNS]:
        raise typer.BadParameter(f"expected of {', '.join(PATTERNS)}, got {other[0]}", param_hint="--pattern")
    methods = [chosen.value for chosen in method or (Method.wanda, Method.sparsegpt)]
    points = grid(methods, patterns, sparsity or (0.4, 0.5, 0.6, 0.7, 0.8))
    _set_threads(threads)
    with _reported(), Stages(Console(stderr=True)) as stages:
        check_packages()
        measure = Measure(
            text.read_text(encoding="utf-8"),
            calibration.read_text(encoding="utf-8"),
            windows,
            length,
            max_tokens,
            tuple(task or ()),
            seconds=seconds,
        )
        with stages.stage(f"load {model}"):
            loaded, tokenizer = _load_for_eval(model, dtype, device)
        with stages.stage(f"measure {len(points)} points", total=len(points)) as advance:
            rows = run(model, loaded, tokenizer, points, measure, out, advance)
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    best = {path: set(pareto(rows, f"{path}_speedup")) for path in ("decode", "prefill")}
    Console().print(
        _table(
            f"{model.name}: dense perplexity {rows[0].dense_perplexity:.2f}; speed-ups over dense",
            ("pruned", "zeros", "perplexity", "decode", "prefill", "best at"),
            [
                (
                    f"{row.method}, {row.pattern}",
                    f"{row.zeros:.1%}",
                    f"{row.perplexity:.2f}",
                    f"{row.decode_speedup:.2f}",
                    f"{row.prefill_speedup:.2f}",
                    ", ".join(path for path, front in best.items() if row in front),
                )
                for row in rows
            ],
        )
    )
    typer.echo(f"{out / 'sweep.csv'}, {out / 'sweep.png'}")


def _check_tasks(names: list[str]) -> None:
    from fasticl.evaluate import task_names

    if unknown := [name for name in names if name not in task_names()]:
        expected = ", ".join(task_names())
        raise typer.BadParameter(f"expected one of {expected}, got {', '.join(unknown)}", param_hint="--task")


def _load_for_eval(model: Path, dtype: Dtype | None, device: str) -> tuple[Any, Any]:
    from fasticl import checkpoint

    loaded, tokenizer = checkpoint.load(model, dtype=_of_torch(dtype), device=device)
    if tokenizer is None:
        raise ValueError(f"{model}: expected a tokenizer beside the model, got none")
    return loaded, tokenizer


@contextmanager
def _reported() -> Iterator[None]:
    """Turns what a user can put right into a message and exit code 1."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        _fail(str(error))


def _check_free(out: Path) -> None:
    """Before the work, not after it."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"expected a new or empty folder, got {out}")


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _tune(op: list[str] | None, dtype: Dtype, out: Path | None) -> None:
    from fasticl import tune, tuned

    ops = op or list(tuned.SPACE)
    if unknown := [name for name in ops if name not in tuned.SPACE]:
        raise typer.BadParameter(
            f"expected one of {', '.join(tuned.SPACE)}, got {', '.join(unknown)}", param_hint="--op"
        )
    if not torch.cuda.is_available():
        _fail("bench --tune: expected a CUDA or ROCm device, got none that torch can use")
    path = out or Path(f"{tuned.architecture(0)}.json")
    console = Console(stderr=True)
    entries = []
    try:
        for problem in tune.problems(ops, dtype.of_torch):
            entries += tune.tune([problem], lambda text: console.print(text, highlight=False))
            tune.write(path, entries, tune.about())  # what is found so far stays if the rest is broken off
    except (OSError, ValueError) as error:
        _fail(str(error))
    Console().print(
        f"{path}: {len(entries)} problems, of {sum(e['default_ms'] > e['ms'] for e in entries)} another configuration "
        "than the default; read from fasticl/data/",
        highlight=False,
    )


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _of_torch(dtype: Dtype | None) -> torch.dtype | None:
    return None if dtype is None else dtype.of_torch


def _print_demo(results: dict[str, Any], console: Console) -> None:
    icl = results["icl"]
    errors = {point["rate"]: point for point in icl["pruning"]["smallest first"]}
    console.print(
        _table(
            f"one-layer model, {icl['neurons']} neurons, smallest pruned first",
            ("pruned", "hinge", "OOD", "0/1", "OOD", "eager us", "FastICL us", "speed-up"),
            [
                (
                    f"{row['rate']:.0%}",
                    *(f"{errors[row['rate']][domain]['hinge']:.3f}" for domain in ("in_domain", "out_of_domain")),
                    *(f"{errors[row['rate']][domain]['zero_one']:.3f}" for domain in ("in_domain", "out_of_domain")),
                    f"{row['eager_us']:.2f}",
                    f"{row['fasticl_us']:.2f}",
                    f"{row['speedup']:.1f}",
                )
                for row in icl["time"]
            ],
        )
    )
    lm = results["lm"]
    if lm is None:
        return
    console.print(
        _table(
            f"{lm['model']}, {lm['pruning']['sparsity']:.0%} of its block weights zero; "
            f"{lm['conversion']['packed']} of {lm['conversion']['linears']} linears packed; tokens/s",
            ("", "MB", "perplexity", "few-shot", "prefill", "speed-up", "decode", "speed-up"),
            [
                (
                    name,
                    f"{variant['megabytes']:.0f}",
                    f"{variant['perplexity']:.1f}",
                    f"{variant['few_shot']['mean']:.2f}",
                    f"{variant['prefill_tokens_per_s']:.0f}",
                    f"{variant['prefill_speedup']:.2f}",
                    f"{variant['decode_tokens_per_s']:.1f}",
                    f"{variant['decode_speedup']:.2f}",
                )
                for name, variant in lm["variants"].items()
            ],
        ),
        _table(
            "FastICL against the masked model",
            ("layers", "path", "largest logit error", "tolerance", "same argmax"),
            [
                (
                    row["layers"],
                    row["path"],
                    f"{row['max_relative_error']:.1e}",
                    f"{row['tolerance']:.1e}",
                    f"{row['argmax_agreement']:.1%}",
                )
                for row in lm["agreement"]
            ],
        ),
    )


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    """A column goes to the right if all its cells start with a digit, but for the first."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for index, column in enumerate(columns):
        numeric = index > 0 and all(row[index][:1].isdigit() for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    return table


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _error(message: str) -> None:
    Console(stderr=True).print("error:", message, style="red", markup=False, highlight=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    _error(message)
    raise typer.Exit(1)
