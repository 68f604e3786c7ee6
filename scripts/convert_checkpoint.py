#!/usr/bin/env python
"""`stlm convert_checkpoint`, without installation."""

from _command import start

if __name__ == "__main__":
    start("convert_checkpoint")
