"""A run held against the limits of its server, before its first step.

A server checks every call as it comes, and what an optimiser sends grows with the probes that it remembers: a run that
begins well may be refused dozens of steps later, with an update that no server will take.
"""

from __future__ import annotations

from itertools import count

from zoact_remote.errors import InvalidValue
from zoact_remote.estimators import Estimator
from zoact_remote.optimizers import Optimizer
from zoact_remote.wire import Limits


def check_limits(limits: Limits, estimator: Estimator, optimizer: Optimizer, steps: int) -> None:
    """Raise InvalidValue if one of the next steps would be refused.

    Args:
        limits: of the server.
        estimator: of the run.
        optimizer: of the run, as it is now.
        steps: to come, at least 1.

    """
    probes = len(estimator.ask(count().__next__).probes)
    if probes > limits.max_probes:
        raise InvalidValue("probes", f"the server takes max_probes ({limits.max_probes}) a step at most, got {probes}")
    terms = optimizer.most_terms(probes, steps)
    if terms <= limits.max_terms:
        return
    comes_to = f"comes to updates of {terms} terms, beyond the server's max_terms ({limits.max_terms})"
    room = limits.max_terms // optimizer.most_terms(1, steps)
    if room:
        raise InvalidValue("probes", f"{probes} a step with {optimizer} {comes_to}: take {room} at most")
    raise InvalidValue("optimizer", f"{optimizer} {comes_to}: have it remember fewer steps")
