"""Splitting promises: no group is divided, each class is shared out to within one group, fixed test groups are test,
and the outcome depends on names, classes and seed alone."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.taxonomy import CODES
from training.data.splits import DEFAULT_FRACTIONS, SPLITS, assign_splits

one_class = st.builds(lambda code, size: [code] * size, st.sampled_from(CODES), st.integers(1, 8))
mixed = st.lists(st.sampled_from(CODES), min_size=1, max_size=8)
names = st.text(min_size=1, max_size=6)
shares = st.tuples(*[st.integers(0, 10)] * 3, st.integers(1, 10)).map(
    lambda parts: dict(zip(reversed(SPLITS), parts, strict=True))
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, one_class, max_size=60), shares, st.integers(), st.data())
def test_each_class_is_shared_out_to_within_its_largest_group(groups, fractions, seed, data):
    fixed = frozenset(data.draw(st.sets(st.sampled_from(sorted(groups)))) if groups else ())
    splits = assign_splits(groups, fixed, fractions, seed)
    assert splits.keys() == groups.keys()
    assert all(splits[name] == "test" for name in fixed)

    for code in CODES:
        sizes = {name: len(codes) for name, codes in groups.items() if codes[0] == code}
        if not sizes:
            continue
        given_out = Counter()
        for name, size in sizes.items():
            given_out[splits[name]] += size
        fixed_images = sum(size for name, size in sizes.items() if name in fixed)
        wanted = {split: sum(sizes.values()) * fractions[split] / sum(fractions.values()) for split in SPLITS}
        # What is fixed beyond test's share is missing from the others, in their proportion.
        wanted["test"] = max(wanted["test"], fixed_images)
        rest = sum(share for split, share in wanted.items() if split != "test")
        for split in SPLITS:
            if split != "test":
                wanted[split] *= (sum(sizes.values()) - wanted["test"]) / rest
            assert abs(given_out[split] - wanted[split]) <= max(sizes.values()) + 1e-6


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, mixed, max_size=40), st.integers(), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_classes_may_mix(groups, seed, random):
    shuffled = list(groups.items())
    random.shuffle(shuffled)
    splits = assign_splits(dict(shuffled), seed=seed)
    assert splits == assign_splits(groups, seed=seed)
    assert splits.keys() == groups.keys()
    assert set(splits.values()) <= set(SPLITS)


def test_default_shares_seed_and_stability():
    groups = {f"lesion {number}": ["NV"] * (1 + number % 3) for number in range(1000)}
    splits = assign_splits(groups)
    images = Counter()
    for name, split in splits.items():
        images[split] += len(groups[name])
    for split, share in DEFAULT_FRACTIONS.items():
        assert abs(images[split] / sum(images.values()) - share) < 0.002
    assert assign_splits(groups, seed=1) != splits
    # Ten more lesions move only those next to a cut.
    more = assign_splits(groups | {f"new {number}": ["NV"] for number in range(10)})
    assert sum(more[name] != split for name, split in splits.items()) < 15


def test_fixed_test_groups_count_towards_the_share():
    groups = {str(number): ["NV"] for number in range(100)}
    for fixed, expected in ((5, (70, 10, 10, 10)), (28, (56, 8, 8, 28))):
        splits = Counter(assign_splits(groups, frozenset(map(str, range(fixed)))).values())
        assert tuple(splits[split] for split in SPLITS) == expected


def test_shares_written_as_a_difference_are_the_same_shares():
    groups = {str(number): ["NV"] for number in range(5)}  # a group's middle lies on a cut
    share = {"val": 0.1, "calibration": 0.1, "test": 0.1}
    assert assign_splits(groups, fractions={"train": 1 - 0.1 - 0.1 - 0.1, **share}) == assign_splits(
        groups, fractions={"train": 0.7, **share}
    )


def test_the_only_group_of_a_class_is_learnt_from():
    for shares in ((0.7, 0.1, 0.1, 0.1), (0.4, 0.2, 0.2, 0.2), (0.1, 0.3, 0.3, 0.3)):
        fractions = dict(zip(SPLITS, shares, strict=True))
        assert assign_splits({"a": ["DF", "DF"]}, fractions=fractions) == {"a": "train"}
