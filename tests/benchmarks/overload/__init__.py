"""More work than the database can do: what is still answered in time, and how soon all is well again.

Arrivals are *open-loop*: they come when they come, as visitors do, whether or not earlier ones were answered (a
closed loop slows down with the server and hides the collapse). Three processes: PostgreSQL; the *service*, which
holds the pool and serves requests as a threaded or an asyncio server does; and the *arrivals*, which only write
the scheduled time of each request into the service's standard input. Latency counts from the scheduled arrival,
on the one monotonic clock of the machine.

``sustained``, ``brownout`` and ``mixed`` are the loads, each with its report; ``harness`` runs one system under one
load; ``service`` and ``arrivals`` are the other two processes, started with ``python -m``; ``clients`` are the
systems compared; ``verdict`` turns a history into figures.
"""
