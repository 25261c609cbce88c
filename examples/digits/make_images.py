"""Write scikit-learn's 1,797 scanned handwritten digits (UCI optdigits, 8 x 8 grey levels) as PNG files.

They lie in OUT/{train,val,test}/{zero..nine}/.

    python examples/digits/make_images.py --out runs/digits-images
    mmlg data pack runs/digits-images --out runs/digits-data --templates "the number {}." ...
    mmlg family digits --data.path runs/digits-data --out runs/digits

The split is stratified and fixed: 1,197 / 200 / 400 scans. Scans are enlarged four times to 32 x 32, nothing else is done to them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out = parser.parse_args().out
    digits = load_digits()
    indices = np.arange(len(digits.images))
    rest, test = train_test_split(indices, test_size=400, stratify=digits.target, random_state=0)
    train, val = train_test_split(rest, test_size=200, stratify=digits.target[rest], random_state=0)
    for split, members in (("train", train), ("val", val), ("test", test)):
        for index in members:
            folder = out / split / NAMES[digits.target[index]]
            folder.mkdir(parents=True, exist_ok=True)
            grey = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
            Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(folder / f"{index:04d}.png")
    print(f"{len(train)} / {len(val)} / {len(test)} scans in {out}/train, val, test")


if __name__ == "__main__":
    main()
