"""Text <-> token ids: bytes, any Hugging Face tokenizer, or a byte-level BPE trained on the job's own text."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clusters.files import publish, write_atomically
from orchestrator.training.data import DataError, DataIndex

END_OF_TEXT = "<|endoftext|>"
FILE, CONFIG, DESCRIPTION = "tokenizer.json", "tokenizer_config.json", "description.json"
TEMPLATE = "chat_template.jinja"
MAX_CONFIG_BYTES = 2**24
KEPT = "tokenizer"
"""Folder in a run's folder."""
# In this order, where tokenizer_config.json names none: GPT-2, OPT and LLaMA, LLaMA 3, Gemma, GLM.
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<eop>")
MIN_BPE = 257


class Tokenizer(ABC):
    """A tokenizer as training and sampling need it."""

    kind: str
    vocab_size: int
    """One more than the largest id."""
    end_of_text: int
    """Stands after every document."""
    fingerprint: str
    """Two tokenizers with the same one give the same ids."""
    special_ids: Mapping[str, int | None]
    """bos_token_id, eos_token_id, pad_token_id, as a model's config.json has them."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of each text, without any special token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; what is no whole character becomes U+FFFD, and special tokens are left out."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Leaves in a folder what load_saved needs besides describe()."""

    @abstractmethod
    def export(self, directory: Path, model_max_length: int) -> None:
        """Writes into a folder what transformers' AutoTokenizer reads."""

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.encode_batch([text])[0]]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "fingerprint": self.fingerprint,
        }


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 the end of a text.

    256 stands between the texts of a stream, so it is the beginning of a text too, as in GPT-2; there is no padding."""

    kind, vocab_size, end_of_text, fingerprint = "byte", 257, 256, "byte-1"
    special_ids: Mapping[str, int | None] = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": None}

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        """Nothing to keep."""

    def export(self, directory: Path, model_max_length: int) -> None:
        """Writes a byte-level BPE without merges, whose characters for bytes have the bytes as ids."""
        import tokenizers

        inner = _byte_level(tokenizers.models.BPE(vocab=_characters_of_bytes(), merges=[]))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.add_special_tokens([END_OF_TEXT])
        HuggingFaceTokenizer(inner, self.end_of_text).export(directory, model_max_length)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    kind = "hugging_face"

    def __init__(self, inner: Any, end_of_text: int, config: Mapping[str, Any] | None = None) -> None:
        """Args:
        config: the tokenizer_config.json that came with it.
        """
        self.inner, self.end_of_text, self.config = inner, end_of_text, dict(config or {})
        inner.no_truncation()
        inner.no_padding()
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        digest = hashlib.sha256(f"{inner.to_str()}\n{end_of_text}".encode())
        if template := self.config.get("chat_template"):  # it decides the tokens of conversations
            digest.update(json.dumps(template, sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()
        bos, pad = self._named("bos_token"), self._named("pad_token")
        # Where no token begins a text, the one that ended the text before it does.
        self.special_ids = {
            "bos_token_id": end_of_text if bos is None else bos,
            "eos_token_id": end_of_text,
            "pad_token_id": pad,
        }

    def _named(self, word: str) -> int | None:
        """The id of a token that the configuration names."""
        token = _content(self.config.get(word))
        return None if token is None else self.inner.token_to_id(token)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        try:
            encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            raise DataError(f"the tokenizer cannot encode the text: {_fault_of_the_library(error)}") from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode([int(token) for token in ids], skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        partial = directory / f"{FILE}.partial"
        self.inner.save(str(partial))
        publish(partial, directory / FILE)
        if self.config:
            write_atomically(directory / CONFIG, json.dumps(self.config, indent=1))

    def export(self, directory: Path, model_max_length: int) -> None:
        ours = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model_max_length}
        named = {
            f"{word}_token": self.inner.id_to_token(token)
            for word in ("bos", "eos", "pad")
            if (token := self.special_ids[f"{word}_token_id"]) is not None
        }
        HuggingFaceTokenizer(self.inner, self.end_of_text, {**ours, **self.config, **named}).save(directory)


def load_tokenizer(name: str, base: Path) -> Tokenizer:
    """`byte`, or the path of a tokenizer.json or of a folder with one (or with vocab.json and merges.txt)."""
    if name == "byte":
        return ByteTokenizer()
    path = base / Path(name).expanduser()
    if not path.exists():
        raise DataError(f"data.tokenizer: {path} does not exist; write byte, {{bpe: 8192}} or a tokenizer's folder")
    folder, file = (path, path / FILE) if path.is_dir() else (path.parent, path)
    import tokenizers

    try:
        if file.is_file():
            inner = tokenizers.Tokenizer.from_file(str(file))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            inner = _byte_level(tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        else:
            raise DataError(
                f"data.tokenizer: {folder} holds neither {FILE} nor vocab.json with merges.txt; "
                f"save it with AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})"
            )
    except DataError:
        raise
    except BaseException as error:
        told = _fault_of_the_library(error)
        raise DataError(f"data.tokenizer: {file} is no tokenizer that `tokenizers` can read: {told}") from None
    config = _config(folder)
    return HuggingFaceTokenizer(inner, _end_of_text(inner, folder, config), config)


def load_saved(directory: Path, description: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a prepared folder, by its index's description. DataError where it is not that one."""
    wanted = {"kind": str, "end_of_text": int, "fingerprint": str}
    if any(type(description.get(key)) is not kind for key, kind in wanted.items()):
        raise DataError(f"{directory} does not say which tokenizer it holds; run `shardwise prepare` again")
    if description["kind"] == "byte":
        return ByteTokenizer()
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(directory / FILE))
    except BaseException as error:
        told = _fault_of_the_library(error)
        raise DataError(f"{directory / FILE} cannot be read: {told}; run `shardwise prepare` again") from None
    tokenizer = HuggingFaceTokenizer(inner, description["end_of_text"], _config(directory))
    if tokenizer.fingerprint != description["fingerprint"]:
        raise DataError(f"{directory / FILE} was altered after the text was tokenized; run `shardwise prepare` again")
    return tokenizer


