"""The HTTP API of the service: jobs, their events, steps and logs, and the nodes. docs/reference/service.md lists the calls.

Every call answers JSON. What is refused is answered {message, fix, errors}; `errors` are a job's faults with line and column.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from orchestrator.control import controller as control
from orchestrator.control.admission import LOCAL, User, user_of
from orchestrator.control.folder import RunFolder, RunRefused
from orchestrator.control.lifecycle import DRIVEN, Ask, State
from orchestrator.control.store import Conflict, NotFound, Refused, Row, Store
from orchestrator.spec.errors import SpecError
from orchestrator.spec.source import MAX_BYTES

if TYPE_CHECKING:
    from orchestrator.control.controller import Controller

MOST_BODY_BYTES = 2 * MAX_BYTES
"""A job of the largest size in JSON, whose line ends take two bytes."""
MOST_LOG_BYTES = 256 * 1024
NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
PAGE, MOST = 100, 1000

Name = Annotated[str, PathParameter(pattern=NAME)]
After = Annotated[int, Query(ge=0, lt=2**53)]
Limit = Annotated[int, Query(ge=1, le=MOST)]


class Submission(BaseModel):
    """A job as its YAML text."""

    job: str = Field(max_length=MAX_BYTES)


class JobView(BaseModel):
    """One job. Times are Unix seconds."""

    id: int
    name: str
    user: str
    state: State
    cause: str
    """Why it is in that state; of a job that waits, why it waits."""
    asked: Ask | None
    priority: int
    preemptible: bool
    num_gpus: int | None
    submitted_unix_s: float
    since_unix_s: float
    step: int
    num_steps: int | None
    loss: float | None
    tokens_per_second_per_gpu: float | None
    directory: str


class JobPage(BaseModel):
    jobs: list[JobView]
    next_after: int | None
    """`after` of the next page; null: this is the last."""


class EventView(BaseModel):
    id: int
    time_unix_s: float
    kind: str
    cause: str
    details: dict[str, Any]


class EventPage(BaseModel):
    events: list[EventView]
    next_after: int | None


class LogPage(BaseModel):
    text: str
    next_offset: int
    """`offset` of what comes after it, in bytes."""


class NodeView(BaseModel):
    name: str
    gpu: str
    num_gpus: int
    num_free: int
    cordoned: bool
    jobs: list[str]


class NodePage(BaseModel):
    nodes: list[NodeView]


class Health(BaseModel):
    status: Literal["ok", "failing"]
    cause: str | None
    version: str
    jobs: dict[str, int]


class Problem(BaseModel):
    message: str
    fix: str
    errors: list[dict[str, Any]] = []


ANSWERS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": what}
    for code, what in {
        400: "The request is not what it must be.",
        401: "No token, or one of nobody.",
        403: "The user's role does not allow it.",
        404: "No such job, log or node.",
        409: "The name stands for another job, or the job's state does not allow it.",
        413: "The body is too large.",
        422: "The job or a parameter has faults.",
    }.items()
}


class Denied(Exception):
    """An answer that is not the one asked for."""

    def __init__(self, code: int, message: str, fix: str) -> None:
        super().__init__(message)
        self.code, self.message, self.fix = code, message, fix


def make_app(controller: Controller) -> FastAPI:
    """Return the API of a controller's site, as an ASGI application."""
    from importlib.metadata import version

    app = FastAPI(title="Shardwise", version=version("shardwise"), docs_url=None, redoc_url=None)
    app.state.controller = controller
    add = app.add_api_route
    reads, acts = [Depends(caller)], [Depends(actor)]
    add("/v1/health", health, dependencies=reads, responses=ANSWERS)
    add(
        "/v1/jobs",
        submit,
        methods=["POST"],
        dependencies=acts,
        responses=ANSWERS,
        response_model=JobView,
        status_code=201,
    )
    add("/v1/jobs", list_jobs, dependencies=reads, responses=ANSWERS)
    add("/v1/jobs/{name}", job, dependencies=reads, responses=ANSWERS)
    add("/v1/jobs/{name}/events", events, dependencies=reads, responses=ANSWERS)
    add("/v1/jobs/{name}/logs", logs, dependencies=reads, responses=ANSWERS)
    for verb, act in {"pause": pause, "resume": resume, "cancel": cancel}.items():
        add(f"/v1/jobs/{{name}}/{verb}", act, methods=["POST"], dependencies=acts, responses=ANSWERS)
    add("/v1/nodes", nodes, dependencies=reads, responses=ANSWERS)
    for verb, change in {"cordon": cordon, "uncordon": uncordon}.items():
        add(f"/v1/nodes/{{name}}/{verb}", change, methods=["POST"], dependencies=acts, responses=ANSWERS)
    _handle_errors(app)
    app.add_middleware(SmallBodies)
    return app


