"""The stages of a long run: progress bars on a terminal, plain lines elsewhere, and the seconds that each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Stages:
    """``with Stages(console) as stages, stages.stage("train", total=400) as advance: ...``

    Attributes:
        seconds: title of each finished stage -> wall-clock seconds.
    """

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Shows ``title`` while the block runs, and yields ``advance()``, to be called ``total`` times if given."""
        plain = self._progress.disable
        if plain:
            self._console.print(f"{title} ...", highlight=False)
        task = self._progress.add_task(title, total=total)
        start = time.perf_counter()
        yield lambda: self._progress.advance(task)
        self.seconds[title] = time.perf_counter() - start
        self._progress.update(task, total=total or 1, completed=total or 1)
        if plain:
            self._console.print(f"    {self.seconds[title]:.1f} s", highlight=False)
