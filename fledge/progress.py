"""How far a run is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

PLAIN_EVERY = 10.0  # seconds between progress lines where there is no terminal to draw a bar on


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 3:05:00."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere; both say stage, step, loss, speed and ETA."""

    def __init__(self, stage: str, total: int, start: int, unit: str, show: bool, stream=None):
        self.stage, self.total, self.start, self.step, self.unit = stage, total, start, start, unit
        self.stream = stream or sys.stderr
        self.loss: float | None = None
        self.rows, self.began = 0, time.monotonic()
        self._spoke, self._said = self.began, start - 1
        self._bar = None
        self._show = show
        if show and self.stream.isatty():
            from tqdm import tqdm

            layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix} {elapsed}<{remaining}"
            self._bar = tqdm(total=total, initial=start, desc=stage, file=self.stream, dynamic_ncols=True,
                             bar_format=layout, mininterval=0.2)  # fmt: skip

    def update(self, values: Mapping[str, Any] | None = None, rows: int = 0) -> None:
        """One more step is done, over `rows` images or sequences; shows "loss" of `values`, or the last one known."""
        self.step += 1
        self.rows += rows
        self.loss = (values or {}).get("loss", self.loss)
        if not self._show:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._figures()), refresh=False)
            self._bar.update(1)
        elif time.monotonic() - self._spoke >= PLAIN_EVERY:
            self._line()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._show and self._said != self.step and self.step > self.start:
            self._line()
        self._show = False

    def write(self, text: str) -> None:
        """Print `text` without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def line(self) -> str:
        """mae  step 120/400  loss 0.5123  3.20 it/s  410 img/s  ETA 1:27"""
        passed, done = time.monotonic() - self.began, self.step - self.start
        left = passed / done * (self.total - self.step) if done else 0.0
        eta = f"ETA {clock(left)}" if self.step < self.total else f"took {clock(passed)}"
        return "  ".join([self.stage, f"step {self.step}/{self.total}", *self._figures(), eta])

    def _figures(self) -> Iterator[str]:
        passed = max(time.monotonic() - self.began, 1e-9)
        if self.loss is not None:
            yield f"loss {self.loss:.4f}"
        yield f"{(self.step - self.start) / passed:.2f} it/s"
        if self.rows:
            yield f"{self.rows / passed:,.0f} {self.unit}/s"

    def _line(self) -> None:
        print(self.line(), file=self.stream, flush=True)
        self._spoke, self._said = time.monotonic(), self.step
