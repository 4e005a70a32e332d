"""Share of wall time that is training when nodes fail: a formula and a simulation of every event.

Formula (Young 1974, Daly 2006; see also "The Llama 3 Herd of Models", section 3.3.4):
    share = 1 / (1 + C / tau + lambda (detect + restart + lost + lag))
    lambda lost = (exp(lambda tau) - 1) / (lambda tau) - 1, about lambda tau / 2 between frequent saves
with C the stall of a save, tau the time between saves, lambda failures per second, lag the time until
a checkpoint is durable.
"""

import heapq
import math
import random
from dataclasses import dataclass, replace

from megatron_eso.errors import ConfigError

DAY = 86400.0


@dataclass(frozen=True)
class Failures:
    """What fails, and how the run comes back."""

    num_gpus: int = 1024
    gpus_per_node: int = 8
    failures_per_1000_node_days: float = 3.8
    """2.3 optimistic, 3.8 Llama 3 (419 stops of 16,384 GPUs in 54 days), 6.5 pessimistic."""
    save_stall_seconds: float = 6.0
    save_interval_seconds: float | None = None
    """Training time between two saves; None: the best."""
    durable_lag_seconds: float = 60.0
    """From the start of an asynchronous save until it can be restored."""
    detect_seconds: float = 60.0
    restart_seconds: float = 300.0
    burst_probability: float = 0.0
    """Chance that a failure is followed by another within ``burst_seconds``."""
    burst_seconds: float = 1800.0
    rack_probability: float = 0.0
    """Chance that a failure takes a whole rack of nodes instead of one."""
    nodes_per_rack: int = 4
    num_spares: int = 8
    """Nodes kept idle to replace failed ones immediately."""
    repair_seconds: float = 4 * 3600.0
    local_interval_seconds: float | None = None
    """Time between node-local copies, which survive unless the node is lost; None: there are none."""
    node_lost_probability: float = 0.5
    """Share of failures after which the failed node's local copy is gone and the node needs repair."""

    @property
    def failures_per_second(self) -> float:
        """Rate of first failures over all nodes, lambda."""
        nodes = self.num_gpus / self.gpus_per_node
        return nodes * self.failures_per_1000_node_days / 1000 / DAY

    @property
    def interval_seconds(self) -> float:
        """Training time between two saves: as given, or the best."""
        return self.save_interval_seconds or best_interval(self)


@dataclass(frozen=True)
class Simulated:
    """Result of a simulation."""

    share: float
    """Share of the wall time that became training progress."""
    num_failures: int
    lost_seconds: float
    """Training repeated after restarts."""
    down_seconds: float
    """Detection, restart and waiting for nodes."""
    waiting_seconds: float
    """Part of the down time in which no spare node was left."""


def best_interval(failures: Failures) -> float:
    """Return the time between saves that loses least: Daly's form with recovery time.

    It is not below the lag, since a save waits for the one before it.
    """
    stall = failures.save_stall_seconds
    rate = failures.failures_per_second
    if rate == 0:
        return math.inf
    recovery = failures.detect_seconds + failures.restart_seconds
    best = stall + math.sqrt(2 * (1 / rate + recovery) * stall + stall**2)
    return max(best, failures.durable_lag_seconds)


def expected_share(failures: Failures) -> float:
    """Return the formula's share of time that is training."""
    rate = failures.failures_per_second
    interval = failures.interval_seconds
    lost = _lost_since_save(interval, rate) + failures.durable_lag_seconds if rate else 0.0
    rate *= 1 + failures.burst_probability
    if failures.local_interval_seconds:
        # A copy that survives bounds the loss to half its own interval.
        local = failures.local_interval_seconds / 2
        gone = failures.node_lost_probability
        lost = gone * lost + (1 - gone) * min(lost, local)
    down = failures.detect_seconds + failures.restart_seconds
    stalls = 0.0 if math.isinf(interval) else failures.save_stall_seconds / interval
    return 1 / (1 + stalls + (rate * (down + lost) if rate else 0.0))


def _lost_since_save(interval: float, rate: float) -> float:
    """Return the mean training that a failure throws away (Daly 2006).

    An interval begins anew until one passes without a failure.
    """
    failures = min(rate * interval, 600.0)  # with more, exp() overflows; no run would end anyway
    return (math.expm1(failures) / failures - 1) / rate


def simulate(failures: Failures, *, days: float = 100.0, seed: int = 1) -> Simulated:
    """Return what happens over ``days`` of wall time, event by event.

    Raises:
        ConfigError: for a negative time or a probability outside [0, 1].
    """
    _check(failures)
    return _Simulation(failures, days * DAY, random.Random(seed)).run()


