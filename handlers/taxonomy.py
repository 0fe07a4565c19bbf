"""The nine diagnoses of the ISIC 2019 challenge, in its column order."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LesionClass:
    """One diagnosis: its ISIC 2019 code, full name, whether it is malignant, and a sentence for a reader."""

    code: str
    name: str
    malignant: bool
    description: str


# fmt: off
TAXONOMY: tuple[LesionClass, ...] = (
    LesionClass("MEL", "Melanoma", True, "Malignant tumour of the pigment cells; early removal decides the outcome."),
    LesionClass("NV", "Melanocytic nevus", False, "Common mole: a benign growth of pigment cells."),
    LesionClass("BCC", "Basal cell carcinoma", True, "The most common skin cancer; grows locally and rarely spreads."),
    LesionClass("AK", "Actinic keratosis", False,
                "Precancerous sun damage, not yet malignant, that can progress to squamous cell carcinoma."),
    LesionClass("BKL", "Benign keratosis", False,
                "Seborrheic keratosis, solar lentigo, lichen-planus-like keratosis: benign growths of the epidermis."),
    LesionClass("DF", "Dermatofibroma", False, "Benign firm nodule of fibrous tissue, often on the legs."),
    LesionClass("VASC", "Vascular lesion", False, "Angioma, angiokeratoma, pyogenic granuloma, haemorrhage: benign."),
    LesionClass("SCC", "Squamous cell carcinoma", True, "Skin cancer of the epidermis that can spread if untreated."),
    LesionClass("UNK", "None of the above", False,
                "The picture resembles no class the model was trained on; the other probabilities mean little."),
)
# fmt: on

BY_CODE: dict[str, LesionClass] = {lesion.code: lesion for lesion in TAXONOMY}
CODES: tuple[str, ...] = tuple(BY_CODE)
UNKNOWN = "UNK"
KNOWN_CODES: tuple[str, ...] = CODES[:-1]
MALIGNANT = np.array([lesion.malignant for lesion in TAXONOMY])  # bool (9,), by place in CODES
