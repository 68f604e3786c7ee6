"""Preparing data: the same bytes for any division of the work, and no unfinished folder that looks finished."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cleaning import exact_duplicates
from data_pipeline.errors import DataError
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation import encoding
from data_pipeline.preparation import pipeline as prepare
from data_pipeline.preparation.options import PrepareConfig, default_data_dir
from data_pipeline.preparation.pipeline import Preparation, ensure_default_data
from data_pipeline.preparation.work_folder import locked
from data_pipeline.report.summary import summary
from data_pipeline.sources import hub
from data_pipeline.sources import text_files as textfiles
from data_pipeline.sources.source import open_sources
from data_pipeline.storage import atomic, documents

ROOT = Path(__file__).resolve().parents[2]
WORDS = re.findall(
    r"\w+", "the of and a to in is was it for with he be on that by at you are from his they have this one"
)


def sentences(seed, number):
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=rng.randint(3, 20))) + ". é😀\u2581"[: rng.randint(1, 5)] for _ in range(number)
    ]


@pytest.fixture
def inputs(tmp_path):
    """Make a folder of three text files and one of another format, and a .jsonl file; some documents are equal."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("\n<eos>\n".join(sentences(1, 100)))
    (folder / "more" / "b.text").write_text("\n<eos>\n".join([*sentences(2, 100), *sentences(1, 20)]))
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*sentences(3, 100), "", *sentences(2, 5)]))
    return (str(folder), str(lines))


@pytest.fixture
def small_pieces(monkeypatch):
    """Divide little text into many units and shards."""
    monkeypatch.setattr("data_pipeline.sources.files.SLICE", 1000)
    monkeypatch.setattr(textfiles, "SLICE", 1000)
    monkeypatch.setattr(encoding, "SHARD_BYTES", 2000)
    monkeypatch.setattr(documents, "_BLOCK", 300)
    monkeypatch.setattr(exact_duplicates, "_SORTED_AT_A_TIME", 50)


def contents(directory):
    """Return the sha256 of every file in a folder except the report, which contains the folder's name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file() and path.name != "report.html"
    }


def texts_of(data, split):
    return [data.tokenizer.decode(document) for document in data.split(split).documents()]


@pytest.mark.parametrize("tokenizer", ["byte", "sentencepiece:330"])
def test_every_document_arrives_once_and_every_byte_is_counted(inputs, tmp_path, small_pieces, tokenizer):
    config = PrepareConfig(inputs, tokenizer, str(tmp_path / "out"), workers=1, validation_fraction=0.1)
    manifest = prepare.prepare(config)
    data = PreparedData.open(tmp_path / "out", verify=True)
    assert not (tmp_path / "out" / ".preparing").exists()
    train, validation = texts_of(data, "train"), texts_of(data, "validation")

    expected = [*sentences(1, 100), *sentences(2, 100), *sentences(3, 100)]
    assert sorted(train + validation) == sorted(expected)
    assert [text for text in expected if text in set(train)] == train, "documents keep their order"
    assert not set(train) & set(validation)
    assert 10 < len(validation) < 60

    for split in ("train", "validation"):
        stream = data.split(split)
        ids = stream.read(0, len(stream))
        size = sum(len(text.encode()) for text in texts_of(data, split))
        assert data.tokenizer.bytes_per_id[ids].sum() == stream.num_bytes == size
        assert (ids == data.tokenizer.end_of_text_id).sum() == stream.num_documents
    assert len(manifest.splits["train"]) > 3
    assert manifest.duplicates["documents"] == 25
    assert [source["documents"] for source in manifest.sources] == [220, 105]
    assert [source["problems"] for source in manifest.sources] == [
        {"files_of_other_formats": 1, "empty_files": 1},
        {"empty_documents": 1},
    ]
    table = summary(manifest, tmp_path / "out")
    assert "1 file of another format left out" in table
    assert "left out 25 documents, 1,094 bytes: exact duplicates" in table


def test_equal_documents_stay_on_one_side_when_they_are_kept(inputs, tmp_path):
    config = PrepareConfig(inputs, output=str(tmp_path / "out"), validation_fraction=0.3, deduplicate=False)
    assert prepare.prepare(config).duplicates == {"documents": 0, "bytes": 0}
    data = PreparedData.open(tmp_path / "out")
    train, validation = texts_of(data, "train"), texts_of(data, "validation")
    assert len(train) + len(validation) == 325
    assert not set(train) & set(validation)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_ever_empty(tmp_path, fraction, small_pieces):
    texts = sentences(1, 60)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare.prepare(
        PrepareConfig((str(tmp_path / "a.jsonl"),), output=str(tmp_path / "out"), validation_fraction=fraction)
    )
    data = PreparedData.open(tmp_path / "out")
    small, extreme = ("validation", min) if fraction < 0.5 else ("train", max)
    hashes = {text: hashlib.blake2b(text.encode(), digest_size=16).digest()[7::-1] for text in texts}
    assert texts_of(data, small) == [extreme(hashes, key=hashes.__getitem__)]
    assert len(texts_of(data, "train")) + len(texts_of(data, "validation")) == 60


@pytest.mark.parametrize("tokenizer", ["byte", "sentencepiece:330"])
def test_the_number_of_workers_changes_no_byte(inputs, tmp_path, small_pieces, tokenizer):
    for workers in (1, 2):
        prepare.prepare(PrepareConfig(inputs, tokenizer, str(tmp_path / str(workers)), workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


# A preparation in a separate process that kills itself just before it would rename its n-th file.
KILLED = """
import os, signal, sys
from data_pipeline.preparation import encoding
from data_pipeline.sources import files
from data_pipeline.preparation import pipeline as prepare
from data_pipeline.sources import text_files as textfiles
files.SLICE = textfiles.SLICE = 4000
encoding.SHARD_BYTES = 10_000
output, survives, *inputs = sys.argv[1:]
renames = 0
def replace(source, target, replace=os.replace):
    global renames
    renames += 1
    if renames > int(survives):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace
