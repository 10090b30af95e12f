"""The web edge: what a request may ask of the database, and what its client is told when it cannot be served.

``asgi`` and ``wsgi`` are two thin shells around the decisions in ``edge`` (the request's terms: deadline,
intent, criticality; refused on arrival or not) and ``problem`` (error → response). ``starlette`` (also
FastAPI) and ``flask`` register exception handlers, because these frameworks turn an error into a 500 before
a middleware around them could see it: **use the middleware and the handlers together.**

May import ``engine``, ``runtime``, ``policy`` and the plain data; imported by nothing in the package but the
command line. Only ``asgi`` and ``starlette`` import starlette, only ``flask`` imports flask.
"""
