"""Caption fields -> prompts, by a template in which a missing field leaves no hole.

A template is text with fields: ``chest x-ray, age {age} {sex}, view {view}``. ``{Sex}`` gives the value a capital.
It is cut into pieces at ``,`` and ``;``. Inside a piece a field owns the words before it (and what touches it behind,
as in ``{age}-year-old``): when it is missing they go with it. A piece that had fields and lost them all goes with its
comma. So without an age the example reads ``chest x-ray, male, view PA``, and with nothing known ``chest x-ray``.
"""

import re

from minildm.errors import InputError

PADCHEST = (
    "chest x-ray, age {age} {sex}, view {view}, projection {projection}, modality {modality}, "
    "diagnosis {diagnosis}, loc {loc}"
)

# The levels of detail that can be asked for by name. "full" is the report's longest chest X-ray prompt, "montgomery"
# and "findings" are what the SeLoRA paper (arXiv:2408.07196) trains its two data sets on.
TEMPLATES = {
    "plain": "chest x-ray",
    "person": ", ".join(PADCHEST.split(", ")[:2]),
    "view": ", ".join(PADCHEST.split(", ")[:5]),
    "diagnosis": "chest x-ray, diagnosis {diagnosis}, loc {loc}",
    "full": PADCHEST,
    "montgomery": " age:{age}, gender:{Sex}, findings:{findings}",
    "findings": "{findings}",
    "impression": "{impression}",
}
FIELDS = ("age", "sex", "view", "projection", "modality", "diagnosis", "loc", "findings", "impression", "text")


def render(template, fields):
    """One prompt. ``template`` is a name of TEMPLATES or a text with fields; unknown fields count as missing."""
    template = TEMPLATES.get(template, template)
    parts = re.split(r"([,;])", template)  # piece, separator, piece, separator, ..., piece
    prompt = ""
    for separator, piece in zip(["", *parts[1::2]], parts[::2]):
        text = _render_piece(piece, fields)
        if text is not None:
            prompt += (separator if prompt else "") + text
    return prompt if template[:1].isspace() else prompt.lstrip()


def _render_piece(piece, fields):
    """The piece with its fields filled in, or None if it had fields and none of them is known."""
    chunks = re.findall(r"[^{}]*\{\w+\}[^\s{}]*", piece)
    if not chunks:
        return piece
    rest = piece[sum(map(len, chunks)) :]  # the words after the last field stay with the piece
    filled = []
    for chunk in chunks:
        before, name, behind = re.fullmatch(r"([^{}]*)\{(\w+)\}(.*)", chunk).groups()
        value = fields.get(name) or fields.get(name.lower())
        if value:
            filled.append(before + (value[:1].upper() + value[1:] if name[0].isupper() else value) + behind)
    if not filled:
        return None
    leading = piece[: len(piece) - len(piece.lstrip())]
    return leading + ("".join(filled) + rest).strip()


def prompts_for(data_set, template=None):
    """The prompts of a data set's records, in their order.

    Args: template: the user's (--prompt-template), or None for the data set's own.
    Raises: InputError for an unknown field, listing the known ones, and where records would be left with no prompt.
    """
    template = data_set.prompt if template is None else template
    if template is None:
        raise InputError(f'{data_set.name} has no captions; give --prompt-template, such as "chest x-ray"')
    check_template(template, data_set.records)
    prompts = [render(template, record.fields) for record in data_set.records]
    if empty := [record.name for record, prompt in zip(data_set.records, prompts) if not prompt.strip()]:
        raise InputError(
            f"{len(empty):,} of {len(prompts):,} prompts are empty with the template {template!r}, such "
            f"as that of {empty[0]}; give a --prompt-template with fields that are known"
        )
    return prompts


def check_template(template, records):
    template = TEMPLATES.get(template, template)
    known = sorted({*FIELDS, *(name for record in records for name in record.fields)})
    names = re.findall(r"\{(\w+)\}", template)
    if unknown := [name for name in names if name not in known and name.lower() not in known]:
        raise InputError(f"unknown field {{{unknown[0]}}} in the prompt template; known: {', '.join(known)}")
    if len(names) != template.count("{") or len(names) != template.count("}"):
        raise InputError(f"the prompt template {template!r} has a brace that is no field; write fields as {{age}}")
    if not names and " " not in template and template not in TEMPLATES.values():
        raise InputError(f"{template!r} is neither a prompt template nor one of: {', '.join(TEMPLATES)}")
