"""One file a subject. A scenario is a workload, a fault that proves itself, and what must hold; it runs with
plain SQLAlchemy first, to show that the fault bites, then with the library.
"""
