"""What a whole fleet does to a database that comes back: a discrete-event simulation in virtual time.

``world``      the clock and the events
``database``   a server that can be dead, cold, busy and thrashing
``fleet``      processes with a pool, a breaker, retries and a prober each
``systems``    what is compared: the library's own policies, parts of them, and what programs do without it
``herd``       one run, and what is measured of it
``plots``      drawings of it, as plain SVG

``python -m tests.simulation`` runs it and prints a table; ``--docs`` writes docs/herd.md's table and drawings.
"""