prepare.prepare(prepare.PrepareConfig(tuple(inputs), "sentencepiece:330", output, workers=1))
"""


def run_killed(output, survives, inputs):
    command = [sys.executable, "-c", KILLED, str(output), str(survives), *inputs]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).returncode


def test_killed_at_any_file_and_repeated_it_ends_with_the_same_bytes(inputs, tmp_path):
    whole, often = tmp_path / "whole", tmp_path / "often"
    assert run_killed(whole, 10**6, inputs) == 0
    deaths = 0
    while run_killed(often, 2 * deaths, inputs) == -signal.SIGKILL:
        deaths += 1
        assert not (often / "manifest.json").exists()
        with pytest.raises(DataError, match=r"unfinished|no prepared data"):
            PreparedData.open(often)
    assert deaths >= 4
    assert contents(often) == contents(whole)


def test_kill_minus_9_with_workers_and_repeated_it_ends_with_the_same_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(8):
            file.writelines(json.dumps({"text": text + str(number)}) + "\n" for text in sentences(number, 2000))
    command = [sys.executable, "scripts/preprocess.py", "--input", str(path), "--tokenizer", "sentencepiece:330"]
    command += ["--workers", "2", "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, str(killed)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (killed / "tokenizer" / "tokenizer.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "manifest.json").exists()
    for output in (killed, whole):
        subprocess.run([*command, str(output)], cwd=ROOT, check=True, capture_output=True)
    assert contents(killed) == contents(whole)


def test_finished_data_is_left_alone_and_other_settings_are_refused(inputs, tmp_path, monkeypatch):
    config = PrepareConfig(inputs, output=str(tmp_path / "out"))
    opened = []
    monkeypatch.setattr(prepare, "open_sources", lambda *options: opened.append(1) or open_sources(*options))
    preparation = Preparation(config)
    assert preparation.existing() is None
    manifest = preparation.run()
    assert preparation.existing() == manifest and len(opened) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare.prepare(config).fingerprint == manifest.fingerprint == Preparation(config).existing().fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before

    other = PrepareConfig(inputs, "sentencepiece:330", str(tmp_path / "out"), validation_fraction=0.2)
    with pytest.raises(DataError) as caught:
        prepare.prepare(other)
    assert "--tokenizer was byte, now it is sentencepiece:330" in str(caught.value)
    assert "--validation-fraction was 0.01, now it is 0.2" in str(caught.value)
    assert "--output" in str(caught.value)

    with open(inputs[1], "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(
        DataError, match=r"lines\.jsonl has changed since: it had [\d,]+ bytes, now it has [\d,]+ bytes"
    ):
        prepare.prepare(config)


def test_unfinished_data_of_other_settings_is_prepared_from_the_start(inputs, tmp_path, capsys):
    output = tmp_path / "out"
    survives = 0
    while not (output / "train" / "shard_00000.bin").exists():
        survives += 3
        assert run_killed(output, survives, inputs) == -signal.SIGKILL
    prepare.prepare(PrepareConfig(inputs, output=str(output)))
    assert capsys.readouterr().err == (
        f"{output}: discarding an interrupted preparation: --tokenizer was sentencepiece:330, now it is byte\n"
    )
    prepare.prepare(PrepareConfig(inputs, output=str(tmp_path / "fresh")))
    assert contents(output) == contents(tmp_path / "fresh")


def test_preparing_a_folder_again_in_one_process_leaves_nothing_of_the_first_time(inputs, tmp_path):
    output, texts = tmp_path / "out", [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, text in enumerate(texts):
        text.write_text(json.loads(Path(inputs[1]).read_text().splitlines()[number])["text"])
    configs = [
        PrepareConfig(inputs, f"sentencepiece:{size}", str(output), 1, decontaminate=(str(text),))
        for size, text in zip((320, 330), texts, strict=True)
    ]
    prepare.prepare(configs[0])
    shutil.rmtree(output)
    prepare.prepare(configs[1])
    prepare.prepare(dataclasses.replace(configs[1], output=str(tmp_path / "fresh")))
    assert contents(output) == contents(tmp_path / "fresh")


def test_a_folder_with_something_else_is_not_touched(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"out holds something else \(letter\.txt\).*--output"):
        prepare.prepare(PrepareConfig(inputs, output=str(tmp_path / "out")))
    assert list(contents(tmp_path / "out")) == ["letter.txt"]
    with pytest.raises(DataError, match="is a file, expected a folder"):
        prepare.prepare(PrepareConfig(inputs, output=inputs[1]))


def test_two_processes_do_not_write_to_one_folder(inputs, tmp_path):
    output = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom pathlib import Path\n"
         "from data_pipeline.preparation.work_folder import locked\n"
         f"with locked(Path({str(output)!r}), False):\n    print('locked', flush=True)\n    sys.stdin.read()"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(DataError, match=r"another process is preparing data in .*out"):
        prepare.prepare(PrepareConfig(inputs, output=str(output)))
    with pytest.raises(DataError, match="is still being prepared by another process; wait"):
        PreparedData.open(output)
    holder.communicate("")
    prepare.prepare(PrepareConfig(inputs, output=str(output)))


def test_a_worker_that_outlives_a_killed_process_does_not_hold_its_lock(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from data_pipeline.preparation.work_folder import locked\n"
        "with locked(Path(sys.argv[1]), wait=False):\n"
        "    if os.fork() == 0: print('copied', flush=True)\n"
        "    sys.stdin.read(); os._exit(0)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "copied\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with locked(tmp_path, wait=False):
        pass
    process.communicate("")


def test_workers_begin_as_copies_of_a_process_without_threads_only():
    code = (
        "import threading; from data_pipeline.preparation import pipeline as prepare, workers\n"
        "from data_pipeline.progress import Progress\n"
        "with Progress(total=1): print(workers._may_fork())\n"
        "thread = threading.Thread(target=threading.Event().wait, daemon=True); thread.start()\n"
        "print(workers._may_fork())"
    )
    for imports, expected in (("", ["True", "False"]), ("import pyarrow; ", ["False", "False"])):
        result = subprocess.run(
            [sys.executable, "-c", imports + code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert result.stdout.split() == expected


def test_a_full_disk_is_one_line_and_the_work_resumes_later(inputs, tmp_path):
    """The file size limit acts as the disk: writing beyond it fails like writing to a full disk."""
    output = tmp_path / "out"
    command = [sys.executable, "scripts/preprocess.py", "--input", inputs[0], "--output", str(output), "--workers", "1"]
    limited = ["bash", "-c", 'ulimit -f 5; exec "$0" "$@"', *command]
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: cannot write {output}")
    assert "Traceback" not in result.stderr
    assert not (output / "manifest.json").exists()
    assert not list(output.rglob(".tmp-*"))
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    PreparedData.open(output, verify=True)


def test_each_disk_error_has_its_own_message(tmp_path):
    with (
        pytest.raises(atomic.WriteError, match=r"cannot write .*x\.bin: no space is left"),
        atomic.atomic_file(tmp_path / "x.bin"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"cannot write .*: a part of the path is a file"):
        prepare.prepare(PrepareConfig((str(ROOT / "README.md"),), output=str(ROOT / "README.md" / "out")))


def test_an_error_of_the_disk_while_more_is_written_is_not_lost(tmp_path, monkeypatch):
    """The system reports an error once, to the thread that flushes meanwhile, and not again at the last flush."""
    failed = threading.Event()

    def fsync(descriptor):
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(atomic, "_FLUSHED_EVERY_S", 0)
    with (
        pytest.raises(atomic.WriteError, match=r"cannot write .*x\.bin: the device reports an input/output error"),
        atomic.atomic_file(tmp_path / "x.bin") as file,
    ):
        file.write(b"x")
        assert failed.wait(60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "missing.txt"], "input 'missing.txt' does not exist"),
        (["--input", "./missing"], "input './missing' does not exist"),
        (["--input", ""], "an input without a name"),
        (["--input", "empty.txt"], "the input is empty"),
        (["--input", "pipe.txt"], "cannot read pipe.txt: it is not a file; to read the output of another program, use"),
        (["--tokenizer", "sentencepiece:9" + "9" * 5000], "must have fewer than 1,000,000,000 ids"),
        (["--input", "blank.txt"], "the input holds 0 different documents of text; expected at least two"),
        (["--input", "one.txt"], "the input holds 1 different document of text; expected at least two"),
        (["--on-error", "skip", "--input", "broken.jsonl"], "read: 1 broken line left out (broken.jsonl:2: not valid"),
        (["--on-error", "skip", "--input", "wide.txt"], "1 unreadable file left out, or the rest of it (wide.txt is U"),
        (["--input", "one.txt", "--documents", "separator=X"], "the text nowhere holds 'X', so nothing is divided"),
        (["--input", "pictures"], "nothing to read in the folder pictures: it holds only .png"),
        (["--input", "links"], "cannot read links/gone.txt: No such file"),
        (["--input", "table.pdf"], "table.pdf: its format is not supported"),
        (["--input", "broken.jsonl"], "broken.jsonl:2: not valid JSON"),
        (["--input", "wide.txt"], "wide.txt is UTF-16"),
        (["--tokenizer", "bites"], "tokenizer 'bites' is unknown"),
        (["--input", "two.txt", "--tokenizer", "sentencepiece:9000"], "the corpus is too small"),
        (["--validation-fraction", "1.5"], "validation_fraction must lie between 0 and 1, got 1.5"),
        (["--workers", "0"], "workers must be at least 1"),
        (["verify", "nowhere"], "no prepared data in nowhere"),
    ],
)  # fmt: skip
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    (tmp_path / "one.txt").write_text("one\n")
    (tmp_path / "two.txt").write_text("one\n<eos>\ntwo\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "gone.txt").symlink_to("nowhere")
    (tmp_path / "table.pdf").write_text("text\nhello\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "wide.txt").write_text("wide", encoding="utf-16")
    before = contents(tmp_path)
    command = [sys.executable, str(ROOT / "scripts" / "preprocess.py"), *arguments]
    command += [] if arguments[0] == "verify" else ["--output", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    progress, _, error = result.stderr.rpartition("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert progress in ("", "training the tokenizer sentencepiece:9000; this takes a minute or less\n")
    assert {name: digest for name, digest in contents(tmp_path).items() if not name.startswith("out/")} == before
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_names_that_are_no_utf8(tmp_path):
    """They are printed in Python's notation everywhere, and resolve to the same files again."""
    folder = os.fsencode(tmp_path) + b"/te\xffts"
    os.mkdir(folder)
    for name, text in ((b"a\xfe.txt", "\n<eos>\n".join(sentences(1, 50))), (b"b\xfe.jsonl", '{"text": 7}\n')):
        with open(folder + b"/" + name, "w") as file:
            file.write(text)
    command = [sys.executable, ROOT / "scripts" / "preprocess.py", "--output", "out", "--on-error", "skip", "--input"]
    for printed in ("report: out/report.html", "out is already prepared; nothing to do"):
        result = subprocess.run([*command, folder], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        assert printed in result.stdout
        assert re.search(r"te\\udcffts/b\\udcfe.jsonl:1: 'text' is not a string", result.stdout)
    assert PreparedData.open(tmp_path / "out").manifest.sources[0]["name"].endswith("te\udcffts")


def test_problems_that_may_be_skipped_are_counted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("\n<eos>\n".join(sentences(1, 10)))
    (folder / "b.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    (folder / "gone.txt").symlink_to("nowhere")
    manifest = prepare.prepare(PrepareConfig((str(folder),), output=str(tmp_path / "out"), on_error="skip"))
    assert manifest.sources[0]["problems"] == {"unreadable_files": 1, "broken_lines": 1}
    assert any("b.jsonl:2" in example for example in manifest.sources[0]["examples"])


def test_verify_names_the_flipped_shard(inputs, tmp_path):
    output = tmp_path / "out"
    prepare.prepare(PrepareConfig(inputs, output=str(output)))
    command = [sys.executable, "scripts/preprocess.py", "verify", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{output}: 2 shards, every byte as written\n")
    shard = output / "train" / "shard_00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 4
    shard.write_bytes(raw)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {shard} is damaged")


def test_a_hub_data_set_is_read_by_its_text_column(tmp_path, monkeypatch):
    import datasets

    data = datasets.Dataset.from_dict({"story": sentences(1, 30), "stars": list(range(30))})
    monkeypatch.setattr(hub, "_load", lambda rows: data)
    monkeypatch.setattr(hub, "_HUB_ROWS", 7)
    config = PrepareConfig(("someone/stories",), output=str(tmp_path / "out"), text_key="story", workers=1)
    prepare.prepare(config)
    prepared = PreparedData.open(tmp_path / "out")
    assert sorted(texts_of(prepared, "train") + texts_of(prepared, "validation")) == sorted(sentences(1, 30))
    for key, message in (
        ("text", "no column 'text'.*story, stars"),
        ("stars", "'stars' of someone/stories holds no text"),
    ):
        with pytest.raises(DataError, match=message):
            prepare.prepare(PrepareConfig(("someone/stories",), output=str(tmp_path / "b"), text_key=key))


def test_a_hub_data_set_without_a_network_is_one_line(tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "https://no-such-host.invalid", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "scripts/preprocess.py", "--input", "someone/stories", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: input 'someone/stories' is neither a file or folder here nor a data set")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_default_folders(tmp_path, monkeypatch):
    assert default_data_dir("sentencepiece:4096") == Path("data/default-sentencepiece-4096")
    assert PrepareConfig().directory == Path("data/default-byte")
    assert PrepareConfig(("a/novel.txt", "x/y"), "sentencepiece:512").directory == Path(
        "data/novel+y-sentencepiece-512"
    )
    monkeypatch.chdir(tmp_path)
    finished = Path("data/default-byte/manifest.json")
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    assert ensure_default_data("byte") == finished.parent, "what is there is used, not made again"


def test_importing_the_package_is_light():
    modules = "data_pipeline.preparation.pipeline, data_pipeline.loading.prepared_data"
    code = f"import sys, {modules}; print([m for m in HEAVY if m in sys.modules])"
    heavy = ["torch", "datasets", "sentencepiece", "pandas", "pyarrow", "stlm", "deepspeed"]
    result = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {heavy}\n{code}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "[]\n", result.stderr


def test_sampling_for_a_tokenizer_is_even_and_from_training_text_only(inputs, tmp_path, monkeypatch):
    seen = {}

    def train(texts, size, kind):
        seen["texts"] = list(texts)
        raise DataError("enough")

    monkeypatch.setattr(encoding, "train_sentencepiece", train)
    for limit in (1 << 30, 6000):
        monkeypatch.setattr(encoding, "_SAMPLE_BYTES", limit)
        output = tmp_path / str(limit)
        with pytest.raises(DataError, match="enough"):
            prepare.prepare(PrepareConfig(inputs, "sentencepiece:330", str(output), validation_fraction=0.2, workers=1))
        units = [documents.Gathered(path.with_suffix("")) for path in sorted(output.rglob("unit_*.text"))]
        train_documents = [
            document.tobytes()[:-1].decode()
            for unit in units
            for place in np.flatnonzero(unit.choice == documents.TRAIN).tolist()
            for document, _ in unit.documents(place, place + 1, unit.choice == documents.TRAIN)
        ]
        if limit > 6000:
            assert seen["texts"] == train_documents
        else:
            assert set(seen["texts"]) < set(train_documents)
            assert abs(sum(len(text.encode()) for text in seen["texts"]) - limit) < limit / 4
