"""End a run after a whole step when a signal asks for it."""

from __future__ import annotations

import signal
from types import FrameType

from minibert.processes import Team


class Stop:
    """From its creation on, SIGINT and SIGTERM set ``signal`` instead of ending the process.

    In a single process a second Ctrl-C ends it at once. (torchrun itself sends each signal twice.)
    """

    def __init__(self, team: Team):
        self.signal = 0  # the signal that arrived
        self.team = team
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    @property
    def status(self) -> int:
        """Exit status: 130 or 143. SIGTERM's if the signal went to another process."""
        return 128 + (self.signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT and self.team.size == 1:
            raise KeyboardInterrupt
        self.signal = number
