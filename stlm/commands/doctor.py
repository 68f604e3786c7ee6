"""Check that this machine can train, and print how to fix what is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.plurals import number_of
from stlm.training.doctor import check_machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; None: those of the process. Returns the exit code, if any."""
    parser = argparse.ArgumentParser(
        description="Check versions, compiler, devices and caches, then train for two steps in a temporary folder. "
        "Exit with 2 if there is a problem."
    )
    parser.parse_args(argv)
    print("this takes about a minute", file=sys.stderr)
    findings = []
    for finding in check_machine():
        print(f"{finding.status:9}{finding.name:15}{finding.found}", flush=True)
        findings.append(finding)
    for finding in findings:
        if finding.advice:
            print(f"\n{finding.status}: {finding.name}: {finding.advice}")
    problems = sum(finding.status == "problem" for finding in findings)
    print(f"\n{number_of(problems, 'problem') if problems else 'no problems'}")
    return 2 if problems else 0
