"""Options: plain data, checked when made, merged from call, environment, URL and profile.

Lives here: the tables of options, their ranges, the ways to read them, and who said what. May import
``resilientdb.errors`` only; any room may import it.
"""

from resilientdb.config.options import (
    Backoff,
    BreakerPolicy,
    Lifecycle,
    RetryBudget,
    RetryPolicy,
    Routing,
    SaturationQueue,
)
from resilientdb.config.profiles import PROFILES, Profile, ProfileName
from resilientdb.config.resilience import Resilience
from resilientdb.config.resolve import Explanation, Resolved, resolve
from resilientdb.config.sources import ENV_PREFIX, URL_PREFIX

__all__ = [
    "Backoff",
    "BreakerPolicy",
    "Lifecycle",
    "Resilience",
    "RetryBudget",
    "RetryPolicy",
    "Routing",
    "SaturationQueue",
    "ENV_PREFIX",
    "URL_PREFIX",
    "PROFILES",
    "Profile",
    "ProfileName",
    "Explanation",
    "Resolved",
    "resolve",
]
