from stlm.evals import table


def test_table():
    assert table([["xz", "2.1"], ["gzip -9", "12.3"]], ["name", "bits"], "lr").splitlines() == [
        "name     bits",
        "───────  ────",
        "xz        2.1",
        "gzip -9  12.3",
    ]
    assert table([["a", "b"], ["cc", ""]]) == "a   b\ncc"
