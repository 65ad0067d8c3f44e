"""How a run ends early: a signal after a whole step, or an error in one line."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from minibert.files import MinibertError, fill_closed_streams, reason
from minibert.processes import LostProcessError, Team

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """From its creation on, SIGINT, SIGTERM and SIGHUP set ``signal`` and do not end the process.

    A signal that the process ignores, as SIGHUP under nohup, stays ignored. In a single process a
    second Ctrl-C ends it at once. (torchrun itself sends each signal twice.)
    """

    def __init__(self, team: Team):
        self.signal = 0  # the signal that arrived
        self.team = team
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    @property
    def status(self) -> int:
        """Exit status: 129, 130 or 143. SIGTERM's if the signal went to another process."""
        return 128 + (self.signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT and self.team.size == 1:
            raise KeyboardInterrupt
        self.signal = number


def prepare_streams() -> None:
    """Accept closed streams, and print an escape for a character that the locale lacks."""
    fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def status_of(problem: BaseException, program: str) -> int:
    """Print why a run ends; returns the exit status.

    Args:
        problem: MinibertError, OSError or KeyboardInterrupt.
        program: the name of the command.
    """
    if isinstance(problem, KeyboardInterrupt):
        return 130
    if isinstance(problem, OSError):
        if problem.filename is None:  # Python would fail again when it flushes at exit
            silence(1)
        if isinstance(problem, BrokenPipeError):  # as in `train.py | head`
            silence(2)
            return 141
        problem = MinibertError(
            f"{problem.filename or 'standard output'}: {reason(problem)}: "
            "mend that, then continue with --resume"
        )
    with suppress(OSError):  # the disk may be full under standard error, too
        print(f"{program}: {problem}", file=sys.stderr, flush=True)
    if isinstance(problem, LostProcessError):
        sys.stdout.flush()
        os._exit(2)
    return 2


def silence(descriptor: int) -> None:
    """Discard what is printed from now on, and what is still buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
