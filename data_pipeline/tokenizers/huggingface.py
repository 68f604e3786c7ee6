"""Tokenizers of the Hugging Face `tokenizers` library, from a folder with tokenizer.json, made to follow this project's
rules.

The rules: decoding restores every text, and each id stands for known bytes. Three kinds of vocabulary are supported:
byte-level (GPT-2 and its successors write each byte as a character of a fixed alphabet: Radford et al. 2019, section
2.2), that of sentencepiece (a space is U+2581, and text that was not learned becomes byte pieces), and plain
characters.

Removed from the file are: additions before, after or around a text (the first space, templates, padding, truncation),
the stripping of spaces around added words, and, if there are bytes for every text, its composition (NFC). The tokenizer
must then restore a list of difficult texts, and during preparation every document; one that lowercases, normalises or
loses text is refused.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.storage.atomic import write_bytes
from data_pipeline.tokenizers.base import (
    SPACE,
    TOKENIZER_FILE,
    Ids,
    checked_ids,
    fingerprint,
    id_dtype,
    save_description,
    segments,
    utf8,
)
from data_pipeline.tokenizers.cutting import Cutter

DEFINITION_FILE = "huggingface.json"

# Names of the special symbols: the key in tokenizer_config.json, and names to try without it. The first that exists
# and is not yet taken is used; if there is none, a new id is added.
_SPECIALS = {
    "end_of_text": ("eos_token", ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")),
    "start": ("bos_token", ("<|begin_of_text|>", "<|startoftext|>", "<|start|>", "<s>", "<bos>", "[BOS]", "[CLS]")),
    "pad": ("pad_token", ("<pad>", "<|pad|>", "[PAD]")),
    "mask": ("mask_token", ("<mask>", "<|mask|>", "[MASK]")),
}
_BATCH_BYTES = 1 << 20  # of text passed to the library at a time: it needs about 130 bytes for each

# The shortest come first: the first text that is not restored is shown.
_PROBES = [
    "a", "A", " a", "a ", "a  b", "\n", "a\n\nb", "\t", "\r\n", "\0", "1234567890", "don't stop", "e\u0301", "\u00e9",
    "\ufb01 \u00bd \uff21", SPACE, f"a{SPACE} b", "\u65e5\u672c\u8a9e", "\U0001f600 \U0001f468\u200d\U0001f469",
    "\ufeff", "\u200b\u00a0\u2028", "<0x41><s></s><unk><pad><mask><|endoftext|>[CLS][SEP]",
    "def f(x):\n    return  x ** 2\n",
    "".join(map(chr, range(0x300))), "".join(map(chr, range(0x300, 0xD800, 97))),
]  # fmt: skip


class HuggingFaceTokenizer:
    """A lossless tokenizer of the `tokenizers` library. Its ids are those of its file."""

    chat_template: str | None = None

    def __init__(self, definition: bytes, special_ids: dict[str, int], spec: str) -> None:
        """definition: the tokenizer.json that `build_huggingface` made. special_ids: start, end_of_text, pad, mask."""
        library = _library(definition, spec)
        library.encode_special_tokens = True  # text that spells a special symbol is plain text
        self._library = library
        self._definition = definition
        self.spec = spec
        self.vocab_size = size_of(library)
        self.dtype = id_dtype(self.vocab_size)
        self.start_id = special_ids["start"]
        self.end_of_text_id = special_ids["end_of_text"]
        self.pad_id = special_ids["pad"]
        self.mask_id = special_ids["mask"]
        described = json.loads(definition)
        self._spaces = _vocabulary_kind(described) == "spaces"
        self._byte_level = _vocabulary_kind(described) == "bytes"
        self._cutter = Cutter(described)
        symbols = [token.content for token in library.get_added_tokens_decoder().values() if token.special]
        self._symbols = re.compile("|".join(["<0x[0-9A-F]{2}>", *map(re.escape, symbols)]))
        self._bytes, byte_ids = _bytes_of_ids(library, described)
        self._space_ids = [byte_ids[byte] for byte in SPACE.encode() if byte in byte_ids]
        self.bytes_per_id: NDArray[np.int32] = np.array([len(piece) for piece in self._bytes], dtype=np.int32)
        self.fingerprint = fingerprint({"kind": "hf", "version": 1, **special_ids}, definition)

    def encode(self, text: str) -> NDArray[Any]:
        return self._encode([utf8(text)])[0]

    def encode_documents(
        self, stored: NDArray[np.uint8], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        end = np.array([self.end_of_text_id], dtype=self.dtype)
        stops = np.cumsum(lengths)
        spans = zip((stops - lengths).tolist(), stops.tolist(), strict=True)
        encoded = self._encode(stored[start : stop - 1].tobytes() for start, stop in spans)
        counts = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
        return np.concatenate([np.empty(0, self.dtype), *(part for ids in encoded for part in (ids, end))]), counts

    def decode(self, ids: Ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        return b"".join([self._bytes[id] for id in checked_ids(ids, self.vocab_size).tolist()])

    def save(self, directory: str | os.PathLike[str]) -> None:
        write_bytes(Path(directory) / DEFINITION_FILE, self._definition)
        save_description(self, "hf", directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], spec: str | None = None) -> HuggingFaceTokenizer:
        """Load what `save` wrote. spec: the user's name for it now; None: the saved one."""
        path = Path(directory)
        try:
            description = json.loads((path / TOKENIZER_FILE).read_bytes())
            special_ids = {name: description[f"{name}_id"] for name in _SPECIALS}
            return cls((path / DEFINITION_FILE).read_bytes(), special_ids, spec or description["spec"])
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise DataError(f"the tokenizer in {directory} is incomplete: {missing} is missing") from None
        except (KeyError, ValueError, DataError) as error:
            raise DataError(f"the tokenizer in {directory} is damaged: {error}") from error

    def _encode(self, texts: Iterable[bytes]) -> list[NDArray[Any]]:
        """Return the ids of texts of UTF-8, passing about a megabyte of them at a time to the library."""
        encoded: list[list[NDArray[Any]]] = []
        batch: list[tuple[int, str, bytes]] = []  # the number of the text, a piece of it, and the same as UTF-8
        size = 0
        for number, text in enumerate(texts):
            encoded.append([])
            for piece in self._pieces(text):
                batch.append((number, piece, (piece or SPACE).encode("utf-8")))
                size += len(batch[-1][2])
                if size >= _BATCH_BYTES:
                    self._encode_batch(batch, encoded)
                    batch, size = [], 0
        self._encode_batch(batch, encoded)
        return [parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts]) for parts in encoded]

    def _encode_batch(self, batch: list[tuple[int, str, bytes]], encoded: list[list[NDArray[Any]]]) -> None:
        pieces = [piece for _, piece, _ in batch if piece]
        encodings = iter(self._library.encode_batch_fast(pieces, add_special_tokens=False))
        for number, piece, raw in batch:
            ids = next(encodings).ids if piece else self._space_ids
            if self._raw(ids) != raw and self._raw(ids := self._spelled(piece)) != raw:
                raise DataError(self._loss(piece or SPACE, ids))
            encoded[number].append(np.array(ids, dtype=self.dtype))

    def _raw(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._bytes[id] for id in ids])

    def _spelled(self, piece: str) -> list[int]:
        """Return the ids of a piece in which the library would match a special symbol or a byte of the vocabulary.

        Cut after the first character of each such match, the piece has none left, and is encoded as plain text.
        """
        cuts = [found.start() + 1 for found in self._symbols.finditer(piece)]
        parts = [piece[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(piece)])]
        encodings = self._library.encode_batch_fast([part for part in parts if part], add_special_tokens=False)
        return [id for encoding in encodings for id in encoding.ids]

    def _pieces(self, text: bytes) -> Iterator[str]:
        """Yield the pieces for the library; "" stands for a U+2581, which the library would treat as a space."""
        if self._byte_level:
            yield from self._cutter.pieces(text)
            return
        characters = text.decode("utf-8")
        for index, part in enumerate(characters.split(SPACE) if self._spaces else [characters]):
            if index:
                yield ""
            yield from segments(part)

    def _loss(self, text: str, ids: list[int]) -> str:
        back = self.decode(ids)
        place = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        before, after = text[max(place - 10, 0) : place + 20], back[max(place - 10, 0) : place + 20]
        return f"tokenizer {self.spec!r} loses text: it gives back {before!a} as {after!a}; choose one that is lossless"


