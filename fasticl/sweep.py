"""A language model's quality and speed over methods, patterns and sparsities: a CSV, and a plot of the best."""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fasticl
from fasticl import checkpoint, evaluate
from fasticl.doctor import diagnose
from fasticl.prune import Magnitude, NeuronActivation, SparseGPT, Wanda
from fasticl.report import FAINT, axes, label, legend
from fasticl.scores import N_OF_M
from fasticl.speed import language_model_timings, megabytes

PATTERNS = ("unstructured", *N_OF_M)
_COLORS = {"magnitude": "#9aa3ad", "wanda": "#dd9a4a", "sparsegpt": "#1769aa", "neurons": "#2e8555"}
_MARKERS = {"unstructured": "o", "2:4": "s", "4:8": "D", "8:16": "^", "neuron": "P"}


@dataclass(frozen=True)
class Point:
    """What to prune: a fraction ``sparsity`` in ``pattern``, chosen by ``method``."""

    method: str
    pattern: str
    sparsity: float

    def __str__(self) -> str:
        return f"{self.method}, {self.pattern}, {self.sparsity:.0%}"


@dataclass(frozen=True)
class Row:
    """One point measured. ``settings`` is the :func:`identity` of model and measurement, ``sparsity`` what was asked
    for, ``zeros`` what came of it; speed-ups are over the dense model, which took turns with this one. ``megabytes``
    are in memory, ``checkpoint_megabytes`` in the files of ``save_pretrained(compress=True)``.
    """

    settings: str
    model: str
    method: str
    pattern: str
    sparsity: float
    zeros: float
    perplexity: float
    dense_perplexity: float
    accuracy: float | None
    dense_accuracy: float | None
    decode_tokens_per_s: float
    decode_speedup: float
    prefill_tokens_per_s: float
    prefill_speedup: float
    megabytes: float
    dense_megabytes: float
    checkpoint_megabytes: float
    packed: int
    dtype: str
    device: str
    cpu: str
    threads: int
    torch: str
    fasticl: str
    utc: str

    @property
    def point(self) -> Point:
        return Point(self.method, self.pattern, self.sparsity)


@dataclass(frozen=True)
class Measure:
    """How each point is measured.

    Attributes:
        text: whose perplexity is taken.
        calibration: another text, which methods that look at activations see.
        windows, length: of the calibration.
        max_tokens: of ``text``; None is all.
        tasks: of :func:`fasticl.evaluate.task_names`, whose accuracy is taken after ``shots`` examples; maybe none.
        prefill, decode: tokens.
        seconds: of timing for each of prefill and decode.
    """

    text: str
    calibration: str
    windows: int = 32
    length: int = 128
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    shots: int = 8
    prefill: int = 128
    decode: int = 16
    seconds: float = 12.0

    def __post_init__(self) -> None:
        if self.text == self.calibration:
            raise ValueError("expected a calibration text other than the one whose perplexity is taken, got the same")


def grid(methods: Sequence[str], patterns: Sequence[str], sparsities: Sequence[float]) -> list[Point]:
    """Every method in every pattern at every sparsity; N:M patterns have one, ``neurons`` has a pattern of its own."""
    points = []
    for method in methods:
        for pattern in ("neuron",) if method == "neurons" else patterns:
            n, m = N_OF_M.get(pattern, (0, 1))
            points += [Point(method, pattern, sparsity) for sparsity in ([1 - n / m] if n else sparsities)]
    return list(dict.fromkeys(points))


def identity(folder: Path, model: nn.Module, measure: Measure) -> str:
    """12 digits: equal if the folder's files are, by name, size and time, and all that a measurement depends on."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    parameter = next(model.parameters())
    numbers = str(parameter.dtype), str(parameter.device), torch.get_num_threads()
    run_by = torch.__version__, fasticl.__version__, diagnose()["cpu"]["model"]
    return hashlib.sha256(repr((files, astuple(measure), numbers, run_by)).encode()).hexdigest()[:12]


def check_packages() -> None:
    """Raises ImportError, with the command that installs it, unless matplotlib is there."""
    if find_spec("matplotlib") is None:
        raise ImportError("the sweep's plot needs matplotlib: pip install 'fasticl[plots]'")


def run(
    folder: Path,
    dense: nn.Module,
    tokenizer: Any,
    points: Sequence[Point],
    measure: Measure,
    out: Path,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Measures the points that ``out/sweep.csv`` has no row of by the same ``identity``; keeps each row as it comes.

    Each point: a copy of ``dense`` is pruned and converted, its perplexity and accuracy taken, and its prefill and
    decoding timed in turns with the dense model's. Draws ``out/sweep.png`` in the end.

    Args:
        folder: where ``dense`` was loaded from.
        points: of :func:`grid`.
        advance: called after each point that is measured.

    Returns:
        The rows of ``points``, in their order.

    Raises:
        ValueError: there is no point, a text is too short, or ``sweep.csv`` is none.
    """
    if not points:
        raise ValueError("points: expected at least one, got none")
    for point in points:
        _config(point)  # raises what is wrong with it, before hours of work
    out.mkdir(parents=True, exist_ok=True)
    settings = identity(folder, dense, measure)
    rows = read(out / "sweep.csv")
    done = {row.point: row for row in rows if row.settings == settings}
    missing = [point for point in points if point not in done]
    if missing:
        whole = _quality(dense, tokenizer, measure)
    for point in missing:
        done[point] = _measure(dense, whole, tokenizer, point, measure, (settings, folder.resolve().name))
        rows.append(done[point])
        _write(rows, out / "sweep.csv")
        advance()
    found = [done[point] for point in points]
    _draw(found, out / "sweep.png")
    return found


