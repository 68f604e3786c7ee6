#!/usr/bin/env python
"""Many clients at once on scripts/serve.py: complete answers, and waiting times.

    python benchmarks/serving.py [RUN_OR_CHECKPOINT] [--clients 64] [--seconds 60]

Each client sends its next request as soon as it has an answer: prompts and answers of many lengths, half of them
streamed. Without a model, one of the quickstart's shape with random weights is served. Every answer is counted, and
must be complete.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORDS = ("the", "module", "returns", "a list", "of names", "which it", "finds in", "a given", "folder", "or below")


class Client(threading.Thread):
    """A client that sends requests until the time is over, and records when each answer began and ended."""

    def __init__(self, address: str, seed: int, end: float) -> None:
        super().__init__()
        self.address, self.end, self.random = address, end, random.Random(seed)
        self.asked = self.tokens = 0
        self.first: list[float] = []
        self.whole: list[float] = []
        self.lost: list[str] = []

    def run(self) -> None:
        while time.perf_counter() < self.end:
            self.asked += 1
            try:
                self.ask(stream=self.asked % 2 == 0)
            except (OSError, ValueError, KeyError, AssertionError) as error:
                self.lost.append(repr(error))

    def ask(self, stream: bool) -> None:
        prompt = " ".join(self.random.choices(WORDS, k=self.random.randint(1, 20)))
        asked = {"prompt": prompt, "max_tokens": self.random.randint(8, 64), "seed": self.asked, "stream": stream}
        if stream:
            asked["stream_options"] = {"include_usage": True}
        request = urllib.request.Request(f"{self.address}/v1/completions", json.dumps(asked).encode())
        begin = time.perf_counter()
        with urllib.request.urlopen(request, timeout=600) as answer:
            if stream:
                lines = []
                for line in answer:
                    if line.strip() and not lines:
                        self.first.append(time.perf_counter() - begin)
                    lines += [line.decode().strip().removeprefix("data: ")] if line.strip() else []
                assert lines[-1] == "[DONE]", "a stream was cut off"
                self.tokens += json.loads(lines[-2])["usage"]["completion_tokens"]
            else:
                body = json.loads(answer.read())
                assert body["choices"][0]["finish_reason"] in ("stop", "length"), "an answer was cut off"
                self.tokens += body["usage"]["completion_tokens"]
        self.whole.append(time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="run, checkpoint or model (default: the quickstart's, random)")
    parser.add_argument("--clients", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--seconds", type=float, default=60, help="until no client asks again (default: 60)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or quickstart(Path(folder) / "model")
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(model), "--port", "0"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        address = next(filter(None, (re.search(r"http://[\d.:]+", line) for line in server.stderr)))[0]
        threading.Thread(target=server.stderr.read, daemon=True).start()
        begin = time.perf_counter()
        clients = [Client(address, seed, begin + options.seconds) for seed in range(options.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        seconds = time.perf_counter() - begin
        server.terminate()
        server.wait()
    asked, lost = sum(client.asked for client in clients), [error for client in clients for error in client.lost]
    tokens = sum(client.tokens for client in clients)
    print(
        f"{options.clients} clients, {seconds:.0f} s: {asked} requests, {len(lost)} lost, {tokens / seconds:.0f} ids/s"
    )
    for error in sorted(set(lost))[:5]:
        print(f"lost: {error}")
    print(f"\n{'seconds until':24}{'p50':>8}{'p90':>8}{'p99':>8}{'longest':>9}")
    for name, times in (
        ("the first piece", [each for client in clients for each in client.first]),
        ("the whole answer", [each for client in clients for each in client.whole]),
    ):
        times.sort()
        shown = [times[min(len(times) - 1, int(share * len(times)))] for share in (0.5, 0.9, 0.99, 1.0)]
        print(f"{name:24}" + "".join(f"{each:8.2f}" for each in shown[:3]) + f"{shown[3]:9.2f}")
    if lost:
        raise SystemExit(1)


def quickstart(folder: Path) -> Path:
    """Write a model directory with the quickstart's shape and random weights."""
    from data_pipeline.tokenizers import build_tokenizer
    from stlm.config import load_run_config
    from stlm.stlm import STLM

    STLM.from_config(load_run_config("quickstart").model, build_tokenizer("byte")).save(folder)
    return folder


if __name__ == "__main__":
    main()