def build_huggingface(place: str, spec: str) -> HuggingFaceTokenizer:
    """Build the tokenizer of a folder with tokenizer.json, or of that file. Missing special symbols get new ids.

    A tokenizer that this project saved is loaded unchanged, with its symbols.

    Raises DataError if there is none, or it does not restore every text.
    """
    if (saved := Path(place) / DEFINITION_FILE).is_file():
        return HuggingFaceTokenizer.load(saved.parent, spec)
    path, definition = _read_exact(place, spec)
    special_ids = _find_specials(definition, path.parent)
    _add_specials(definition, special_ids)
    return _checked(definition, special_ids, spec)


def adopt_huggingface(place: str, spec: str, vocab_size: int) -> HuggingFaceTokenizer:
    """Build such a tokenizer with exactly the `vocab_size` ids of a trained model, to which none can be added.

    A missing symbol borrows another id, preferably that of end_of_text: no other id was trained to begin a sequence,
    and padding is never read. Ids that the file does not define stand for no text.

    Raises DataError if the file has more ids, or neither end_of_text nor start.
    """
    path, definition = _read_exact(place, spec)
    special_ids = _find_specials(definition, path.parent)
    if not {"end_of_text", "start"} & set(special_ids):
        raise DataError(
            f"tokenizer {spec!r}: names neither eos_token nor bos_token, expected a symbol between documents; name it "
            "in tokenizer_config.json"
        )
    borrowed = special_ids.get("end_of_text", special_ids.get("start", 0))
    special_ids = {name: special_ids.get(name, borrowed) for name in _SPECIALS}
    size = size_of(_library(json.dumps(definition).encode(), spec))
    if size > vocab_size:
        raise DataError(f"tokenizer {spec!r}: has {size:,} ids, but its model's vocab_size is {vocab_size:,}")
    definition["added_tokens"] += [_symbol(id, f"<|unused_{id}|>") for id in range(size, vocab_size)]
    return _checked(definition, special_ids, spec)


