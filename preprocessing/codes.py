"""What a label's name means in SNOMED CT and DICOM's own words, so that another program knows a liver when it meets one.

Every code stands, with this very meaning, in pydicom's copy of the standard's context groups; tests/preprocessing/test_codes.py
looks each one up. Where SNOMED's own code is not in that copy, the next broader one is given: a wider true word, no guess.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Code:
    """One word of a terminology."""

    value: str
    scheme: str
    """SCT (SNOMED CT), DCM (DICOM), NCIt ..."""
    meaning: str

    def __post_init__(self) -> None:
        """DICOM's lengths: a code it cannot hold would be found out only when a result is written."""
        lengths = (("value", self.value, 16), ("scheme", self.scheme, 16), ("meaning", self.meaning, 64))
        for name, text, most in lengths:
            if not 0 < len(text.strip()) <= most or "\\" in text:
                raise ValueError(
                    f"the {name} of a code is {text!r}; 1 to {most} characters and no backslash are needed. Correct it."
                )


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a name stands for."""

    category: Code
    type: Code
    modifiers: tuple[Code, ...] = ()
    """Left, right, anterior ..."""


def meaning_of(name: str) -> Meaning:
    """What is known of that name; `UNKNOWN` where nothing is."""
    words = _words(name)
    modifiers = tuple(code for word, code in MODIFIERS.items() if word in words)
    rest = words - frozenset(MODIFIERS) - FILLERS
    for category, table in ((STRUCTURE, STRUCTURES), (TISSUE, TISSUES), (SUBSTANCE, SUBSTANCES)):
        # the whole name first: in 'anterior commissure' the first word is no modifier
        for sought in (words, rest):
            if sought in table:
                told = tuple(code for word, code in MODIFIERS.items() if word in words - sought)
                return Meaning(category=category, type=table[sought], modifiers=told)
    for part, code in ABNORMAL:
        if part <= rest:
            return Meaning(category=ABNORMALITY, type=code, modifiers=modifiers)
    return Meaning(category=UNKNOWN.category, type=UNKNOWN.type, modifiers=modifiers)


def _words(name: str) -> frozenset[str]:
    """leftKidney, LEFT_KIDNEYS and kidney-left are one: small letters, singular, American."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return frozenset(SPELLINGS.get(word, word) for word in re.findall(r"[a-z0-9]+", apart.lower()))


def _code(text: str, scheme: str = "SCT") -> Code:
    value, meaning = text.split(" ", 1)
    return Code(value=value, scheme=scheme, meaning=meaning)


STRUCTURE = _code("91723000 Anatomical Structure")
TISSUE = _code("85756007 Tissue")
ABNORMALITY = _code("49755003 Morphologically Abnormal Structure")
SUBSTANCE = _code("91720002 Body Substance")

UNKNOWN = Meaning(category=TISSUE, type=TISSUE)
"""Tissue of the type tissue: true of everything, and plain to see that nobody said more."""

MODIFIERS = {
    "left": _code("7771000 Left"),
    "right": _code("24028007 Right"),
    "bilateral": _code("51440002 Bilateral"),
    "anterior": _code("255549009 Anterior"),
    "posterior": _code("255551008 Posterior"),
}

FILLERS = frozenset(
    ("of", "the", "and", "or", "structure", "organ", "region", "label", "seg", "segmentation", "mask", "total", "whole")
)

SPELLINGS = {
    "l": "left", "lt": "left", "r": "right", "rt": "right", "both": "bilateral",
    "tumour": "tumor", "tumours": "tumor", "tumors": "tumor", "neoplasms": "neoplasm", "lesions": "lesion",
    "nodules": "nodule", "cysts": "cyst", "metastases": "metastasis", "masses": "mass", "oedema": "edema",
    "haemorrhage": "hemorrhage", "haematoma": "hematoma", "necrotic": "necrosis", "ncr": "necrosis",
    "oesophagus": "esophagus", "clavicula": "clavicle", "clavicles": "clavicle", "caecum": "cecum",
    "vertebrae": "vertebra", "vertebras": "vertebra", "ribs": "rib", "kidneys": "kidney", "lungs": "lung",
    "vessels": "vessel", "veins": "vein", "arteries": "artery", "cartilages": "cartilage", "discs": "disc",
    "disk": "disc", "disks": "disc", "muscles": "muscle", "bones": "bone", "nodes": "node", "femurs": "femur",
    "adrenals": "adrenal", "glands": "gland", "eyes": "eye", "ventricles": "ventricle", "hippocampi": "hippocampus",
    "teeth": "tooth", "breasts": "breast", "scapulae": "scapula", "sacral": "sacrum", "vena": "vena", "lobes": "lobe",
    "hemorrhages": "hemorrhage", "parotids": "parotid", "lymphnode": "lymph node", "enhanced": "enhancing",
}  # fmt: skip


