"""Join copies of one file into photographs, and settle the label of each photograph."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from training.data import near_duplicates
from training.data.data_sets import FOLDER, authorities, source_names
from training.data.image_files import Faults
from training.data.near_duplicates import ImageDigest
from training.data.sources import Identifier, SourceImage

SAME_BYTES = "same file as another"
SAME_ID = "same ISIC identifier as another"
UNKNOWN_LABEL = "image whose diagnosis or class folder is unknown"
NO_LABEL = "image without a diagnosis: no row, no class folder"
ORPHAN = "augmented copy without its original"

# What augmentation scripts append to a name: mole_aug1, mole_flip, mole_rot90.
_AUGMENTED = re.compile(
    r"[_-](aug(mented)?|[hv]?_?flip(ped)?|mirror(ed)?|rot(ated?)?|rotation)[_-]?\d*([_-]\d+)*$", re.IGNORECASE
)
# Augmentor's names: nevus_original_mole.jpg_01234567-89ab-cdef-0123-456789abcdef.
_AUGMENTOR = re.compile(r".*_original_(.+)\.\w+_[0-9a-f-]{36}", re.IGNORECASE)
# Keras's names, aug_0_1234, do not say which original they come from.
_ANONYMOUS = re.compile(r"aug(mented)?_\d+_\d+", re.IGNORECASE)


@dataclass
class Photo:
    """One photograph: the file that is kept, and the statements on all its copies together."""

    kept: SourceImage
    digest: ImageDigest
    copies: list[tuple[SourceImage, ImageDigest]]
    name: str
    claims: set[tuple[str, str]]
    lesions: set[Identifier]
    patients: set[Identifier]
    is_test: bool
    label: str = ""  # "": dropped
    lesion: str = ""  # the lesion group
    patient: str = ""
    division: int = 0  # the number of what a split never divides


def merge_copies(described: list[tuple[SourceImage, ImageDigest]], faults: Faults, dropped: Faults) -> list[Photo]:
    """Join files with the same ISIC identifier or the same bytes into one photo each.

    The kept file is that of the best source, then one whose name is no second download's ("a (1).jpg"), then the one
    with most pixels, then the first by digest and name. Its place does not matter.
    """
    by_key: dict[str, list[int]] = defaultdict(list)
    for index, (image, digest) in enumerate(described):
        by_key[digest.sha256].append(index)
        if image.isic_id:
            by_key[image.isic_id].append(index)
    links = [(members[0], other) for members in by_key.values() for other in members[1:]]
    stems = Counter(image.name for image, _ in described if not image.isic_id)

    photos = []
    for members in components(len(described), links):
        copies = sorted((described[index] for index in members), key=_keeping_order)
        kept, digest = copies[0]
        ids = sorted({image.isic_id for image, _ in copies if image.isic_id})
        name = kept.isic_id or (ids[0] if ids else kept.name)
        if not ids and stems[name] > 1:  # two data sets may both have an "img_001"
            name += "@" + digest.sha256[:8]
        for other, other_digest in copies[1:]:
            if other_digest.sha256 == digest.sha256:
                dropped.add(SAME_BYTES, f"{other.path} = {kept.path}")
            else:
                dropped.add(SAME_ID, f"{other.path} = {kept.path}")
                if (other_digest.phash ^ digest.phash).bit_count() > near_duplicates.UNRELATED_BITS:
                    faults.add("same ISIC identifier, different picture", f"{other.path} and {kept.path}")
        images = [image for image, _ in copies]
        photos.append(
            Photo(
                kept, digest, copies, name,
                claims=set().union(*(image.claims for image in images)),
                lesions=set().union(*(image.lesions for image in images)),
                patients=set().union(*(image.patients for image in images)),
                is_test=any(image.is_test for image in images),
            )
        )  # fmt: skip
    return sorted(photos, key=lambda photo: (photo.name, photo.digest.sha256))


def _keeping_order(item: tuple[SourceImage, ImageDigest]) -> tuple[int, bool, int, str, str, str]:
    image, digest = item
    names = source_names()
    rank = names.index(image.source) if image.source else len(names)
    is_second_download = "(" in image.path.stem
    pixels = digest.width * digest.height
    return rank, is_second_download, -pixels, digest.sha256, image.name, str(image.path)


def near_pairs(photos: list[Photo]) -> list[tuple[int, int]]:
    """Return pairs of indices (i < j) of which any two copies are near-duplicates, the most certain first.

    All copies are compared, because two files of one ISIC identifier may be different crops.
    """
    copies = [
        (index, digest)
        for index, photo in enumerate(photos)
        for digest in {digest.sha256: digest for _, digest in photo.copies}.values()
    ]
    owners = [index for index, _ in copies]
    pairs, correlations = near_duplicates.find_pairs(np.stack([digest.thumbnail for _, digest in copies]))
    certainty: dict[tuple[int, int], float] = {}
    for (i, j), correlation in zip(pairs.tolist(), correlations.tolist(), strict=True):
        if owners[i] != owners[j]:
            pair = min(owners[i], owners[j]), max(owners[i], owners[j])
            certainty[pair] = max(certainty.get(pair, 0.0), correlation)
    return sorted(certainty, key=lambda pair: (-round(certainty[pair], 4), pair))


def augmented_pairs(photos: list[Photo]) -> list[tuple[int, int]]:
    """Return (original, copy) for photos whose name says that augmentation made them of another: mole_aug1, mole_flip.

    The original is looked for in the copy's folder, then in the whole data folder, where its name must be unique.
    """
    by_name: dict[tuple[str, str], set[int]] = defaultdict(set)
    for index, photo in enumerate(photos):
        for image, _ in photo.copies:
            for folder in (str(image.path.parent), f"below {image.root}"):
                by_name[folder, image.path.stem.casefold()].add(index)
    pairs = []
    for index, photo in enumerate(photos):
        for image, _ in photo.copies:
            if base := (original_name(image.path.stem) or "").casefold():
                same_folder = by_name.get((str(image.path.parent), base))
                originals = (same_folder or by_name.get((f"below {image.root}", base), set())) - {index}
                if len(originals) == 1:
                    pairs.append((originals.pop(), index))
    return pairs


def original_name(stem: str) -> str | None:
    """Return the original's name in the name of an augmented copy; "" if the name does not hold it, None for others."""
    if _ANONYMOUS.fullmatch(stem):
        return ""
    if match := _AUGMENTOR.fullmatch(stem):
        return match[1]
    match = _AUGMENTED.search(stem)
    return stem[: match.start()] if match and match.start() else None


