"""From files to photographs: joins copies, settles each label, and forms the groups that a split never divides."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from training.data import duplicates
from training.data.duplicates import ImageDigest
from training.data.sources import AUTHORITIES, Faults, SourceImage

SAME_BYTES = "same file as another"
SAME_ID = "same ISIC identifier as another"
UNKNOWN_LABEL = "image whose diagnosis or class folder is unknown"


@dataclass
class Photo:
    """One photograph: the file that is kept, and what all its copies together say."""

    kept: SourceImage
    digest: ImageDigest
    copies: list[tuple[SourceImage, ImageDigest]]
    name: str
    claims: set[tuple[str, str]]
    lesions: set[tuple[str, str]]
    is_test: bool
    label: str = ""  # "": dropped
    group: str = ""


def merge_copies(described: list[tuple[SourceImage, ImageDigest]], faults: Faults, dropped: Faults) -> list[Photo]:
    """Files with the same ISIC identifier or the same bytes become one photo. The file kept is that of the first
    source in AUTHORITIES' order, then one whose name is no second download's ("a (1).jpg"), then the one with most
    pixels, then by digest and name: its place does not matter."""
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
                if (other_digest.phash ^ digest.phash).bit_count() > duplicates.UNRELATED_BITS:
                    faults.add("same ISIC identifier, different picture", f"{other.path} and {kept.path}")
        images = [image for image, _ in copies]
        photos.append(
            Photo(
                kept, digest, copies, name,
                claims=set().union(*(image.claims for image in images)),
                lesions=set().union(*(image.lesions for image in images)),
                is_test=any(image.is_test for image in images),
            )
        )  # fmt: skip
    return sorted(photos, key=lambda photo: (photo.name, photo.digest.sha256))


def _keeping_order(item: tuple[SourceImage, ImageDigest]) -> tuple[int, bool, int, str, str, str]:
    image, digest = item
    rank = AUTHORITIES.index(image.source) if image.source else len(AUTHORITIES)
    is_second_download = "(" in image.path.stem
    pixels = digest.width * digest.height
    return rank, is_second_download, -pixels, digest.sha256, image.name, str(image.path)


def near_pairs(photos: list[Photo]) -> list[tuple[int, int]]:
    """Pairs of indices (i < j) of which any two copies are near duplicates: a copy may be another picture's crop."""
    copies = [
        (index, digest)
        for index, photo in enumerate(photos)
        for digest in {digest.sha256: digest for _, digest in photo.copies}.values()
    ]
    owners = np.array([index for index, _ in copies], dtype=np.int64)
    pairs = duplicates.candidate_pairs(np.array([digest.phash for _, digest in copies], dtype=np.uint64))
    pairs = pairs[owners[pairs[:, 0]] != owners[pairs[:, 1]]]
    if not len(pairs):
        return []
    thumbnails = np.stack([digest.thumbnail for _, digest in copies])
    same = owners[pairs[duplicates.confirm(thumbnails, pairs)]]
    return sorted({(int(i), int(j)) for i, j in same})


def settle_labels(photos: list[Photo], near: list[tuple[int, int]], faults: Faults, dropped: Faults) -> Counter[str]:
    """Give each photo the label of the first authority that speaks of it or of a near duplicate of it; none if that
    authority says two things, or nobody anything. Returns how many each authority settled."""
    neighbours: dict[int, list[int]] = defaultdict(list)
    for i, j in near:
        neighbours[i].append(j)
        neighbours[j].append(i)
    settled: Counter[str] = Counter()
    for index, photo in enumerate(photos):
        where = f"{photo.name} ({photo.kept.path})"
        if not photo.claims:
            unknown = _listed(photo)
            dropped.add(
                UNKNOWN_LABEL if unknown else "image without a diagnosis: no row, no class folder", where + unknown
            )
            continue
        claims = photo.claims.union(*(photos[other].claims for other in neighbours[index]))
        authority = min((name for name, _ in claims), key=AUTHORITIES.index)
        codes = sorted({code or "not known" for name, code in claims if name == authority})
        if codes == ["not known"]:
            dropped.add(UNKNOWN_LABEL, where + _listed(photo, *(photos[other] for other in neighbours[index])))
            continue
        if len(codes) > 1:
            who = "folders alone" if authority == "folder" else authority
            dropped.add(f"contradictory diagnoses from {who}", f"{where}: {', '.join(codes)}")
            continue
        photo.label = codes[0]
        if photo.label == "AK" and authority in ("isic2018", "ham10000"):
            faults.add("akiec without an ISIC 2019 truth: taken as AK, may be SCC", where)
        settled[authority] += 1
        for name, code in sorted(photo.claims):
            if code not in (photo.label, ""):
                faults.add(f"{name} says {code}, overruled by {authority}: {photo.label}", where)
    return settled


def _listed(*photos: Photo) -> str:
    """The diagnoses and folders that are not known to the vocabulary."""
    labels = {label for photo in photos for image, _ in photo.copies for label in image.unknown_labels}
    return "".join(f": {label}" for label in sorted(labels))


def group_photos(photos: list[Photo], near: list[tuple[int, int]]) -> None:
    """Give each photo its group, named after its first lesion id, or else its first labelled image.

    Photos without a label take part, though they are dropped: one of them may be what joins two others.
    """
    by_lesion: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, photo in enumerate(photos):
        for lesion in photo.lesions:
            by_lesion[lesion].append(index)
    links = near + [(members[0], other) for members in by_lesion.values() for other in members[1:]]
    names, keys = [], []
    members_of = components(len(photos), links)
    for members in members_of:
        lesions = sorted(lesion for index in members for _, lesion in photos[index].lesions)
        images = sorted((not photos[index].label, photos[index].name) for index in members)
        names.append(lesions[0] if lesions else images[0][1])
        keys.append(min(photos[index].digest.sha256 for index in members))
    uses = Counter(names)
    for members, name, key in zip(members_of, names, keys, strict=True):
        for index in members:
            photos[index].group = name if uses[name] == 1 else f"{name}@{key[:8]}"


def labelled(photos: list[Photo], near: list[tuple[int, int]]) -> tuple[list[Photo], list[tuple[int, int]]]:
    """The photos that have a label, and the near pairs among them."""
    left = [index for index, photo in enumerate(photos) if photo.label]
    renumbered = {old: new for new, old in enumerate(left)}
    pairs = [(renumbered[i], renumbered[j]) for i, j in near if i in renumbered and j in renumbered]
    return [photos[index] for index in left], pairs


def components(size: int, links: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components of 0 ... size - 1, each sorted, in order of their first member."""
    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    matrix = coo_array((np.ones(len(ends), dtype=np.int8), (ends[:, 0], ends[:, 1])), shape=(size, size))
    _, component = connected_components(matrix, directed=False)
    members: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(component):
        members[int(number)].append(index)
    return list(members.values())
