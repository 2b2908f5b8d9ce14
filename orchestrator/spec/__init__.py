"""The job: one YAML file or mapping -> a frozen Job, or every fault with its place."""

from orchestrator.spec.errors import SpecError
from orchestrator.spec.job import Job
from orchestrator.spec.parse import load_job, parse_job

__all__ = ["Job", "SpecError", "load_job", "parse_job"]
