"""The words that tables use for sex, age and view -> one spelling. Only known words and possible values count.

Whatever is not known here is reported as such (`Record.unread`) and never guessed: "missing" is not male, "RAO" is not
frontal. Words are compared without accents, dots and capitals. Views are known in English, German, French, Spanish,
Portuguese, Italian and Dutch; sexes only in English, as one letter means different sexes in different languages.
"""

import functools
import re
import unicodedata

OLDEST = 120  # years

SEXES = dict.fromkeys(("m", "male", "man", "boy"), "male") | dict.fromkeys(("f", "female", "woman", "girl"), "female")

YES_NO = dict.fromkeys(("yes", "y", "true", "1", "ped"), "yes") | dict.fromkeys(("no", "n", "false", "0"), "no")

# Units of an age and how many of them make a year. DICOM writes 047Y, 013M, 006W, 003D.
UNITS = {
    1: "y yr yrs year years yo y/o jahr jahre ans ano anos anni jaar jaren",
    12: "m mo mos mon month months monat monate mois mes meses mesi maand maanden",
    52: "w wk wks week weeks woche wochen semaine semaines semana semanas settimane weken",
    365: "d day days tag tage jour jours dia dias giorni dag dagen",
}

# Views. A text is frontal if it has a word for that and all its words are known; one word for another view is enough.
FRONTAL = {"pa": "PA", "ap": "AP"} | dict.fromkeys(("frontal", "frontale", "front", "frente", "face", "frontaal"))
LATERAL = "l lat lateral laterale lateralis laterolateral ll rl lld llat rlat seitlich profil perfil profilo zijdelings"
OTHER = (
    "rld rao lao rpo lpo rlo llo oblique obliqua obliquo oblicua oblicuo obl schrag decubitus decubito decub axial "
    "transverse transversal coronal sagittal lordotic apical costal rib ribs xtable crosstable swimmers tangential"
)
POSITIONS = (  # they change the image, so they stay in the spelling
    "supine erect upright semi semierect semiupright standing sitting seated recumbent horizontal vertical prone "
    "portable mobile bedside liegend stehend sitzend supino supina pie debout couche inspiration expiration"
)
NEUTRAL = "view views projection chest thorax torax xray x ray radiograph film image left right links rechts de"

_UNITS = {word: per_year for per_year, words in UNITS.items() for word in words.split()}
_LATERAL, _OTHER = set(LATERAL.split()), set(OTHER.split())
_POSITIONS, _NEUTRAL = set(POSITIONS.split()), set(NEUTRAL.split())


@functools.lru_cache(10_000)
def sex(text):
    """ "M", "Female", "woman" -> "male" or "female"; any other word -> None."""
    return SEXES.get(_plain(text))


def yes_or_no(text):
    """A flag: "PED", "True", "1" -> "yes", "No", "0" -> "no"; any other word -> None."""
    return YES_NO.get(_plain(text))


@functools.lru_cache(10_000)
def years(text):
    """An age in whole years: "47", "047Y", "47.0", "16month" -> "47", "47", "47", "1"; anything else -> None.

    Also None: ages over 120, and a zero with a unit ("000Y"), which stands for an unknown age: DICOM counts a baby's
    weeks or days.
    """
    match = re.fullmatch(r"0*(\d{1,4})(\.\d*)?\s*([a-z/]*)( old)?", _plain(text, dots=True))
    if match is None or (match[3] and match[3] not in _UNITS):
        return None
    age = int(match[1]) // _UNITS.get(match[3], 1)
    placeholder = match[3] and not float(match[1] + (match[2] or ""))
    return None if age > OLDEST or placeholder else str(age)


@functools.lru_cache(10_000)
def view(text):
    """A known view in one spelling: "Posteroanterior", "Left lateral", "AP_horizontal" -> "PA", "L", "AP horizontal".
    None: it has no known view."""
    if is_frontal(text) is None:
        return None
    words = set(_view_words(text)) - _NEUTRAL
    spellings = {"L" if word in _LATERAL else FRONTAL.get(word) for word in words}
    one = spellings.pop() if len(spellings) == 1 else None
    return one or " ".join(text.replace("_", " ").split())


@functools.lru_cache(10_000)
def is_frontal(text):
    """True or False for a known view; None for a blank or unknown one."""
    words = set(_view_words(text))
    if words & (_LATERAL | _OTHER):
        return False
    return True if words & FRONTAL.keys() and words <= FRONTAL.keys() | _POSITIONS | _NEUTRAL else None


def _view_words(text):
    """ "Postero-anterior, erect" -> ["pa", "erect"]"""
    text = _plain(text).replace("_", " ")
    for first, second, short in (("poster", "anter", "pa"), ("anter", "poster", "ap")):
        text = re.sub(rf"\b{first}\w{{0,3}}[\s-]*{second}\w*", short, text)
    text = re.sub(r"\b([ap])[\s/-]+([ap])\b", r"\1\2", text)
    return re.findall(r"\w+", text)


def _plain(text, dots=False):
    """The text in lower case, without accents and, unless ``dots``, without dots."""
    text = unicodedata.normalize("NFKD", text or "").casefold()
    text = "".join(letter for letter in text if not unicodedata.combining(letter)).strip()
    return text if dots else text.replace(".", "")
