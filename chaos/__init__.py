"""The library's own chaos suite: real servers, real faults, every scenario bare and guarded, on every driver.

=================  ==========================================================================
``scenarios/``     what is shown, one file a subject
``workloads``      callers and what they saw: open-loop arrivals, one record a call
``drivers``        one engine on one driver, behind one shape, so that a scenario is written once
``bodies``         what a caller does with its connection
``pair``           a primary and its synchronous standby, which change places
``strikes``        one fault after another, drawn from a seed
``invariants``     what holds after every scenario
``profiles``       sizes: ``short`` (minutes, the default) and ``nightly``
``report``         both results of each scenario: ``report/chaos.json`` and a table
=================  ==========================================================================

``pytest chaos`` runs it; ``--chaos-profile nightly`` makes it long, ``--chaos-seed`` makes it other.
It uses the public package only, as a user's own suite would; nothing may import it.
"""
