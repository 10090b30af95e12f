"""SQLModel's own tutorial application. The engine is turned on by the URL, so its code does not change.

::

    DATABASE_URL='postgresql+psycopg://app:secret@db/app?plugin=resilientdb&resilientdb_profile=web' \
        uvicorn --app-dir examples sqlmodel_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlmodel import Field, Session, SQLModel, create_engine, select

from resilientdb.health import HealthApp
from resilientdb.middleware.asgi import ResilienceMiddleware
from resilientdb.middleware.starlette import install

engine = create_engine(os.environ["DATABASE_URL"])


class NewItem(SQLModel):
    name: str


class Item(NewItem, table=True):
    id: int | None = Field(default=None, primary_key=True)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    SQLModel.metadata.create_all(engine)  # a real project runs a migration instead
    yield
    engine.dispose()


app = FastAPI(lifespan=lifespan)
install(app, engine)
app.add_middleware(ResilienceMiddleware, engine=engine, deadline=2.0, exempt=["/internal"])
app.mount("/internal", HealthApp(engine))


@app.get("/items")
def items() -> list[str]:
    with Session(engine) as session:
        return list(session.exec(select(Item.name).order_by("id")))


@app.post("/items", status_code=201)
def add(new: NewItem) -> int | None:
    with Session(engine) as session:
        item = Item.model_validate(new)
        session.add(item)
        session.commit()
        return item.id
