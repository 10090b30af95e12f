"""Pure decisions: who may hold a slot, whether to try a node, how long to back off, which node to ask.

Nothing in this room locks, waits, reads a clock, draws a random number or knows SQLAlchemy: ``now`` and
``rng`` are arguments. A decision *returns* what must happen; the caller, who holds the lock, does it
afterwards. May import ``config``, ``errors``, ``events``, ``stats``; imported by ``runtime`` and ``engine``.
"""
