"""The command: verbs by table, exit codes, errors without tracebacks."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from orchestrator import cli
from orchestrator.cli import VERBS, main
from orchestrator.cli.errors import CommandError, ExitCode, answer
from orchestrator.spec import SpecError

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "examples" / "opt-125m.yaml")


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("DONE", 0), ("FAILED", 1), ("BAD_INPUT", 2), ("DOES_NOT_FIT", 3), ("LOST_CLUSTER", 4), ("CANCELLED", 5),
        ("NOT_FOUND", 6), ("NOT_ALLOWED", 7),
    ],
)  # fmt: skip
def test_exit_codes_are_those_of_the_design(code, number):
    assert ExitCode[code] == number


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_module_its_command_and_a_line_of_help(verb):
    module, attribute, text = VERBS[verb]
    assert isinstance(getattr(importlib.import_module(module), attribute), click.Command)
    assert text.endswith(".")


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out and text in out for verb, (_, _, text) in VERBS.items())


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert "Verbs:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("shardwise ")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from orchestrator.cli import main; main(['--help']); "
        "print('heavy', sorted({'torch', 'ray', 'pandas', 'numpy', 'rich', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy []"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "validate", "nope.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.BAD_INPUT
    assert done.stderr == "Error: there is no such job\n  nope.yaml\n  to fix: check the path\n"


@pytest.mark.parametrize(
    ("argv", "what", "fix"),
    [
        (["valdate"], "there is no verb `valdate`", "did you mean `shardwise validate`?"),
        (["xyzzy"], "there is no verb `xyzzy`", "known: validate, "),
        (["validate"], "Missing argument 'JOB'", "see `shardwise validate --help`"),
        (["validate", JOB, "--jsn"], "No such option", "see `shardwise validate --help`"),
        (["--nonsense"], "No such option", "see `shardwise --help`"),
    ],
)
def test_a_wrong_command_line_is_bad_input_with_advice(capsys, argv, what, fix):
    assert main(argv) == ExitCode.BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith(f"Error: {what}")
    assert f"to fix: {fix}" in err


def test_validate_says_what_the_job_is(capsys):
    assert main(["validate", JOB]) == 0
    assert "opt-125m, 125,239,296 parameters" in capsys.readouterr().out


def test_validate_speaks_json(capsys, tmp_path):
    assert main(["validate", JOB, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (note,) = said.pop("notes")
    assert said == {"valid": True, "name": "opt-125m", "errors": []}
    assert note["message"].endswith("corpus/*.txt matches no file")
    (tmp_path / "bad.yaml").write_text("version: 1\n")
    assert main(["validate", str(tmp_path / "bad.yaml"), "--json"]) == ExitCode.BAD_INPUT
    said = json.loads(capsys.readouterr().out)
    assert not said["valid"]
    assert {"file", "line", "column", "message", "fix"} == said["errors"][0].keys()


def test_validate_shows_every_fault_in_the_shape_of_an_error(capsys, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        "version: 2\nname: a\nmodel: opt-125m\nbatch: {global_batch_size: 8, sequence_length: 1}\ntsk: sft\n"
    )
    assert main(["validate", str(file)]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == (
        f"Error: `version` is 2; the only version of the format today is 1\n  {file}:1:10\n  to fix: write `version: 1`\n"
        f"Error: unknown key `tsk` in a job; nothing would come of it\n  {file}:5:1\n  to fix: did you mean `task`?\n"
        f"2 errors in {file}\n"
    )


def test_a_file_full_of_faults_does_not_flood_the_terminal(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("".join(f"k{number}: 1\n" for number in range(60)))
    assert main(["validate", str(tmp_path / "bad.yaml")]) == ExitCode.BAD_INPUT
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("64 errors in " + str(tmp_path / "bad.yaml") + ", the first 50 shown")
    )


def test_schema_prints_the_schema(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$schema"].endswith("2020-12/schema")


def fails_with(error: BaseException) -> click.Command:
    @click.command("fail")
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (
            CommandError("no run `a`", fix="shardwise list", exit_code=ExitCode.NOT_FOUND, where="runs/a"),
            6, "Error: no run `a`\n  runs/a\n  to fix: shardwise list\n",
        ),
        (CommandError("just so"), 2, "Error: just so\n"),
        (KeyboardInterrupt(), 5, "Error: cancelled\n"),
        (click.Abort(), 5, "Error: cancelled\n"),
    ],
)  # fmt: skip
def test_a_verb_that_cannot_go_on_says_so_and_nothing_else(monkeypatch, capsys, error, code, err):
    monkeypatch.setattr(cli.Verbs, "get_command", lambda *_: fails_with(error))
    assert main(["validate"]) == code
    assert capsys.readouterr().err.lstrip() == err  # click ends the line of the ^C


def test_a_fault_of_ours_is_one_line_and_a_log_with_the_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli.Verbs, "get_command", lambda *_: fails_with(ZeroDivisionError("one\ntwo")))
    assert main(["validate"]) == ExitCode.FAILED
    err = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert err.startswith("Error: ZeroDivisionError: one\n")
    assert "Traceback" not in err
    assert str(log) in err
    assert "Traceback (most recent call last)" in log.read_text()


def test_a_plan_error_is_shown_in_the_same_shape(monkeypatch, capsys):
    class PlanError(ValueError):
        pass

    fake = type(sys)("orchestrator.planner.plan")
    fake.PlanError = PlanError
    monkeypatch.setitem(sys.modules, "orchestrator.planner.plan", fake)
    assert answer(PlanError("opt-13b does not fit\n  needs 72.0 GiB\n  to fix: zero_stage: 3")) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "Error: opt-13b does not fit\n  needs 72.0 GiB\n  to fix: zero_stage: 3\n"


def test_a_spec_error_is_bad_input_wherever_it_comes_from(capsys):
    error = SpecError([{"file": "a", "line": 1, "column": 2, "message": "m", "fix": "f"}])
    assert answer(error) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "Error: m\n  a:1:2\n  to fix: f\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m orchestrator.cli schema | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
