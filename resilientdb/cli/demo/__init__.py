"""``resilientdb demo``: one application twice, plain and guarded, over a PostgreSQL that is broken on purpose.

===============  ===================================================================================
``command``      the command and its options
``run``          the whole run: start, load, faults, verdict, report, and the clean-up whatever happens
``services``     PostgreSQL primary and standby, Toxiproxy, the two applications
``app``          the two applications (a process each)
``load``         the load generator (a process): the same requests to both, open loop, seeded
``client``       its HTTP client
``timeline``     the phases, how long each is, and the fault of each
``feeds``        listening to the load generator and to the guarded application
``record``       what they say, as it comes in
``series``       the same, cut into slices of time
``verdict``      figures per phase, time back to normal, the ledger, and whether the goals were met
``wording``      figures in words
``screen``       the terminal: live, or a line a second, and the final table
``report``       the HTML page (with ``charts``, ``page.css``, ``page.js``) and the JSON beside it
``interrupts``   Ctrl-C at any moment
===============  ===================================================================================

Nothing here is tuned: the guarded engine has the library's defaults, the replica, and the pool size that the
plain one has too.
"""
