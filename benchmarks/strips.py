"""How many columns strips of 16 rows need, in a pruned language model: ``python benchmarks/strips.py MODEL``.

A strip would store a dense ``[16, columns]`` block and one list of columns, so that it pays only where its rows store
the same ones. Counted is the share of all columns that the strips list, for the rows in their order and for rows sorted
so that strips hold similar ones. Nothing is timed: docs/convert.md, "No strips", says what follows.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from environment import ROOT
from torch import Tensor

import fasticl
from fasticl.demo.texts import calibration_text

STRIP = 16  # rows
SPARSITIES = (0.5, 0.8)
WINDOWS, TOKENS = 16, 128  # of calibration
COLUMNS = ("model", "method", "sparsity", "linear", "density", "as_they_are", "sorted", "strip_bytes", "bitmap_bytes")


def listed(keep: Tensor) -> float:
    """The share of the columns that strips of the rows of ``keep [N, K]`` list, in their order."""
    keep = torch.nn.functional.pad(keep, (0, 0, 0, -len(keep) % STRIP))
    return float(keep.view(-1, STRIP, keep.shape[1]).any(1).float().mean())


def similar_rows(keep: Tensor) -> Tensor:
    """An order of the rows of ``keep [N, K]``, strip by strip: first the row that stores least of those left, then
    always the one that adds the fewest columns."""
    by_column, stored = keep.T.float().contiguous(), keep.sum(1).float()
    left, order = torch.ones(len(keep), dtype=torch.bool), []
    for n in range(len(keep)):
        if n % STRIP == 0:
            union, adds = torch.zeros(keep.shape[1], dtype=torch.bool), stored.clone()
        row = int(adds.masked_fill(~left, torch.inf).argmin())
        new = keep[row] & ~union
        adds -= by_column[new].sum(0)
        union |= new
        left[row] = False
        order.append(row)
    return torch.tensor(order)


def count(masks: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """A row for each kind of linear, the last part of its name, and one for all; means by elements."""
    sums: dict[str, Tensor] = {}
    torch.set_num_threads(1)  # of sums this short a thread pool is most of the time
    for name, keep in masks.items():
        found = (float(keep.float().mean()), listed(keep), listed(keep[similar_rows(keep)]), 1.0)
        for kind in (name.rsplit(".", 1)[-1], "all"):
            sums[kind] = sums.get(kind, torch.zeros(4)) + keep.numel() * torch.tensor(found)
    rows = []
    for kind, total in sums.items():
        density, as_they_are, best = (total[:3] / total[3]).tolist()
        bytes_ = (2 * best * (1 + 1 / STRIP), 2 * density + 1 / 8)  # a position, of 16-bit values and column numbers
        numbers = (density, as_they_are, best, *bytes_)
        rows.append(dict(zip(COLUMNS[3:], (kind, *(f"{number:.4f}" for number in numbers)), strict=True)))
    return sorted(rows, key=lambda row: row["linear"] == "all")


def masks_of(folder: Path, method: str, sparsity: float) -> dict[str, Tensor]:
    """Where the linears of the blocks store a value after pruning."""
    import transformers

    from fasticl.evaluate import calibration_batches, windows

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config: fasticl.Magnitude | fasticl.Wanda = fasticl.Magnitude(sparsity)
    batches = None
    if method == "wanda":
        config = fasticl.Wanda(sparsity)
        batches = calibration_batches(windows(tokenizer, calibration_text(), WINDOWS, TOKENS))
    report = fasticl.sparsify_(model, config, batches)
    pruned = {layer.name for layer in report.layers}
    return {name: module.weight != 0 for name, module in model.named_modules() if name in pruned}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face language model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "strips" / "strips.csv")
    options = parser.parse_args(arguments)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for sparsity in SPARSITIES:
            for method in ("magnitude", "wanda"):
                about = {"model": options.model.resolve().name, "method": method, "sparsity": f"{sparsity:g}"}
                writer.writerows(about | row for row in count(masks_of(options.model, method, sparsity)))
                file.flush()


if __name__ == "__main__":
    main()
