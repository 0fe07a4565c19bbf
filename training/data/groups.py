"""Form the groups that a split never divides: lesions with their near-duplicates, and patients."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from training.data.image_files import Faults
from training.data.photos import Photo, components
from training.data.sources import Identifier

DOUBTFUL = "near-duplicates of different lesions or patients: not joined"


def join_near_duplicates(
    photos: list[Photo], copies: list[tuple[int, int]], near: list[tuple[int, int]], faults: Faults
) -> list[tuple[int, int]]:
    """Give each photo its lesion, patient and division, and return the pairs that were joined.

    Photos with one lesion id are one lesion. So are augmented copies and their originals. A near-duplicate pair joins
    two lesions, the most certain pair first, unless the lesions or their patients are known to be different: dark
    round frames look alike, and a chain of such pairs would join a whole data set. These pairs are only reported.
    Photos without a label take part, because one of them may join two others.

    `copies` are pairs (original, augmented copy) and `near` near-duplicates, the most certain first, both as indices.
    """
    lesions = _Clusters(photos, [*_same(photos, lambda photo: photo.lesions), *copies])
    joined = list(copies)
    for i, j in near:
        if lesions.join(i, j):
            joined.append((i, j))
        else:
            faults.add(DOUBTFUL, f"{photos[i].name} and {photos[j].name}")
    _name(photos, lesions.members())

    links = [(members[0], other) for members in lesions.members() for other in members[1:]]
    for division, members in enumerate(components(len(photos), links + _same(photos, lambda photo: photo.patients))):
        patients = sorted(patient.name for index in members for patient in photos[index].patients)
        for index in members:
            photos[index].division = division
            photos[index].patient = patients[0] if patients else ""
    _separate_patients(photos)
    return joined


class _Clusters:
    """Lesions as sets of photos that grow by near-duplicate pairs."""

    def __init__(self, photos: list[Photo], links: list[tuple[int, int]]) -> None:
        self.cluster_of: dict[int, int] = {}
        self.photos_of: dict[int, list[int]] = {}
        self.lesion_series: dict[int, set[str]] = {}  # the numberings that name a cluster's lesion
        self.patients: dict[int, dict[str, set[str]]] = {}  # numbering -> names
        for number, members in enumerate(components(len(photos), links)):
            self.photos_of[number] = members
            self.cluster_of |= dict.fromkeys(members, number)
            self.lesion_series[number] = {lesion.numbering for index in members for lesion in photos[index].lesions}
            names: dict[str, set[str]] = defaultdict(set)
            for index in members:
                for patient in photos[index].patients:
                    names[patient.numbering].add(patient.name)
            self.patients[number] = names

    def join(self, i: int, j: int) -> bool:
        """Join the lesions of two photos. Returns False if they are known to be different lesions or patients."""
        first, second = self.cluster_of[i], self.cluster_of[j]
        if first == second:
            return True
        # One lesion id would have joined them before, so two ids of one numbering are two lesions.
        if self.lesion_series[first] & self.lesion_series[second]:
            return False
        a, b = self.patients[first], self.patients[second]
        if any(not a[numbering] & b[numbering] for numbering in a.keys() & b.keys()):
            return False
        for photo in self.photos_of[second]:
            self.cluster_of[photo] = first
        self.photos_of[first] += self.photos_of.pop(second)
        self.lesion_series[first] |= self.lesion_series.pop(second)
        for numbering, names in self.patients.pop(second).items():
            a[numbering] |= names
        return True

    def members(self) -> list[list[int]]:
        """Return each lesion's photos, sorted."""
        return sorted(sorted(members) for members in self.photos_of.values())


def _same(photos: list[Photo], identifiers: Callable[[Photo], Iterable[Identifier]]) -> list[tuple[int, int]]:
    """Link photos that share an identifier."""
    by_key: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, photo in enumerate(photos):
        for key in {identifier.key for identifier in identifiers(photo)}:
            by_key[key].append(index)
    return [(members[0], other) for members in by_key.values() for other in members[1:]]


def _name(photos: list[Photo], lesions: list[list[int]]) -> None:
    """Name each lesion after its first lesion id, or else its first labelled image."""
    names, keys = [], []
    for members in lesions:
        ids = sorted(lesion.name for index in members for lesion in photos[index].lesions)
        images = sorted((not photos[index].label, photos[index].name) for index in members)
        names.append(ids[0] if ids else images[0][1])
        keys.append(min(photos[index].digest.sha256 for index in members))
    uses = Counter(names)
    for members, name, key in zip(lesions, names, keys, strict=True):
        for index in members:
            photos[index].lesion = name if uses[name] == 1 else f"{name}@{key[:8]}"


def _separate_patients(photos: list[Photo]) -> None:
    """Give two patients of the same name, from two data sets, different names."""
    keys: dict[str, dict[int, str]] = defaultdict(dict)
    for photo in photos:
        if photo.patient:
            key = keys[photo.patient].get(photo.division, photo.digest.sha256)
            keys[photo.patient][photo.division] = min(key, photo.digest.sha256)
    for photo in photos:
        if photo.patient and len(keys[photo.patient]) > 1:
            photo.patient = f"{photo.patient}@{keys[photo.patient][photo.division][:8]}"