def _read_exact(place: str, spec: str) -> tuple[Path, dict[str, Any]]:
    """Return the file of a folder, and its definition after `_make_exact`."""
    path = tokenizer_file(place)
    definition = json.loads(path.read_bytes())
    _library(path.read_bytes(), spec)  # reports errors of the user's file before changes
    _make_exact(definition)
    return path, definition


def _checked(definition: dict[str, Any], special_ids: dict[str, int], spec: str) -> HuggingFaceTokenizer:
    """Return the tokenizer after checking that it restores the difficult texts."""
    data = json.dumps(definition, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    tokenizer = HuggingFaceTokenizer(data, special_ids, spec)
    for text in _PROBES:
        tokenizer.encode(text)
    return tokenizer


def read_tokenizer(place: str) -> Any:
    """Return the library's own tokenizer, unchanged from a folder or file, for decoding. Raises DataError if there is
    none.
    """
    return _library(tokenizer_file(place).read_bytes(), f"hf:{place}")


def size_of(library: Any) -> int:
    """Return the highest id plus one."""
    return 1 + max(library.get_vocab(with_added_tokens=True).values())


def tokenizer_file(place: str) -> Path:
    """Return the file that defines the tokenizer of a folder, or that file itself. Raises DataError if it is none."""
    path = Path(place)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        definition = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"tokenizer hf:{place}: there is no {path}; expected a folder with tokenizer.json, as "
            f"AutoTokenizer.from_pretrained(…).save_pretrained(DIR) writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer hf:{place}: {path} cannot be read: {error}") from error
    if isinstance(definition, dict) and definition.get("kind") == "hf":  # saved by this project
        return tokenizer_file(str(path.parent / DEFINITION_FILE))
    if not isinstance(definition, dict) or "model" not in definition:
        raise DataError(f"tokenizer hf:{place}: {path} is not a file of Hugging Face's tokenizers library")
    return path


def _library(definition: bytes, spec: str) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the work is already divided among processes
    from tokenizers import Tokenizer as LibraryTokenizer

    try:
        library = LibraryTokenizer.from_str(definition.decode("utf-8"))
    except Exception as error:  # the library raises no more specific error
        raise DataError(f"tokenizer {spec!r} cannot be read by the tokenizers library: {error}") from error
    library.no_truncation()
    library.no_padding()
    return library


