"""Markdown tables from the rows of results files, one of each machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import CASE_COLUMNS
from environment import ROOT

from fasticl import sweep

Row = dict[str, str]
Results = Mapping[str, Sequence[Row]]  # by file
# Beside FastICL's rows and the best dense
SHOWN = ("onnxruntime", "torch_compile", "torch_csr", "torch_bsr", "torch_2_4", "llama_cpp_q4_1")
PAPER = ROOT / "benchmarks" / "results" / "reproduce" / "results.json"
SWEEP = ROOT / "benchmarks" / "results" / "sweep" / "sweep.csv"


def fasticl(row: Row) -> bool:
    return row["impl"].startswith("fasticl")


def by_case(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows of one case together, cases in the order of the file."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[column] for column in CASE_COLUMNS), []).append(row)
    return cases


def best_dense_ms(case: Sequence[Row]) -> float:
    return next(float(row["ms_p50"]) for row in case if row["impl"] == row["baseline"])


def percent(sparsity: str) -> str:
    return f"{float(sparsity) * 100:g} %"


def variant(row: Row) -> str:
    """What a column of speed-ups is called: the zeros, and what else tells this contender from the others."""
    impl = row["impl"].removeprefix("fasticl").strip("+_")
    if row["pattern"] in ("dense", "none"):
        return impl or "FastICL"
    zeros = {"unstructured": percent(row["sparsity"]), "neuron": f"neurons {percent(row['sparsity'])}"}
    return " ".join(filter(None, (zeros.get(row["pattern"], row["pattern"]), impl)))


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right of the first column."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


def op_table(rows: Sequence[Row], op: str) -> str:
    """One line per case: the best dense, and how much faster each other contender was."""
    cases = [case for case in by_case(rows).values() if case[0]["op"] == op]
    if not cases:
        raise ValueError(f"table {op}: expected rows of this op, got none")
    shapes = list(dict.fromkeys(case[0]["shape"] for case in cases))
    cases.sort(key=lambda case: (shapes.index(case[0]["shape"]), case[0]["dtype"] != "float32", int(case[0]["batch"])))
    shown = [[row for row in case if fasticl(row) or row["impl"] in SHOWN] for case in cases]
    variants = list(dict.fromkeys(variant(row) for case in shown for row in case))
    body = []
    for case, others in zip(cases, shown, strict=True):
        first = case[0]
        speedups = {variant(row): f"{float(row['speedup']):.2f}×" for row in others}
        name = f"{first['shape']}, batch {first['batch']}, {first['dtype']}, {first['cache']}"
        dense = f"{best_dense_ms(case):.3g} ms ({first['baseline']})"
        body.append([name, dense, *(speedups.get(column, "") for column in variants)])
    return markdown(["case", "best dense", *variants], body)


def bandwidth_table(results: Results, op: str = "bitmap_linear") -> str:
    """Cold batch-1 cases: bytes per second of the packed weights, and of plain reading in the same run."""
    cells: dict[str, dict[str, str]] = {}
    for source, rows in results.items():
        for row, roofline in rooflines(rows, op):
            name = f"{row['shape']}, {row['dtype']}, {percent(row['sparsity'])}"
            share = float(row["gbps"]) / roofline
            cells.setdefault(name, {})[source] = f"{float(row['gbps']):.1f} of {roofline:.1f}, {share:.0%}"
    body = [[name, *(found.get(source, "") for source in results)] for name, found in cells.items()]
    return markdown([f"{op}, batch 1, from memory: GB/s of plain reading's", *map(machine, results)], body)


def machine(source: str) -> str:
    """The processor that a file is called after: "intel xeon family6 model207"."""
    return re.sub(r"^cpu-|-\d+threads$", "", Path(source).stem).replace("-", " ")


def rooflines(rows: Sequence[Row], op: str) -> Iterator[tuple[Row, float]]:
    """FastICL's rows of the cases that measured the read bandwidth beside them, with that bandwidth in GB/s."""
    for case in by_case(rows).values():
        reads = [float(row["gbps"]) for row in case if row["impl"] == "read_only"]
        if case[0]["op"] == op and reads:
            yield from ((row, max(reads)) for row in case if row["impl"] == "fasticl")


