"""`python -m stlm NAME` is `stlm NAME`. Launchers start it as a module: `torchrun -m -- stlm pretrain`."""

from stlm.commands.program import main

if __name__ == "__main__":
    main()
