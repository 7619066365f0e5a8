"""What a person sees: one line a stage, a progress bar on a terminal, plain lines in a log. All on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Between two plain lines of a bar in a log.
LOG_SECONDS = 10.0


class Console:
    """Progress and messages. On a terminal bars move; elsewhere each bar prints a line every ten seconds.

    shown: False prints nothing, for all processes of a job but one.
    """

    def __init__(self, shown: bool = True) -> None:
        self._rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.shown = shown
        self.terminal = shown and self._rich.is_terminal

    def line(self, text: str) -> None:
        if self.terminal:
            self._rich.print(text, markup=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[list[str]]:
        """Prints ``what``, what was appended to the yielded list, and the seconds it took."""
        start = time.perf_counter()
        said: list[str] = []
        yield said
        self.line(f"{what}: {', '.join(said)}{' ' if said else ''}({time.perf_counter() - start:.1f} s)")

    @contextlib.contextmanager
    def bar(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Yields ``advance(steps, text)``, which shows the text beside the bar."""
        if self.terminal:
            columns = (
                TextColumn(what),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            with Progress(*columns, console=self._rich, transient=True) as progress:
                task = progress.add_task(what, total=total, completed=done, text="")
                yield lambda n, text: progress.update(task, advance=n, text=text)
            return
        state = {"done": done, "next": time.monotonic()}

        def advance(n: int, text: str) -> None:
            state["done"] += n
            if time.monotonic() >= state["next"] or state["done"] >= total:
                state["next"] = time.monotonic() + LOG_SECONDS
                self.line(f"{what} {state['done']}/{total} {text}")

        yield advance

    @contextlib.contextmanager
    def megabytes(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Yields ``progress(done, total)``, in bytes, which moves a bar in percent."""
        with self.bar(what, 100) as advance:
            shown = 0

            def progress(done: int, total: int) -> None:
                nonlocal shown
                percent = 100 * done // max(total, 1)
                if percent != shown:
                    advance(percent - shown, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")
                    shown = percent

            yield progress
