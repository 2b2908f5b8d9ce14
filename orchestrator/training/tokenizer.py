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
FILE, DESCRIPTION = "tokenizer.json", "description.json"
KEPT = "tokenizer"
"""Folder in a run's folder."""
# In this order, where tokenizer_config.json names none: GPT-2, OPT and LLaMA, LLaMA 3, Gemma, GLM.
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<eop>")
MIN_BPE = 257


class Tokenizer(ABC):
    """What training and sampling need of a tokenizer."""

    kind: str
    vocab_size: int
    """One more than the largest id."""
    end_of_text: int
    """Stands after every document."""
    fingerprint: str
    """Two tokenizers with the same one give the same ids."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of each text, without any special token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; what is no whole character becomes U+FFFD, and special tokens are left out."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Leaves in a folder what load_saved needs besides describe()."""

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
    """Ids 0 to 255 are the bytes of UTF-8, 256 the end of a text."""

    kind, vocab_size, end_of_text, fingerprint = "byte", 257, 256, "byte-1"

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        """Nothing to keep."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    kind = "hugging_face"

    def __init__(self, inner: Any, end_of_text: int) -> None:
        self.inner, self.end_of_text = inner, end_of_text
        inner.no_truncation()
        inner.no_padding()
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        digest = hashlib.sha256(f"{inner.to_str()}\n{end_of_text}".encode())
        self.fingerprint = digest.hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode([int(token) for token in ids], skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        partial = directory / f"{FILE}.partial"
        self.inner.save(str(partial))
        publish(partial, directory / FILE)


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
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"data.tokenizer: {file} is no tokenizer that `tokenizers` can read: {error}") from None
    return HuggingFaceTokenizer(inner, _end_of_text(inner, folder))


def load_saved(directory: Path, description: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a prepared folder, by its index's description. DataError where it is not that one."""
    if description["kind"] == "byte":
        return ByteTokenizer()
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(directory / FILE))
    except Exception as error:
        raise DataError(f"{directory / FILE} cannot be read: {error}; run `shardwise prepare` again") from None
    tokenizer = HuggingFaceTokenizer(inner, int(description["end_of_text"]))
    if tokenizer.fingerprint != description["fingerprint"]:
        raise DataError(f"{directory / FILE} was altered after the text was tokenized; run `shardwise prepare` again")
    return tokenizer


def keep_tokenizer(index: DataIndex, run_directory: Path) -> None:
    """Leaves in a run's folder the tokenizer that its tokens are of: a sample needs it when the tokens are long gone."""
    folder = run_directory / KEPT
    folder.mkdir(parents=True, exist_ok=True)
    load_saved(index.directory, index.tokenizer).save(folder)
    write_atomically(folder / DESCRIPTION, json.dumps(dict(index.tokenizer)))


def kept_tokenizer(run_directory: Path) -> Tokenizer:
    """What keep_tokenizer left. DataError where it left nothing."""
    folder = run_directory / KEPT
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{folder} holds no tokenizer: a run keeps its own there when it starts") from None
    return load_saved(folder, description)


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


def _byte_level(model: Any) -> Any:
    import tokenizers

    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return inner


def _end_of_text(inner: Any, folder: Path) -> int:
    """The id that ends a document: what the folder's configuration names, else a name that is known."""
    named = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token = json.loads((folder / file).read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        named.append(token["content"] if isinstance(token, dict) and "content" in token else token)
    for token in (*named, *_KNOWN_ENDS):
        if isinstance(token, str) and (found := inner.token_to_id(token)) is not None:
            return int(found)
    raise DataError(
        f"data.tokenizer: {folder} names no end of a text: put its token into tokenizer_config.json as eos_token"
    )
