"""Flask on psycopg.

::

    DATABASE_URL=postgresql+psycopg://app:secret@db/app flask --app examples/flask_app.py run
"""

import os

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue
from sqlalchemy import text
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import resilientdb as rdb
from resilientdb.health import WSGIHealthApp
from resilientdb.middleware.flask import install

engine = rdb.create_engine(os.environ["DATABASE_URL"], resilience=rdb.Resilience.profile("web"))
with engine.begin() as connection:  # a real project runs a migration instead
    connection.execute(text("CREATE TABLE IF NOT EXISTS item (id serial PRIMARY KEY, name text NOT NULL)"))

app = Flask(__name__)
install(app, engine, deadline=2.0)
app.wsgi_app = DispatcherMiddleware(  # type: ignore[method-assign]
    app.wsgi_app, {"/internal": WSGIHealthApp(engine)}
)


@app.get("/items")
def items() -> ResponseReturnValue:
    with engine.connect() as connection:
        return jsonify(connection.scalars(text("SELECT name FROM item ORDER BY id")).all())


@app.post("/items")
def add() -> ResponseReturnValue:
    with engine.begin() as connection:
        inserted = connection.execute(
            text("INSERT INTO item (name) VALUES (:name) RETURNING id"), {"name": request.json["name"]}
        )
        number = inserted.scalar_one()
    return jsonify(number), 201