@dataclass(frozen=True)
class Goal:
    """``measure(rows)`` values, one per entry of ``at_least``; None where the rows are not there."""

    case: str
    at_least: tuple[float, ...]
    measure: Callable[[Sequence[Row]], list[float | None]]
    unit: str = "×"


def _select(rows: Sequence[Row], **columns: object) -> list[Row]:
    return [row for row in rows if all(row[column] in str(value).split("|") for column, value in columns.items())]


def speedups(sparsities: Sequence[float], over: str = "", take: Callable = max, **columns: object) -> Callable:
    """At each sparsity: ``take`` of the speed-ups of all rows with these columns, over the best dense or ``over``."""

    def measure(rows: Sequence[Row]) -> list[float | None]:
        found: list[float | None] = []
        for sparsity in sparsities:
            values = []
            for case in by_case(rows).values():
                for row in _select(case, sparsity=f"{sparsity:g}", **{"impl": "fasticl", **columns}):
                    if not over:
                        values.append(float(row["speedup"]))
                    values += [float(r["ms_p50"]) / float(row["ms_p50"]) for r in case if over and r["impl"] == over]
            found.append(take(values) if values else None)
        return found

    return measure


def roofline_share(rows: Sequence[Row]) -> list[float | None]:
    shares = {
        row["sparsity"]: 100 * float(row["gbps"]) / roofline
        for row, roofline in rooflines(rows, "bitmap_linear")
        if (row["shape"], row["dtype"]) == ("4096x4096", "float32")
    }
    return [shares.get("0.5"), shares.get("0.8")]


