"""What a sweep shows of its progress."""

from __future__ import annotations

from types import TracebackType

from rich import get_console, progress


class Display:
    """What is being done: a progress bar on a terminal; elsewhere, as in a log file, a line for each step."""

    def __init__(self, transient: bool = False) -> None:
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        self._console = get_console()
        self._terminal = self._console.is_terminal
        self._progress = progress.Progress(
            *columns, console=self._console, transient=transient, disable=not self._terminal
        )
        self._bar = self._progress.add_task("", total=None)

    def step(self, text: str, total: int | None = None) -> None:
        """What begins now. total: of what `advance` counts."""
        self.show(text, total)
        self.log(text)

    def show(self, text: str, total: int | None = None) -> None:
        """The same on a terminal only."""
        self._progress.update(self._bar, description=text, total=total)

    def advance(self, n: int) -> None:
        self._progress.advance(self._bar, n)

    def complete(self, n: int) -> None:
        self._progress.update(self._bar, completed=n)

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._console.out(line, highlight=False)

    def log(self, line: str) -> None:
        """A line where there is no bar."""
        if not self._terminal:
            self.say(line)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