def keep_tokenizer(index: DataIndex, run_directory: Path, of_weights: Mapping[str, Any] | None = None) -> None:
    """Leaves in a run's folder the tokenizer that its tokens are of: a sample needs it when the tokens are long gone.

    Args:
        of_weights: what the folder that training started from says of special ids and of generating (weights.spoken_of).
    """
    folder = run_directory / KEPT
    folder.mkdir(parents=True, exist_ok=True)
    load_saved(index.directory, index.tokenizer).save(folder)
    write_atomically(folder / DESCRIPTION, json.dumps({**index.tokenizer, "of_weights": dict(of_weights or {})}))


def kept_tokenizer(run_directory: Path) -> Tokenizer:
    """Return what keep_tokenizer left. DataError where it left nothing."""
    return load_saved(run_directory / KEPT, _description(run_directory))


def tokenizer_of_run(folder: Path) -> str:
    """Return what data.tokenizer has to say for a run's tokenizer, by the run's folder or one of its checkpoints. DataError where
    it left none."""
    for run in (folder, folder.parent.parent):
        if (run / KEPT / DESCRIPTION).is_file():
            return "byte" if _description(run).get("kind") == "byte" else str((run / KEPT).resolve())
    raise DataError(
        f"model.checkpoint: {folder} is in no run that keeps its tokenizer; name it: data.tokenizer: FOLDER"
    )


def kept_of_weights(run_directory: Path) -> dict[str, Any]:
    """Return what keep_tokenizer was told of the weights that the run started from. Empty: nothing."""
    return dict(_description(run_directory).get("of_weights", {}))


def _description(run_directory: Path) -> dict[str, Any]:
    folder = run_directory / KEPT
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        description = None
    if not isinstance(description, dict) or not isinstance(description.get("of_weights", {}), dict):
        raise DataError(f"{folder} holds no tokenizer: a run keeps its own there when it starts")
    return description


