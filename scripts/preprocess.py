#!/usr/bin/env python
"""`stlm preprocess`, without installation."""

from _command import start

if __name__ == "__main__":
    start("preprocess")