# Who calls ------------------------------------------------------------------------------------------------------------


def caller(request: Request) -> User:
    """Return who calls. Without users, everybody on this machine is one, by a loopback name: no page of a browser is."""
    users = request.app.state.controller.site.users
    if not users:
        host = request.headers.get("host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost", "[::1]"):
            raise Denied(403, "the service answers to 127.0.0.1, localhost and ::1 alone", "call it by one of these")
        return LOCAL
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    user = user_of(token.strip(), users) if scheme.lower() == "bearer" else None
    if user is None:
        raise Denied(401, "no token, or one of nobody", "set SHARDWISE_TOKEN to the token that you were given")
    return user


def actor(request: Request, user: Annotated[User, Depends(caller)]) -> User:
    """Return who calls, where it may act; a body of another type, as a page of a browser can send it, is refused."""
    if user.role == "viewer":
        raise Denied(403, f"{user.name} may only read", "ask for the role user")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", ""):
        raise Denied(400, f"the body is {kind}", "send application/json")
    if request.headers.get("origin"):
        raise Denied(403, "pages of a browser may not act here", "use shardwise's commands")
    return user


Actor = Annotated[User, Depends(actor)]


def _own(store: Store, name: str, user: User) -> Row:
    row = store.job(name)
    if user.role != "admin" and row.user != user.name:
        raise Denied(403, f"{name} is a job of {row.user}", "ask its user, or an admin")
    return row


# Jobs -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(request: Request) -> Iterator[Store]:
    with contextlib.closing(request.app.state.controller.site.store()) as store:
        yield store


def health(request: Request) -> Health:
    """Whether the controller works, and how many jobs are in each state."""
    with opened(request) as store:
        fault = request.app.state.controller.fault
        status: Literal["ok", "failing"] = "ok" if fault is None else "failing"
        return Health(status=status, cause=fault, version=request.app.version, jobs=store.counts())


def submit(request: Request, submission: Submission, user: Actor) -> JSONResponse:
    """Submit a job: 201 where it is new, 200 where it is there already with the same content."""
    with opened(request) as store:
        row, new = control.submit(request.app.state.controller.site, store, submission.job, user)
    return JSONResponse(_view(row, request).model_dump(mode="json"), status_code=201 if new else 200)


def list_jobs(
    request: Request,
    state: Annotated[list[State] | None, Query()] = None,
    after: After = 0,
    limit: Limit = PAGE,
) -> JobPage:
    """A page of jobs, in the order of their submission."""
    with opened(request) as store:
        rows = store.jobs(state, after=after, limit=limit + 1)
    more = len(rows) > limit
    return JobPage(jobs=[_view(row, request) for row in rows[:limit]], next_after=rows[limit - 1].id if more else None)


def job(request: Request, name: Name) -> JobView:
    """One job."""
    with opened(request) as store:
        return _view(store.job(name), request)


def events(request: Request, name: Name, after: After = 0, limit: Limit = PAGE) -> EventPage:
    """What happened to a job, oldest first."""
    with opened(request) as store:
        found = store.events(name, after=after, limit=limit + 1)
    more = len(found) > limit
    return EventPage(
        events=[EventView(**event) for event in found[:limit]], next_after=found[limit - 1]["id"] if more else None
    )


def logs(
    request: Request,
    name: Name,
    rank: Annotated[int, Query(ge=0, lt=10**6)] = 0,
    offset: Annotated[int, Query(ge=0, lt=2**53)] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST_LOG_BYTES)] = MOST_LOG_BYTES,
) -> LogPage:
    """What a rank printed, from a byte on. A rank that has printed nothing yet has an empty log."""
    with opened(request) as store:
        row = store.job(name)
    path = RunFolder(Path(row.folder)).logs / f"rank-{rank:04d}.log"
    if row.num_gpus is not None and rank >= row.num_gpus:
        raise Denied(404, f"{name} has no rank {rank}", f"ranks 0 to {row.num_gpus - 1}")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except FileNotFoundError:
        data = b""
    return LogPage(text=data.decode(errors="replace"), next_offset=offset + len(data))


def _view(row: Row, request: Request) -> JobView:
    cause = row.cause
    if row.state == State.PLANNED:
        cause = request.app.state.controller.reasons.get(row.name, "waits for the jobs before it")
    return JobView(
        id=row.id,
        name=row.name,
        user=row.user,
        state=State(row.state),
        cause=cause,
        asked=None if row.asked is None else Ask(row.asked),
        priority=row.priority,
        preemptible=bool(row.preemptible),
        num_gpus=row.num_gpus,
        submitted_unix_s=row.submitted_s,
        since_unix_s=row.since_s,
        step=row.step,
        num_steps=row.num_steps,
        loss=row.loss,
        tokens_per_second_per_gpu=row.tokens_per_second_per_gpu,
        directory=row.folder,
    )


