"""Choosing among an op's implementations by measurement: verified first, then timed, then remembered.

    off    built-in rules choose, among what the compiler sees into; nothing is read, nothing is timed
    auto   what was measured before decides (the user's store, then the table shipped for the device), else the rules
    full   what was not measured before is measured now, and stored

An op takes part by what it declares (`fxopt.ops`): implementations whose `when` has no objection are candidates, each
with its own guess at a configuration and with those that its `configs` names. A candidate that computes something else
than the reference is never timed. Timing is in `fxopt.tune.timing`, what is remembered in `fxopt.tune.store`.

A fusion that is worth it only where some kernel is faster asks `may_pay` before it rewrites: what was measured answers,
else what its implementations say of themselves (`pays`).
"""

from fxopt.tune.choice import Chosen as Chosen
from fxopt.tune.choice import choose as choose
from fxopt.tune.choice import may_pay as may_pay
from fxopt.tune.session import Session as Session
from fxopt.tune.session import current as current
from fxopt.tune.session import session as session
