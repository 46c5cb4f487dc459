"""Progress of long work, on stderr: a bar on a terminal; elsewhere (nohup, a batch system, a pipe) a plain line every
half minute, so that a log shows that the work goes on and when it will end. Of several processes that work together,
the first shows its own."""

import sys
import time

from tqdm import tqdm

from minildm.torchrun import shows_progress

INTERVAL = 30.0  # seconds between plain lines
DELAY = 1.0  # seconds before a bar appears


class Progress:
    """Counts what is done of ``total``; a context manager, and with ``iterable`` also an iterator over it.

    Args:
        title: what is being done. unit: what is counted, in the singular; "B": bytes.
        initial: how many were done before. hidden: show nothing.
        leave: leave the full bar on the terminal.
    """

    def __init__(self, title, unit, total=None, iterable=None, initial=0, hidden=False, leave=True):
        self.title, self.unit, self.iterable = title, unit, iterable
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.done = self.first = initial
        self.begun = self.shown = time.monotonic()
        self.hidden, self.note, self.bar = hidden or not shows_progress(), "", None
        if not self.hidden and sys.stderr.isatty():
            options = {"unit_scale": True} if unit == "B" else {}
            self.bar = tqdm(
                total=self.total, initial=initial, desc=title, unit=unit, leave=leave, delay=DELAY, dynamic_ncols=True,
                **options,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self):
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, count=1, note=None):
        """``count`` more are done. ``note``: a few words to show beside the count from now on."""
        self.done += count
        self.note = self.note if note is None else note
        if self.bar is not None:
            if note is not None:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif not self.hidden and time.monotonic() - self.shown >= INTERVAL:
            self.shown = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def reset(self):
        """Nothing is done: the work begins anew."""
        self.done = self.first = 0
        self.begun = time.monotonic()
        if self.bar is not None:
            self.bar.reset()

    def line(self):
        """Where the work is, in one line."""
        done, seconds = self.done - self.first, time.monotonic() - self.begun
        parts = [f"{self.title}: {self._amount()}", f"{tqdm.format_interval(seconds)} so far"]
        if self.total and done > 0:
            parts.append(f"about {tqdm.format_interval(seconds / done * max(self.total - self.done, 0))} left")
        return ", ".join(parts + [self.note] * bool(self.note))

    def _amount(self):
        scale, unit = (
            (1e6, "MB") if self.unit == "B" else (1, f"{self.unit}{'es' if self.unit.endswith('ch') else 's'}")
        )
        done = f"{self.done / scale:,.0f}"
        if not self.total:
            return f"{done} {unit}"
        return f"{done} of {self.total / scale:,.0f} {unit} ({100 * self.done / self.total:.0f} %)"

    def close(self):
        if self.bar is not None:
            self.bar.close()


def say(line):
    """Print a line on stdout, above a bar that may be shown."""
    tqdm.write(line)
