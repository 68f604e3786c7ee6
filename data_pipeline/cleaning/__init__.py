"""Cleaning: what is changed in documents, and which documents are left out, each step off unless it is asked for.

`documents` lists the steps on single documents, `normalization`, `language`, `c4`, `gopher`, one file each;
`near_duplicates` and `decontamination` compare documents with others, over hashes of runs of `words`. `record` counts
what they do.
"""
