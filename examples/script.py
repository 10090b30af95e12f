"""A plain script: moves money from one account to another, many times, whatever the database does meanwhile.

::

    DATABASE_URL=postgresql+psycopg://app:secret@db/app python examples/script.py 100
"""

import os
import sys
import time

from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

import resilientdb as rdb

TABLES = """
    CREATE TABLE IF NOT EXISTS account (name text PRIMARY KEY, balance int NOT NULL);
    CREATE TABLE IF NOT EXISTS transfer (number int PRIMARY KEY);
    INSERT INTO account VALUES ('alice', 1000), ('bob', 0) ON CONFLICT DO NOTHING;
"""


def prepare(connection: Connection) -> None:
    connection.execute(text(TABLES))


def transfer(connection: Connection, number: int, source: str, target: str, amount: int) -> None:
    """Applied once, however often it is run: its number is stored in the same transaction."""
    new = connection.execute(
        text("INSERT INTO transfer VALUES (:number) ON CONFLICT DO NOTHING"), {"number": number}
    )
    if new.rowcount == 1:
        change = text("UPDATE account SET balance = balance + :amount WHERE name = :name")
        connection.execute(change, {"name": source, "amount": -amount})
        connection.execute(change, {"name": target, "amount": amount})


def main(transfers: int) -> None:
    engine = rdb.create_engine(os.environ["DATABASE_URL"], resilience=rdb.Resilience.profile("worker"))
    control = rdb.control(engine)
    control.on_event(lambda event: print(event, flush=True))
    control.validate()

    rdb.run_transaction(engine, prepare)
    number = 0
    while number < transfers:
        try:
            rdb.run_transaction(engine, transfer, number, "alice", "bob", 1)
        except (rdb.ResilienceError, OperationalError):
            # The library has retried what it could. CommitOutcomeUnknown is among them: whether that transfer
            # was applied nobody knows, and it need not be known, because it can be run again. Half a second:
            # while the circuit is open, asking costs the database nothing.
            time.sleep(0.5)
        else:
            number += 1
            print("transferred", number, flush=True)

    with rdb.deadline(5.0), rdb.read_only(), engine.connect() as connection:
        for name, balance in connection.execute(text("SELECT name, balance FROM account ORDER BY name")):
            print(name, balance)
    print("state:", control.state)
    engine.dispose()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