def drop_orphans(photos: list[Photo], pairs: list[tuple[int, int]], dropped: Faults) -> None:
    """Drop the label of augmented copies that nothing joins with an original: no split can keep them from it."""
    joined = {index for pair in pairs for index in pair}
    for index, photo in enumerate(photos):
        if photo.label and index not in joined and original_name(photo.kept.path.stem) == "":
            dropped.add(ORPHAN, str(photo.kept.path))
            photo.label = ""


def settle_labels(photos: list[Photo], near: list[tuple[int, int]], faults: Faults, dropped: Faults) -> Counter[str]:
    """Give each photo the label of the best authority on it. Returns how many labels each authority settled.

    A photo without a known diagnosis stays without a label, and so does one whose best authority says two things. A
    better authority on near-duplicates counts, if it says one thing. A near-duplicate is never a reason to drop.
    """
    order = authorities()
    neighbours: dict[int, list[int]] = defaultdict(list)
    for i, j in near:
        neighbours[i].append(j)
        neighbours[j].append(i)
    settled: Counter[str] = Counter()
    for index, photo in enumerate(photos):
        where = f"{photo.name} ({photo.kept.path})"
        unknown = _unknown_labels(photo)
        if not photo.claims:
            dropped.add(UNKNOWN_LABEL if unknown else NO_LABEL, where + unknown)
            continue
        authority, codes = _best(photo.claims)
        others = set().union(*(photos[other].claims for other in neighbours[index]))
        better = {claim for claim in others if order.index(claim[0]) < order.index(authority)}
        if better:
            other_authority, other_codes = _best(better)
            if len(other_codes) == 1 and "" not in other_codes:
                authority, codes = other_authority, other_codes
        if codes == {""}:
            dropped.add(UNKNOWN_LABEL, where + unknown)
            continue
        if len(codes) > 1:
            written = ", ".join(sorted(code or "not known" for code in codes))
            kind = "folders alone" if authority == FOLDER else authority
            dropped.add(f"contradictory diagnoses from {kind}", f"{where}: {written}")
            continue
        photo.label = next(iter(codes))
        if photo.label == "AK" and authority in ("isic2018", "ham10000"):
            faults.add("akiec without an ISIC 2019 truth: taken as AK, may be SCC", where)
        settled[authority] += 1
        for name, code in sorted(photo.claims):
            if code not in (photo.label, ""):
                faults.add(f"{name} says {code}, overruled by {authority}: {photo.label}", where)
    for i, j in near:
        if photos[i].label and photos[j].label and photos[i].label != photos[j].label:
            labels = f"{photos[i].label} and {photos[j].label}"
            faults.add("near-duplicates with different diagnoses", f"{photos[i].name} and {photos[j].name}: {labels}")
    return settled


def _best(claims: set[tuple[str, str]]) -> tuple[str, set[str]]:
    """Return the best authority of the claims, and the codes that it says."""
    authority = min((name for name, _ in claims), key=authorities().index)
    return authority, {code for name, code in claims if name == authority}


def _unknown_labels(photo: Photo) -> str:
    """Return the photo's diagnoses and folders that the vocabulary lacks."""
    labels = {label for image, _ in photo.copies for label in image.unknown_labels}
    return "".join(f": {label}" for label in sorted(labels))


def labelled(photos: list[Photo], near: list[tuple[int, int]]) -> tuple[list[Photo], list[tuple[int, int]]]:
    """Return the photos that have a label, and the near pairs among them."""
    left = [index for index, photo in enumerate(photos) if photo.label]
    renumbered = {old: new for new, old in enumerate(left)}
    pairs = [(renumbered[i], renumbered[j]) for i, j in near if i in renumbered and j in renumbered]
    return [photos[index] for index in left], pairs


def components(size: int, links: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the connected components of 0 ... size - 1, each sorted, in order of their first member."""
    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    matrix = coo_array((np.ones(len(ends), dtype=np.int8), (ends[:, 0], ends[:, 1])), shape=(size, size))
    _, component = connected_components(matrix, directed=False)
    members: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(component):
        members[int(number)].append(index)
    return list(members.values())
