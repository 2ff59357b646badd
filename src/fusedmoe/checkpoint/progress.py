"""A bar for loads that take long."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

#: A load that is shorter than this gets no bar.
PATIENCE_S = 2.0


@contextmanager
def ticks(progress: bool | None, total: int, text: str) -> Iterator[Callable[[], None]]:
    """A function to call ``total`` times; on stderr it moves a bar (rich, where installed) or counts.

    ``progress`` True: always, False: never, None: on a terminal, when it takes longer than two seconds.
    """
    if progress is False or progress is None and not sys.stderr.isatty():
        yield lambda: None
        return
    begun, done = time.monotonic(), 0
    with ExitStack() as stack:
        show: Callable[[int], None] | None = None

        def tick() -> None:
            nonlocal show, done
            done += 1
            if show is None and (progress or time.monotonic() - begun > PATIENCE_S):
                show = _bar(stack, total, text)
            if show is not None:
                show(done)

        yield tick


def _bar(stack: ExitStack, total: int, text: str) -> Callable[[int], None]:
    # By name, as the library does without these packages.
    if importlib.util.find_spec("rich") is not None:
        console = importlib.import_module("rich.console").Console(stderr=True)
        bar = stack.enter_context(importlib.import_module("rich.progress").Progress(console=console))
        task = bar.add_task(text, total=total)
        return lambda done: bar.update(task, completed=done)
    stack.callback(sys.stderr.write, "\n")

    def count(done: int) -> None:
        sys.stderr.write(f"\r{text} {done}/{total}")
        sys.stderr.flush()

    return count