def _ask(request: Request, name: str, user: User, act: Callable[[Store], Row]) -> JobView:
    with opened(request) as store:
        _own(store, name, user)
        return _view(act(store), request)


def pause(request: Request, name: Name, user: Actor) -> JobView:
    """Stop a job after a checkpoint; it goes on when it is resumed."""
    return _ask(request, name, user, lambda store: store.ask(name, Ask.PAUSE, f"paused by {user.name}", time.time()))


def resume(request: Request, name: Name, user: Actor) -> JobView:
    """Put a paused or failed job back into the queue."""
    return _ask(request, name, user, lambda store: store.resume(name, f"resumed by {user.name}", time.time()))


def cancel(request: Request, name: Name, user: Actor) -> JobView:
    """End a job for good."""
    return _ask(
        request, name, user, lambda store: store.ask(name, Ask.CANCEL, f"cancelled by {user.name}", time.time())
    )


# Nodes ----------------------------------------------------------------------------------------------------------------


def nodes(request: Request) -> NodePage:
    """The machines that jobs run on."""
    site = request.app.state.controller.site
    with opened(request) as store:
        held, cordons = store.gpus(), store.cordons()
        names = {row.id: row.name for row in store.jobs(DRIVEN)}
    own = {job for (node, _), job in held.items() if node == site.node}
    return NodePage(
        nodes=[
            NodeView(
                name=site.node,
                gpu=site.cluster.accelerator.name,
                num_gpus=site.cluster.gpus_per_node,
                num_free=site.cluster.gpus_per_node - sum(node == site.node for node, _ in held),
                cordoned=site.node in cordons,
                jobs=sorted(names[job] for job in own if job in names),
            )
        ]
    )


NodeName = Annotated[str, PathParameter(min_length=1, max_length=253)]


def cordon(request: Request, name: NodeName, user: Actor) -> NodePage:
    """Start no more jobs on a node; those that run there go on."""
    return _cordon(request, name, user, cordoned=True)


def uncordon(request: Request, name: NodeName, user: Actor) -> NodePage:
    """Start jobs on a node again."""
    return _cordon(request, name, user, cordoned=False)


def _cordon(request: Request, name: str, user: User, *, cordoned: bool) -> NodePage:
    if user.role != "admin":
        raise Denied(403, f"{user.name} may not act on nodes", "ask an admin")
    site = request.app.state.controller.site
    if name != site.node:
        raise Denied(404, f"there is no node {name:.80}", f"known: {site.node}")
    with opened(request) as store:
        store.cordon(name, cordoned=cordoned)
    return nodes(request)


# Errors and limits ----------------------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI) -> None:
    def answer(code: int, message: str, fix: str = "", errors: Any = ()) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if code == 401 else None
        return JSONResponse({"message": message, "fix": fix, "errors": list(errors)}, status_code=code, headers=headers)

    def of_ours(request: Request, error: Exception) -> JSONResponse:
        match error:
            case SpecError():
                count = len(error.errors)
                return answer(422, f"the job has {count} fault{'' if count == 1 else 's'}", "", error.errors)
            case RunRefused():
                return answer(422, error.message, error.fix)
            case Denied():
                return answer(error.code, error.message, error.fix)
            case NotFound():
                return answer(404, error.message, error.fix)
            case Conflict() | Refused():
                return answer(409, error.message, error.fix)
            case RequestValidationError():
                faults = [{"message": f"{'.'.join(map(str, e['loc']))}: {e['msg']}", "fix": ""} for e in error.errors()]
                return answer(422, "; ".join(fault["message"] for fault in faults), "see /openapi.json", faults)
            case HTTPException() | StarletteHTTPException():
                return answer(error.status_code, str(error.detail), "see /openapi.json")
        return answer(500, "a fault of shardwise", "its log on the service's machine has the traceback")

    for kind in (SpecError, RunRefused, Denied, Refused, RequestValidationError, StarletteHTTPException, Exception):
        app.add_exception_handler(kind, of_ours)


class SmallBodies:
    """Refuses a body that is too large, by its stated length or as soon as so much has come."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        while more and len(body) <= MOST_BODY_BYTES and not (stated.isdigit() and int(stated) > MOST_BODY_BYTES):
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if more or len(body) > MOST_BODY_BYTES:
            told = {
                "message": f"the body is larger than {MOST_BODY_BYTES} bytes",
                "fix": "a job is smaller",
                "errors": [],
            }
            answer = JSONResponse(told, status_code=413, headers={"connection": "close"})
            await answer(scope, receive, send)
            return
        given = False

        async def whole() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, whole, send)