def _table(text: str) -> dict[frozenset[str], Code]:
    """One line: code and meaning, then the names, apart by commas."""
    table: dict[frozenset[str], Code] = {}
    for line in text.strip().splitlines():
        told, names = line.split(":")
        for name in names.split(","):
            table[frozenset(name.split())] = _code(told.strip())
    return table


def _vertebrae() -> Iterator[tuple[frozenset[str], Code]]:
    codes = {
        "C": "14806007 39976000 113205007 5329002 36978003 36054005 87391001",
        "T": "64864005 53733008 1626008 73071006 56401006 45296009 62487009 11068009 82687006 7610001 12989004 23215003",
        "L": "66794005 14293000 36470004 11994002 49668003",
    }
    for letter, values in codes.items():
        for number, value in enumerate(values.split(), start=1):
            code = _code(f"{value} {letter}{number} vertebra")
            yield frozenset({"vertebra", f"{letter}{number}".lower()}), code
            yield frozenset({f"{letter}{number}".lower()}), code


STRUCTURES = {
    **_table("""
        12738006 Brain: brain
        119238007 Brain Stem: brainstem, brain stem
        113305005 Cerebellum: cerebellum
        5366008 Hippocampus: hippocampus
        42695009 Thalamus: thalamus
        11000004 Caudate nucleus: caudate, caudate nucleus
        89278009 Putamen: putamen
        14738005 Globus pallidus: pallidum, globus pallidus
        4958002 Amygdala: amygdala
        427667007 Nucleus Accumbens: accumbens, nucleus accumbens
        88442005 Corpus callosum: corpus callosum
        35764002 Brain ventricle: brain ventricle, cerebral ventricle
        66720007 Lateral Ventricle: lateral ventricle
        49841001 Third ventricle: third ventricle
        35918002 Fourth Ventricle: fourth ventricle
        56329008 Pituitary: pituitary, pituitary gland
        244453006 Optic chiasm: optic chiasm, chiasm
        18234004 optic nerve: optic nerve
        81745001 Eye: eye
        79652003 Eyeball: eyeball, globe
        78076003 Lens: lens, eye lens
        2748008 Spinal cord: spinal cord, myelon
        61853006 Vertebral canal: spinal canal, vertebral canal
        89546000 Skull: skull
        91609006 Mandible: mandible
        38199008 Tooth: tooth
        45289007 Parotid gland: parotid, parotid gland
        54019009 Submandibular gland: submandibular gland
        385294005 Salivary gland: salivary gland
        69748006 Thyroid: thyroid, thyroid gland
        4596009 Larynx: larynx
        54066008 Pharynx: pharynx
        44567001 Trachea: trachea
        955009 Bronchus: bronchus, bronchi
        89187006 Airway structure: airway, airways
        39607008 Lung: lung
        45653009 Upper lobe of lung: lung upper lobe
        90572001 Lower lobe of lung: lung lower lobe
        72481006 Middle lobe of right lung: lung middle lobe
        3120008 Pleura: pleura
        80891009 Heart: heart
        76848001 Pericardium: pericardium
        49848007 Left Ventricle Myocardium: myocardium
        87878005 Left ventricle: heart ventricle left, ventricle left, left ventricle cavity
        53085002 Right ventricle: heart ventricle right, ventricle right, right ventricle cavity
        82471001 Left atrium: heart atrium left, atrium left
        73829009 Right atrium: heart atrium right, atrium right
        33626005 Left auricular appendage: atrial appendage left
        15825003 Aorta: aorta
        54247002 Ascending aorta: ascending aorta
        281130003 Descending aorta: descending aorta
        7832008 Abdominal aorta: abdominal aorta
        113262008 Thoracic aorta: thoracic aorta
        81040000 Pulmonary artery: pulmonary artery
        122972007 Pulmonary vein: pulmonary vein
        12691009 brachiocephalic trunk: brachiocephalic trunk
        8887007 Brachiocephalic vein: brachiocephalic vein
        36765005 Subclavian artery: subclavian artery
        32062004 Common carotid artery: common carotid artery, carotid artery
        48345005 Superior vena cava: superior vena cava
        64131007 Inferior vena cava: inferior vena cava, vena cava inferior, postcava
        32764006 Portal vein: portal vein
        35819009 Splenic vein: splenic vein
        8993003 Hepatic vein: hepatic vein
        2841007 Renal artery: renal artery
        56400007 Renal vein: renal vein
        10293006 Iliac artery: iliac artery
        244411005 Iliac vein: iliac vein, iliac vena
        59820001 Blood Vessel: vessel, blood vessel, hepatic vessel, portal vein splenic vein
        32849002 Esophagus: esophagus
        69695003 Stomach: stomach
        38848004 Duodenum: duodenum
        30315005 Small intestine: small bowel, small intestine
        71854001 Colon: colon
        34402009 Rectum: rectum
        10200004 Liver: liver
        28231008 Gallbladder: gallbladder, gall bladder
        78961009 Spleen: spleen
        15776009 Pancreas: pancreas
        23451007 Adrenal gland: adrenal, adrenal gland
        64033007 Kidney: kidney
        87953007 Ureter: ureter
        89837001 Bladder: bladder, urinary bladder
        41216001 Prostate: prostate
        279706003 Peripheral zone of the prostate: prostate peripheral zone, pz
        399384005 Transition zone of the prostate: prostate transition zone, tz
        35039007 Uterus: uterus
        15497006 Ovary: ovary
        76752008 Breast: breast
        51282000 Vertebra: vertebra, vertebra s1
        54735007 Sacrum: sacrum
        113197003 Rib: rib, rib 1, rib 2, rib 3, rib 4, rib 5, rib 6, rib 7, rib 8, rib 9, rib 10, rib 11, rib 12
        50016007 Costal Cartilage: costal cartilage
        56873002 Sternum: sternum
        51299004 Clavicle: clavicle
        79601000 Scapula: scapula
        85050009 Humerus: humerus
        29836001 Hip: hip
        71341001 Femur: femur
        2812003 Femoral head: femoral head, femur head
        64234005 Patella: patella
        12611008 Tibia: tibia
        87342007 Fibula: fibula
        44947003 Erector spinae muscle: autochthon, erector spinae
        127954009 Skeletal muscle: gluteus maximus, gluteus medius, gluteus minimus, iliopsoas, quadriceps femoris, sartorius
        60005003 Pectoralis major muscle: pectoralis major
        18686000 Pectoralis minor muscle: pectoralis minor
        59441001 Lymph Node: lymph node
    """),
    **dict(_vertebrae()),
}
"""Organs and their parts, by the words of their names in any order. TotalSegmentator's list is in it, word for word."""

