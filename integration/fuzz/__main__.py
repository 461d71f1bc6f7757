"""Run the fuzzer: ``python -m integration.fuzz FOLDER [libFuzzer options]``. Needs atheris; see ``make fuzz``.

FOLDER keeps the corpus between runs, and the inputs that failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vmsnap"]):
    from integration.fuzz.target import one_input, seeds


def main() -> None:
    folder = Path(sys.argv[1])
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-artifact_prefix={folder}/", "-max_len=2048", "-print_final_stats=1", *sys.argv[2:]]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    atheris.Fuzz()


main()