def read(path: Path) -> list[Row]:
    """The whole rows of a CSV, if it is there and has the columns of :class:`Row`."""
    if not path.is_file():
        return []
    parsers: Mapping[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "float": float,
        "float | None": lambda cell: float(cell) if cell else None,
    }
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [field.name for field in fields(Row)]:
            raise ValueError(f"{path}: expected a CSV with the columns of this version, got another one")
        return [Row(**{f.name: parsers[str(f.type)](cells[f.name]) for f in fields(Row)}) for cells in reader]


def pareto(rows: Sequence[Row], speedup: str) -> Iterator[Row]:
    """The rows to which no other is better in one of speed-up and perplexity and at least as good in the other."""
    best = float("inf")
    for row in sorted(rows, key=lambda row: (-getattr(row, speedup), row.perplexity)):
        if row.perplexity < best:
            best = row.perplexity
            yield row


def _measure(
    dense: nn.Module,
    whole: tuple[float, float | None],
    tokenizer: Any,
    point: Point,
    measure: Measure,
    names: tuple[str, str],
) -> Row:
    parameter = next(dense.parameters())
    calibration = evaluate.windows(tokenizer, measure.calibration, measure.windows, measure.length)
    pruned = copy.deepcopy(dense)
    zeros = fasticl.sparsify_(
        pruned, _config(point), evaluate.calibration_batches(calibration.to(parameter.device))
    ).total
    report = fasticl.convert(pruned)
    sparse = report.model.eval()
    perplexity, accuracy = _quality(sparse, tokenizer, measure)
    prompt = evaluate.windows(tokenizer, measure.text, 1, measure.prefill).to(parameter.device)
    timings = language_model_timings(
        {"dense": dense, "sparse": sparse},
        prompt,
        measure.decode,
        seconds=measure.seconds,
        synchronize=torch.cuda.synchronize if parameter.is_cuda else None,
    )
    ms = {path: timings["sparse"][path].ms_p50 for path in ("prefill", "decode")}
    gain = {path: timings["dense"][path].ms_p50 / ms[path] for path in ms}
    return Row(
        *names,
        point.method,
        point.pattern,
        point.sparsity,
        zeros,
        perplexity,
        whole[0],
        accuracy,
        whole[1],
        measure.decode * 1e3 / ms["decode"],
        gain["decode"],
        measure.prefill * 1e3 / ms["prefill"],
        gain["prefill"],
        megabytes(sparse),
        megabytes(dense),
        _checkpoint_megabytes(sparse),
        len(report.converted),
        str(parameter.dtype).removeprefix("torch."),
        str(parameter.device),
        diagnose()["cpu"]["model"],
        torch.get_num_threads(),
        torch.__version__,
        fasticl.__version__,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _checkpoint_megabytes(model: nn.Module) -> float:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_pretrained(model, folder, compress=True)
        return sum(file.stat().st_size for file in checkpoint.weight_files(Path(folder))) / 1e6


def _config(point: Point) -> Magnitude | Wanda | SparseGPT | NeuronActivation:
    if point.method == "neurons":
        return NeuronActivation(point.sparsity)
    if point.method == "magnitude":
        return Magnitude(point.sparsity, point.pattern)
    return (Wanda if point.method == "wanda" else SparseGPT)(point.sparsity, point.pattern)


def _quality(model: nn.Module, tokenizer: Any, measure: Measure) -> tuple[float, float | None]:
    """Perplexity, and accuracy over all tasks if there are any."""
    found = evaluate.perplexity(model, tokenizer, measure.text, max_tokens=measure.max_tokens).perplexity
    results = [
        row
        for task in measure.tasks
        for row in evaluate.few_shot_accuracy(model, tokenizer, evaluate.load_task(task), [measure.shots])
    ]
    return found, evaluate.pooled(results, measure.shots).accuracy if results else None


def _write(rows: Sequence[Row], path: Path) -> None:
    """Beside, then renamed: a file that exists is whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    for row in rows:
        writer.writerow("" if value is None else value for value in astuple(row))
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text.getvalue(), encoding="utf-8")
    os.replace(unfinished, path)


def _draw(rows: Sequence[Row], path: Path) -> None:
    drawing, panels = axes(2, height=3.6)
    for panel, (speedup, title) in zip(
        panels, {"decode_speedup": "Decode", "prefill_speedup": "Prefill"}.items(), strict=True
    ):
        front = list(pareto(rows, speedup))
        x, y = [getattr(row, speedup) for row in front], [row.perplexity for row in front]
        panel.plot(x, y, color=FAINT, linewidth=4, zorder=0, label="best of all")
        seen = set()
        for row in rows:
            kind = f"{row.method}, {row.pattern}"
            at = getattr(row, speedup), row.perplexity
            panel.plot(
                *at,
                _MARKERS[row.pattern],
                color=_COLORS[row.method],
                markersize=5.5,
                label=None if kind in seen else kind,
            )
            seen.add(kind)
            panel.annotate(
                f"{row.sparsity:.0%}",
                at,
                (4, 3),
                textcoords="offset points",
                fontsize=7.5,
                color=_COLORS[row.method],
            )
        panel.axhline(rows[0].dense_perplexity, color="#5c6670", linewidth=0.8, linestyle=":", label="dense")
        panel.axvline(1, color="#5c6670", linewidth=0.8, linestyle=":")
        panel.set_yscale("log")
        label(panel, f"{title}: quality against speed", "speed-up over dense", "perplexity")
    legend(panels[1])
    drawing.savefig(path, dpi=160)
