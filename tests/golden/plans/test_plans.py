"""Ten plans as a table: a change of the model that changes a plan is a line in a diff that somebody reads."""

from __future__ import annotations

import pytest

from tests.golden.plans.jobs import JOBS, TABLE, row


@pytest.mark.parametrize("name", JOBS)
def test_the_plan_of_a_job_is_the_one_that_was_reviewed(name: str) -> None:
    kept = {line[:42].rstrip(): line for line in TABLE.read_text(encoding="utf-8").splitlines()}
    assert row(name) == kept[name], "if this is meant: python -m tests.golden.plans.jobs, and read the diff"
