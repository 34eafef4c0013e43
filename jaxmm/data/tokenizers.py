"""Text to ids and back."""

import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxmm.errors import InputError

_SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}

# the files of a plain tokenizer; a folder of transformers has a tokenizer_config.json as well
_TOKENS, _NAMES, _CONFIG = "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"


class TextTokenizer:
    """A tokenizer of the `tokenizers` package or of transformers.

    A special token that is spelled out in the text becomes its id with those of transformers, as it does by default
    there; those of `tokenizers` split it like any other text.

    Args:
      tokenizer: a `tokenizers.Tokenizer` or a transformers tokenizer.
      special: {"bos" | "eos" | "pad": token} of a `tokenizers.Tokenizer`; those of transformers know their own.

    Attributes:
      size: the number of ids: one more than the largest.
      bos_id, eos_id, pad_id: None where there is none.
    """

    def __init__(self, tokenizer: Any, special: Mapping[str, str] | None = None):
        self._tokenizer = tokenizer
        self._plain = isinstance(tokenizer, tokenizers.Tokenizer)
        self._special = dict(special or {})
        if self._plain:
            tokenizer.encode_special_tokens = True
            ids = {name: tokenizer.token_to_id(token) for name, token in self._special.items()}
        else:
            ids = {name: getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
        self.size: int = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.bos_id, self.eos_id, self.pad_id = (ids.get(name) for name in ("bos", "eos", "pad"))

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no special token is added.

        Raises:
          InputError: for a word that a word-level tokenizer does not know, or for text that is no Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"text {text!r} is not Unicode: {error.reason}") from error
        if not self._plain:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # what `tokenizers` raises for a word without an id
            raise InputError(self._unknown_word(text)) from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ids are left out, and so are those that are not the tokenizer's."""
        known = [int(i) for i in ids if 0 <= i < self.size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the files that `load_tokenizer` reads into a folder, which is made if it is not there.

        Raises:
          InputError: if the folder cannot be written to.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".tokenizer.", dir=folder) as beside:
                self._write(Path(beside))
                written = [file.replace(folder / file.name) for file in sorted(Path(beside).iterdir())]
            # files of a tokenizer that was there before would be read as part of this one
            for name in {_TOKENS, _NAMES, _CONFIG} - {file.name for file in written}:
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot write a tokenizer to {folder}: {error.strerror or error}") from error

    def _write(self, folder: Path) -> None:
        if not self._plain:
            self._tokenizer.save_pretrained(folder)
            return
        self._tokenizer.save(str(folder / _TOKENS))
        names = {f"{name}_token": token for name, token in self._special.items()}
        (folder / _NAMES).write_text(json.dumps(names, indent=2) + "\n")

    def _unknown_word(self, text: str) -> str:
        known = set(self._tokenizer.get_vocab()) - set(self._special.values())
        word = next((word for word in _split(self._tokenizer, text) if word not in known), text)
        near = difflib.get_close_matches(word, sorted(known), n=8, cutoff=0)
        return f"unknown word {word!r} in {text!r}; of the {len(known)} known words the nearest are: {', '.join(near)}"


def word_tokenizer(words: Iterable[str]) -> TextTokenizer:
    """A tokenizer of whole words.

    Text is lower-cased and split at white space and around punctuation marks; there is no unknown token.

    Args:
      words: all that it is to know; text of several words is split.

    Returns:
      A tokenizer with the ids <pad> 0, <s> 1, </s> 2, then the words in alphabetical order.

    Raises:
      InputError: if there are no words.
    """
    if isinstance(words, str):
        raise InputError(f"words: a list of words, not the one string {words!r}")
    tokenizer = tokenizers.Tokenizer(models.WordLevel())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    known = sorted({word for text in words for word in _split(tokenizer, text)})
    if not known:
        raise InputError("a word tokenizer needs words")
    tokenizer.model = models.WordLevel({token: i for i, token in enumerate([*_SPECIAL.values(), *known])})
    tokenizer.add_special_tokens(list(_SPECIAL.values()))
    return TextTokenizer(tokenizer, _SPECIAL)


def load_tokenizer(name: str | os.PathLike) -> TextTokenizer:
    """Load a folder that was saved here or by transformers, or a tokenizer of the Hugging Face hub by its name.

    Raises:
      InputError: if it cannot be loaded.
    """
    folder = Path(name)
    if not folder.is_dir():
        return _from_transformers(str(name), "is neither a folder nor can it be loaded from the Hugging Face hub")
    if (folder / _CONFIG).is_file() or not (folder / _TOKENS).is_file():
        return _from_transformers(str(name), "is a folder without a tokenizer that can be loaded")
    try:
        return TextTokenizer(tokenizers.Tokenizer.from_file(str(folder / _TOKENS)), _special_names(folder / _NAMES))
    except Exception as error:  # `tokenizers` raises Exception itself
        raise InputError(f"tokenizer {name} cannot be loaded: {_first_line(error)}") from error


def _from_transformers(name: str, problem: str) -> TextTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(f"tokenizer {name!r} needs the package transformers, which is not installed") from error
    try:
        return TextTokenizer(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    except Exception as error:  # its files, its packages and the network fail in many ways
        raise InputError(f"tokenizer {name!r} {problem}: {_first_line(error)}") from error


def _special_names(file: Path) -> dict[str, str]:
    """{"bos": token, ...} of a special_tokens_map.json, where a token is a string or an object with its content."""
    if not file.is_file():
        return {}
    tokens = json.loads(file.read_text())
    tokens = {name: tokens.get(f"{name}_token") for name in _SPECIAL}
    return {name: t["content"] if isinstance(t, dict) else t for name, t in tokens.items() if t is not None}


def _split(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    """The words that a tokenizer sees in a text."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" :") if lines else type(error).__name__