TISSUES = _table("""
    389080008 White Matter: white matter, wm
    389081007 Gray Matter: gray matter, grey matter, gm
    3138006 Bone: bone
    91727004 Muscle: muscle
    127954009 Skeletal muscle: skeletal muscle
    55603005 Fat: fat
    71966008 Subcutaneous tissue: subcutaneous tissue
    39937001 Skin: skin
    309312004 Cartilage: cartilage
""")

SUBSTANCES = _table("""
    65216001 Cerebrospinal Fluid: csf, cerebrospinal fluid
    32457005 Body fluid: fluid, body fluid
""")

ABNORMAL = (
    (frozenset({"non", "enhancing"}), _code("C81175 Non-Enhancing Lesion", "NCIt")),
    (frozenset({"nonenhancing"}), _code("C81175 Non-Enhancing Lesion", "NCIt")),
    (frozenset({"enhancing"}), _code("C113842 Enhancing Lesion", "NCIt")),
    (frozenset({"necrosis"}), _code("6574001 Necrosis")),
    (frozenset({"edema"}), _code("79654002 Edema")),
    (frozenset({"metastasis"}), _code("128462008 Metastasis")),
    (frozenset({"tumor"}), _code("108369006 Neoplasm")),
    (frozenset({"neoplasm"}), _code("108369006 Neoplasm")),
    (frozenset({"cancer"}), _code("108369006 Neoplasm")),
    (frozenset({"gtv"}), _code("108369006 Neoplasm")),
    (frozenset({"nodule"}), _code("27925004 Nodule")),
    (frozenset({"cyst"}), _code("367643001 Cyst")),
    (frozenset({"hematoma"}), _code("35566002 Hematoma")),
    (frozenset({"hemorrhage"}), _code("50960005 Hemorrhage")),
    (frozenset({"thrombus"}), _code("396339007 Thrombus")),
    (frozenset({"mass"}), _code("4147007 Mass")),
    (frozenset({"effusion"}), _code("41699000 Effusion")),
    (frozenset({"lesion"}), _code("52988006 Lesion")),
)
"""What is abnormal, by words that are in the name, the closest first: a liver tumour is a neoplasm, no liver."""
