"""Assign groups of images to splits: stratified by class, without dividing a group, the same for the same data."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, get_args

Split = Literal["train", "val", "calibration", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
# 70 % for training; equal parts of the rest choose the epoch, fit the calibration, and test.
DEFAULT_FRACTIONS = {"train": 0.7, "val": 0.1, "calibration": 0.1, "test": 0.1}
DEFAULT_SEED = 2019


def assign_splits(
    groups: Mapping[str, Sequence[str]],
    fixed_test: frozenset[str] = frozenset(),
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = DEFAULT_SEED,
) -> dict[str, str]:
    """Return one of SPLITS for each group.

    Within a class, groups are ordered by a hash of seed and name, laid end to end by their number of images, and cut
    where the splits' shares end. A group belongs to the split that its middle falls into. So each split gets its share
    of each class, to within the size of the class's largest group, and new groups move only a few others. A group with
    several classes counts as its rarest.

    Args:
        groups: class codes of each group's images.
        fixed_test: groups that are always test; they count towards the test split's share.
        fractions: share of each of SPLITS; they need not sum to 1.
    """
    images_of_class = Counter(code for codes in groups.values() for code in codes)
    strata: dict[str, list[str]] = defaultdict(list)
    for name, codes in groups.items():
        strata[min(set(codes), key=lambda code: (images_of_class[code], code))].append(name)

    # Exact arithmetic: 1 - 0.1 - 0.1 - 0.1 is not 0.7 in floats, and must not move a group that lies on a cut.
    shares = {split: Fraction(round(fractions[split] * 1_000_000)) for split in SPLITS}
    total_share = sum(shares.values())
    splits: dict[str, str] = {}
    for names in strata.values():
        fixed = [name for name in names if name in fixed_test]
        free = sorted((name for name in names if name not in fixed_test), key=lambda name: _dice(seed, name))
        images = sum(len(groups[name]) for name in names)
        targets = {split: images * shares[split] / total_share for split in SPLITS}
        targets["test"] = max(Fraction(0), targets["test"] - sum(len(groups[name]) for name in fixed))
        splits |= dict.fromkeys(fixed, "test")
        # The only group of a class is for training.
        splits |= _cut(free, groups, targets) if len(names) > 1 else dict.fromkeys(free, "train")
    return splits


def _dice(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _cut(names: Sequence[str], groups: Mapping[str, Sequence[str]], targets: Mapping[str, Fraction]) -> dict[str, str]:
    total = sum(len(groups[name]) for name in names)
    scale = total / (sum(targets.values()) or Fraction(1))
    ends, end = [], Fraction(0)
    for split in ("test", "calibration", "val", "train"):
        end += targets[split] * scale
        ends.append((split, end))
    result, position = {}, 0
    for name in names:
        middle = position + Fraction(len(groups[name]), 2)
        position += len(groups[name])
        result[name] = next((split for split, end in ends if middle <= end), "train")
    return result
