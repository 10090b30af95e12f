"""The only room that locks, waits, sleeps or starts threads: clock, context, breaker shell, waiters,
watchdog, prober. May import ``policy`` and the plain data; imported by ``engine`` and everything above it.
"""
