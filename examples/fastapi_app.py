"""FastAPI: ``async def`` routes on asyncpg, ``def`` routes on psycopg, one database.

::

    DATABASE_URL=postgresql+asyncpg://app:secret@db/app uvicorn --app-dir examples fastapi_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import Engine, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import resilientdb as rdb
from resilientdb.health import HealthApp
from resilientdb.middleware.asgi import ResilienceMiddleware
from resilientdb.middleware.starlette import install

url = make_url(os.environ["DATABASE_URL"])
web = rdb.Resilience.profile("web")
engine = rdb.create_async_engine(url, resilience=web)
# A ``def`` route runs in a thread, and an AsyncEngine belongs to the event loop.
sync_engine = rdb.create_engine(url.set(drivername="postgresql+psycopg"), resilience=web)
engines: list[Engine | AsyncEngine] = [engine, sync_engine]
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class NewItem(BaseModel):
    name: str


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:  # a real project runs a migration instead
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()
    sync_engine.dispose()


app = FastAPI(lifespan=lifespan)
install(app, engines)
app.add_middleware(ResilienceMiddleware, engine=engines, deadline=2.0, exempt=["/internal"])
# app.add_middleware(CORSMiddleware, ...) comes after: added later is outside.
app.mount("/internal", HealthApp(engines))


@app.get("/items")
async def items() -> list[str]:
    async with sessions() as session:
        return list(await session.scalars(select(Item.name).order_by(Item.id)))


@app.post("/items", status_code=201)
async def add(new: NewItem) -> int:
    async with sessions.begin() as session:  # committed before the response is sent
        item = Item(name=new.name)
        session.add(item)
        await session.flush()
        return item.id


@app.get("/count")
def count() -> int:
    with Session(sync_engine) as session:
        return session.scalars(select(func.count()).select_from(Item)).one()
