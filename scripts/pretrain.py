#!/usr/bin/env python
"""`stlm pretrain`, without installation."""

from _command import start

if __name__ == "__main__":
    start("pretrain")
