"""What the library costs and what it gains, as ratios to plain SQLAlchemy measured in the same run.

``python -m tests.benchmarks [names…] [--json PATH] [--quick]``; ``docs/benchmarks.md`` says what each of them
means. No part of the test suite: only ``tests/test_benchmarks.py`` runs them all once, at toy size.

``measure`` (interleaved turns, ratios) and ``report`` (rows, targets, tables) know nothing of databases;
``systems`` makes the engines and pools compared; each other module is one benchmark, ``run(bench) -> Report``.
"""
