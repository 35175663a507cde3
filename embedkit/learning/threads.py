"""How many threads a training step is worth, found out on the way."""

import os
import threading
import time
from collections.abc import Callable
from statistics import median

import torch

from embedkit.learning.memory import Result

# Steps of each half of a trial, on one thread and then on all; the first of a half, which makes the threads
# ready, does not count.
TRIAL_STEPS = 5
# Steps between trials: at first, and where the answer has long been the same.
SHORTEST, LONGEST = 64, 1024
# All threads have to be faster by so much; they are given up where they take so many times as long.
WORTH_IT, HOPELESS = 0.95, 3.0

# Products of up to so many rows come out the same on any number of threads, in float32 and with AVX512. All
# other steps take all threads.
SMALL_BATCH = 1_024
WIDE_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512"

# A forked process, such as a preloaded server's worker, has none of the threads that OpenMP waits for: torch
# would wait for ever. It goes on with one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


class ThreadChoice:
    """Runs steps on one thread, or on all that torch has, whichever is faster at the time.

    A step of a small network is over in milliseconds, and many pieces. On a core of its own a second thread
    makes it faster by a half at best; where another process wants that core the two wait for one another, and
    it takes many times as long. So it is tried, and tried again. It must not matter to the result:
    `for_batches` leaves the choice only to steps that come out the same to the last bit on any number.

    Parameters
    ----------
    most : int
        Threads to try; 1 leaves nothing to choose.
    clock : callable
        Seconds, as of `time.perf_counter`.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most, self.clock = most, clock
        self.chosen, self.wait, self.until_trial = 0, SHORTEST, 0
        self.trial: list[float] = []  # seconds of the steps of a trial under way
        self.alone = 0.0  # seconds of a step on one thread, at the last trial
        self.late = 0  # steps in a row for which all threads took far too long

    @classmethod
    def for_batches(cls, batch_size: int, device: torch.device, precision: str = "float32") -> "ThreadChoice":
        """For steps of so many rows."""
        repeatable = batch_size <= SMALL_BATCH and precision == "float32" and WIDE_VECTORS
        return cls(torch.get_num_threads() if repeatable and device.type == "cpu" else 1)

    def run(self, step: Callable[[], Result]) -> Result:
        """The result of a step.

        torch's number of threads is one for all threads of Python: only the main one may change it.
        """
        if self.most == 1 or threading.current_thread() is not threading.main_thread():
            return step()
        on_trial = self.until_trial == 0
        threads = self.chosen
        if on_trial:
            threads = 1 if len(self.trial) < TRIAL_STEPS else self.most
        start = self.clock()
        torch.set_num_threads(threads)
        try:
            return step()
        finally:
            torch.set_num_threads(self.most)
            (self._judge if on_trial else self._watch)(self.clock() - start)

    def _judge(self, seconds: float) -> None:
        self.trial.append(seconds)
        one, many = self.trial[1:TRIAL_STEPS], self.trial[TRIAL_STEPS + 1 :]
        hopeless = len(many) > 1 and median(many) > HOPELESS * median(one)
        if hopeless or len(self.trial) == 2 * TRIAL_STEPS:
            self.alone = median(one)
            self._decide(self.most if median(many) < WORTH_IT * self.alone else 1)

    def _watch(self, seconds: float) -> None:
        self.until_trial -= 1
        is_late = self.chosen > 1 and seconds > HOPELESS * self.alone
        self.late = self.late + 1 if is_late else 0
        if self.late == 2:
            self._decide(1)

    def _decide(self, threads: int) -> None:
        self.wait = min(2 * self.wait, LONGEST) if threads == self.chosen else SHORTEST
        self.chosen, self.until_trial, self.trial, self.late = threads, self.wait, [], 0