LINEAR = "bitmap_linear|sliced_linear"
COLD = {"shape": "4096x4096", "batch": 1}
MIDDLE = {"op": LINEAR, "shape": "3072x768", "batch": 64, "pattern": "unstructured"}
SMALL = {"op": "bitmap_linear", "batch": "1|2|4|8|16", "pattern": "unstructured", "dtype": "float32"}
DECODE = {"op": "decoder", "shape": "smollm2-135M-decode128", "dtype": "bfloat16"}
GOALS = (
    Goal("`bitmap_linear` 4096×4096, batch 1, float32, 50 / 80 %", (1.6, 3.4),
         speedups((0.5, 0.8), op="bitmap_linear", dtype="float32", **COLD)),
    Goal("the same, of the read-bandwidth roofline", (85, 85), roofline_share, " %"),
    Goal("the same, bfloat16", (3.5, 6), speedups((0.5, 0.8), op="bitmap_linear", dtype="bfloat16", **COLD)),
    Goal("`sliced_linear` 4096×4096, batch 1, float32, 90 %", (5.5,),
         speedups((0.9,), op="sliced_linear", dtype="float32", **COLD)),
    Goal("3072×768, batch 64, float32, 50 / 80 / 90 %", (2, 4, 7),
         speedups((0.5, 0.8, 0.9), dtype="float32", **MIDDLE)),
    Goal("3072×768, batch 64, bfloat16, 50 / 80 / 90 %", (1.1, 2.5, 5),
         speedups((0.5, 0.8, 0.9), dtype="bfloat16", **MIDDLE)),
    Goal("768×768, batch 1 to 16, float32, 50 %, slowest, weights from memory", (1,),
         speedups((0.5,), take=min, shape="768x768", cache="cold", **SMALL)),
    Goal("the same, weights in cache", (1,), speedups((0.5,), take=min, shape="768x768", cache="hot", **SMALL)),
    Goal("3072×768, batch 1 to 16, float32, 50 %, slowest, weights from memory", (1,),
         speedups((0.5,), take=min, shape="3072x768", cache="cold", **SMALL)),
    Goal("the same, weights in cache", (1,), speedups((0.5,), take=min, shape="3072x768", cache="hot", **SMALL)),
    Goal("`attention_mlp` B=64, L=512, d=64, m=256, against eager", (3.5,),
         speedups((0,), "torch", op="attention_mlp", batch=64, shape="L512-d64-m256", dtype="float32")),
    Goal("the same, against `torch.compile`", (2,),
         speedups((0,), "torch_compile", op="attention_mlp", batch=64, shape="L512-d64-m256", dtype="float32")),
    Goal("`attention_mlp`, all shapes, slowest", (1,), speedups((0,), take=min, op="attention_mlp")),
    Goal("GPT-2-124M shape, float32, prefill of 128 tokens, 50 / 80 %", (1.6, 3),
         speedups((0.5, 0.8), op="model", shape="gpt2-124M-prefill128")),
    Goal("the same, decode, LM head pruned too, 50 / 80 %", (2.5, 4),
         speedups((0.5, 0.8), op="model", shape="gpt2-124M-decode", impl="fasticl+head")),
    Goal("SmolLM2-135M shape, bfloat16, decode, by transformers, 50 / 80 %", (2, 2.5), speedups((0.5, 0.8), **DECODE)),
    Goal("the same, by `fasticl.Decoder`", (4, 5.5), speedups((0.5, 0.8), **DECODE, impl="fasticl+decoder")),
    Goal("the same, int8 values, 50 %", (6,), speedups((0.5,), **DECODE, impl="fasticl+int8+decoder")),
    Goal("the same, against llama.cpp on 4-bit weights (Q4_1), dense", (1,),
         speedups((0.5,), "llama_cpp_q4_1", **DECODE, impl="fasticl+int8+decoder")),
    Goal("SmolLM2-135M shape, prefill of 512 tokens, float32, 50 %", (1.5,),
         speedups((0.5,), op="decoder", shape="smollm2-135M-prefill512", dtype="float32")),
    Goal("the same, bfloat16, 80 %", (1.8,),
         speedups((0.8,), op="decoder", shape="smollm2-135M-prefill512", dtype="bfloat16")),
)  # fmt: skip


def headline_table(results: Results) -> str:
    """What the project set out to reach, and what was measured; speed-ups are over the best dense."""

    def cell(goal: Goal, rows: Sequence[Row]) -> str:
        values = goal.measure(rows)
        if all(value is None for value in values):
            return "not measured"
        digits = 0 if goal.unit == " %" else 2
        text = " / ".join("–" if value is None else f"{value:.{digits}f}" for value in values) + goal.unit
        reached = all(value is not None and value >= least for value, least in zip(values, goal.at_least, strict=True))
        return f"**{text}**" if reached else text

    body = []
    for goal in GOALS:
        at_least = " / ".join(f"{value:g}" for value in goal.at_least) + goal.unit
        body.append([goal.case, at_least, *(cell(goal, rows) for rows in results.values())])
    return markdown(["case", "at least", *(f"{machine(source)} (bold: reached)" for source in results)], body)


def paper_table(path: Path = PAPER) -> str:
    """The paper's figures from ``fasticl reproduce``'s results.json: the first claim of each, and how many hold.

    Raises:
        ValueError: if the file is of a quick run, or lacks figures.
    """
    found = json.loads(path.read_text())
    if found["quick"] or found["failures"]:
        raise ValueError(
            f"{path}: expected a full run without failures, got quick={found['quick']}, {found['failures']}"
        )
    body = []
    for name, claims in found["figures"].items():
        verdicts = [claim["verdict"] for claim in claims]
        held = f"{verdicts.count('reproduced')} + {verdicts.count('in trend')} of {len(verdicts)}"
        first = claims[0]
        body.append([f"`{name}`", first["what"], first["paper"], first["ours"], first["verdict"], held])
    text = markdown(["figure", "its first claim", "authors", "ours (95 % interval)", "verdict", "claims held"], body)
    source = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return (
        f"{text}\n\nClaims held: reproduced + in trend. From `{source}`: {found['seeds']} seeds, "
        f"{found['job_seconds'] / 60:.0f} core-minutes, torch {found['torch']}, fasticl {found['fasticl']}, "
        f"{found['cpu']}."
    )


