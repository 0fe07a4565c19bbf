"""The spellings of diagnoses, body sites, sexes and ages in public data sets.

Each function returns this project's spelling, or None or "" for an unknown word. Words of one data set alone stand in
data_sets.yaml.
"""

import re
from functools import lru_cache

from handlers.metadata import OLDEST
from handlers.taxonomy import CODES, TAXONOMY

# Codes and full names come from the taxonomy. These are further spellings in public data sets and folder names.
# `_words` folds plurals and the spellings of "keratosis" and "nevus".
_ALIASES = {
    "MEL": ("malignant melanoma", "melanoma in situ", "melanoma invasive", "melanoma metastasis"),
    "NV": ("nevus", "mole", "melanocytic nevi", "common nevus", "atypical nevus", "dysplastic nevus", "clark nevus",
           "blue nevus", "combined nevus", "compound nevus", "congenital nevus", "dermal nevus", "intradermal nevus",
           "junctional nevus", "halo nevus", "recurrent nevus", "spitz nevus", "reed nevus", "reed or spitz nevus"),
    "BCC": (),
    # HAM10000 and ISIC 2018 put actinic keratosis and Bowen's disease (an SCC in situ) into one class, akiec. Only
    # ISIC 2019 separates them. The class is named after the first.
    "AK": ("akiec", "solar keratosis", "solar or actinic keratosis", "actinic keratosis intraepithelial carcinoma",
           "actinic keratosis and intraepithelial carcinoma", "actinic keratosis bowens disease",
           "actinic keratosis and intraepithelial carcinoma bowens disease"),
    "BKL": ("seborrheic keratosis", "seborrhoeic keratosis", "pigmented benign keratosis", "solar lentigo",
            "lichen planus like keratosis", "lichenoid keratosis", "benign keratosis like lesion", "sk", "sek", "pbk"),
    "DF": ("fibrous histiocytoma",),
    "VASC": ("vascular", "angioma", "hemangioma", "haemangioma", "angiokeratoma", "pyogenic granuloma",
             "hemorrhage", "haemorrhage"),
    "SCC": ("bowens disease", "bowen disease", "intraepithelial carcinoma", "squamous carcinoma",
            "squamous cell carcinoma in situ", "squamous cell carcinoma invasive"),
    # Not "unknown" or "other": in the ISIC Archive these mean a mole without a written diagnosis.
    "UNK": ("none of the others", "out of distribution"),
}  # fmt: skip

# Places in ISIC 2019's words. For HAM10000 they are those of ISIC 2019's metadata on the same images. "trunk" is blank
# there, because it may be front or back. PAD-UFES-20 and Derm7pt have further words.
_SITES = {
    "abdomen": "anterior torso",
    "chest": "anterior torso",
    "back": "posterior torso",
    **dict.fromkeys(("ear", "face", "neck", "scalp", "nose", "lip", "head neck"), "head/neck"),
    **dict.fromkeys(("foot", "thigh", "leg", "lower limbs"), "lower extremity"),
    **dict.fromkeys(("hand", "arm", "forearm", "upper limbs"), "upper extremity"),
    "acral": "palms/soles",
    "genital": "oral/genital",
    "genital areas": "oral/genital",
    "trunk": "",
}

_BLANK = frozenset({"", "na", "n/a", "nan", "none", "null", "unknown", "-", "?"})
_SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}


def _words(text: str) -> str:
    text = re.sub(r"['’]", "", text.casefold()).replace("&", " and ")
    text = re.sub(r"[^a-z0-9]+", " ", text).strip()
    text = re.sub(r"\bkeratoses\b", "keratosis", text)
    text = re.sub(r"\bnaev", "nev", text)
    text = re.sub(r"\bnevi\b", "nevus", text)
    return re.sub(r"\b(carcinoma|melanoma|lesion|dermatofibroma|angioma|mole)s\b", r"\1", text)


_CLASS_BY_WORDS = {_words(word): code for code, words in _ALIASES.items() for word in words}
_CLASS_BY_WORDS |= {_words(word): lesion.code for lesion in TAXONOMY for word in (lesion.code, lesion.name)}
assert set(_ALIASES) == set(CODES)


@lru_cache(4096)
def class_code(text: str) -> str | None:
    """Return the class code of a diagnosis, a column's or a folder's name in any known spelling; None if unknown."""
    return _CLASS_BY_WORDS.get(_words(text))


def text_or_blank(text: str) -> str:
    """Return the text without surrounding space; "" for words that mean "not known"."""
    text = text.strip()
    return "" if text.casefold() in _BLANK else text


def sex(text: str) -> str:
    """Return "male", "female" or ""."""
    return _SEXES.get(text.strip().casefold(), "")


def site(text: str) -> str:
    """Return a place on the body in ISIC 2019's words, or the text in lower case if there is no such word."""
    place = text_or_blank(text).casefold()
    return _SITES.get(place, place)


def age(text: str) -> float | None:
    """Return the age in years, None for anything else; "85+" is 85."""
    try:
        years = float(text.strip().removesuffix("+"))
    except ValueError:
        return None
    return years if 0 <= years <= OLDEST else None