def _fault_of_the_library(error: BaseException) -> str:
    """Return what `tokenizers` says of an error of its own: it raises bare Exception, and a panic of its Rust code is not even
    one. Raises all else again."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return str(error)
    raise error


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size ids, the end of a text among them."""
    if vocab_size < MIN_BPE:
        raise DataError(
            f"data.tokenizer: bpe is {vocab_size}; it needs at least {MIN_BPE} (256 bytes, the end of a text)"
        )
    import tokenizers

    inner = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(inner, inner.token_to_id(END_OF_TEXT))


def check_vocabulary(tokenizer_vocab_size: int, model_vocab_size: int) -> None:
    """DataError where the tokenizer has ids that the model has no row for."""
    if tokenizer_vocab_size > model_vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer_vocab_size} tokens and the model's vocab_size is {model_vocab_size}: "
            f"set model.vocab_size to at least {tokenizer_vocab_size} "
            f"({-(-tokenizer_vocab_size // 8) * 8} divides by 8), or choose another data.tokenizer"
        )


def unfilled(tokenizer_vocab_size: int, model_vocab_size: int) -> str:
    """A warning where the model has many more rows than the tokenizer has tokens. Empty: it has about as many."""
    if model_vocab_size <= tokenizer_vocab_size + max(128, tokenizer_vocab_size // 10):  # what padding adds
        return ""
    return (
        f"the tokenizer has {tokenizer_vocab_size:,} tokens and the model's vocab_size is {model_vocab_size:,}: "
        f"{model_vocab_size - tokenizer_vocab_size:,} rows of its embedding stand for nothing. Choose the tokenizer that the "
        "model was made for, a larger one (data.tokenizer: {bpe: N}), or a smaller model.vocab_size"
    )


def _characters_of_bytes() -> dict[str, int]:
    """The printable character that stands for a byte in byte-level tokenizers (GPT-2's table) -> the byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _byte_level(model: Any) -> Any:
    import tokenizers

    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return inner


def _config(folder: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json says, completed by special_tokens_map.json; without what names code to be run."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG):
        file = folder / name
        if not file.is_file():
            continue
        try:
            if file.stat().st_size > MAX_CONFIG_BYTES:
                raise DataError(
                    f"data.tokenizer: {file} is larger than {MAX_CONFIG_BYTES} bytes: this is no configuration"
                )
            found = json.loads(file.read_text(encoding="utf-8"))
            json.dumps(found, ensure_ascii=False).encode("utf-8")  # JSON may spell half a character, which is no text
        except (OSError, json.JSONDecodeError, UnicodeError, RecursionError) as error:
            raise DataError(f"data.tokenizer: {file} cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise DataError(f"data.tokenizer: {file} holds no keys")
        config |= found
    # transformers writes a chat template into a file of its own since version 4.52.
    template = folder / TEMPLATE
    if "chat_template" not in config and template.is_file():
        try:
            if template.stat().st_size > MAX_CONFIG_BYTES:
                raise DataError(
                    f"data.tokenizer: {template} is larger than {MAX_CONFIG_BYTES} bytes: this is no template"
                )
            config["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"data.tokenizer: {template} cannot be read: {error}") from None
    return {word: value for word, value in config.items() if word not in ("auto_map", "custom_pipelines")}


def _content(token: Any) -> str | None:
    """The text of a token, which a configuration gives as it is or in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _end_of_text(inner: Any, folder: Path, config: Mapping[str, Any]) -> int:
    """The id that ends a document: what the folder's configuration names, else a name that is known."""
    for token in (_content(config.get("eos_token")), *_KNOWN_ENDS):
        if token is not None and (found := inner.token_to_id(token)) is not None:
            return int(found)
    raise DataError(
        f"data.tokenizer: {folder} names no end of a text: put its token into tokenizer_config.json as eos_token"
    )
