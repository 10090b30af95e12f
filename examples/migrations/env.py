"""Alembic's env.py. Two lines differ from the one that ``alembic init`` writes: how the engine is made."""

import os

from alembic import context
from sqlalchemy import NullPool

import resilientdb as rdb

# "batch": hours of work are worth minutes of waiting. A migration is never run again by the library.
engine = rdb.create_engine(
    os.environ["DATABASE_URL"], poolclass=NullPool, resilience=rdb.Resilience.profile("batch")
)

with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=None)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
