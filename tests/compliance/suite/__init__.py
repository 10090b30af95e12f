"""SQLAlchemy's own dialect compliance suite, run in a process of its own by ``test_drop_in``.

Its plugin replaces much of pytest's collection, so it cannot share a process with other tests; nothing here is
named so that they would collect it. ``dialect_suite`` is the suite, ``requirements`` what PostgreSQL can do,
``plugin`` writes down what happened, ``broken`` holds plugins that must be found out.
"""
