"""Cleaning: steps that change documents or leave them out, each off by default.

`documents` lists the steps on single documents, `normalization`, `language`, `c4`, `gopher`, one file each;
`near_duplicates` and `decontamination` compare documents with others, using hashes of runs of `words`. `record` counts
their effects.
"""