def sweep_table(path: Path = SWEEP) -> str:
    """Quality and speed of a pruned language model, from the CSV of ``fasticl eval sweep``.

    Raises:
        ValueError: if the file has no rows, or rows of several models or settings.
    """
    rows = sorted(sweep.read(path), key=lambda row: (row.pattern != "unstructured", row.sparsity, row.method))
    if len({row.settings for row in rows}) != 1:
        raise ValueError(f"{path}: expected rows of one model and settings, got {len({row.settings for row in rows})}")
    first = rows[0]
    body = [["dense", f"{first.dense_perplexity:.1f}", "1×", "1×", "1×"]]
    for row in rows:
        factors = row.decode_speedup, row.prefill_speedup, row.checkpoint_megabytes / row.dense_megabytes
        pruning = f"{row.method}, {row.pattern}, {row.sparsity:.0%}"
        body.append([pruning, f"{row.perplexity:.1f}", *(f"{factor:.2f}×" for factor in factors)])
    header = ["pruning of the blocks", "perplexity", "decode, by transformers", "prefill", "size of the checkpoint"]
    source = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return (
        f"{markdown(header, body)}\n\nFrom `{source}`: {first.model}, {first.dtype}, {first.cpu}, "
        f"threads {first.threads}, torch {first.torch}, fasticl {first.fasticl}."
    )


def table(name: str, results: Results) -> str:
    """The table ``name``: "headline", "bandwidth", "paper", "sweep" or an op; and the source of its numbers.

    Raises:
        ValueError: if there is no such table, or no rows for it.
    """
    if name == "paper":
        return paper_table()
    if name == "sweep":
        return sweep_table()
    if name == "headline":
        return "\n\n".join((headline_table(results), *(_facts(*each) for each in results.items())))
    if name == "bandwidth":
        read = {source: [row for row, _ in rooflines(rows, "bitmap_linear")] for source, rows in results.items()}
        return "\n\n".join((bandwidth_table(results), *(_facts(*each) for each in read.items())))
    parts = [f"{op_table(rows, name)}\n\n{_facts(source, _select(rows, op=name))}" for source, rows in results.items()]
    return "\n\n".join(parts)


def _facts(source: str, used: Sequence[Row]) -> str:
    if not used:
        raise ValueError(f"{source}: expected rows, got none")
    facts = [
        f"{column} {' and '.join(sorted({row[column] for row in used if row[column]}))}"
        for column in ("threads", "torch", "fasticl", "git")
    ]
    return f"From `{source}`: {', '.join(facts)}."


MARKER = re.compile(r"(<!-- table:([\w-]+) -->\n)(?:.*?)(<!-- end -->)", re.DOTALL)


def fill(readme: Path, results: Results) -> list[str]:
    """Writes the tables between the markers of ``readme``; returns their names.

    Raises:
        ValueError: if the file has no marker, a marker without its end, or a name that is no table.
    """
    text = readme.read_text()
    opened, names = text.count("<!-- table:"), [match[2] for match in MARKER.finditer(text)]
    if not names or opened != len(names):
        raise ValueError(
            f"{readme}: expected `<!-- table:NAME -->` lines, each with `<!-- end -->`, got {opened} and {len(names)}"
        )
    readme.write_text(MARKER.sub(lambda match: f"{match[1]}{table(match[2], results)}\n{match[3]}", text))
    return names