def _parts(definition: dict[str, Any], *keys: str) -> Iterator[dict[str, Any]]:
    """Yield the components under some keys, including those within sequences."""
    for key in keys:
        part = definition.get(key) or {}
        nested = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
        yield from nested if isinstance(nested, list) else [part]


def _vocabulary_kind(definition: dict[str, Any]) -> str:
    """Return the spelling of its pieces: "bytes" (byte-level alphabet), "spaces" (U+2581 for space) or "characters"."""
    parts = list(_parts(definition, "normalizer", "pre_tokenizer", "decoder"))
    if any(part.get("type") == "ByteLevel" for part in parts):
        return "bytes"
    replaced = any(part.get("type") == "Replace" and part.get("content") == SPACE for part in parts)
    return "spaces" if replaced or any(part.get("type") == "Metaspace" for part in parts) else "characters"


def _make_exact(definition: dict[str, Any]) -> None:
    """Remove everything that adds to a text or removes from it."""
    definition |= {"post_processor": None, "truncation": None, "padding": None}
    for part in _parts(definition, "pre_tokenizer", "decoder"):
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
    removed = {"Prepend"}
    if _vocabulary_kind(definition) == "bytes":
        removed.add("NFC")  # Qwen's: uncomposed texts have bytes too, and other texts stay the same
    normalizer = definition.get("normalizer") or {}
    if normalizer.get("type") in removed:
        definition["normalizer"] = None
    elif normalizer.get("type") == "Sequence":
        normalizer["normalizers"] = [part for part in normalizer["normalizers"] if part.get("type") not in removed]
    for token in definition.get("added_tokens") or []:
        token |= {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def _find_specials(definition: dict[str, Any], folder: Path) -> dict[str, int]:
    """Return the ids of the existing special symbols by name, and mark them as special in `definition`."""
    names: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            names |= json.loads((folder / file).read_bytes())
    added = definition.setdefault("added_tokens", [])
    found: dict[str, int] = {}
    for name, (key, usual) in _SPECIALS.items():
        stated = names.get(key)
        stated = stated.get("content") if isinstance(stated, dict) else stated
        by_content = {token["content"]: token for token in added if token["id"] not in found.values()}
        token = next((by_content[content] for content in (stated, *usual) if content in by_content), None)
        if token is not None:
            token["special"] = True
            found[name] = token["id"]
    return found


def _add_specials(definition: dict[str, Any], found: dict[str, int]) -> None:
    """Give the missing symbols new ids, in `definition` and in `found`."""
    vocabulary: dict[str, int] = _library(json.dumps(definition).encode(), "").get_vocab(with_added_tokens=True)
    for name in _SPECIALS:
        if name not in found:
            content = f"<|{name}|>"
            while content in vocabulary:
                content = f"<{content}>"
            vocabulary[content] = found[name] = max(vocabulary.values()) + 1
            definition["added_tokens"].append(_symbol(found[name], content))


def _symbol(id: int, content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **flags}


def _bytes_of_ids(library: Any, definition: dict[str, Any]) -> tuple[list[bytes], dict[int, int]]:
    """Return the bytes of each id, and the ids of pieces named after one byte."""
    kind = _vocabulary_kind(definition)
    alphabet = _byte_alphabet()
    added = library.get_added_tokens_decoder()
    table = [b""] * size_of(library)
    byte_ids: dict[int, int] = {}
    fallback = bool((definition.get("model") or {}).get("byte_fallback"))
    for piece, id in library.get_vocab(with_added_tokens=True).items():
        if id in added:
            table[id] = b"" if added[id].special else added[id].content.encode()
        elif kind == "bytes":
            if all(character in alphabet for character in piece):  # others occur in no text
                table[id] = bytes(alphabet[character] for character in piece)
        elif fallback and len(piece) == 6 and piece.startswith("<0x"):
            table[id] = bytes([int(piece[3:5], 16)])
            byte_ids[table[id][0]] = id
        else:
            table[id] = (piece.replace(SPACE, " ") if kind == "spaces" else piece).encode()
    return table, byte_ids


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of the byte-level alphabet.

    Printable characters of Latin-1 stand for themselves; U+0100 and following for the other bytes, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
