"""SIGTERM and SIGINT: the first asks the run to finish its step, save and end; the second ends it at once."""

import os
import signal
import types


class StopRequests:
    """A context in which the two signals are requests.

    A preempted machine gets SIGTERM some seconds before it goes; a person sends SIGINT, and again if it takes too long.

    Attributes:
      requested: the name of the signal that came, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequests":
        try:
            self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        except ValueError:  # not the main thread, which alone may take signals: then they do what they did before
            self._before = {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: types.FrameType | None) -> None:
        if self.requested is not None:
            os._exit(128 + number)  # checkpoints are renamed into their place: nothing is harmed
        self.requested = signal.Signals(number).name
