"""The example on sentence similarity."""

import gzip
import pathlib
import runpy


def test_the_example_on_sentence_similarity(tmp_path):
    for part in ("train", "test"):
        lines = [
            f"{score:.3f}\tA man eats {word} ||| A man eats rice\n"
            for score, word in zip((0, 1, 2, 5), "abcd", strict=True)
        ]
        with gzip.open(tmp_path / f"{part}.tsv.gz", "wt") as file:
            file.writelines(["label\ttext\n", *lines * 3])
    root = pathlib.Path(__file__).parents[2]
    example = runpy.run_path(str(root / "examples" / "stsb.py"))
    pearson, spearman = example["main"](str(tmp_path), "r_at", epochs=8, batch=4)
    assert pearson > 0.9 and spearman > 0.9
