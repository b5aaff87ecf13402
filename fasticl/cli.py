"""The ``fasticl`` command. Results go to stdout, progress and errors to stderr; ``--json`` prints JSON and no more."""

from __future__ import annotations

import json
import sys
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


Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of weights and activations.")]
Device = Annotated[str, typer.Option(callback=_available, help="Where tensors live: cpu, cuda, cuda:1.")]
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
        for name, claims in results["figures"].items():
            fields = ("what", "paper", "ours", "verdict")
            rows = [tuple(claim[field] for field in fields) for claim in claims]
            Console().print(_table(name, ("claim", "paper", "ours (95 % interval)", "verdict"), rows))
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
    threads: Annotated[int | None, typer.Option(min=1, help="torch.set_num_threads; default: torch's own.")] = None,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.float32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Check and time each op against PyTorch's dense layer on this machine: interleaved calls, ratio of medians."""
    from fasticl.bench import OPS, WrongResult, run

    ops = op or list(OPS)
    if unknown := [name for name in ops if name not in OPS]:
        raise typer.BadParameter(f"expected one of {', '.join(OPS)}, got {', '.join(unknown)}", param_hint="--op")
    if threads is not None:
        torch.set_num_threads(threads)
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