class _Simulation:
    """Clock, progress, checkpoints and nodes under repair."""

    def __init__(self, failures: Failures, horizon: float, draw: random.Random) -> None:
        self.settings, self.horizon, self.draw = failures, horizon, draw
        self.interval = failures.interval_seconds
        self.now = self.progress = self.lost = self.down = self.waiting = 0.0
        self.unsaved = 0.0  # training since the last durable checkpoint
        self.num_failures, self.spares = 0, failures.num_spares
        self.repairs: list[float] = []  # times at which nodes come back
        self.bursts: list[float] = []  # times of follow-up failures

    def run(self) -> Simulated:
        next_first = self._gap()
        while self.now < self.horizon:
            is_burst = bool(self.bursts) and self.bursts[0] < next_first
            failure = heapq.heappop(self.bursts) if is_burst else next_first
            if not is_burst:
                next_first = failure + self._gap()
            is_node_lost = self.draw.random() < self.settings.node_lost_probability
            if failure >= self.now:
                self._train(min(failure, self.horizon) - self.now)
                if failure >= self.horizon:
                    break
                self._roll_back(is_node_lost)
            # A failure before `now` fell into the restart, which therefore begins again.
            begin = max(self.now - self._restart(), failure) if failure < self.now else failure
            self.down -= max(0.0, self.now - begin)
            self.now = begin
            self._fail(is_burst, is_node_lost)
        total = max(self.now, 1e-9)
        return Simulated(
            max(0.0, self.progress / total), self.num_failures, self.lost, self.down, self.waiting
        )

    def _gap(self) -> float:
        rate = self.settings.failures_per_second
        return self.draw.expovariate(rate) if rate else math.inf

    def _restart(self) -> float:
        return self.settings.detect_seconds + self.settings.restart_seconds

    def _train(self, wall: float) -> None:
        """Train for ``wall`` seconds, stalls included, from a fresh (re)start."""
        stall = self.settings.save_stall_seconds
        cycles, gained = 0, wall
        if not math.isinf(self.interval):
            cycles = int(wall // (self.interval + stall))
            rest = wall - cycles * (self.interval + stall)
            gained = cycles * self.interval + min(rest, self.interval)
        self.progress += gained
        self.now += wall
        self.unsaved = gained - self._durable(wall, cycles)

    def _durable(self, wall: float, cycles: int) -> float:
        """Return the training of this segment that a durable checkpoint holds at its end."""
        stall, lag = self.settings.save_stall_seconds, self.settings.durable_lag_seconds
        if not cycles and wall < self.interval + lag:
            return 0.0
        if math.isinf(self.interval):
            return 0.0
        # Save k starts after k intervals and k - 1 stalls.
        done = int((wall - lag + stall) // (self.interval + stall))
        return max(0, done) * self.interval

    def _roll_back(self, is_node_lost: bool) -> None:
        lost, local = self.unsaved, self.settings.local_interval_seconds
        if local and not is_node_lost:
            lost = min(lost, self.draw.uniform(0, local))
        self.progress -= lost
        self.lost += lost

    def _fail(self, is_burst: bool, is_node_lost: bool) -> None:
        settings = self.settings
        self.num_failures += 1
        while self.repairs and self.repairs[0] <= self.now:
            heapq.heappop(self.repairs)
            self.spares += 1
        is_rack = self.draw.random() < settings.rack_probability
        taken = settings.nodes_per_rack if is_rack else int(is_node_lost)
        for _ in range(taken):
            heapq.heappush(self.repairs, self.now + settings.repair_seconds)
        self.spares -= taken
        down = self._restart() + self._wait_for_nodes()
        self.down += down
        if not is_burst and self.draw.random() < settings.burst_probability:
            heapq.heappush(self.bursts, self.now + self.draw.uniform(0, settings.burst_seconds))
        self.now += down

    def _wait_for_nodes(self) -> float:
        """Return how long the run waits until enough nodes are repaired."""
        until = self.now
        while self.spares < 0 and self.repairs:
            until = heapq.heappop(self.repairs)
            self.spares += 1
        self.waiting += until - self.now
        return until - self.now


def what_it_is_worth(failures: Failures, *, days: float = 200.0) -> dict[str, float]:
    """Return by how many percentage points each improvement changes the simulated training share."""
    base = _mean_share(failures, days)
    changes = {
        "one more spare node": replace(failures, num_spares=failures.num_spares + 1),
        "restart twice as fast": replace(failures, restart_seconds=failures.restart_seconds / 2),
        "detection twice as fast": replace(failures, detect_seconds=failures.detect_seconds / 2),
        "half the save stall": replace(
            failures, save_stall_seconds=failures.save_stall_seconds / 2
        ),
        "local copies every 2 minutes": replace(failures, local_interval_seconds=120.0),
    }
    return {name: 100 * (_mean_share(changed, days) - base) for name, changed in changes.items()}


def _mean_share(failures: Failures, days: float) -> float:
    return sum(simulate(failures, days=days, seed=seed).share for seed in range(5)) / 5


def _check(failures: Failures) -> None:
    for name in ("burst_probability", "rack_probability", "node_lost_probability"):
        if not 0 <= getattr(failures, name) <= 1:
            raise ConfigError(f"{name}={getattr(failures, name)} must be in [0, 1]")
    for name, value in vars(failures).items():
        if value is not None and value < 0:
            raise ConfigError(f"{name}={value} must not be negative")
    if failures.save_interval_seconds == 0:
        raise ConfigError("save_interval_seconds=0 would save all the time; give a positive number")
