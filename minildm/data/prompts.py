"""Caption fields -> prompts, from a template in which a missing field leaves no hole.

A template is a text with fields: ``chest x-ray, age {age} {sex}, view {view}``. ``{Sex}`` capitalizes the value.
Commas and semicolons cut the template into pieces. Within a piece, the words before a field belong to it, and so does
text that directly follows it, as in ``{age}-year-old``. A missing field is dropped along with the text that belongs to
it, and a piece whose fields are all missing is dropped along with its comma. Without an age the example gives
``chest x-ray, male, view PA``, and with no fields at all ``chest x-ray``.
"""

import functools
import re

from minildm.errors import InputError

# Templates that can be chosen by name. "full" is the longest prompt for PadChest; "montgomery" and "findings" are those
# of the SeLoRA paper (arXiv:2408.07196), "impression" is RoentGen's (arXiv:2211.12737).
TEMPLATES = {
    "plain": "chest x-ray",
    "person": "chest x-ray, age {age} {sex}",
    "view": "chest x-ray, age {age} {sex}, view {view}, projection {projection}, modality {modality}",
    "diagnosis": "chest x-ray, diagnosis {diagnosis}, loc {loc}",
    "full": "chest x-ray, age {age} {sex}, view {view}, projection {projection}, modality {modality}, "
    "diagnosis {diagnosis}, loc {loc}",
    "montgomery": " age:{age}, gender:{Sex}, findings:{findings}",
    "findings": "{findings}",
    "impression": "{impression}",
}
FIELDS = ("age", "sex", "view", "projection", "modality", "diagnosis", "loc", "findings", "impression", "text")


def render(template, fields):
    """One prompt. ``template`` is a name in TEMPLATES or a text with fields; a field not in ``fields`` is missing."""
    template = TEMPLATES.get(template, template)
    prompt = ""
    for separator, piece, chunks, rest in _pieces(template):
        text = _render_piece(piece, chunks, rest, fields)
        if text is not None:
            prompt += (separator if prompt else "") + text
    return prompt if template[:1].isspace() else prompt.lstrip()


@functools.lru_cache(64)
def _pieces(template):
    """The pieces of a template: (the separator before it, its text, its fields as (words before, name, text after),
    the words after the last field)."""
    parts = re.split(r"([,;])", template)  # piece, separator, piece, separator, ..., piece
    pieces = []
    for separator, piece in zip(["", *parts[1::2]], parts[::2]):
        chunks = re.findall(r"([^{}]*)\{(\w+)\}([^\s{}]*)", piece)
        length = sum(len(before) + len(name) + len(after) + 2 for before, name, after in chunks)
        pieces.append((separator, piece, chunks, piece[length:]))
    return pieces


def _render_piece(piece, chunks, rest, fields):
    """The piece with its fields filled in, or None if it has fields and all of them are missing."""
    if not chunks:
        return piece
    filled = []
    for before, name, after in chunks:
        value = fields.get(name) or fields.get(name.lower())
        if value:
            filled.append(before + (value[:1].upper() + value[1:] if name[0].isupper() else value) + after)
    if not filled:
        return None
    leading = piece[: len(piece) - len(piece.lstrip())]
    return leading + ("".join(filled) + rest).strip()


def prompts_for(data_set, template=None):
    """The prompts of a data set's records, in their order.

    Args: template: as in --prompt-template; None = the data set's default.
    Raises: InputError if there is no template, if it has an unknown field, or if it leaves a record without a prompt.
    """
    template = data_set.prompt if template is None else template
    if template is None:
        raise InputError(f'{data_set.name} has no captions; give --prompt-template, such as "chest x-ray"')
    check_template(template, data_set.records)
    prompts = [render(template, record.fields) for record in data_set.records]
    if empty := [record.name for record, prompt in zip(data_set.records, prompts) if not prompt.strip()]:
        raise InputError(
            f"{len(empty):,} of {len(prompts):,} prompts are empty with the template {template!r}, such as that of "
            f"{empty[0]}; give a --prompt-template with fields that every record has"
        )
    return prompts


def check_template(template, records):
    """Raise InputError for an unknown field, a stray brace, or a single word that is not a name in TEMPLATES."""
    template = TEMPLATES.get(template, template)
    known = sorted({*FIELDS, *(name for record in records for name in record.fields)})
    names = re.findall(r"\{(\w+)\}", template)
    if unknown := [name for name in names if name not in known and name.lower() not in known]:
        raise InputError(f"unknown field {{{unknown[0]}}} in the prompt template; known: {', '.join(known)}")
    if len(names) != template.count("{") or len(names) != template.count("}"):
        raise InputError(
            f"the prompt template {template!r} has a brace that is not part of a field; write fields as {{age}}"
        )
    if not names and " " not in template and template not in TEMPLATES.values():
        raise InputError(f"{template!r} is neither a prompt template nor one of: {', '.join(TEMPLATES)}")
