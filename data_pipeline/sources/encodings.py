"""Detection of the encoding of text, and of files that are not text.

Text is UTF-8. A file that is largely in another encoding is refused, with a guess, rather than read as U+FFFD; a few
broken bytes become U+FFFD. With --encoding NAME, files are converted first. Names are resolved by the Encoding Standard
of the WHATWG, which matches their use in practice: gb2312 is GBK, iso-8859-1 is windows-1252.
"""

from __future__ import annotations

import codecs
import shlex
from typing import IO

import webencodings

from data_pipeline.errors import DataError

_BLOCK = 1 << 20
SAMPLE = 64 << 10  # bytes read at the beginning, in the middle and at the end of a file

BOMS = (  # UTF-32 before UTF-16, whose little-endian mark is a prefix
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
# First bytes of files that are not text, the kind of file, and the suffix it needs; None: unpack it, "": no advice.
_RENAME = "give it a name that says so: {path}{suffix}"
_MAGIC = (
    (b"\x1f\x8b", "gzip data", ".gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", ".zst"),
    (b"\xfd7zXZ\0", "xz data", ".xz"),
    (b"BZh", "bzip2 data", ".bz2"),
    (b"PAR1", "a Parquet file", ".parquet"),
    (b"PK\x03\x04", "a zip archive", None),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", None),
    (b"Rar!", "a rar archive", None),
    (b"\x04\x22\x4d\x18", "lz4 data", None),
    (b"%PDF-", "a PDF file", ""),
    (b"\x89PNG", "an image", ""),
    (b"\xff\xd8\xff", "an image", ""),
    (b"GIF8", "an image", ""),
    (b"\x7fELF", "a program", ""),
    (b"SQLite format 3\0", "a data base", ""),
    (b"ARROW1", "an Arrow file", ""),
    (b"\x93NUMPY", "a numpy array", ""),
    (b"\x89HDF", "an HDF5 file", ""),
)
_CONTROLS = bytes(code for code in range(32) if code not in b"\b\t\n\v\f\r\x1a\x1b")
_MOST_CONTROLS = 0.05  # of the bytes of a text
_FEW_INVALID = 3  # bytes that may be invalid in a file that is UTF-8
_MOST_INVALID = 0.001  # of the bytes
_MOST_INVALID_CONVERTED = 0.01  # of the characters, in the encoding that the user named
_ISO_2022 = ((b"\x1b$B", "iso2022_jp"), (b"\x1b$@", "iso2022_jp"), (b"\x1b$)C", "iso2022_kr"))

# Candidates of a guess: the encodings of the web, and a few older ones.
_USUAL = [
    *("cp1252", "cp1251", "koi8_r", "gb18030", "big5", "cp932", "euc_jp", "cp949", "iso2022_jp", "cp1250", "cp1253"),
    *("cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874", "koi8_u", "cp866", "utf_16_le", "utf_16_be"),
    *("utf_32_le", "utf_32_be", "cp437", "cp850", "mac_roman", "cp037"),
]
_RARER_THAN_1252 = ("cp1250", "cp1257", "cp1258", "mac_roman", "cp437", "cp850")
_NO_TEXT = ("idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "utf-7")


class NotText(DataError):
    """Error for a file that is not text in UTF-8; every slice of it raises it."""


def codec_of(name: str) -> str:
    """Return Python's name of an encoding named by a user or a page. Raises DataError if no text encoding has that
    name.
    """
    label = name.strip().lower()
    if label.replace("_", "-") in ("utf-16", "utf16", "utf-32", "utf32"):
        return label  # with a byte-order mark, which gives the byte order
    found = webencodings.lookup(label)
    if found is not None and found.name not in ("replacement", "x-user-defined"):
        return "gb18030" if found.name == "gbk" else found.codec_info.name
    try:
        codec = codecs.lookup(label)
    except LookupError:
        codec = None
    if codec is None or not codec._is_text_encoding or codec.name in _NO_TEXT:
        raise DataError(f"--encoding {name!r} is unknown; expected a name such as gb18030, shift_jis, koi8-r or utf-16")
    return codec.name


def bom_of(beginning: bytes) -> tuple[bytes, str]:
    """Return the byte-order mark of a text and the encoding that it indicates; b"" and "" if there is none."""
    return next(((bom, codec) for bom, codec in BOMS if beginning.startswith(bom)), (b"", ""))


def bom_and_codec(beginning: bytes, codec: str) -> tuple[bytes, str]:
    """Return the byte-order mark of a text, and the codec to decode it: the mark's, otherwise the named one.

    UTF-16 and UTF-32 without a mark are read in the byte order in which the text is printable, or little-endian, as on
    the web.
    """
    bom, told = bom_of(beginning)
    if told or codec[:6] not in ("utf-16", "utf-32", "utf16", "utf32") or codec.endswith(("le", "be")):
        return bom, told or codec
    wide = f"utf-{codec[-2:]}"
    guess = _wide(beginning[:SAMPLE])
    return b"", guess if guess.startswith(wide) else f"{wide}-le"


def transcode(file: IO[bytes], copy: IO[bytes], codec: str, path: str) -> None:
    """Write a text as UTF-8. A byte-order mark overrides `codec`. Raises DataError if it is not in that encoding."""
    block, characters, invalid = file.read(_BLOCK), 0, 0
    bom, found = bom_and_codec(block, codec)
    decoder = codecs.getincrementaldecoder(found)("replace")
    block = block[len(bom) :]
    while block:
        text = decoder.decode(block)
        characters, invalid = characters + len(text), invalid + text.count("\ufffd")
        copy.write(text.encode("utf-8", "replace"))
        if invalid > max(_FEW_INVALID, _MOST_INVALID_CONVERTED * characters):
            raise DataError(
                f"{path} is not text in {codec}: {invalid:,} of its first {characters:,} characters are broken"
            )
        block = file.read(_BLOCK)
    copy.write(decoder.decode(b"", final=True).encode("utf-8", "replace"))


def in_utf8(data: bytes, codec: str) -> bytes:
    """Return the beginning of a text as UTF-8. A byte-order mark overrides `codec`, in which "" means UTF-8."""
    bom, found = bom_and_codec(data, codec)
    if found in ("", "utf-8"):
        return data
    return data[len(bom) :].decode(found, "replace").encode("utf-8", "replace")


def sample_of(file: IO[bytes], size: int | None) -> list[bytes]:
    """Return the beginning of a file, and if its size is known its middle and end. Leave the file at its beginning."""
    file.seek(0)
    parts = [file.read(SAMPLE)]
    if size is not None and size > 4 * SAMPLE:
        for place in (size // 2, size - SAMPLE):
            file.seek(place)
            parts.append(file.read(SAMPLE))
    file.seek(0)
    return parts


def check_text(parts: list[bytes], path: str) -> None:
    """Raise NotText if a file is compressed, binary, or largely not UTF-8. parts: some of its contents."""
    for magic, what, suffix in _MAGIC:
        if parts[0].startswith(magic) and (magic != b"BZh" or parts[0][4:10] == b"1AY&SY"):
            todo = "unpack it" if suffix is None else _RENAME.format(path=path, suffix=suffix) if suffix else ""
            raise NotText(f"{path} is {what}, not text" + (f"; {todo}" if todo else ""))
    guess = _guess(parts)
    if guess == "":
        return
    if guess is None:
        raise NotText(f"{path} is binary data, not text; if it is text, name its encoding with --encoding NAME")
    what = guess[:6].upper() if guess.startswith("utf-") else f"largely not UTF-8; it may be {guess}"
    convert = f"iconv -f {_iconv_name(guess)} -t UTF-8 {shlex.quote(path)} > NEW"
    raise NotText(f"{path} is {what}, expected UTF-8; convert it: {convert}, or read it with --encoding {guess}")


def _guess(parts: list[bytes]) -> str | None:
    """Return the encoding of text that is not UTF-8; "" for UTF-8, None if it is not text."""
    _, codec = bom_of(parts[0])
    if codec not in ("", "utf-8"):
        return codec[:6]
    whole = b"".join(parts)
    if wide := _wide(parts[0]):
        return wide
    if len(whole.translate(None, _CONTROLS)) < (1 - _MOST_CONTROLS) * len(whole):
        return _guessed(whole) if b"\0" not in whole and not _is_random(whole) else None
    for escape, codec in _ISO_2022:
        if escape in whole:
            return codec
    if not looks_broken(parts):
        return ""
    return _guessed(whole)


def looks_broken(parts: list[bytes]) -> bool:
    """Return whether a text is largely not UTF-8: more of its non-ASCII characters are broken than valid."""
    invalid = whole = 0
    for number, part in enumerate(parts):
        part = part.lstrip(bytes(range(0x80, 0xC0))) if number else part  # the rest of a split character
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(part)
        here = text.count("\ufffd") - part.count(b"\xef\xbf\xbd")
        invalid += here
        whole += len(text) - len(text.encode("ascii", "ignore")) - here
    return _mostly_invalid(invalid, whole, sum(map(len, parts)))


def _mostly_invalid(invalid: int, whole: int, total: int) -> bool:
    return invalid > _FEW_INVALID and invalid > _MOST_INVALID * total and invalid > whole


def _wide(part: bytes) -> str:
    """Detect UTF-16 or UTF-32 without a byte-order mark: zero bytes, but printable as characters of that width."""
    if b"\0" not in part:
        return ""
    best, spaces = "", 0
    for codec in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        width = int(codec[4:6]) // 8
        text = part[: len(part) // width * width].decode(codec, "replace")
        separators = text.count(" ") + text.count("\n")
        shown = sum(map(str.isprintable, text)) + sum(map(text.count, "\n\r\t"))
        if separators > spaces and text.count("\ufffd") <= 1 and shown >= 0.97 * len(text):
            best, spaces = codec, separators
    return best


def _is_random(data: bytes) -> bool:
    """Return whether all byte values are about equally frequent, as in compressed data."""
    values = len(set(data))
    return values > 0.9 * min(len(data), 250)


def _guessed(data: bytes) -> str | None:
    """Return the likeliest usual encoding; None if none fits."""
    from charset_normalizer import from_bytes

    matches = from_bytes(data[: 2 * SAMPLE], cp_isolation=_USUAL)
    best = matches.best()
    if best is None:
        return "cp1252" if not _is_random(data) else None
    if best.encoding in _RARER_THAN_1252:
        western = [match for match in matches if "cp1252" in (match.encoding, *match.could_be_from_charset)]
        if western and western[0].chaos <= best.chaos + 0.1 and western[0].coherence >= best.coherence - 0.1:
            return "cp1252"
    return str(best.encoding).replace("utf_", "utf-").replace("_le", "-le").replace("_be", "-be")


def _iconv_name(codec: str) -> str:
    """Return iconv's name of one of Python's encodings."""
    names = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32-le": "UTF-32LE", "utf-32-be": "UTF-32BE"}
    special = {"mac_roman": "MACINTOSH", "iso2022_jp": "ISO-2022-JP", "iso2022_kr": "ISO-2022-KR"}
    return (names | special).get(codec) or codec.upper().replace("_", "-")
