"""Should the number of connections in use follow the database's latency? A simulation, and PostgreSQL itself.

``python -m tests.benchmarks.adaptive [simulation] [live]``; under four minutes. What it answers is written in
``docs/benchmarks.md``; it measures an option that the library does not have, so it is no part of the other
benchmarks.

``controllers`` are the candidates, pure; ``simulation`` is a database in virtual time, with the pool's own admission
(``policy.saturation``) in front of it; ``live`` lets the same candidates drive a real pool.
"""
