"""What pydantic found -> faults in words: the key, its value, the nearest known key, what would follow, and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from orchestrator.spec.errors import Fault, Keys, dotted, nearest
from orchestrator.spec.job import Job
from orchestrator.spec.sections import OffloadSpec, Section
from orchestrator.spec.values import FILES, KEYS, NUMBER, TEXT

OTHER_NAMES: dict[str, Keys] = {
    "lr": ("training", "optimizer", "learning_rate"),
    "max_lr": ("training", "optimizer", "learning_rate"),
    "wd": ("training", "optimizer", "weight_decay"),
    "eps": ("training", "optimizer", "epsilon"),
    "clip_grad": ("training", "optimizer", "gradient_clip"),
    "max_grad_norm": ("training", "optimizer", "gradient_clip"),
    "warmup": ("training", "schedule", "warmup_steps"),
    "max_steps": ("training", "steps"),
    "num_steps": ("training", "steps"),
    "dtype": ("training", "precision"),
    "eval_every": ("training", "evaluate_every"),
    "batch_size": ("batch", "global_batch_size"),
    "seq_len": ("batch", "sequence_length"),
    "seq_length": ("batch", "sequence_length"),
    "max_seq_len": ("batch", "sequence_length"),
    "zero": ("strategy", "zero_stage"),
    "dp": ("strategy", "data_parallel_degree"),
    "tp": ("strategy", "tensor_parallel_degree"),
    "tensor_parallel": ("strategy", "tensor_parallel_degree"),
    "tensor_parallel_size": ("strategy", "tensor_parallel_degree"),
    "pp": ("strategy", "pipeline_parallel_degree"),
    "pipeline_parallel": ("strategy", "pipeline_parallel_degree"),
    "pipeline_parallel_size": ("strategy", "pipeline_parallel_degree"),
    "micro_batch": ("strategy", "micro_batch_size"),
    "gradient_checkpointing": ("strategy", "activation_checkpointing"),
    "recompute": ("strategy", "activation_checkpointing"),
    "accumulation": ("strategy", "gradient_accumulation_steps"),
    "grad_accum": ("strategy", "gradient_accumulation_steps"),
    "save_every": ("checkpoint", "every"),
    "gpus": ("cluster", "gpus_per_node"),
    "num_gpus": ("cluster", "gpus_per_node"),
}
"""What other trainers call a field -> the keys that lead to it here."""
OTHER_WORDS = {
    "cpu": "host",
    "ram": "host",
    "disk": "nvme",
    "ssd": "nvme",
    "float32": "fp32",
    "float64": "fp64",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
}
"""What other trainers call a value -> the word for it here."""

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def keys_of(error: ErrorDetails) -> Keys:
    """The keys that lead to a finding."""
    return tuple(part for part in error["loc"] if str(part) not in (KEYS, TEXT, NUMBER, FILES))


def fault_of(error: ErrorDetails) -> Fault:
    """One finding of pydantic as a fault."""
    path = keys_of(error)
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(path, section_at(path[:-1]), value)
    if kind == "missing":
        return _missing(path)
    name = f"`{dotted(path)}`"
    if value is None:
        optional = "" if _required(path) else ", or delete the line"
        return Fault(path=path, message=f"{name} has no value", fix=f"write one, as in `{example(path)}`{optional}")
    if kind == "literal_error":
        return _choice(path, value)
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = f"{words} {context[key]:g}"
        message = f"{name} is {show(value)}; it must be {bound}"
        return Fault(path=path, message=message, fix=f"write a value {bound}, as in `{example(path)}`")
    if kind in ("too_short", "string_too_short"):
        return Fault(path=path, message=f"{name} is empty", fix=f"write something, as in `{example(path)}`")
    if kind == "too_long":
        return Fault(path=path, message=f"{name} holds too many values", fix=f"write it as in `{example(path)}`")
    if kind == "string_pattern_mismatch":
        rule = "it names a folder: 1 to 63 of a-z, 0-9, dot, underscore and hyphen, a letter or digit first"
        return Fault(path=path, message=f"{name} is {show(value)}; {rule}", fix=f"write `{path[-1]}: {_tame(value)}`")
    if kind == "shardwise":
        return Fault(path=path, message=f"{name} is {show(value)}; it {context['message']}", fix=context["fix"])
    return _wrong_type(path, value, _WANTED.get(kind, "a value of the right kind"))


def _missing(path: Keys) -> Fault:
    if isinstance(path[-1], int):
        where = dotted(path[:-1])
        return Fault(path=path, message=f"`{where}` holds too few values", fix=f"write it as in `{example(path)}`")
    what = f"a `{dotted(path[:-1])}`" if len(path) > 1 else "a job"
    message = f"`{dotted(path)}` is missing; {what} needs it"
    return Fault(path=path, message=message, fix=f"add `{example(path)}`, with your value", of_key=True)


def _wrong_type(path: Keys, value: Any, wanted: str) -> Fault:
    said, section = f"`{dotted(path)}` is {show(value)}", section_at(path)
    if wanted == _WANTED["model_type"] and section is not None:
        words, some = section.bare_words, ", ".join(list(known_keys(section))[:4])
        guess = nearest(value, words.replace(",", " ").split()) if isinstance(value, str) and words else None
        if section is OffloadSpec and OTHER_WORDS.get(str(value), value) in ("host", "nvme"):
            place = OTHER_WORDS.get(str(value), value)
            what = "`offload` says what leaves the GPU, and then where to"
            return Fault(path=path, message=f"{said}; {what}", fix=f"write `offload: {{optimizer: {place}}}`")
        fix = f"did you mean {guess}?" if guess else f"write keys such as {some}, each on an indented line of its own"
        return Fault(path=path, message=f"{said}, {f'neither {words} nor' if words else 'not'} {wanted}", fix=fix)
    fix = f"write {wanted}, as in `{example(path)}`"
    if isinstance(value, str) and wanted in ("a whole number", "a number"):
        fix = _number_fix(value) or fix
    elif isinstance(value, str) and wanted == "true or false" and value.lower() in ("yes", "no", "on", "off"):
        fix = f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    elif wanted == "text" and isinstance(value, (int, float)) and not isinstance(value, bool):
        fix = f"put it in quotes: '{value}'"
    return Fault(path=path, message=f"{said}, not {wanted}", fix=fix)


def _number_fix(text: str) -> str | None:
    bare = text.strip().replace("_", "").replace(",", "").replace(" ", "")
    if re.fullmatch(r"[-+]?0\d+", bare):
        return f"a number does not start with 0: write {int(bare)}"
    if re.fullmatch(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?", bare):
        return f"write it without quotes and separators: {bare}"
    scaled = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbBtT])", bare)
    if scaled:
        return f"write {scaled[1]}e{ {'k': 3, 'm': 6, 'b': 9, 't': 12}[scaled[2].lower()] }"
    return None


def _choice(path: Keys, value: Any) -> Fault:
    choices, said = choices_of(path), f"`{dotted(path)}` is {show(value)}"
    if choices == [1]:
        what = "version of the format" if path[-1] == "version" else "value"
        return Fault(path=path, message=f"{said}; the only {what} today is 1", fix=f"write `{path[-1]}: 1`")
    words = [flow(choice) for choice in choices]
    listed, other = ", ".join(words), OTHER_WORDS.get(str(value))
    guess = other if other in words else nearest(value, words)
    fix = f"did you mean {guess}? known: {listed}" if guess else f"write one of {listed}"
    return Fault(path=path, message=f"{said}, which is none of the known words", fix=fix)


def _unknown(path: Keys, owner: type[Section] | None, value: Any) -> Fault:
    key, known = str(path[-1]), list(known_keys(owner)) if owner else []
    where = f"`{dotted(path[:-1])}`" if len(path) > 1 else "a job"
    homes = [f"`{home}`" if home else "the top level" for home in _homes(key)]
    guess = nearest(key, known)
    if key == "<<":
        fix = "YAML 1.2 has no merge keys: write the keys out"
    elif homes:  # before a guess: a key that is right elsewhere lost its indentation, not its spelling
        fix = f"`{key}` belongs in {' or '.join(homes)}: {'indent it under that line' if len(path) == 1 else 'move it there'}"
    elif key in OTHER_NAMES:
        fix = _in_our_words(OTHER_NAMES[key], path[:-1], value)
    elif guess:
        fix = f"did you mean `{guess}`?"
    else:
        fix = f"delete it; known here: {', '.join(known)}"
    return Fault(
        path=path, message=f"unknown key `{key:.60}` in {where}; nothing would come of it", fix=fix, of_key=True
    )


def _in_our_words(ours: Keys, here: Keys, value: Any) -> str:
    """The fix for a key that is named otherwise here: its name, and its section where that is another one."""
    if ours[:-1] == here:
        return f"did you mean `{ours[-1]}`?"
    if ours == ("cluster", "gpus_per_node"):
        count = value if type(value) is int and value > 0 else 8
        sized = f"{count // 8}x8" if count > 8 and count % 8 == 0 else f"1x{count}"
        return (
            f"the cluster says how many: write `cluster: GPU-{sized}` (nodes x GPUs of each), as in `a100-80gb-{sized}`"
        )
    return f"did you mean `{ours[-1]}`? it belongs in `{dotted(ours[:-1])}`"


def _homes(key: str) -> list[str]:
    homes: dict[type[Section], str] = {}  # a section that stands in several places is named by its first
    for path, section in all_sections():
        if key in known_keys(section):
            homes.setdefault(section, dotted(path))
    return list(homes.values())


def all_sections(section: type[Section] = Job, path: Keys = ()) -> Iterator[tuple[Keys, type[Section]]]:
    """Every section of a job and the keys that lead to it."""
    yield path, section
    for key, field in known_keys(section).items():
        inner = _section_of(section.model_fields[field].annotation)
        if inner:
            yield from all_sections(inner, (*path, key))


def known_keys(section: type[Section]) -> dict[str, str]:
    """Key of the YAML -> name of the field."""
    return {field.alias or name: name for name, field in section.model_fields.items()}


def section_at(path: Keys) -> type[Section] | None:
    """The section that the keys lead to."""
    section: type[Section] | None = Job
    for part in path:
        field = known_keys(section).get(str(part)) if section else None
        section = _section_of(section.model_fields[field].annotation) if section and field else None
    return section


def _section_of(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_of(part))), None)


def field_at(path: Keys) -> FieldInfo | None:
    """The field that the keys lead to; of an item, that of its list."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    owner = section_at(path[:-1])
    name = known_keys(owner).get(str(path[-1])) if owner and path else None
    return owner.model_fields[name] if owner and name else None


def choices_of(path: Keys) -> list[Any]:
    """The words that a field, or an item of it, may be."""
    field = field_at(path)
    return list(literals(field.annotation)) if field else []


def literals(annotation: Any) -> Iterator[Any]:
    """The words in an annotation."""
    for part in get_args(annotation):
        if isinstance(part, (str, bool, int)):
            yield part
        elif part is not Ellipsis:
            yield from literals(part)


def _required(path: Keys) -> bool:
    field = field_at(path)
    return field is not None and field.is_required()


def example(path: Keys) -> str:
    """The line of the job that gives the field a value."""
    field, name = field_at(path), next((part for part in reversed(path) if isinstance(part, str)), "")
    return f"{name}: {flow(field.examples[0])}" if field and field.examples else f"{name}: ..."


def flow(value: Any) -> str:
    """A plain value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(flow(part) for part in value) + "]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def show(value: Any) -> str:
    """A value as the message shows it, short."""
    if isinstance(value, dict):
        return "a group of keys"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = flow(value) if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tame(value: Any) -> str:
    """The nearest text that may name a run."""
    tame = re.sub(r"[^a-z0-9._-]+", "-", str(value).lower()).strip("-._")[:63]
    return tame or "my-run"
