"""The database falls silent, or is gone, and comes back: who is answered when.

Requests are *open-loop*: 50 a second, whether or not earlier ones were answered, each in a thread or task of its own,
as in a server that takes what comes. A system runs in a process of its own behind Toxiproxy; the process that breaks
the proxy and heals it reads what became of each request when all is over, on the one monotonic clock of the machine.

``hang`` and ``heal`` are the two reports; ``episodes`` runs one system through its outages; ``service`` is the other
process, started with ``python -m``; ``clients`` are the systems compared; ``verdict`` turns requests into figures.
"""
