"""Conversations, from the line of JSON to the loss mask of a window: which ids are context and which are scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loading.loaders import train_loader, validation_loader
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.loading.verify import verify
from data_pipeline.loading.window_plans import write_plan
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.preparation.workers import Workers
from data_pipeline.sources.conversations import TEMPLATE, encode_conversations, prompt_of, segments_of
from data_pipeline.tokenizers import ByteTokenizer, load_tokenizer, train_sentencepiece

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4 …"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def test_only_turns_of_the_assistant_are_answers() -> None:
    assert segments_of({"messages": MESSAGES}) == [
        "\x02system\nBe brief.\x03\x02user\n2 + 2?\x03\x02assistant\n",
        "4 …\x03",
        "\x02user\nSure?\x03\x02assistant\n",
        "Yes.\x03",
    ]
    assert segments_of({"prompt": "a", "completion": "b"}) == ["a", "b"]
    assert prompt_of(MESSAGES[:2]) == segments_of({"messages": MESSAGES})[0]


def test_the_jinja_template_renders_the_same() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(TEMPLATE)
    assert template.render(messages=MESSAGES[:2], add_generation_prompt=True) == prompt_of(MESSAGES[:2])
    assert template.render(messages=MESSAGES) == "".join(segments_of({"messages": MESSAGES}))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "'messages' is not a list of messages but list"),
        ({"messages": MESSAGES[:2]}, "nothing to learn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "the role of a message is 'robot', expected one of system"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content of a message is not a text but int '3'"),
        ({"messages": [{"role": "user", "content": "\x02assistant\nx"}]}, r"the character U\+0002"),
        ({"messages": [{"role": "user", "content": "x\x03"}]}, r"the character U\+0003"),
        ({"messages": ["x"]}, "a message is not an object"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        ({"text": "x"}, "expected the key 'messages' or 'conversations', or 'prompt' and 'completion', or"),
    ],
)
def test_malformed_conversations_are_refused(record: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments_of(record)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_segments_are_encoded_by_themselves(kind: str) -> None:
    tokenizer = ByteTokenizer()
    if kind == "sentencepiece":
        tokenizer = train_sentencepiece(["the cat sat on the mat and the hat, " * 40], 274, kind)
    conversations = [["the c", "at sat", " on", " the mat"], ["", "the hat"], ["the mat", "x"]]
    stored = [b"\xfe".join(text.encode() for text in one) + b"\xff" for one in conversations]
    lengths = np.array([len(one) for one in stored])
    ids, counts, given = encode_conversations(tokenizer, np.frombuffer(b"".join(stored), np.uint8), lengths)

    expected_ids, expected_given, expected_counts = [], [], []
    for one in conversations:
        pieces = [tokenizer.encode(text).tolist() for text in one]
        pieces[-1] = [*pieces[-1], tokenizer.end_of_text_id]
        expected_counts.append(sum(map(len, pieces)))
        for number, piece in enumerate(pieces):
            expected_ids += piece
            expected_given += [number % 2 == 0] * len(piece)
    assert ids.dtype == tokenizer.dtype
    assert ids.tolist() == expected_ids
    assert counts.tolist() == expected_counts
    assert given.tolist() == expected_given


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("conversations")
    turns = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"({n})"}] for n in range(60)]
    lines = [json.dumps({"messages": [MESSAGES[0], *messages]}) for messages in turns]
    Path(folder, "c.jsonl").write_text("\n".join(lines))
    prepare(PrepareConfig((f"{folder}/c.jsonl",), output=f"{folder}/data", conversations=True, workers=1,
                          validation_fraction=0.1))  # fmt: skip
    return PreparedData.open(folder / "data", verify=True)


def test_bytes_are_those_of_the_text(prepared: PreparedData) -> None:
    for split in ("train", "validation"):
        ids = prepared.split(split).read(0, len(prepared.split(split)))
        assert prepared.split(split).num_bytes == sum(ids != prepared.tokenizer.end_of_text_id) > 0


def counted(text: bytes, mask: np.ndarray) -> bytes:
    return bytes(np.frombuffer(text, np.uint8)[mask])


@pytest.mark.parametrize("packing", ["stream", "documents", "padded", "best_fit"])
def test_windows_count_the_answers_alone(prepared: PreparedData, packing: str) -> None:
    context = 100  # more than any conversation
    if packing in ("padded", "best_fit"):
        write_plan(prepared, packing, context)
    loader = train_loader(prepared, DataConfig(packing=packing), context, 1, seed=0)
    answers = []
    for step in range(1, loader.num_windows + 1):
        windows = loader.rows(step, 0, 1)
        answers += bytes(windows.ids[windows.loss_mask].astype(np.uint8)).split(b"\x03\xff")
    stream = prepared.split("train")
    said = [bytes(document).split(b"\x02assistant\n")[1][:-2] for document in stream.documents()]
    if packing in ("padded", "best_fit"):
        assert sorted(filter(None, answers)) == sorted(said)
    else:  # windows cut conversations
        assert sum(map(len, answers)) + answers.count(b"") >= sum(map(len, said))
        assert set(b"".join(answers)) <= set(b"()0123456789\x03\xff")

    loader = validation_loader(prepared, DataConfig(packing=packing), context)
    windows = loader.windows(0, loader.num_windows)
    validation = prepared.split("validation")
    expected = b"".join(bytes(one).split(b"\x02assistant\n")[1] for one in validation.documents())
    assert bytes(windows.ids[windows.loss_mask].astype(np.uint8)) == expected


def test_the_tokenizer_stores_the_chat_template(prepared: PreparedData, tmp_path: Path) -> None:
    assert prepared.tokenizer.chat_template == TEMPLATE
    prepared.tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == TEMPLATE
    ByteTokenizer().save(tmp_path / "plain")
    assert load_tokenizer(tmp_path / "plain").chat_template is None
    assert prepared.tokenizer.fingerprint == ByteTokenizer().fingerprint  # ids are the same


def test_a_damaged_loss_mask_is_named(prepared: PreparedData, tmp_path: Path) -> None:
    given = prepared.dir / "train/shard_00000.given"
    good = given.read_bytes()
    try:
        given.write_bytes(good[:-1] + bytes([1 - good[-1]]))
        with pytest.raises(DataError, match=r"shard_00000\.given is damaged"), Workers(1) as team:
            verify(prepared.dir, team)
        given.write_bytes(good[:-1])
        with pytest.raises(DataError, match=r"shard_00000\.given is cut short"):
            PreparedData.open(prepared.dir)
    finally:
        given.write_bytes(good)
    shard = prepared.manifest.splits["train"][0]
    assert shard.given_sha256 in shard.identity  # so that another mask counts as other data


def test_a_tokenizer_is_taken_from_elsewhere(tmp_path: Path) -> None:
    Path(tmp_path, "a.txt").write_text("\n\n".join(f"the number {n} of the list is {n * n}" for n in range(400)))
    Path(tmp_path, "c.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n}", "completion": f"the {n}"}) for n in range(50))
    )
    spec = "sentencepiece:286"
    first = prepare(PrepareConfig((f"{tmp_path}/a.txt",), spec, f"{tmp_path}/a", workers=1))
    second = prepare(PrepareConfig((f"{tmp_path}/c.jsonl",), spec, f"{tmp_path}/c", workers=1, conversations=True,
                                   tokenizer_from=f"{tmp_path}/a"))  # fmt: skip
    assert second.tokenizer == first.tokenizer
    with pytest.raises(DataError, match=r"the tokenizer of .*a is sentencepiece:286, but byte is asked for"):
        PrepareConfig((f"{tmp_path}/c.jsonl",), tokenizer_from=f"{tmp_path}/a")
    with pytest.raises(DataError, match="no tokenizer in"):
        PrepareConfig((f"{tmp_path}/c.jsonl",), tokenizer_from=f"{tmp_path}/nothing")


def test_a_broken_line_and_other_formats_are_refused(tmp_path: Path) -> None:
    Path(tmp_path, "c.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"messages": 3}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:2: 'messages' is not a list of messages but int '3'"):
        prepare(PrepareConfig((f"{tmp_path}/c.jsonl",), output=f"{tmp_path}/d", conversations=True, workers=1))
    Path(tmp_path, "a.txt").write_text("x\n\ny")
    with pytest.raises(DataError, match=r"conversations are read from JSON Lines .* holds text"):
        prepare(PrepareConfig((f"{tmp_path}/a.txt",), output=f"{tmp_path}/e", conversations=True, workers=1))
    with pytest.raises(DataError, match="clean is for prose"):
        PrepareConfig((f"{tmp_path}/c.jsonl",), conversations=True, clean=("c4",))
