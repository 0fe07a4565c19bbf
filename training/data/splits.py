"""Which split a lesion goes to: stratified by class, never dividing a group, the same for the same data."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, get_args

Split = Literal["train", "val", "calibration", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
# 70 % to learn from; the rest in equal parts for choosing the epoch, fitting the calibration, and the final measure.
DEFAULT_FRACTIONS = {"train": 0.7, "val": 0.1, "calibration": 0.1, "test": 0.1}
DEFAULT_SEED = 2019


def assign_splits(
    groups: Mapping[str, Sequence[str]],
    fixed_test: frozenset[str] = frozenset(),
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = DEFAULT_SEED,
) -> dict[str, str]:
    """Give every group one split.

    Within a class the groups are put in an order that depends on the seed and their names alone, laid end to end by
    their number of images, and cut where the splits' shares end; a group belongs to the split its middle falls into.
    So each split gets its share of each class to within the size of the class's largest group, the order in which
    groups are given does not matter, and a few added groups move only the few groups next to a cut. Groups with
    several classes count as their rarest.

    Args:
        groups: name of each group -> class code of each of its images.
        fixed_test: groups that are test whatever the dice say; they count towards the test split's share.
        fractions: share of each of SPLITS; they need not sum to 1.
        seed: another seed gives another split.

    Returns:
        name of each group -> one of SPLITS.
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
        # The only group of a class is learnt from, whatever the shares.
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
