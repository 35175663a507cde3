"""How many threads a training step is worth, found out on the way."""

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Steps of each trial, on one thread and then on all.
TRIAL_STEPS = 4
# Steps between trials: at first, and where the answer has long been the same.
SHORTEST, LONGEST = 64, 1024
# All threads have to be faster by so much; a trial is over where they take so many times as long.
WORTH_IT, HOPELESS = 0.95, 3.0


class ThreadChoice:
    """Runs steps on one thread, or on all that torch has, whichever is faster at the time.

    A step of a small network is over in milliseconds, and many pieces. On a core of its own a second thread
    makes it faster by a half at best; where another process wants that core the two wait for one another, and
    it takes many times as long. So it is tried, and tried again. It must not matter to the result: `Trainer`
    takes the same step to the last bit on any number of threads.

    Parameters
    ----------
    most : int
        Threads to try; 1 leaves nothing to choose.
    clock : callable
        Seconds, as of `time.perf_counter`.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most, self.clock = most, clock
        self.chosen, self.wait, self.until_trial = 1, SHORTEST, 0
        self.seconds: list[float] = []  # of the steps of a trial under way

    def run(self, step: Callable[[], Result]) -> Result:
        """The result of a step."""
        if self.most == 1:
            return step()
        on_trial = self.until_trial == 0
        start = self.clock()
        torch.set_num_threads(
            (1 if len(self.seconds) < TRIAL_STEPS else self.most) if on_trial else self.chosen
        )
        try:
            return step()
        finally:
            torch.set_num_threads(self.most)
            if on_trial:
                self._learn(self.clock() - start)
            else:
                self.until_trial -= 1

    def _learn(self, seconds: float) -> None:
        self.seconds.append(seconds)
        one, many = self.seconds[:TRIAL_STEPS], self.seconds[TRIAL_STEPS:]
        hopeless = bool(many) and seconds > HOPELESS * median(one)
        if len(many) < TRIAL_STEPS and not hopeless:
            return
        better = self.most if not hopeless and median(many) < WORTH_IT * median(one) else 1
        self.wait = min(2 * self.wait, LONGEST) if better == self.chosen else SHORTEST
        self.chosen, self.until_trial, self.seconds = better, self.wait, []
