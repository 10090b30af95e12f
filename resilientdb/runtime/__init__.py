"""The only room that locks, waits, sleeps or starts threads: clock, context, callers, section, waiters, watchdog,
prober, keeper, breaker shell. May import ``policy`` and the plain data; imported by ``engine`` and everything above
it.
"""
