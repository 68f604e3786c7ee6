"""Commands that evaluate and use a saved model, called as users call them."""

import dataclasses
import io
import json
import math
import os
import pty
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.sources.conversations import TEMPLATE, prompt_of
from data_pipeline.tokenizers import build_tokenizer
from stlm.commands import generate
from stlm.config import (
    DataConfig,
    ExitsConfig,
    GroupedQueryConfig,
    ModelConfig,
    RunConfig,
    TransformerCoreConfig,
    dump_run_config,
)
from stlm.evals import compressed_bits_per_byte, score_split
from stlm.evals.tasks.bits_per_byte import text_fingerprint
from stlm.stlm import STLM

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    context_length=32,
    width=32,
    core=TransformerCoreConfig(num_layers=1, attention=GroupedQueryConfig(num_heads=2)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with prepared data and a run of one checkpoint on them: data/, other/, run/."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("data", "other"):
        text = "\n<eos>\n".join(f"Line {number} of {name}, {number % 7} words long." for number in range(300))
        (folder / f"{name}.txt").write_text(text)
        config = PrepareConfig(inputs=(str(folder / f"{name}.txt"),), output=str(folder / name), workers=1)
        prepare(dataclasses.replace(config, validation_fraction=0.1))
    data = PreparedData.open(folder / "data")
    checkpoint = folder / "run" / "checkpoints" / "step_00000007"
    STLM.from_config(MODEL, data.tokenizer, seed=1).save(checkpoint / "model")
    (checkpoint / "state.json").write_text(json.dumps({"step": 7, "data_fingerprint": data.fingerprint}))
    (checkpoint / "COMPLETE").write_text('{"files": {}}')
    run_config = RunConfig(data=DataConfig(dir=str(folder / "data")), model=MODEL)
    (folder / "run" / "config.yaml").write_text(dump_run_config(run_config))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs a script in this process: call("evaluate.py", …) -> (exit code, stdout, stderr)."""

    def call(script, *arguments, stdin=""):
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        return ending.value.code or 0, *capsys.readouterr()

    return call


def continuation(folder, prompt, **options):
    return STLM.load(folder / "run").generate(prompt, **{"temperature": 0.8, **options})


# evaluate.py


def test_evaluate_gives_the_results_of_the_library(folder, call, tmp_path):
    model, data = STLM.load(folder / "run"), PreparedData.open(folder / "data")
    stream = data.split("validation")
    score = score_split(model, stream, stride=8)
    compressors = compressed_bits_per_byte(stream, data.tokenizer)

    code, out, _ = call("evaluate.py", folder / "run", "--stride", "8", "--output", tmp_path / "out.json")
    assert code == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"]["bits_per_byte"] == {
        "bits_per_byte": pytest.approx(score.bits_per_byte),
        "low": pytest.approx(score.interval().low),
        "high": pytest.approx(score.interval().high),
        "nats": pytest.approx(score.nats),
        "ids": len(stream),
        "bytes": stream.num_bytes,
        "documents": stream.num_documents,
        "context_length": 32,
        "stride": 8,
        "documents_apart": False,
        "compressors": compressors,
        "sha256": text_fingerprint(stream, data.tokenizer),
        "precision": "fp32",
    }
    assert (written["step"], written["parameters"]) == (7, model.num_parameters())
    assert written["data_fingerprint"] == written["trained_on"] == data.fingerprint
    assert "step 7" in out and f"{model.num_parameters():,} parameters" in out and data.fingerprint in out
    rows = {"model": score.bits_per_byte, **compressors}
    for name, value in rows.items():
        assert re.search(rf"^{name} +{value:.4f}$", out, re.MULTILINE)


@pytest.mark.parametrize("others", [False, True])
def test_evaluate_keeps_documents_apart_where_the_run_did(folder, call, tmp_path, others):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    packed = RunConfig(data=DataConfig(dir=str(folder / "data"), packing="documents"), model=MODEL)
    (run / "config.yaml").write_text(dump_run_config(packed))
    data = folder / ("other" if others else "data")
    code, out, _ = call("evaluate.py", run, "--output", tmp_path / "out.json", *(["--data", data] if others else []))
    assert code == 0 and "from its own document alone" in out
    found = json.loads((tmp_path / "out.json").read_text())["results"]["bits_per_byte"]["bits_per_byte"]
    stream = PreparedData.open(data).split("validation")
    assert found == pytest.approx(score_split(STLM.load(run), stream, documents_apart=True).bits_per_byte)
    assert found != pytest.approx(score_split(STLM.load(run), stream).bits_per_byte)


def test_evaluate_on_the_test_split(folder, call, tmp_path):
    """The test text replaces the validation text; requesting it where none exists, or without data, is an error."""
    config = PrepareConfig((str(folder / "data.txt"),), output=str(tmp_path / "out"), test=(str(folder / "other.txt"),))
    prepare(config)
    code, out, _ = call("evaluate.py", folder / "run", "--data", tmp_path / "out", "--split", "test",
                        "--output", tmp_path / "out.json")  # fmt: skip
    assert code == 0 and "test text" in out and f"({folder / 'other.txt'})" in out
    written = json.loads((tmp_path / "out.json").read_text())
    stream = PreparedData.open(tmp_path / "out").split("test")
    assert written["split"] == "test"
    assert written["results"]["bits_per_byte"]["bytes"] == stream.num_bytes
    assert written["results"]["bits_per_byte"]["bits_per_byte"] == pytest.approx(
        score_split(STLM.load(folder / "run"), stream).bits_per_byte
    )
    code, _, err = call("evaluate.py", folder / "run", "--split", "test")
    assert code == 2 and "holds no text for a test; prepare the data with scripts/preprocess.py --test PATH" in err
    code, _, err = call("evaluate.py", folder / "run", "--split", "test", "--tasks", "minimal_pairs")
    assert code == 2 and "--split: minimal_pairs read no prepared data" in err


def test_compare_runs_and_results(folder, call, tmp_path):
    """A model compared with itself, once from its run and once from the files of evaluate.py: no difference."""
    files = tmp_path / "out.json", tmp_path / "items.jsonl"
    call("evaluate.py", folder / "run", "--output", files[0], "--items", files[1])
    code, out, _ = call("compare.py", folder / "run", files[0], "--tasks", "bits_per_byte",
                        "--output", tmp_path / "page.html")  # fmt: skip
    assert code == 0 and re.search(r"bits_per_byte .* \+0\.0000 .* bootstrap +1 +1$", out, re.MULTILINE)
    assert "bits_per_byte" in (tmp_path / "page.html").read_text()
    other = tmp_path / "other.json"
    call("evaluate.py", folder / "run", "--data", folder / "other", "--output", other, "--items", files[1])
    code, _, err = call("compare.py", folder / "run", other, "--tasks", "bits_per_byte")
    assert code == 2 and re.search("bits_per_byte: .*run and .*other.json were scored on different items", err)
    code, _, err = call("compare.py", tmp_path / "nope.json")
    assert code == 2 and f"there is no file {tmp_path / 'nope.json'}; expected a run" in err
    call("evaluate.py", folder / "run", "--output", files[0], "--items", files[1])
    code, _, err = call("compare.py", files[0], "--figures", "/proc/x")
    assert code == 2 and "no folder can be made there" in err and "Traceback" not in err


def test_evaluate_reports_that_data_differ_from_the_runs(folder, call):
    trained_on = PreparedData.open(folder / "data").fingerprint
    code, out, _ = call("evaluate.py", folder / "run" / "checkpoints" / "step_00000007", "--data", folder / "other")
    assert code == 0
    assert f"differs from the training data, sha256 {trained_on}" in out
    assert PreparedData.open(folder / "other").fingerprint in out


def test_evaluate_tasks_of_choices(folder, call, tmp_path):
    items = [{"id": str(n), "context": f"Line {n} of", "choices": ["data", "it"], "answer": 0} for n in range(5)]
    (tmp_path / "hellaswag.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    files = tmp_path / "out.json", tmp_path / "items.jsonl"
    model = folder / "run" / "checkpoints" / "step_00000007" / "model"  # data are neither needed nor looked for
    code, out, _ = call("evaluate.py", model, "--tasks", "hellaswag", "--tasks-dir", tmp_path,
                        "--output", files[0], "--items", files[1])  # fmt: skip
    assert code == 0 and re.search(r"^hellaswag +5 .* 50\.0 +30\.0$", out, re.MULTILINE)
    values = json.loads(files[0].read_text())["results"]["hellaswag"]
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [line["id"] for line in lines] == list("01234") and {line["task"] for line in lines} == {"hellaswag"}
    assert values["accuracy"]["value"] == sum(line["accuracy"] for line in lines) / 5
    code, _, _ = call("evaluate.py", model, "--tasks", "hellaswag", "--tasks-dir", tmp_path,
                      "--output", tmp_path / "out.md")  # fmt: skip
    assert code == 0 and values["sha256"] in (tmp_path / "out.md").read_text()


def test_evaluate_all_checkpoints_in_the_order_of_training(folder, call, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    later = shutil.copytree(run / "checkpoints" / "step_00000007", run / "checkpoints" / "step_00000012")
    STLM.from_config(MODEL, PreparedData.open(folder / "data").tokenizer, seed=2).save(later / "model2")
    shutil.rmtree(later / "model")
    (later / "model2").rename(later / "model")
    (later / "state.json").write_text(json.dumps({"step": 12}))
    shutil.copytree(later, run / "checkpoints" / "step_00000013")
    (run / "checkpoints" / "step_00000013" / "COMPLETE").unlink()
    output = tmp_path / "out.json"
    code, out, _ = call("evaluate.py", run, "--tasks", "bits_per_byte", "--all-checkpoints", "--output", output)
    found = json.loads(output.read_text())["checkpoints"]
    assert code == 0 and [one["step"] for one in found] == [7, 12]
    stream = PreparedData.open(folder / "data").split("validation")
    curve = [score_split(STLM.load(run / "checkpoints" / f"step_{step:08}"), stream).bits_per_byte for step in (7, 12)]
    assert [one["results"]["bits_per_byte"]["bits_per_byte"] for one in found] == pytest.approx(curve)
    assert out.splitlines()[-2:] == [f"   7         {curve[0]:.4f}", f"  12         {curve[1]:.4f}"]
    code, _, err = call("evaluate.py", tmp_path, "--all-checkpoints")
    assert code == 2 and "holds no complete checkpoint" in err


def test_evaluate_without_any_other_data(folder, call, tmp_path):
    text = "\n<eos>\n".join(
        f"{' '.join(f'word{n}x{m}' for m in range(24))}. One {n}. Two {n} is so " + "long. " * 25 for n in range(60)
    )
    (tmp_path / "text.txt").write_text(text)
    config = PrepareConfig(inputs=(str(tmp_path / "text.txt"),), output=str(tmp_path / "data"), workers=1)
    prepare(dataclasses.replace(config, validation_fraction=0.1))
    run = folder / "run"
    output = tmp_path / "out.json"
    code, out, _ = call("evaluate.py", run, "--data", tmp_path / "data", "--tasks", "corruptions", "--output", output)
    assert code == 0 and re.search(r"^word_shuffle +\d+ ", out, re.MULTILINE)
    values = json.loads(output.read_text())["results"]["corruptions"]
    assert values["items"] == 13 * values["passages"] and values["chance"] == 0.5
    code, _, err = call("evaluate.py", run, "--tasks", "minimal_pairs", "--shots", "1")
    assert code == 2 and "--shots: got 1 for minimal_pairs, which has no prompts" in err


def test_evaluate_refuses(folder, call, tmp_path):
    run = folder / "run"
    for arguments, message in [
        ((run, "--tasks", "bits_per_bite"), "got 'bits_per_bite' (nearest: bits_per_byte), expected one or more of"),
        ((run, "--tasks", "blimp", "--tasks-dir", tmp_path), f"put them into {tmp_path / 'blimp.jsonl'}"),
        ((run, "--stride", "33"), "the stride: got 33, expected 1 to 32"),
        ((run, "--stride", "0"), "the stride: got 0, expected 1 to 32"),
        ((run, "--tasks", "minimal_pairs", "--stride", "3"), "--stride: no effect on minimal_pairs; expected one"),
        ((run, "--tasks-dir", tmp_path), "--tasks-dir: no effect on bits_per_byte; expected one of arc_challenge"),
        ((run, "--hub"), "--hub: no effect on bits_per_byte"),
        ((run, "--reference", run), "--reference: no effect on bits_per_byte; expected one of text_quality"),
        ((run, "--data", tmp_path), f"no prepared data in {tmp_path}"),
        ((tmp_path / "none",), "no such directory"),
        ((tmp_path,), "holds no complete checkpoint"),
    ]:
        code, _, err = call("evaluate.py", *arguments)
        assert code == 2
        assert err.startswith("error: ") and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "found.txt"), "--output: got 'found.txt', expected FILE.json or FILE.md"),
        (("--items", "."), "--items: . is a folder, expected a file"),
        (("--tasks", "minimal_pairs", "--data", "mine"), "--data: minimal_pairs read no prepared data"),
    ],
)
def test_evaluate_refuses_before_it_scores(folder, call, options, message):
    code, out, err = call("evaluate.py", folder / "run", *options)
    assert (code, out) == (2, "") and message in err


def test_evaluate_from_another_folder_than_the_run_was_started_in(folder, call, tmp_path, monkeypatch):
    shutil.copytree(folder / "run", tmp_path / "run")
    config = RunConfig(data=DataConfig(dir="data"), model=MODEL)
    (tmp_path / "run" / "config.yaml").write_text(dump_run_config(config))
    monkeypatch.chdir(folder)
    assert call("evaluate.py", tmp_path / "run")[0] == 0
    monkeypatch.chdir(tmp_path)
    code, _, err = call("evaluate.py", tmp_path / "run")
    assert code == 2
    assert "no prepared data in data" in err and "name its data by --data" in err


@pytest.mark.parametrize("state", ["[1]", '{"data": 1}', '{"step": "x"}', "{"])
def test_evaluate_refuses_invalid_progress(folder, call, tmp_path, state):
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run/checkpoints/step_00000007/state.json").write_text(state)
    code, _, err = call("evaluate.py", tmp_path / "run")
    assert code == 2
    assert "state.json: cannot be read (" in err and "Traceback" not in err


def test_evaluate_refuses_data_of_another_tokenizer(folder, call, tmp_path, monkeypatch):
    tokenizer = build_tokenizer("byte")
    tokenizer.fingerprint = "f" * 64
    monkeypatch.setattr("stlm.checkpoints.load_tokenizer", lambda directory: tokenizer)
    STLM.from_config(MODEL, tokenizer).save(tmp_path / "model")
    code, _, err = call("evaluate.py", tmp_path / "model", "--data", folder / "data")
    assert code == 2
    assert "prepared with the tokenizer byte (" in err and "expected byte (ffffffffffff)" in err


# generate.py


def test_generate_shows_the_prompt_and_what_follows(folder, call):
    code, out, _ = call("generate.py", folder / "run", "--prompt", "Line", "--max-ids", "40", "--seed", "3")
    assert code == 0
    assert out == "Line" + continuation(folder, "Line", max_new_ids=40, seed=3) + "\n"


def test_generate_passes_every_option_on(folder, call):
    given = {"temperature": 1.5, "top_k": 99, "top_p": 0.8, "min_p": 0.3, "typical_p": 0.9, "repetition_penalty": 3.0,
             "frequency_penalty": 0.4, "presence_penalty": 9.0}  # fmt: skip
    options = ["--max-ids", "30"]
    for name, value in given.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    _, out, _ = call("generate.py", folder / "run", "--prompt", "", *options)
    assert out == continuation(folder, "", max_new_ids=30, **given) + "\n"
    for option in ("--temperature", "--top-p", "--typical-p", "--repetition-penalty", "--max-ids"):
        without = [word for index, word in enumerate(options) if options[index - index % 2] != option]
        assert call("generate.py", folder / "run", "--prompt", "", *without)[1] != out, option

    arguments = ("--prompt", "", "--max-ids", "30", "--temperature", "0", "--presence-penalty", "9")
    _, out, _ = call("generate.py", folder / "run", *arguments)
    plain = {"max_new_ids": 30, "temperature": 0}
    assert (
        out == continuation(folder, "", **plain, presence_penalty=9) + "\n" != continuation(folder, "", **plain) + "\n"
    )


def test_generate_reads_a_prompt_from_each_line(folder, call):
    code, out, _ = call("generate.py", folder / "run", "--max-ids", "9", stdin="Line 1\nLéne\n")
    assert code == 0
    lines = [
        prompt + continuation(folder, prompt, max_new_ids=9, seed=seed)
        for seed, prompt in enumerate(("Line 1", "Léne"))
    ]
    assert out == "".join(line + "\n" for line in lines)


def test_generate_with_fewer_layers_prints_their_mean_number(folder, call, tmp_path):
    core = dataclasses.replace(MODEL.core, num_layers=4, exits=ExitsConfig(every=1))
    model = STLM.from_config(dataclasses.replace(MODEL, core=core), build_tokenizer("byte"), seed=1)
    model.save(tmp_path / "model")
    arguments = (tmp_path / "model", "--prompt", "Line", "--max-ids", "20", "--temperature", "0")
    _, plain, err = call("generate.py", *arguments)
    assert err == ""
    code, out, err = call("generate.py", *arguments, "--speculative", "self", "--drafts", "2")
    assert (code, out) == (0, plain) and re.search(r"of 4 layers run per id .* drafts accepted", err)
    code, _, err = call("generate.py", *arguments, "--exit-threshold", "0.0001")
    assert code == 0 and "19 ids; 1.00 of 4 layers run per id (75% saved)" in err


def test_generate_uses_the_requested_precision(folder, call, tmp_path):
    (tmp_path / "text").write_text("Line 1 and line 2")
    said = {}
    for precision in ("fp32", "bf16", "int8"):
        code, out, _ = call("generate.py", folder / "run", "--score", tmp_path / "text", "--precision", precision)
        assert code == 0
        said[precision] = out
        nats = STLM.load(folder / "run").optimize_for_decoding(precision).log_likelihood("Line 1 and line 2")
        assert f"log-likelihood {nats:.4f} nats" in out
    assert len(set(said.values())) == 3


def test_generate_several_texts_the_likeliest_one_and_up_to_a_stop(folder, call):
    model = STLM.load(folder / "run")
    code, out, _ = call("generate.py", folder / "run", "--prompt", "Li", "--max-ids", "9", "--samples", "3")
    texts = [continuation(folder, "Li", max_new_ids=9, seed=seed) for seed in range(3)]
    assert code == 0 and out == "".join(f"Li{text}\n" for text in texts)
    text, log_probability = model.beam_search("Li", num_beams=3, max_new_ids=9)[0]
    code, out, err = call("generate.py", folder / "run", "--prompt", "Li", "--max-ids", "9", "--beams", "3")
    assert (code, out, err) == (0, f"Li{text}\n", f"log-probability {log_probability:.4f}\n")
    stop = texts[0][3:5]
    code, out, _ = call("generate.py", folder / "run", "--prompt", "Li", "--max-ids", "9", "--stop", stop)
    assert out == f"Li{texts[0].split(stop)[0]}\n"
    long = "a long prompt, " * 9
    _, _, err = call("generate.py", folder / "run", "--prompt", long, "--max-ids", "1", "--valid-utf8")
    assert err == "the prompt has 135 ids; the model reads the last 31\n"


def test_generate_answers_in_a_chat(folder, call, tmp_path):
    model = STLM.load(folder / "run")
    messages = [{"role": "user", "content": "Line"}]
    code, out, err = call("generate.py", folder / "run", "--chat", "--prompt", "Line", "--max-ids", "9")
    assert (code, out) == (0, continuation(folder, "User: Line\nAssistant:", max_new_ids=9) + "\n")
    assert "trained on no conversations" in err

    model.tokenizer.chat_template = TEMPLATE
    model.save(tmp_path / "model")
    whole = model.generate(prompt_of(messages), max_new_ids=9, temperature=0.8)
    code, out, err = call("generate.py", tmp_path / "model", "--chat", "--prompt", "Line", "--max-ids", "9")
    assert (code, out, err) == (0, whole.partition("\x03")[0] + "\n", "")
    code, _, err = call("generate.py", tmp_path / "model", "--chat", "--beams", "2", "--prompt", "Line")
    assert code == 2 and "--chat: no effect with --beams" in err


def test_generate_scores_a_file(folder, call, tmp_path):
    model, text = STLM.load(folder / "run"), "Line 1\n\nLéne\n"
    (tmp_path / "text").write_text(text)
    nats = -model.log_likelihood(text)
    total = (
        f"log-likelihood {-nats:.4f} nats, {len(text.encode())} bytes, {nats / math.log(2) / 14:.4f} bits per byte\n"
    )
    assert call("generate.py", folder / "run", "--score", tmp_path / "text") == (0, total, "")
    _, out, _ = call("generate.py", folder / "run", "--score", tmp_path / "text", "--per-line")
    bits = [-model.log_likelihood(line) / math.log(2) / len(line.encode()) for line in ("Line 1", "Léne")]
    assert out == f"{bits[0]:.4f}\tLine 1\n{bits[1]:.4f}\tLéne\n{total}"
    (tmp_path / "text").write_bytes(b"ab\xff")
    for name, message in (("text", "is not UTF-8 at byte 2"), ("none", "there is no file")):
        code, _, err = call("generate.py", folder / "run", "--score", tmp_path / name)
        assert code == 2 and message in err and "Traceback" not in err


def test_generate_refuses(folder, call):
    for arguments, message in [
        (("--temperature", "-1"), "--temperature: got '-1', expected a number from 0 to 100"),
        (("--temperature", "hot"), "--temperature: got 'hot'"),
        (("--top-k", "0"), "--top-k: got '0', expected an integer of at least 1"),
        (("--top-p", "1.5"), "--top-p: got '1.5', expected a number from 0 to 1"),
        (("--max-ids", "2.5"), "--max-ids: got '2.5', expected an integer of at least 0"),
        (("--prompt", "\udcff"), "lone surrogate"),
        (("--exit-threshold", "0"), "--exit-threshold: got '0', expected a number"),
        (("--speculative", "self", "--prompt", "a"), "model.core.exits.every = null"),
        (("--stop", ""), "--stop: got '', expected a text that is not empty"),
        (("--stop", "\udcff"), "--stop: got '\\udcff', expected valid UTF-8"),
        (("--score", folder), "--score: "),
        (("--per-line",), "--per-line: got no --score FILE"),
    ]:
        code, _, err = call("generate.py", folder / "run", *arguments)
        assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "beside"),
    [
        ("--exit-threshold 0.5 --speculative self", "--speculative: no effect with --exit-threshold"),
        ("--exit-threshold 0.5 --drafts 2", "--drafts: no effect with --exit-threshold"),
        ("--speculative off --drafts 3", "--drafts: no effect with --speculative off"),
        ("--drafts 3", "--drafts: no effect with --speculative auto"),
        ("--beams 2 --speculative ngram", "--speculative: no effect with --beams"),
        ("--beams 2 --stop .", "--stop: no effect with --beams"),
        ("--beams 2 --temperature 0.8", "--temperature: no effect with --beams"),
        ("--beams 2 --seed 1 --top-k 3", "--top-k, --seed: no effect with --beams"),
        ("--beams 2 --samples 1", "--samples: no effect with --beams"),
        ("--temperature 0 --top-p 0.9", "--top-p: no effect with --temperature 0"),
        ("--temperature 0 --seed 2", "--seed: no effect with --temperature 0"),
        ("--temperature 0 --samples 2", "--samples: no effect with --temperature 0"),
        ("--samples 2 --speculative ngram", "--speculative: no effect with --samples 2"),
        ("--score none --prompt a", "--prompt: no effect with --score"),
        ("--score none --temperature 0 --stop a", "--stop, --temperature: no effect with --score"),
        ("--score none --chat --max-ids 3", "--chat, --max-ids: no effect with --score"),
        ("--score none --valid-utf8", "--valid-utf8: no effect with --score"),
    ],
)
def test_generate_refuses_an_option_without_effect(folder, call, options, beside):
    code, out, err = call("generate.py", folder / "run", *options.split())
    assert (code, out) == (2, "") and f"error: {beside}" in err


def test_every_option_of_generate_is_checked_for_its_effect(call):
    """New options must be added to one of the tables, or be always valid."""
    _, out, _ = call("generate.py", "--help")
    options = {name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]+)", out.partition("options:")[2])}
    known = {*generate.TEXT, *generate.DRAWING, *generate.DRAFTING}
    assert known | {"help", "score", "per_line", "precision"} == options


class Terminal:
    """Runs generate.py as a user at a terminal would: from another folder, in a locale that is limited to ASCII."""

    def __init__(self, *arguments):
        self.ours, theirs = pty.openpty()
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "generate.py", *arguments],
            stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
            env=environment | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where this process ignores it
        )  # fmt: skip
        os.close(theirs)

    def type(self, text):
        os.write(self.ours, text)

    def end(self):
        out, err = self.process.communicate(timeout=120)
        os.close(self.ours)
        assert self.process.returncode == 0, err
        return out.decode("utf-8").replace("› ", ""), err.decode("utf-8")


def test_generate_at_a_terminal_prompts_until_exit(folder):
    terminal = Terminal(folder / "run", "--max-ids", "30")
    terminal.type(b"Line\nWord\n/reset\nWord\n/new\nWord\n/help\n/hepl\n/exit\nnever\n")
    out, err = terminal.end()
    first = continuation(folder, "Line", max_new_ids=30, seed=0)
    second = continuation(folder, f"Line{first}\nWord", max_new_ids=30, seed=1)
    third, fourth = (continuation(folder, "Word", max_new_ids=30, seed=seed) for seed in (3, 5))
    assert out == f"Line{first}\nWord{second}\nWord{third}\nWord{fourth}\n"
    assert "/reset  forget the conversation" in err and "unknown command /hepl; /help lists them" in err


def test_bytes_that_are_no_text_do_not_end_the_conversation(folder):
    terminal = Terminal(folder / "run", "--max-ids", "3")
    terminal.type(b"\xff Line\nWord\n/exit\n")
    out, err = terminal.end()
    assert "Line" in out and "\nWord" in out and "surrogate" not in err


def test_ctrl_c_stops_the_answer_and_not_the_conversation(folder):
    endless = ("--max-ids", "1000000", "--temperature", "0")  # the likeliest text repeats without end
    assert len(continuation(folder, "Line", max_new_ids=3000, temperature=0)) > 1000
    terminal = Terminal(folder / "run", *endless)
    terminal.type(b"Line\n")
    read_until(terminal.process.stdout, b"Line")
    terminal.process.send_signal(signal.SIGINT)
    read_until(terminal.process.stderr, b"stopped")
    terminal.type(b"/exit\n")
    _, err = terminal.end()
    assert "Traceback" not in err


def read_until(stream, what, patience_s=120):
    """Read from a pipe until the text appears."""
    said, end = b"", time.monotonic() + patience_s
    while what not in said:
        assert select.select([stream], [], [], max(0, end - time.monotonic()))[0], f"it said no more than {said!r}"
        piece = os.read(stream.fileno(), 1000)
        assert piece, f"it ended after {said!r}"
        said += piece


def test_generate_into_a_closed_pipe_ends_quietly(folder):
    command = f"yes Line | {sys.executable} {ROOT / 'scripts' / 'generate.py'} {folder / 'run'} --max-ids 5 | head -1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command + "; echo ${PIPESTATUS[1]} >&2"], capture_output=True, timeout=120
    )
    assert result.stderr.decode().split() == ["0"]
