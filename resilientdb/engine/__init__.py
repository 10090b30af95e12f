"""The only room that knows SQLAlchemy: making engines, the pool, the nodes behind it, transactions.

One checkout, top to bottom: ``pool`` (the door: node, permit, slot, connection) → ``hooks`` (deadline and
outcome of each statement) → ``pool`` again (outcome recorded, slot handed on). ``plugin`` builds it, ``cluster``
and ``node`` outlive the pool (``Engine.dispose()`` replaces it), ``control`` shows it. May import ``runtime``,
``policy`` and the plain data; imported by the side rooms (middleware, health, command line, testing).
"""
