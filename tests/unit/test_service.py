"""The service's API: who may do what, what a job may name, pages and limits; no request is answered with a fault of ours."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import closing
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from clusters.catalog import load_cluster
from orchestrator.cli import main
from orchestrator.control import supervise
from orchestrator.control.admission import User, users_in
from orchestrator.control.controller import Controller, Site, alone
from orchestrator.control.folder import RunRefused
from orchestrator.control.lifecycle import Ask, State
from orchestrator.control.run import RunResult
from orchestrator.control.service import MOST_BODY_BYTES, make_app
from orchestrator.control.supervisor import Ending
from orchestrator.spec.errors import SpecError

JOB = """version: 1
name: small
model: {family: opt, num_layers: 2, hidden_size: 32, num_heads: 2, vocab_size: 264, max_position: 64}
data: {train: [corpus/*.txt]}
batch: {global_batch_size: 4, sequence_length: 64}
training: {steps: 30, precision: fp32}
cluster: a100-80gb-1x2
"""
TOKENS = {"ada": "token-of-ada", "bob": "token-of-bob", "eve": "token-of-eve"}
USERS = tuple(
    User(name=name, role=role, token_sha256=hashlib.sha256(TOKENS[name].encode()).hexdigest())
    for name, role in (("ada", "admin"), ("bob", "user"), ("eve", "viewer"))
)


def site_of(folder: Path, users: tuple[User, ...] = ()) -> Site:
    root = (folder / "root").resolve()
    (root / "corpus").mkdir(parents=True)
    (root / "corpus" / "a.txt").write_text("a text")
    site = Site(root=root, state=root / ".shardwise", cluster=load_cluster("a100-80gb-1x8"), users=users)
    site.state.mkdir()
    site.store().close()
    return site


@pytest.fixture
def site(tmp_path):
    return site_of(tmp_path)


@pytest.fixture
def client(site):
    with TestClient(make_app(Controller(site=site)), base_url="http://127.0.0.1") as made:
        yield made


@pytest.fixture
def shared(tmp_path):
    with TestClient(make_app(Controller(site=site_of(tmp_path, USERS))), base_url="http://service") as made:
        yield made


def as_user(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name]}"}


def submit(client, text: str = JOB, **more):
    return client.post("/v1/jobs", json={"job": text}, **more)


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_a_job_is_submitted_once_and_another_content_under_its_name_is_a_conflict(client):
    first = submit(client)
    assert (first.status_code, first.json()["state"]) == (201, "queued")
    again = submit(client, JOB.replace("  ", " ") + "# the same job in other words\n")
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    other = submit(client, JOB.replace("steps: 30", "steps: 31"))
    assert other.status_code == 409
    assert other.json()["fix"] == "give this job another name"
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1


def test_jobs_and_events_come_in_pages(client):
    for number in range(5):
        assert submit(client, JOB.replace("small", f"job-{number}")).status_code == 201
    seen, after = [], 0
    while after is not None:
        page = client.get("/v1/jobs", params={"limit": 2, "after": after}).json()
        seen += [job["name"] for job in page["jobs"]]
        after = page["next_after"]
    assert seen == [f"job-{number}" for number in range(5)]
    client.post("/v1/jobs/job-1/pause")
    assert [job["name"] for job in client.get("/v1/jobs", params={"state": "paused"}).json()["jobs"]] == ["job-1"]
    first = client.get("/v1/jobs/job-1/events", params={"limit": 1}).json()
    rest = client.get("/v1/jobs/job-1/events", params={"after": first["next_after"]}).json()
    assert [event["kind"] for event in first["events"] + rest["events"]] == ["queued", "paused"]
    assert rest["events"][0]["cause"] == "paused by local"
    for query in ("limit=0", "limit=1001", "after=-1", "state=asleep"):
        assert client.get(f"/v1/jobs?{query}").status_code == 422


def test_pause_resume_and_cancel_are_answered_with_the_job(client):
    submit(client)
    for verb, state in (("pause", "paused"), ("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert client.post(f"/v1/jobs/small/{verb}").json()["state"] == state
    assert client.post("/v1/jobs/small/resume").status_code == 409
    assert client.post("/v1/jobs/nobody/cancel").status_code == 404


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("version: [", "not YAML"),
        ("- a\n- b", "a job is a mapping"),
        ("", "empty"),
        ("a: &a [*a]", "holds itself"),
        ("a: !!python/object/apply:os.system [id]", "makes an object"),
        (JOB + "colour: red\n", "colour"),
        (JOB.replace("steps: 30, ", ""), "no length"),
        (JOB.replace("corpus/*.txt", "nowhere.txt"), "nowhere.txt does not exist"),
        (JOB + "recovery: {on_loss_spike: rollback}\n", "nothing looks for a jump"),
    ],
)
def test_a_job_with_faults_is_refused_with_where_and_what(client, text, told):
    answer = submit(client, text)
    assert answer.status_code == 422
    assert told in answer.text
    assert "Traceback" not in answer.text


def test_a_fault_of_a_job_has_line_and_column(client):
    (fault,) = submit(client, JOB + "colour: red\n").json()["errors"]
    assert (fault["file"], fault["line"], fault["column"]) == ("job.yaml", 8, 1)


def test_run_says_that_the_queue_is_the_services(tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(JOB + "queue: {priority: 3, max_wait: 2h}\n")
    assert main(["run", str(tmp_path / "job.yaml")]) == 2  # for want of GPUs
    assert "queue     max_wait, priority: acts under `shardwise serve` alone" in capsys.readouterr().out


def test_the_queue_of_a_job_is_what_the_queue_decides_by(client, site):
    submit(client, JOB + "queue: {priority: 3, preemptible: false, max_wait: 2h}\n")
    with closing(site.store()) as store:
        row = store.job("small")
    assert (row.priority, row.preemptible, row.max_wait_s) == (3, 0, 7200.0)


# Paths ----------------------------------------------------------------------------------------------------------------

OUTSIDE = ["/etc/passwd", "../secret", "corpus/../../secret", "~/x", "~root/x", ".shardwise/x", "corpus/.hidden", "link",
           "link/x", "*/../../x", "/", "a\\0b", "x" * 5000, "loop"]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path[:20])
@pytest.mark.parametrize(
    "field",
    [
        "data: {{train: [{}]}}", "data: {{train: [corpus/a.txt], validation: [{}]}}", "model: {{path: {}}}", "model: {}",
        "data: {{train: [corpus/a.txt], tokenizer: {}}}", "cluster: {}", "checkpoint: {{directory: {}}}",
    ],
)  # fmt: skip
def test_no_path_of_a_job_leaves_the_root(client, site, monkeypatch, field, path):
    (site.root.parent / "secret").write_text("secret")
    (site.root / "link").symlink_to(site.root.parent)
    (site.root / "loop").symlink_to("loop")
    replaced = field.partition(":")[0]
    kept = "".join(line + "\n" for line in JOB.splitlines() if line.partition(":")[0] != replaced)
    opened: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(str(self)) or real(self, *a, **k))
    answer = submit(client, kept + field.format(f'"{path}"') + "\n")
    assert answer.status_code == 422, path
    assert "not a path inside the service's root" in answer.text
    assert [file for file in opened if not file.startswith(str(site.state))] == []


def test_paths_in_the_root_are_taken_absolute_or_relative(client, site):
    for number, path in enumerate(("corpus/a.txt", "corpus", f"{site.root}/corpus/*.txt", "'**/*.txt'")):
        text = JOB.replace("small", f"job-{number}").replace("corpus/*.txt", path)
        assert submit(client, text).status_code == 201, path


# Who may do what ------------------------------------------------------------------------------------------------------

ROLES = [
    # (method, path, ada the admin, bob the user, eve the viewer)
    ("GET", "/v1/health", 200, 200, 200),
    ("GET", "/v1/jobs", 200, 200, 200),
    ("GET", "/v1/jobs/small", 200, 200, 200),
    ("GET", "/v1/jobs/small/logs", 200, 200, 200),
    ("POST", "/v1/jobs/small/pause", 200, 403, 403),
    ("POST", "/v1/jobs/of-bob/pause", 200, 200, 403),
    ("POST", "/v1/jobs/of-bob/resume", 200, 200, 403),
    ("POST", "/v1/nodes/nowhere/cordon", 404, 403, 403),
]


@pytest.mark.parametrize(("method", "path", "ada", "bob", "eve"), ROLES)
def test_a_user_acts_on_its_own_jobs_an_admin_on_all_and_a_viewer_on_none(shared, method, path, ada, bob, eve):
    assert submit(shared, headers=as_user("ada")).status_code == 201
    assert submit(shared, JOB.replace("small", "of-bob"), headers=as_user("bob")).status_code == 201
    for name, code in (("eve", eve), ("bob", bob), ("ada", ada)):
        assert shared.request(method, path, headers=as_user(name)).status_code == code, name
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "Bearer "},
    ):
        answer = shared.request(method, path, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_a_viewer_submits_nothing_and_a_user_no_more_than_its_quota(tmp_path):
    few = (USERS[2], User(name="bob", token_sha256=USERS[1].token_sha256, jobs=1))
    with TestClient(make_app(Controller(site=site_of(tmp_path, few)))) as client:
        assert submit(client, headers=as_user("eve")).status_code == 403
        assert submit(client, headers=as_user("bob")).status_code == 201
        more = submit(client, JOB.replace("small", "more"), headers=as_user("bob"))
        assert (more.status_code, "may have 1" in more.text) == (409, True)


def test_without_users_only_this_machines_programs_are_answered(client):
    assert submit(client, headers={"Host": "evil.example"}).status_code == 403  # a page whose name leads to 127.0.0.1
    assert submit(client, headers={"Origin": "http://evil.example"}).status_code == 403
    plain = client.post("/v1/jobs", content=json.dumps({"job": JOB}), headers={"Content-Type": "text/plain"})
    assert plain.status_code in (400, 422)
    assert client.post("/v1/jobs/small/cancel", headers={"Origin": "null"}).status_code == 403
    assert client.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("users: []", "names no users"),
        ("users: [{name: ada}]", "name and token_sha256 are needed"),
        ("users: [{name: ada, token_sha256: abc}]", "not 64 hexadecimal digits"),
        (f"users: [{{name: ada, token_sha256: {'0' * 63}a, role: boss}}]", "has the role 'boss'"),
        (f"users: [{{name: ada, token_sha256: {'0' * 63}a, gpus: -1}}]", "`gpus` of ada is -1"),
        (
            f"users: [{{name: ada, token_sha256: {'0' * 63}a}}, {{name: ada, token_sha256: {'0' * 63}b}}]",
            "the same name",
        ),
        (
            f"users: [{{name: a, token_sha256: {'0' * 63}a}}, {{name: b, token_sha256: {'0' * 63}a}}]",
            "same token_sha256",
        ),
    ],
)
def test_a_users_file_with_faults_is_refused(tmp_path, text, told):
    (tmp_path / "users.yaml").write_text(text)
    with pytest.raises(SpecError, match=told):
        users_in(tmp_path / "users.yaml")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "there are no users"),
        (["--host", "10.0.0.1", "--users", "users.yaml"], "tokens would travel in the clear"),
        (["--host", "::", "--users", "users.yaml"], "tokens would travel in the clear"),
        (["--tls-cert", "a.pem"], "go together"),
        (["--root", "nowhere"], "the root is no folder"),
    ],
)
def test_serve_refuses_to_be_open(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users.yaml").write_text(f"users: [{{name: ada, token_sha256: {'0' * 63}a}}]")
    assert main(["serve", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["users.yaml"]


def test_two_controllers_never_work_on_one_state(site):
    with alone(site), pytest.raises(RunRefused, match="another `shardwise serve`"), alone(site):
        pass


# Limits and faults ----------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused(client):
    assert submit(client, "x" * MOST_BODY_BYTES).status_code == 413
    assert submit(client, "x" * (MOST_BODY_BYTES // 2 + 1)).status_code == 422

    def endless():
        for _ in range(MOST_BODY_BYTES // 1000 + 2):
            yield b" " * 1000

    assert client.post("/v1/jobs", content=endless(), headers={"Content-Type": "application/json"}).status_code == 413


def test_text_that_is_not_unicode_is_refused(client):
    for body in (b'{"job": "\\ud800"}', b'{"job": "\xff"}', b'{"job": 1}', b"{", b"[]", b"null", b""):
        answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), body


def test_a_log_is_read_from_any_byte_on(client, site):
    submit(client)
    logs = site.root / "runs" / "small" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank-0001.log").write_text("one\ntwo\n")
    page = client.get("/v1/jobs/small/logs", params={"rank": 1, "limit": 4}).json()
    assert page == {"text": "one\n", "next_offset": 4}
    assert client.get("/v1/jobs/small/logs", params={"rank": 1, "offset": 4}).json()["text"] == "two\n"
    assert client.get("/v1/jobs/small/logs", params={"rank": 0}).json() == {"text": "", "next_offset": 0}
    for name in ("..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "small%2f..%2f.."):
        assert client.get(f"/v1/jobs/{name}/logs").status_code in (404, 422)


def test_no_request_that_the_schema_allows_or_forbids_is_a_fault_of_ours(site):
    """Every operation of the OpenAPI document, with generated parameters and bodies, right and wrong ones."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    app = make_app(Controller(site=site))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses = set()

    for result in schema.get_all_operations():

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=result.ok().as_strategy())
        def one(case):
            answer = case.call(headers={"Host": "127.0.0.1"})
            statuses.add(answer.status_code)
            assert answer.status_code < 500, answer.text
            assert isinstance(json.loads(answer.content), dict)

        one()
    assert {200, 404, 422} <= statuses


# The controller -------------------------------------------------------------------------------------------------------


def test_a_job_whose_plan_cannot_run_here_fails_with_the_reason(client, site):
    """The site is one of GPUs that this machine does not have."""
    submit(client)
    with closing(site.store()) as store:
        Controller(site=site).tick(store, time.time())
    job = client.get("/v1/jobs/small").json()
    assert job["state"] == "failed"
    assert "this machine has" in job["cause"]


def test_a_supervisor_that_is_dead_loses_its_job_at_once_and_after_three_times_the_job_fails(site):
    store = site.store()
    store.submit(name="a", user="ada", text=JOB, digest="1", now=1.0, folder=str(site.root / "runs" / "a"))
    controller = Controller(site=site)
    for number in range(3):
        now = time.time()
        store.move("a", State.PLANNED, "planned", now, num_gpus=2, num_nodes=1)
        token = store.start("a", [("n", 0)], "free", now, lease_s=1000.0)
        store.renew("a", token, now + 1000.0, holder="999999:1.0")
        controller._take_from_lost(store, now)
        row = store.job("a")
        assert (row.state, row.token) == ("queued" if number < 2 else "failed", token + 1)
    assert "3 times before it trained" in row.cause
    store.close()


@pytest.mark.parametrize(
    ("kind", "asked", "becomes"),
    [
        ("finished", None, State.SUCCEEDED),
        ("finished", Ask.CANCEL, State.SUCCEEDED),
        ("stopped", Ask.CANCEL, State.CANCELLED),
        ("stopped", Ask.PAUSE, State.PAUSED),
        ("stopped", Ask.PREEMPT, State.QUEUED),
        ("stopped", None, State.QUEUED),  # the machine goes down
        ("failed", Ask.PAUSE, State.FAILED),
        ("lost", None, State.FAILED),
    ],
)
def test_what_a_job_becomes_by_how_its_run_ended(kind, asked, becomes):
    result = RunResult(folder=None, ending=Ending(kind=kind, step=3, cause="why"), num_steps=9, metrics_url=None)
    assert supervise.outcome(result, asked)[0] is becomes


def test_a_supervisor_that_is_fenced_starts_nothing(site):
    store = site.store()
    store.submit(name="a", user="ada", text=JOB, digest="1", now=1.0)
    store.move("a", State.PLANNED, "planned", 1.0, num_gpus=2)
    token = store.start("a", [("n", 0)], "free", 1.0, lease_s=1.0)
    store.lost("a", token, State.QUEUED, "silent", 5.0)
    store.close()
    assert supervise.main([str(site.database), "a", str(token), str(site.root)]) == 1
    assert not (site.root / "runs").exists()
    assert os.listdir(site.root / "corpus") == ["a.txt"]
