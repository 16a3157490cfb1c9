"""The server: the pages, and the routes by which they read and write."""

from __future__ import annotations

import sqlite3
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from sysdag.errors import LabelError
from sysdag.files.atomic import free_beside
from sysdag.labelling.guard import Access, Guard
from sysdag.labelling.records import CHOICES, Choice, Queue, checked_name
from sysdag.labelling.store import LabelStore
from sysdag.labelling.summary import summarize
from sysdag.labelling.view import clean, comparison, single
from sysdag.traces.trace import Trace

_PAGES = {
    "/": ("label.html", "text/html"),
    "/summary": ("summary.html", "text/html"),
    "/label.js": ("label.js", "text/javascript"),
    "/summary.js": ("summary.js", "text/javascript"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}

Name = Annotated[str, Field(min_length=1, max_length=200)]
RequestName = Annotated[str, Field(min_length=8, max_length=64)]
Number = Annotated[int, Field(ge=0, lt=2**63)]  # what SQLite can hold


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    annotator: Name


class _Label(_Body):
    pair: Number
    choice: Choice
    request: RequestName


class _Undo(_Body):
    label: Number
    request: RequestName


def create_app(store: LabelStore, trace: Trace, access: Access) -> FastAPI:
    """The server's application.

    Args:
        store: where labels go; a route answers after they are on the disk.
        trace: what its rows are numbers of.
        access: who is let in.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, access=access)

    def state(annotator: str, queue: Queue) -> dict[str, Any]:
        shows = comparison if store.settings.collect == "pairs" else single
        task = None if queue.task is None else shows(trace, store.settings.outputs, queue.task)
        return {
            "annotator": checked_name(annotator),
            "done": queue.done,
            "total": queue.total,
            "last": queue.last,
            "task": task,
        }

    @app.get("/api/session")
    def session() -> dict[str, Any]:
        settings = store.settings
        return {
            "annotators": store.annotators(), "outputs": settings.outputs, "pairs": len(store.pairs()),
            "collect": settings.collect, "choices": CHOICES[settings.collect],
        }  # fmt: skip

    @app.post("/api/queue")
    def queue(body: _Body) -> dict[str, Any]:
        return state(body.annotator, store.queue(body.annotator))

    @app.post("/api/label")
    def label(body: _Label) -> dict[str, Any]:
        return state(body.annotator, store.label(body.annotator, body.pair, body.choice, body.request))

    @app.post("/api/undo")
    def undo(body: _Undo) -> dict[str, Any]:
        return state(body.annotator, store.undo(body.annotator, body.label, body.request))

    @app.get("/api/summary")
    def summary() -> dict[str, Any]:
        return summarize(store).to_dict()

    @app.exception_handler(LabelError)
    async def refused(request: Request, error: LabelError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=409)

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without what was sent, which may have no UTF-8 form.
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return JSONResponse({"error": clean(told)}, status_code=422)

    @app.exception_handler(sqlite3.Error)
    async def not_saved(request: Request, error: sqlite3.Error) -> JSONResponse:
        told = f"Nothing was saved: {store.path} cannot be written to ({error}; {free_beside(store.path)})."
        return JSONResponse({"error": told}, 503)

    folder = resources.files("sysdag.labelling") / "page"
    for path, (name, kind) in _PAGES.items():
        app.add_api_route(path, _constant((folder / name).read_bytes(), kind), methods=["GET"])
    return app


def _constant(content: bytes, kind: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=kind)

    return page
