"""The words that data sets use for the same things: diagnoses, body sites, sexes, ages, image names.

Everything here turns somebody's spelling into this project's, or into None / "" where it cannot be told.
"""

import re
from functools import lru_cache

from handlers.metadata import OLDEST
from handlers.taxonomy import CODES, TAXONOMY

# Codes and full names come from the taxonomy; these are the further spellings met in public data sets and folder
# names. Plural and spelling of "keratosis" and "nevus" are folded in `_words`.
_ALIASES = {
    "MEL": ("malignant melanoma", "melanoma in situ", "melanoma metastasis"),
    "NV": ("nevus", "mole", "melanocytic nevi", "common nevus", "atypical nevus"),
    "BCC": (),
    # HAM10000 and ISIC 2018 put actinic keratosis and Bowen's disease (an SCC in situ) into one class, akiec. Without
    # the ISIC 2019 truth of an image the two cannot be told apart; the class is named after the first.
    "AK": ("akiec", "solar keratosis", "actinic keratosis intraepithelial carcinoma",
           "actinic keratosis and intraepithelial carcinoma", "actinic keratosis bowens disease",
           "actinic keratosis and intraepithelial carcinoma bowens disease"),
    "BKL": ("seborrheic keratosis", "seborrhoeic keratosis", "pigmented benign keratosis", "solar lentigo",
            "lichen planus like keratosis", "lichenoid keratosis", "benign keratosis like lesion", "sk", "sek", "pbk"),
    "DF": ("fibrous histiocytoma",),
    "VASC": ("vascular", "angioma", "hemangioma", "haemangioma", "angiokeratoma", "pyogenic granuloma",
             "hemorrhage", "haemorrhage"),
    "SCC": ("bowens disease", "bowen disease", "intraepithelial carcinoma", "squamous carcinoma"),
    # Not "unknown" or "other": in the ISIC archive that is a mole nobody wrote a diagnosis for.
    "UNK": ("none of the others", "out of distribution"),
}  # fmt: skip

# HAM10000's places in ISIC 2019's words: what ISIC 2019's metadata say of the same images, without exception. It left
# "trunk" blank, which may be front or back, and "genital", which has a word of its own.
_SITES = {
    "abdomen": "anterior torso",
    "chest": "anterior torso",
    "back": "posterior torso",
    "ear": "head/neck",
    "face": "head/neck",
    "neck": "head/neck",
    "scalp": "head/neck",
    "foot": "lower extremity",
    "hand": "upper extremity",
    "acral": "palms/soles",
    "genital": "oral/genital",
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
    """The taxonomy's code for a diagnosis, a column or a folder's name in any known spelling; None if unknown."""
    return _CLASS_BY_WORDS.get(_words(text))


def text_or_blank(text: str) -> str:
    """The text without surrounding space; "" for the words that mean "not known"."""
    text = text.strip()
    return "" if text.casefold() in _BLANK else text


def sex(text: str) -> str:
    """ "male", "female" or ""."""
    return _SEXES.get(text.strip().casefold(), "")


def site(text: str) -> str:
    """A place on the body in ISIC 2019's words where there is one, else the text as it was, lower case."""
    place = text_or_blank(text).casefold()
    return _SITES.get(place, place)


def age(text: str) -> float | None:
    """Years, or None where blank or not an age; "85+" is 85."""
    try:
        years = float(text.strip().removesuffix("+"))
    except ValueError:
        return None
    return years if 0 <= years <= OLDEST else None
